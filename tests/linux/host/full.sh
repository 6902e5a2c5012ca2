# shellcheck shell=sh
# A guest whose disk and share are sparse files on a full file system of this host. Room is made when hotslot has said that the guest waits.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

full=$(mktemp -d)
mount -t tmpfs -o size=4M full "$full" 2>/dev/null || {
    note skipped 'this user may not mount'
    exit
}
mkdir "$full/share"
truncate -s 32M "$full/disk.img"
truncate -s 2M "$full/share/written"
backend disk pmem --file "$full/disk.img"
backend share fs --dir "$full/share" --tag share --window 64M
LIMIT=240 guest full -k "$VMLINUX" -m 256M --cpus 2 --debug-exit -c "quiet -- sh /test/full.sh" \
    --vhost-user "$OUT/disk.sock,type=pmem,name=disk" --vhost-user "$OUT/share.sock,type=fs,name=share" </dev/null &

# make_room DEVICE SIZE: when the guest waits for a page of this device, and has done other things for a while.
make_room() {
    wait_for "$OUT/full.err" "warn: $1: the host cannot provide the page" || return
    before=$(grep -c '^tick' "$OUT/full.out")
    wait_for "$OUT/full.out" '^tick' $((before + 3)) && note "ticks while $1 waits" 'they go on'
    mount -o "remount,size=$2" "$full"
}
# The disk takes 8 MiB, the share 2 MiB.
make_room disk 9M
make_room share 16M
wait
note 'disk sum' "$(head -c $((8 << 20)) "$full/disk.img" | md5sum)"
note 'written sum' "$(md5sum <"$full/share/written")"
umount "$full"
rmdir "$full"
