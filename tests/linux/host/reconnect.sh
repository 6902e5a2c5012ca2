# shellcheck shell=sh
# A guest that writes and reads a file on persistent memory and a disk, while the back-ends of both die and come back. Then the disk
# grows.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# serve NAME: starts the back-end of pmem or blk, in the place of one that died. (--shared: the guest still has the file of the dead
# one mapped, and with it that one's lock.)
serve() {
    lock=
    [ "$1" = blk ] || lock=--shared
    # shellcheck disable=SC2086 # no word at all where it is empty
    "$BACKEND" "$1" --socket "$OUT/$1.sock" --file "$OUT/$1.img" $lock 2>>"$OUT/$1.backend" &
    eval "$1=$!"
}

serve pmem
serve blk
open_keyboard
guest reconnect -k "$VMLINUX" --debug-exit -c "$DEBUG_EXIT -- sh /test/reconnect.sh" \
    --vhost-user "$OUT/pmem.sock,type=pmem,name=pmem,reconnect=60" \
    --vhost-user "$OUT/blk.sock,type=blk,name=blk,reconnect=60" <"$KEYS" &
vmm=$!
exec 3>"$KEYS"
wait_for "$OUT/reconnect.out" '^now working'
for death in 1 2 3; do
    for device in pmem blk; do
        sleep 0.7
        eval "kill -KILL \$$device"
        wait_for "$OUT/reconnect.err" "$device: the back-end hung up" $death
        sleep 0.3
        serve $device
        wait_for "$OUT/reconnect.err" "$device: the back-end is back" $death
    done
done
sleep 1
echo stop >&3
wait_for "$OUT/reconnect.out" '^sectors'
truncate -s 2M "$OUT/blk.img"
wait $vmm
# shellcheck disable=SC2154 # set by serve
kill "$pmem" "$blk"
wait
