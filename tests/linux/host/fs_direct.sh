# shellcheck shell=sh
# Guests with a share and a disk, each of a back-end of its own: with the share's mappings shown to the disk's back-end, and without.
# The first has a second disk, ext4.img, of two queues and of blocks of 4096 bytes.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

share=$(mktemp -d)
other=$(mktemp -d)
for way in shared alone; do
    probe fill "$share/file" 6
    rm -f "$share/back" "$share/again" "$other/to"
    truncate -s 6M "$share/back" "$share/again" "$other/to"
    truncate -s 16M "$OUT/$way.img"
    option='' second=''
    if [ $way = shared ]; then
        option=,share-shmem=on
        backend ext4 blk --file "$OUT/ext4.img" --block-size 4096 --queues 2
        second="--cpus 2 --vhost-user $OUT/ext4.sock,type=blk,name=ext4,queues=2"
    fi
    backend "$way.fs" fs --dir "$share" --tag share --window 64M
    backend "$way.other" fs --dir "$other" --tag other --window 2M
    backend "$way.blk" blk --file "$OUT/$way.img"
    # shellcheck disable=SC2086 # options
    guest "$way" -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/fs_direct.sh" \
        --vhost-user "$OUT/$way.fs.sock,type=fs,name=fs$option" \
        --vhost-user "$OUT/$way.other.sock,type=fs,name=other" \
        --vhost-user "$OUT/$way.blk.sock,type=blk,name=disk" $second </dev/null
    end_backends
    head -c 6291456 "$OUT/$way.img" >"$share/disk"
    cp "$other/to" "$share/to"
    for file in file disk back to again; do note "$way $file" "$(sha256sum <"$share/$file")"; done
    rm "$OUT/$way.img"
done
rm -r "$share" "$other"
