# shellcheck shell=sh
# A guest with a file as persistent memory and a disk that is another's back-end: QEMU's. Once the disk's back-end sees
# the memory, once it does not.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

"$STORAGE_DAEMON" --blockdev "driver=file,node-name=disk,filename=$OUT/blk.img" \
    --export "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path=$OUT/blk.sock,writable=on" \
    >"$OUT/blk.backend" 2>&1 &
daemon=$!
for option in on off; do
    cp "$OUT/disk.img" "$OUT/$option.img"
    backend "$option" pmem --file "$OUT/$option.img"
    guest $option -k "$VMLINUX" --debug-exit -c "quiet -- sh /test/sharing.sh" \
        --vhost-user "$OUT/$option.sock,type=pmem,name=pmem,share-shmem=$option" \
        --vhost-user "$OUT/blk.sock,type=blk,name=disk" </dev/null
done
kill $daemon
wait
