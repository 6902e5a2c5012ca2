# shellcheck shell=sh disable=SC2317,SC2329 # the files call functions
# The other end: QEMU, in one of Debian's roots, with a back-end of ours and a guest that does the work of frontends/NAME.sh.
# interop.sh runs it in a mount namespace of its own, without an emulated host.
#
# From interop.sh, in the environment: NAME, INTEROP (this directory), ROOT (Debian's), OUT (a directory for what is printed,
# with kernel and guest.cpio), BACKEND, LIMIT (seconds for the guest).
DIR=$OUT/files SOCKET=$OUT/socket
mkdir "$DIR"
: >"$OUT/host"
beside() { :; }
prepare() { :; }
report() { echo "CHECK $*" >>"$OUT/host"; }
wait_for() { grep -aq -- "$1" "$OUT/console"; }
# shellcheck source=/dev/null
. "$INTEROP/frontends/$NAME.sh"
prepare
(back_end) >"$OUT/back-end" 2>&1 &
back_end=$!
mkdir -p "$ROOT/run/interop"
mount --bind "$OUT" "$ROOT/run/interop" && mount --bind /dev "$ROOT/dev" || exit 1
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ ! -S "$SOCKET" ] || break
    sleep 1
done
# shellcheck disable=SC2153 # the file sets DEVICE
timeout -s KILL "$LIMIT" chroot "$ROOT" qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -accel tcg \
    -cpu max -smp 2 -m 1G -machine q35,memory-backend=memory -object memory-backend-memfd,id=memory,size=1G,share=on \
    -kernel /run/interop/kernel -initrd /run/interop/guest.cpio -serial stdio \
    -append "console=ttyS0 panic=-1 quiet NAMES=$NAME FILES=frontends -- sh /interop/guest.sh" \
    -chardev socket,id=back-end,path=/run/interop/socket -device "$DEVICE,chardev=back-end" \
    </dev/null >"$OUT/console" 2>"$OUT/qemu"
echo $? >"$OUT/status"
# With --once it ends with QEMU.
sleep 1
kill $back_end 2>/dev/null
wait $back_end
beside
