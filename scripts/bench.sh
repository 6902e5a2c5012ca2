#!/bin/bash
# usage: bench.sh [neighbour|files]
#
# Measures, and gives ratios of what it measured in one run; both of these where none is named.
#
#   neighbour          how long requests to one device take while the back-end of another misbehaves, with small guests on
#                      this machine's /dev/kvm: for each kind of misbehaviour the median, the 99th percentile, and its
#                      ratio to that of the rounds in which the other back-end does nothing. Use a machine that does
#                      nothing else.
#   files              how long a guest takes to get at the files of a directory of the host, with DAX, without it, and
#                      without a cache; by the clock of an emulated host (lab.sh --icount), which counts instructions: of
#                      the guest, its kernel, the VMM, the back-end and the host's kernel together
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

main() {
    case ${1-} in
    -h | --help) usage && return ;;
    neighbour | files) "$1" ;;
    '') neighbour && files ;;
    *) die "$1: not understood (--help lists what is)" ;;
    esac
}

neighbour() {
    cd "$PROJECT"
    need cc:gcc
    cargo bench --quiet --locked --bench neighbour
}

files() {
    local work kernel hotslot=$TARGET/release/hotslot backend=$TARGET/release/hotslot-backend
    local host=$PROJECT/benches/files/host.sh
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # this directory, now
    trap "rm -rf '$work'" EXIT
    cargo build --quiet --release --locked --manifest-path "$PROJECT/Cargo.toml" --bins
    kernel=$("$PROJECT/scripts/kernel.sh")
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio \
        --file "$PROJECT/benches/files/guest.sh:/bench/guest.sh"
    local lab=("$PROJECT/scripts/lab.sh" --icount --memory 2G --timeout 240 --exec "$hotslot" --exec "$backend"
        --file "$host" --file "$kernel/vmlinux" --file "$work/guest.cpio" --env "HOTSLOT=$hotslot"
        --env "BACKEND=$backend" --env "KERNEL=$kernel/vmlinux" --env "IMAGE=$work/guest.cpio" -- /bin/sh "$host")
    # QEMU with this clock stands still at times (without it the same guests were never seen to).
    local try
    for try in 1 2 3 4; do
        ((try < 4)) || die "the emulated host did not come to its end in any of three runs"
        if "${lab[@]}" >"$work/figures"; then break; fi
        say "that run did not come to its end"
    done
    table "$work/figures"
}

# Lines of CASE:FIGURE:NANOSECONDS as a table in microseconds. What is read again is compared with the guest's own memory.
table() {
    awk -F : '
        function row(title, figure) {
            printf "%-48s", title
            for (i = 1; i <= 3; i++) {
                key = cases[i] ":" figure
                if (key in ns) printf "%12.1f", ns[key] / 1000; else printf "%12s", "-"
            }
            print ""
        }
        { ns[$1 ":" $2] = $3 }
        END {
            split("dax cached uncached", cases, " ")
            printf "%-48s%12s%12s%12s\n", "microseconds", "DAX", "no DAX", "no cache"
            row("1 MiB of the guest'\''s own memory", "memory")
            row("1 MiB through a mapping, again", "mapped again")
            row("1 MiB through a mapping, first", "mapped first")
            row("the first word of 2 MiB through a mapping", "touch")
            row("1 MiB by reads of 128 KiB, first", "read first")
            row("1 MiB by reads of 128 KiB, again", "read again")
            row("a page at random, first", "random first")
            row("a page at random, again", "random again")
            printf "a mapping read again, to the guest'\''s own memory: %.3f\n", ns["dax:mapped again"] / ns["dax:memory"]
        }' "$1"
}

main "$@"
