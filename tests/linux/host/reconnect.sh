# shellcheck shell=sh
# A guest that writes and reads a file on persistent memory, a disk and a share, while the back-ends of all die and come back, and
# stand still for a while. Then the disk grows.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# serve NAME: starts this back-end, in the place of one that died. (--shared: the guest still has the file of the dead one mapped, and
# with it that one's lock.)
serve() {
    socket=$OUT/$1.sock device=$1
    case $1 in
    pmem) set -- pmem --file "$OUT/pmem.img" --shared ;;
    blk) set -- blk --file "$OUT/blk.img" ;;
    fs) set -- fs --dir "$share" --state "$OUT/fs.state" --window 8M ;;
    esac
    "$BACKEND" "$@" --socket "$socket" 2>>"$OUT/$device.backend" &
    eval "$device=$!"
}

share=$(mktemp -d)
set -- --debug-exit
for device in pmem blk fs; do
    serve $device
    set -- "$@" --vhost-user "$OUT/$device.sock,type=$device,name=$device,reconnect=60"
done
open_keyboard
guest reconnect -k "$VMLINUX" -c 'quiet -- sh /test/reconnect.sh' "$@" <"$KEYS" &
vmm=$!
exec 3>"$KEYS"
wait_for "$OUT/reconnect.out" '^now working'
for death in 1 2 3; do
    for device in pmem blk fs; do
        sleep 0.7
        eval "kill -KILL \$$device"
        wait_for "$OUT/reconnect.err" "$device: the back-end hung up" $death
        sleep 0.3
        serve $device
        wait_for "$OUT/reconnect.err" "$device: the back-end is back" $death
    done
done
# Only the disk owes hotslot an answer: the guest writes to its configuration space.
# shellcheck disable=SC2154 # set by serve
kill -STOP "$pmem" "$blk" "$fs"
echo 'write through' >&3
wait_for "$OUT/reconnect.err" 'blk: SET_CONFIG failed'
kill -CONT "$pmem" "$blk" "$fs"
wait_for "$OUT/reconnect.err" 'blk: the back-end is back' 4
sleep 1
# However slow this host is.
wait_for "$OUT/reconnect.out" '^done with round' 4
echo stop >&3
wait_for "$OUT/reconnect.out" '^sectors'
truncate -s 2M "$OUT/blk.img"
wait $vmm
kill "$pmem" "$blk" "$fs"
wait
synced=$(tr -d '\r' <"$OUT/reconnect.out" | sed -n 's/^synced fs \([0-9]*\)\.$/\1/p' | tail -n 1)
note synced "$synced"
note kept "$(probe kept "$share/blocks" "$synced" 2>&1)"
rm -r "$share"
