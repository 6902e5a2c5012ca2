#!/bin/bash
# usage: run.sh [--shell | --share DIR [--no-dax]] [HOTSLOT OPTION]...
#
# The main job, end to end: boots a stock Debian kernel under hotslot with a file of this machine as its persistent
# memory (/dev/pmem0), mapped into the guest by a vhost-user back-end while it runs. The guest mounts it with DAX,
# writes a file through mmap and switches itself off; then that file is read out of the image here.
#
#   --shell            gives you a shell in that guest instead (its `poweroff` or Ctrl-a x ends it)
#   --share DIR        boots a guest with the directory DIR of this machine at /mnt instead, with DAX, and a shell in it
#   --no-dax           without DAX: its files go through the guest's own page cache
#   HOTSLOT OPTION...  goes to hotslot, after the options of this script: -m 1G, --cpus 2, -v, ...
#
# Where this machine's KVM cannot boot Linux it runs on the emulated host of lab.sh; it prints which. Installs and builds
# what is missing. The image, target/run/pmem.img, is kept from one run to the next.
#
# DIR itself is shared, not a copy: the guest may do there what you may. Each side sees at once what the other does. On
# the emulated host that is so for what the guest does, but for stores through a shared mapping, which take up to half a
# second; the guest sees what you change a second or two later, and in a file that it has mapped only after it has looked
# at that file's attributes or opened it again (scripts/lab.sh --share).
#
# Exit status: hotslot's; 1 when something around it failed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

RUN=$TARGET/run
IMAGE=$RUN/pmem.img
GREETING=/hello.txt
# The guest prints this when the file is written, and runs for another two seconds.
WRITTEN='the guest has written'

main() {
    local job=demo share='' window=1G host kernel status=0
    case ${1-} in
    -h | --help) usage && return ;;
    --shell) job=shell && shift ;;
    --share)
        (($# > 1)) || die "--share needs a directory (--help describes it)"
        [[ -d $2 ]] || die "$2 is not a directory"
        job=share share=$(realpath "$2")
        shift 2
        [[ ${1-} != --no-dax ]] || { window=0 && shift; }
        ;;
    esac
    need mkfs.ext4:e2fsprogs debugfs:e2fsprogs busybox:busybox-static cpio:cpio
    build
    kernel=$("$PROJECT/scripts/kernel.sh")
    mkdir -p "$RUN"
    [[ $job == share ]] || make_image
    pack_guest "$job" "$window"
    local script=$PROJECT/scripts/run/host.sh hotslot=$TARGET/release/hotslot backend=$TARGET/release/hotslot-backend
    local variables=(HOTSLOT="$hotslot" BACKEND="$backend" KERNEL="$kernel/bzImage" GUEST="$RUN/guest.cpio" JOB="$job"
        IMAGE="$IMAGE" SHARE="$share" WINDOW="$window" WRITTEN="$WRITTEN")
    host=$(host_kind)
    case $host in
    kvm)
        say "running on this machine's KVM"
        env "${variables[@]}" /bin/sh "$script" "$@" || status=$?
        ;;
    lab)
        say "this machine's KVM cannot boot Linux: running on an emulated host (scripts/lab.sh)"
        local lab=("$PROJECT/scripts/lab.sh" --file "$RUN/guest.cpio" --file "$script" --file "$kernel/bzImage"
            --exec "$hotslot" --exec "$backend") variable
        for variable in "${variables[@]}"; do lab+=(--env "$variable"); done
        if [[ $job == share ]]; then lab+=(--share "$share"); else lab+=(--file "$IMAGE" --out "$IMAGE"); fi
        [[ $job == demo || ! -t 0 ]] || lab+=(--tty)
        # A user may stay as long as they like; lab.sh by itself would stop a run without a terminal.
        [[ $job == demo ]] || lab+=(--timeout 86400)
        "${lab[@]}" -- /bin/sh "$script" "$@" || status=$?
        ;;
    esac
    ((status == 0)) || return "$status"
    [[ $job != demo ]] || show_greeting
}

build() {
    command -v cargo >/dev/null || die "there is no cargo: install Rust, see https://rustup.rs"
    cargo build --quiet --release --manifest-path "$PROJECT/Cargo.toml" --bins
}

make_image() {
    [[ -e $IMAGE ]] && return
    # DAX wants blocks of a page, and no journal keeps a small image small.
    truncate -s 64M "$IMAGE.new"
    mkfs.ext4 -q -b 4096 -O '^has_journal' "$IMAGE.new"
    mv "$IMAGE.new" "$IMAGE"
}

# What the guest does: mounts the persistent memory or the share; then writes a file there through mmap, or gives a shell.
pack_guest() {
    local module mount='mount -t ext4 -o dax /dev/pmem0 /mnt' what='a file of the host, mapped into your memory'
    local modules=()
    for module in virtio_mmio virtio_pmem nd_pmem pvpanic-mmio; do modules+=(--module "$module"); done
    case $1:$2 in
    share:0) mount='mount -t virtiofs share /mnt' what='a directory of the host' ;;
    share:*) mount='mount -t virtiofs -o dax=always share /mnt' what='a directory of the host, its files mapped into your memory' ;;
    esac
    local job="mkdir -p /mnt && $mount || exit 1"
    if [[ $1 == demo ]]; then
        job+="; uname -sr; grep pmem0 /proc/mounts
            probe pmem-write /mnt$GREETING \"Hello from Linux \$(uname -r), written through mmap.\" || exit 1
            echo '$WRITTEN'; sleep 2; umount /mnt"
    else
        job+="; echo 'This is the guest. /mnt is $what. poweroff ends it.'
            cd /mnt; exec sh -i"
    fi
    "$PROJECT/scripts/image.sh" -o "$RUN/guest.cpio" "${modules[@]}" --command "$job"
}

show_greeting() {
    say "$GREETING in $IMAGE, as this machine reads it:"
    # The guest's file is a whole page: text, then zeroes.
    debugfs -R "cat $GREETING" "$IMAGE" 2>/dev/null | tr -d '\0'
    echo
}

main "$@"
