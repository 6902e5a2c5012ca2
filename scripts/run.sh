#!/bin/bash
# usage: run.sh [--shell] [HOTSLOT OPTION]...
#
# The main job, end to end: boots a stock Debian kernel under hotslot with a file of this machine as its persistent
# memory (/dev/pmem0), mapped into the guest by a vhost-user back-end while it runs. The guest mounts it with DAX,
# writes a file through mmap and switches itself off; then that file is read out of the image here.
#
#   --shell            leaves you in a shell of that guest instead (its `poweroff` or Ctrl-a x ends it)
#   HOTSLOT OPTION...  goes to hotslot, behind what this script gives it: -m 1G, --cpus 2, -v, ...
#
# Where this machine's KVM cannot boot Linux it runs on the emulated host of lab.sh; it says which. Installs and builds
# what is missing. The image, target/run/pmem.img, is kept from one run to the next.
#
# Exit status: hotslot's; 1 when something around it failed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

RUN=$TARGET/run
IMAGE=$RUN/pmem.img
GREETING=/hello.txt
# The guest says this when the file is written, and is on for another two seconds.
WRITTEN='the guest has written'

main() {
    local shell='' host kernel status=0
    case ${1-} in
    -h | --help) usage && return ;;
    --shell) shell=1 && shift ;;
    esac
    need mkfs.ext4:e2fsprogs debugfs:e2fsprogs busybox:busybox-static cpio:cpio
    build
    kernel=$("$PROJECT/scripts/kernel.sh")
    mkdir -p "$RUN"
    make_image
    pack_guest "$shell"
    host=$(host_kind)
    case $host in
    kvm) say "running on this machine's KVM" ;;
    lab) say "this machine's KVM cannot boot Linux: running on an emulated host (scripts/lab.sh)" ;;
    esac

    local command=(/bin/sh "$RUN/host.sh" "${shell:+shell}" "$kernel/bzImage" "$@")
    write_host_script
    if [[ $host == kvm ]]; then
        "${command[@]}" || status=$?
    else
        local lab=("$PROJECT/scripts/lab.sh" --file "$RUN" --file "$kernel/bzImage" --out "$IMAGE"
            --exec "$TARGET/release/hotslot" --exec "$TARGET/release/hotslot-backend")
        [[ -z $shell || ! -t 0 ]] || lab+=(--tty)
        "${lab[@]}" -- "${command[@]}" || status=$?
    fi
    ((status == 0)) || return "$status"
    [[ -n $shell ]] || show_greeting
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

# What the guest does: mounts the persistent memory; then writes a file there through mmap, or gives a shell.
pack_guest() {
    local module job
    local modules=()
    for module in virtio_mmio virtio_pmem nd_pmem pvpanic-mmio; do modules+=(--module "$module"); done
    job="mkdir -p /mnt && mount -t ext4 -o dax /dev/pmem0 /mnt || exit 1"
    if [[ -n $1 ]]; then
        job+="; echo 'This is the guest. /mnt is a file of the host, mapped into your memory. poweroff ends it.'
            cd /mnt; exec sh -i"
    else
        job+="; uname -sr; grep pmem0 /proc/mounts
            probe pmem-write /mnt$GREETING \"Hello from Linux \$(uname -r), written through mmap.\" || exit 1
            echo '$WRITTEN'; sleep 2; umount /mnt"
    fi
    "$PROJECT/scripts/image.sh" -o "$RUN/guest.cpio" "${modules[@]}" --command "$job"
}

# What runs on the host, real or emulated (there, the shell is busybox): the back-end, and hotslot with the guest. When
# the guest has written, hotslot is asked for its memory map.
write_host_script() {
    cat >"$RUN/host.sh" <<EOF
shell=\$1 kernel=\$2
shift 2
dir=\$(mktemp -d)
trap 'kill \$backend 2>/dev/null; rm -rf "\$dir"' EXIT
"$TARGET/release/hotslot-backend" pmem --socket "\$dir/pmem.sock" --file "$IMAGE" --once &
backend=\$!
set -- "$TARGET/release/hotslot" -k "\$kernel" -i "$RUN/guest.cpio" --debug-exit \\
    -c 'quiet hotslot.debug_exit=0xf4' --vhost-user "\$dir/pmem.sock,type=pmem,name=pmem0" "\$@"
[ -z "\$shell" ] || { "\$@"; exit; }
mkfifo "\$dir/console"
"\$@" </dev/null >"\$dir/console" &
hotslot=\$!
while IFS= read -r line; do
    printf '%s\\n' "\$line"
    case \$line in *'$WRITTEN'*) kill -USR1 \$hotslot ;; esac
done <"\$dir/console"
wait \$hotslot
EOF
}

show_greeting() {
    say "$GREETING in $IMAGE, as this machine reads it:"
    # The guest's file is a whole page: text, then zeroes.
    debugfs -R "cat $GREETING" "$IMAGE" 2>/dev/null | tr -d '\0'
    echo
}

main "$@"
