# shellcheck shell=sh
# Guests with a share and a disk, each of a back-end of its own: with the share's mappings shown to the disk's back-end, and without.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

share=$(mktemp -d)
for way in shared alone; do
    probe fill "$share/file" 6
    rm -f "$share/back"
    truncate -s 6M "$share/back"
    truncate -s 16M "$OUT/$way.img"
    option=''
    [ $way = alone ] || option=,share-shmem=on
    backend "$way.fs" fs --dir "$share" --tag share --window 64M
    backend "$way.blk" blk --file "$OUT/$way.img"
    guest "$way" -k "$VMLINUX" -m 256M --debug-exit -c "$DEBUG_EXIT -- sh /test/fs_direct.sh" \
        --vhost-user "$OUT/$way.fs.sock,type=fs,name=fs$option" \
        --vhost-user "$OUT/$way.blk.sock,type=blk,name=disk" </dev/null
    end_backends
    head -c 6291456 "$OUT/$way.img" >"$share/disk"
    for file in file disk back; do note "$way $file" "$(sha256sum <"$share/$file")"; done
    rm "$OUT/$way.img"
done
rm -r "$share"
