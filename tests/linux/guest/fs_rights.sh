# shellcheck shell=sh
# Runs in a guest with two shares: what modes, owners and attributes of their files are, with DAX and without; overlayfs with its upper
# layer there; device nodes.
mkdir -p /share /mapped /lower /merged
mount -t virtiofs -o dax=always share /share || exit 1
mount -t virtiofs -o dax=always mapped /mapped || exit 1
probe rights /share/direct 2>&1 | sed 's/^/direct: /'
probe rights /mapped/direct 2>&1 | sed 's/^/mapped: /'

# overlay SHARE OPTION: removes and replaces what is below, and looks.
mkdir /lower/again
echo below >/lower/again/file
echo gone >/lower/gone
overlay() {
    mount -t overlay -o "lowerdir=/lower,upperdir=$1/upper,workdir=$1/work$2" overlay /merged || return
    rm -r /merged/again /merged/gone
    mkdir /merged/again
    echo changed >/merged/new
    echo "overlay $1: $(find /merged -mindepth 1 | sort | tr '\n' ' ')"
    umount /merged
}
overlay /share ,userxattr
overlay /mapped ''

echo "taken: $(mknod /share/below b 8 1 2>&1)"
echo "refused: $(mknod /share/disk b 8 1 2>&1)"
mknod /mapped/disk b 8 300 && echo "device: $(stat -c '%F %t %T' /mapped/disk)"
echo "below: $(cat /share/below/file)"
[ "$(stat -c %d /mapped)" = "$(stat -c %d /mapped/below/.)" ] || echo 'announced: another device'
umount /mapped/below
umount /share
mount -t virtiofs share /share || exit 1
probe rights /share/cached 2>&1 | sed 's/^/cached: /'
umount /share
umount /mapped
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
exit 0
