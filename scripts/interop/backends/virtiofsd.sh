# shellcheck shell=sh disable=SC2034
# A directory: a tree is unpacked, summed, mounted again, summed again; the host sums it, too.
FROM=sid:virtiofsd
DEVICE=type=fs
TAG=virtiofsd
MOUNT='mount -t virtiofs'

prepare() { mkdir -p "$DIR/$NAME"; }
back_end() {
    inside /usr/libexec/virtiofsd --socket-path "$SOCKET" --shared-dir "$DIR/$NAME" --tag $TAG --sandbox none
}
sums() { (cd "$1" && find . -type f | LC_ALL=C sort | xargs sha256sum | sha256sum); }
beside() {
    wait_for "^$NAME: " || return
    if grep -aq "^$NAME: $(sums "$DIR/$NAME/tree")" "$OUT/console"; then report "$NAME" host ok; else report "$NAME" host WRONG; fi
}

work() { tree; }
tree() {
    mkdir -p mnt
    if ! mountpoint -q mnt; then $MOUNT $TAG mnt; fi
    rm -rf mnt/tree2
    tar -C / -cf all.tar interop lib/modules
    head -c 5000000 /dev/urandom >big
    mkdir mnt/tree2
    tar -C mnt/tree2 -xf all.tar
    cp big mnt/tree2/big
    before=$(sums mnt/tree2)
    umount mnt
    $MOUNT $TAG mnt
    [ "$(sums mnt/tree2)" = "$before" ]
    cmp big mnt/tree2/big
    if [ ! -e mnt/tree ]; then
        mv mnt/tree2 mnt/tree
        sync
        echo "$NAME: $before" >/dev/console
    fi
}
touch_it() { ls mnt; }
