#!/bin/bash
# usage: run.sh [--shell | --share DIR [--no-dax]] [HOTSLOT OPTION]...
#
# The main job, end to end: boots a stock Debian kernel under hotslot with a file of this machine as its persistent
# memory (/dev/pmem0), mapped into the guest by a vhost-user back-end while it runs. The guest mounts it with DAX,
# writes a file through mmap and switches itself off; then that file is read out of the image here.
#
#   --shell            leaves you in a shell of that guest instead (its `poweroff` or Ctrl-a x ends it)
#   --share DIR        boots a guest with the directory DIR of this machine at /mnt instead, with DAX, and a shell in it
#   --no-dax           without DAX: its files go through the guest's own page cache
#   HOTSLOT OPTION...  goes to hotslot, behind what this script gives it: -m 1G, --cpus 2, -v, ...
#
# Where this machine's KVM cannot boot Linux it runs on the emulated host of lab.sh; it says which. Installs and builds
# what is missing. The image, target/run/pmem.img, is kept from one run to the next.
#
# On KVM, DIR itself is shared: each side sees at once what the other does, and the guest may do there what you may. The
# emulated host has a copy of DIR, of 1 GiB at most; what the guest made, changed or removed in it, and nothing else, is
# done to DIR when the guest has ended (contents, modes and times; a new file is yours). What you changed meanwhile, too,
# is left as it is here, and the guest's version in target/run/share.new.
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

# What DIR may have where it has to be carried, in MiB: it is in the emulated host's memory twice for a moment.
CARRIED_LIMIT=1024

main() {
    local job=demo share='' window=1G host kernel status=0
    case ${1-} in
    -h | --help) usage && return ;;
    --shell) job=shell && shift ;;
    --share)
        (($# > 1)) || die "--share needs a directory (--help says more)"
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
    write_host_script
    host=$(host_kind)
    case $host in
    kvm) say "running on this machine's KVM" ;;
    lab) say "this machine's KVM cannot boot Linux: running on an emulated host (scripts/lab.sh)" ;;
    esac

    local command=(/bin/sh "$RUN/host.sh" "$job" "$kernel/bzImage" "$share" "$window" "$@")
    if [[ $host == kvm ]]; then
        "${command[@]}" || status=$?
    else
        local lab=("$PROJECT/scripts/lab.sh" --file "$RUN/guest.cpio" --file "$RUN/host.sh" --file "$kernel/bzImage"
            --exec "$TARGET/release/hotslot" --exec "$TARGET/release/hotslot-backend")
        if [[ $job == share ]]; then
            pack_share "$share"
            lab+=(--memory 4G --env CARRIED=1 --file "$RUN/share.tar" --out "$RUN/share.cpio" --out "$RUN/share.removed")
        else
            lab+=(--file "$IMAGE" --out "$IMAGE")
        fi
        [[ $job == demo || ! -t 0 ]] || lab+=(--tty)
        # Someone sits there as long as they like; lab.sh by itself would stop a run without a terminal.
        [[ $job == demo ]] || lab+=(--timeout 86400)
        "${lab[@]}" -- "${command[@]}" || status=$?
        [[ $job != share ]] || bring_back "$share"
    fi
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

