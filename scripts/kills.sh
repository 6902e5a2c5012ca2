#!/bin/bash
# usage: kills.sh [--count N] [--write-seconds N]
#
# Kills hotslot and its back-ends with SIGKILL while guests write and sync, and looks whether what was synced is there.
#
#   --count N          how many processes to kill, five with each guest (default: 100)
#   --write-seconds N  a guest writes for a random time up to this before each kill (default: 8)
#
# A guest has three ext4 on persistent memory (every second guest mounts them with dax) and three shares with DAX, each with
# a back-end of its own. There write:
#
#   probe keep         on each: blocks of 4 KiB at random, by write and fsync and by a mapping and msync in turn. It prints
#                      the number of its last write after each sync (guest/src/keep.rs)
#   fio                on the first of either kind: one file after another with --verify, an fsync every 8 blocks and one
#                      at the end. When it has verified a file, its number is printed. (What fio itself can save about a
#                      file that it is writing, it saves at its end only)
#
# The others' back-ends are killed, one after another in random order, and then hotslot. With two guests of four the
# host itself then loses its power: the ext4 on which images and directories lie is shut down without writing anything more,
# and mounted again. So a sync must have reached the host's disk. Then the journal of each image is replayed, its file system
# checked, and each write and file that was reported looked for, in the images and in the directories.
#
# Everything runs on an emulated host (lab.sh), which is started anew after five guests. It prints one line for each guest;
# what an emulated host said is in target/kills. Exit status: 1 when anything was lost or could not be looked at.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

LOGS=$TARGET/kills
# What is killed with each guest; guests on one emulated host, and the seconds that one may take on a busy machine.
KILLS=5
GUESTS=5
GUEST_SECONDS=400

main() {
    local count=100 seconds=8 guests first last kept
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --count)
            count=$(whole_number "$@")
            shift
            ;;
        --write-seconds)
            seconds=$(whole_number "$@")
            shift
            ;;
        *) wrong "$1: unknown option (--help lists them)" ;;
        esac
        shift
    done
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    prepare
    guests=$(((count + KILLS - 1) / KILLS))
    for ((first = 1; first <= guests; first += GUESTS)); do
        last=$((first + GUESTS - 1 < guests ? first + GUESTS - 1 : guests))
        run "$first" "$last" "$seconds"
    done | tee "$work/guests"
    kept=$(grep -c ': kept$' "$work/guests") || true
    echo "$((kept * KILLS)) of $((guests * KILLS)) kills lost nothing that was synced"
    ((kept == guests))
}

prepare() {
    need fio:fio mkfs.ext4:e2fsprogs e2fsck:e2fsprogs
    need_programs --quiet --locked
    local name
    kernel=$("$PROJECT/scripts/kernel.sh")
    init=$(guest_init)
    fio=$(type -P fio)
    mkdir -p "$LOGS" "$work/jobs"
    for name in pmem0 fs0; do jobs "$name" >"$work/jobs/$name"; done
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio --module virtio_pmem --module nd_pmem \
        --file "$PROJECT/scripts/kills:/kills" --file "$work/jobs:/jobs"
}

# jobs NAME: what fio does on the device of this name, in the current directory; host.sh verifies with the same options. One
# process makes all files: to start it takes a guest many seconds.
jobs() {
    local number engine
    printf '%s\n' '[global]' rw=randwrite size=128k bs=4k fsync=8 end_fsync=1 randseed=1 verify=crc32c do_verify=1 \
        verify_fatal=1 stonewall thread
    for number in {1..12}; do
        if ((number % 2)); then engine=mmap; else engine=psync; fi
        # tee, since fio redirects the output of that command.
        printf '%s\n' "[$number]" "filename=fio.$number" "ioengine=$engine" \
            "exec_postrun=echo 'verified $1 $number.' | tee /dev/console"
    done
}

# run FIRST LAST SECONDS: these guests, on one emulated host; prints its line for each.
run() {
    local hotslot=$BUILT/hotslot backend=$BUILT/hotslot-backend scripts=$PROJECT/scripts/kills variable
    local variables=(HOTSLOT="$hotslot" BACKEND="$backend" INIT="$init" KERNEL="$kernel/vmlinux" IMAGE="$work/guest.cpio"
        FIRST="$1" LAST="$2" SECONDS_MOST="$3")
    local lab=("$PROJECT/scripts/lab.sh" --memory 3G --timeout $((($2 - $1 + 1) * (GUEST_SECONDS + KILLS * $3))) --module loop
        --exec "$hotslot" --exec "$backend" --exec "$init" --exec "$fio" --exec "$(type -P mkfs.ext4)"
        --exec "$(type -P e2fsck)" --file /etc/mke2fs.conf --file "$scripts" --file "$kernel/vmlinux" --file "$work/guest.cpio")
    for variable in "${variables[@]}"; do lab+=(--env "$variable"); done
    "${lab[@]}" -- /bin/sh "$scripts/host.sh" </dev/null 2>&1 | sed -u 's/\r//g' | tee "$LOGS/$1" | grep -a --line-buffered '^guest [0-9]' ||
        say "the emulated host of guest $1 did not come to its end: $LOGS/$1"
}

main "$@"
