# shellcheck shell=sh
# What debian.sh runs on the host, a real one or the emulated one, whose shell is busybox: one guest with its root, a login on
# its console, and the second guest that it asks for.
#
# From debian.sh, in the environment: HOTSLOT and BACKEND (programs), KERNEL, GUEST (initramfs), CONFIGURATION, IMAGE (the
# root's), OUT (a directory for what is printed), PROGRAMS (the checks), LIMIT (seconds for the guest), LOOP (a module that the
# emulated host lacks, or empty).

dir=$(mktemp -d)
mkfifo "$dir/keys"
root=$dir/root
mkdir "$root"
backends='' swap=''
# shellcheck disable=SC2317,SC2329 # called by the trap
tidy() {
    # shellcheck disable=SC2086 # one word per process
    kill $backends 2>/dev/null
    wait
    umount "$root" 2>/dev/null
    rm -r "$dir"
}
trap tidy EXIT

# A file that a guest has open is a descriptor of its back-end; Linux gives PID 1 4,096 of them, systemd far more.
# shellcheck disable=SC3045 # busybox and dash have it
ulimit -n 65536
words=
if [ -n "$LOOP" ]; then
    insmod "$LOOP" || exit 1
    # Its processor has AVX and no XSAVE, which aesni_intel takes for a working AVX.
    words=noxsave
    # lab.sh hurries what is shared to the outside; a disk's image has the usual time.
    echo 3000 >/proc/sys/vm/dirty_expire_centisecs
    echo 500 >/proc/sys/vm/dirty_writeback_centisecs
fi

# backend NAME KIND OPTION...
backend() {
    name=$1
    shift
    "$BACKEND" "$@" --socket "$dir/$name.sock" --once 2>"$OUT/$name.backend" &
    backends="$backends $!"
}
# guest NAME OPTION...
guest() {
    name=$1
    shift
    timeout -s KILL "$LIMIT" "$HOTSLOT" -k "$KERNEL" -i "$GUEST" --connect-timeout 30s "$@" 2>"$OUT/$name.hotslot"
}
# wait_for TEXT: until the console shows it, or the guest has ended.
wait_for() {
    until grep -aq -- "$1" "$OUT/console"; do
        [ ! -e "$OUT/status" ] || return 1
        sleep 0.2
    done
}

case $CONFIGURATION in
fs-dax) window=512M ;;
fs) window=0 ;;
esac
case $CONFIGURATION in
fs*)
    mount -o loop "$IMAGE" "$root" || exit 1
    backend root fs --dir "$root" --locks host --xattr mapped --tag root --window "$window"
    device=fs
    ;;
*)
    backend root "$CONFIGURATION" --file "$IMAGE"
    # A multiple of 128 MiB, which is Linux' unit for persistent memory.
    truncate -s 256M "$OUT/swap.img"
    backend swap "$CONFIGURATION" --file "$OUT/swap.img"
    device=$CONFIGURATION swap="--vhost-user $dir/swap.sock,type=$CONFIGURATION,name=swap"
    ;;
esac

rm -f "$OUT/status"
: >"$OUT/console"
{
    # shellcheck disable=SC2086 # an option and its value, or nothing
    guest first -m 1G -c "quiet $words rdinit=/check/init.sh CONFIGURATION=$CONFIGURATION" \
        --vhost-user "$dir/root.sock,type=$device,name=root" $swap <"$dir/keys" >>"$OUT/console"
    echo $? >"$OUT/status"
} &
first=$!
exec 3>"$dir/keys"
if wait_for 'login: $'; then
    echo root >&3
    if wait_for '# $'; then echo "exec /check/check.sh $PROGRAMS" >&3; fi
fi
if [ "${device}" = fs ] && wait_for '^now two'; then
    # With a back-end of its own.
    backend two fs --dir "$root/check/two" --locks host --tag two --window "$window"
    guest second -m 256M -c 'quiet -- sh /check/second.sh' --vhost-user "$dir/two.sock,type=fs,name=two" \
        </dev/null >"$OUT/second.console"
fi
wait $first
exit "$(cat "$OUT/status")"