# What runs on the host, real or emulated (there, the shell is busybox): the back-end, and hotslot with the guest. In the
# demonstration hotslot is asked for its memory map when the guest has written. Where the share was carried here, it is
# unpacked first; afterwards it is packed what changed, by a time that nobody can set (that of the unpacking is long ago then),
# and written down what is gone.
write_host_script() {
    cat >"$RUN/host.sh" <<EOF
job=\$1 kernel=\$2 share=\$3 window=\$4
shift 4
dir=\$(mktemp -d)
trap 'kill \$backend 2>/dev/null; rm -rf "\$dir"' EXIT
list() { (cd "\$share" && find . -mindepth 1 -exec stat -c '%f %s %Z %n' {} + | sort) >"\$dir/\$1"; }
if [ \$job = share ]; then
    if [ -n "\${CARRIED-}" ]; then
        share=\$dir/share
        mkdir "\$share"
        tar -x -C "\$share" -f "$RUN/share.tar" || exit 1
        rm "$RUN/share.tar"
        list before
    fi
    "$TARGET/release/hotslot-backend" fs --socket "\$dir/socket" --dir "\$share" --tag share --window "\$window" --once &
    device=type=fs,name=share
else
    "$TARGET/release/hotslot-backend" pmem --socket "\$dir/socket" --file "$IMAGE" --once &
    device=type=pmem,name=pmem0
fi
backend=\$!
set -- "$TARGET/release/hotslot" -k "\$kernel" -i "$RUN/guest.cpio" --debug-exit \\
    -c 'quiet hotslot.debug_exit=0xf4' --vhost-user "\$dir/socket,\$device" "\$@"
if [ \$job != demo ]; then
    "\$@"
    status=\$?
    [ -n "\${CARRIED-}" ] || exit \$status
    list after
    names='{ sub(/^[^ ]* [^ ]* [^ ]* /, ""); print }'
    cd "\$share"
    awk 'NR == FNR { old[\$0]; next } !(\$0 in old)' "\$dir/before" "\$dir/after" | awk "\$names" |
        while IFS= read -r name; do
            # A name with a newline in it comes as two.
            if [ -e "\$name" ] || [ -L "\$name" ]; then echo "\$name"; else echo "not carried back: \$name" >&2; fi
        done | cpio -o -H newc 2>/dev/null >"$RUN/share.cpio"
    awk "\$names" "\$dir/before" | sort >"\$dir/names.before"
    awk "\$names" "\$dir/after" | sort >"\$dir/names.after"
    awk 'NR == FNR { left[\$0]; next } !(\$0 in left)' "\$dir/names.after" "\$dir/names.before" >"$RUN/share.removed"
    exit \$status
fi
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

# The share, for the emulated host; and the time from which on a change here is yours.
pack_share() {
    local size
    need tar:tar
    size=$(du -sm --apparent-size "$1" | cut -f 1)
    ((size <= CARRIED_LIMIT)) ||
        die "$1 has $size MiB, more than the $CARRIED_LIMIT that can be carried into an emulated host and back: share less, or run on a machine with KVM"
    rm -rf "$RUN"/share.{tar,cpio,removed,new}
    touch "$RUN/share.begun"
    tar -C "$1" --warning=no-file-ignored -cf "$RUN/share.tar" .
}

# Does to the share what the guest did to its copy.
bring_back() {
    local share=$1 path new=$RUN/share.new changes=0
    rm -f "$RUN/share.tar"
    [[ -e $RUN/share.cpio ]] || { say "$share is as it was: what the guest did in its copy is lost" && return; }
    mkdir "$new"
    (cd "$new" && cpio --quiet -id --sparse --preserve-modification-time --no-absolute-filenames --no-preserve-owner <"$RUN/share.cpio") ||
        die "$RUN/share.cpio, with what the guest changed, cannot be unpacked: $share is as it was"
    # What is in a directory comes before it.
    while IFS= read -r path; do
        may_change "$share" "${path#./}" || continue
        if rm -df "$share/$path"; then changes=$((changes + 1)); fi
    done < <(LC_ALL=C sort -r "$RUN/share.removed")
    # And after it.
    while IFS= read -r -d '' path; do
        if [[ -d $new/$path && ! -L $new/$path && -d $share/$path && ! -L $share/$path ]]; then
            chmod --reference="$new/$path" "$share/$path"
            continue
        fi
        may_change "$share" "$path" || continue
        if [[ -L $new/$path || -f $new/$path ]]; then
            cp -d --preserve=mode,timestamps --remove-destination "$new/$path" "$share/$path" || continue
            # Nothing that the guest made runs as someone else here.
            [[ -L $share/$path ]] || chmod ug-s "$share/$path"
            rm "$new/$path"
        elif [[ -d $new/$path ]]; then
            rm -f "$share/$path"
            mkdir "$share/$path" || continue
            chmod --reference="$new/$path" "$share/$path"
        else
            say "neither a file nor a directory, left out: $path"
            rm "$new/$path"
            continue
        fi
        changes=$((changes + 1))
    done < <(cd "$new" && find . -mindepth 1 -printf '%P\0')
    find "$new" -depth -type d -empty -delete
    rm -f "$RUN"/share.{cpio,removed}
    say "$share: $changes changes by the guest"
}

# Whether a path in the share may be changed for the guest: it is in there, whatever became of the directories above it, and
# you have not made or changed it since the guest began.
may_change() {
    local place=$1/$2
    if [[ $(realpath -m "${place%/*}") != "${place%/*}" ]]; then
        say "the directories are others now, left alone: $2"
    elif [[ -n $(find "$place" -maxdepth 0 ! -type d -newercm "$RUN/share.begun" 2>/dev/null) ]]; then
        say "changed on both sides, left as it is here: $2"
    else
        return 0
    fi
    return 1
}

show_greeting() {
    say "$GREETING in $IMAGE, as this machine reads it:"
    # The guest's file is a whole page: text, then zeroes.
    debugfs -R "cat $GREETING" "$IMAGE" 2>/dev/null | tr -d '\0'
    echo
}

main "$@"
