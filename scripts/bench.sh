#!/bin/bash
# usage: bench.sh [neighbour|files|programs|boot [RUNS]|mapping [NAME=HOTSLOT]...]
#
# Measures, and gives ratios of what it measured in one run; neighbour and files where none is named.
#
#   neighbour          how long requests to one device take while the back-end of another misbehaves, with small guests on
#                      this machine's /dev/kvm: for each kind of misbehaviour the median, the 99th percentile, and its
#                      ratio to that of the rounds in which the other back-end does nothing. Use a machine that does
#                      nothing else.
#   files              how long a guest takes to get at the files of a directory of the host, with DAX, without it, and
#                      without a cache; by the clock of an emulated host (lab.sh --icount), which counts instructions: of
#                      the guest, its kernel, the VMM, the back-end and the host's kernel together
#   programs           how long programs take that work with such files (tar, ls, git, gcc, pages at random), by the same
#                      clock: on the emulated host itself, and in a guest with our back-ends and with virtiofsd (which
#                      cargo installs) and qemu-storage-daemon
#   boot [RUNS]        how long it takes from the start of hotslot, and of QEMU's microvm and q35, to the first line of PID 1
#                      of a guest with a stock kernel (vmlinux, bzImage), 256 MiB and one vCPU, by the same clock. For
#                      each a line: its name, and minimum, median, 99th percentile and maximum of RUNS (default: 5) in
#                      nanoseconds. What each run took is on standard error
#   mapping            how long a MAP and an UNMAP take that are well, and a reset, by the same clock: with this hotslot, in
#                      its sandbox and without one, with others that are named (of an earlier version, which must give a
#                      guest input that polls the serial port), and with a server that only makes the system calls. One
#                      line for each figure: name, minimum, median, 99th percentile, maximum, in nanoseconds
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

main() {
    case ${1-} in
    -h | --help) usage && return ;;
    neighbour | files | programs) "$1" ;;
    boot | mapping) "$@" ;;
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
    prepare
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio \
        --file "$PROJECT/benches/files/guest.sh:/bench/guest.sh"
    measure "$PROJECT/benches/files/host.sh" --memory 2G --timeout 240
    table "$work/figures"
}

boot() {
    local runs=${1-5} qemu firmware lab
    [[ $runs =~ ^[1-9][0-9]*$ ]] || die "boot $runs: this is not a number of runs"
    need qemu-system-x86_64:qemu-system-x86
    qemu=$(type -P qemu-system-x86_64)
    prepare
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --bare --exec "$(type -P busybox):/busybox" \
        --file "$PROJECT/benches/boot/init.sh:/init"
    lab=(--exec "$qemu")
    for firmware in /usr/share/qemu /usr/share/seabios; do lab+=(--file "$firmware"); done
    measure "$PROJECT/benches/boot/host.sh" --memory 2G --timeout $((120 + 40 * runs)) "${lab[@]}" \
        --file "$kernel/bzImage" --env "QEMU=$qemu" --env "RUNS=$runs" --env "VMLINUX=$kernel/vmlinux" \
        --env "BZIMAGE=$kernel/bzImage"
    sed -n 's/^speed //p' "$work/figures" | tee /dev/stderr | statistics
}

# Lines of NAME: NUMBER, in any order, as lines of NAME MINIMUM MEDIAN P99 MAXIMUM.
statistics() {
    sort -t : -k 1,1 -k 2n | awk -F ': ' '
        function flush() {
            if (count) print name, all[1], all[int((count + 1) / 2)], all[int(count * 0.99 + 0.99)], all[count]
            count = 0
        }
        $1 != name { flush(); name = $1 }
        { all[++count] = $2 }
        END { flush() }'
}

mapping() {
    local hotslot=$TARGET/release/hotslot program built lab=()
    local programs=("hotslot=$hotslot" "no-sandbox=$hotslot --sandbox off")
    cargo build --quiet --release --locked --manifest-path "$PROJECT/Cargo.toml" --bin hotslot
    # A debug build of the client, as the tests have it: its own time is in all figures.
    built=$(cargo test --locked --manifest-path "$PROJECT/Cargo.toml" --bench mapping --no-run 2>&1 |
        sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
    for program in "$@"; do programs+=("${program%%=*}=$(realpath "${program#*=}")"); done
    cd "$PROJECT"
    for program in "${programs[@]}"; do
        program=${program#*=}
        lab+=(--exec "${program%% *}")
    done
    scripts/lab.sh --icount --timeout 600 "${lab[@]}" -- "$(realpath "$built")" "${programs[@]}"
}

programs() {
    local tools virtiofsd daemon work_script=$PROJECT/benches/programs/work.sh
    need git:git gcc:gcc qemu-storage-daemon:qemu-system-common
    daemon=$(type -P qemu-storage-daemon)
    virtiofsd=$(virtiofsd) || say "there is no virtiofsd, and so no column for it"
    prepare
    tree "$work/tree"
    tar -C "$work/tree" --owner 0 --group 0 --numeric-owner -cf "$work/tree.tar" .
    tools=(--exec "$(type -P git)" --exec "$(type -P gcc)" --exec "$(type -P as)" --exec "$(gcc -print-prog-name=cc1)")
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio --module virtio_blk "${tools[@]}" \
        --file "$work_script:/bench/work.sh" --file "$work/tree.tar:/bench/tree.tar"
    measure "$PROJECT/benches/programs/host.sh" --memory 3G --timeout 900 "${tools[@]}" --file "$work_script" \
        --file "$work/tree.tar" --env "WORK=$work_script" --env "TREE=$work/tree.tar" --exec "$daemon" \
        --env "DAEMON=$daemon" ${virtiofsd:+--exec "$virtiofsd"} --env "VIRTIOFSD=$virtiofsd"
    compare "$work/figures"
}

# What both kinds of guest need.
prepare() {
    hotslot=$TARGET/release/hotslot backend=$TARGET/release/hotslot-backend
    work=$(mktemp -d)
    # shellcheck disable=SC2064 # this directory, now
    trap "rm -rf '$work'" EXIT
    cargo build --quiet --release --locked --manifest-path "$PROJECT/Cargo.toml" --bins
    kernel=$("$PROJECT/scripts/kernel.sh")
}

# measure SCRIPT OPTION...: runs a script on an emulated host, with these options of lab.sh; what it prints are figures.
measure() {
    local host=$1 try
    shift
    local lab=("$PROJECT/scripts/lab.sh" --icount --exec "$hotslot" --exec "$backend" --file "$host"
        --file "$kernel/vmlinux" --file "$work/guest.cpio" --env "HOTSLOT=$hotslot" --env "BACKEND=$backend"
        --env "KERNEL=$kernel/vmlinux" --env "IMAGE=$work/guest.cpio" "$@" -- /bin/sh "$host")
    # QEMU with this clock stands still at times (without it the same guests were never seen to).
    for try in 1 2 3 4; do
        ((try < 4)) || die "the emulated host did not come to its end in any of three runs"
        if "${lab[@]}" >"$work/figures"; then break; fi
        say "that run did not come to its end"
    done
}

# Makes sure that the newest virtiofsd is there (Debian's is older), and prints where.
virtiofsd() {
    local libraries=(libcap-ng-dev libseccomp-dev)
    dpkg-query -W "${libraries[@]}" >/dev/null 2>&1 || apt_install "${libraries[@]}"
    need_crate virtiofsd 1.14.0
    type -P virtiofsd
}

# 1,000 small files in 25 directories, and the sources of 3 programs in C.
tree() {
    mkdir -p "$1/source"
    awk -v top="$1" '
        function random(below) { state = (state * 16807) % 2147483647; return state % below }
        BEGIN {
            state = 1
            for (d = 0; d < 25; d++) {
                system("mkdir -p " top "/directory" d)
                for (f = 0; f < 40; f++) {
                    file = top "/directory" d "/file" f
                    for (lines = 1 + random(50); lines > 0; lines--) print random(1000000000), random(1000000000) > file
                    close(file)
                }
            }
            for (p = 0; p < 3; p++) {
                file = top "/source/program" p ".c"
                for (f = 0; f < 30; f++)
                    printf "int function%d(int a, int b) { while (a < b) a = a * %d + b %% (a + 1); return a; }\n", f, f + p > file
                close(file)
            }
        }'
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

# The same for programs: microseconds, and what is a guest's again as a multiple of the host's own.
compare() {
    awk -F : '
        function row(title, figure, kinds, floor) {
            if (!((floor ":" figure) in ns)) return
            printf "%-36s%12.1f", title, ns[floor ":" figure] / 1000
            for (i = 1; i <= split(kinds, cases, " "); i++) {
                key = cases[i] ":" figure
                if (key in ns) printf "%12.1f %5.1fx", ns[key] / 1000, ns[key] / ns[floor ":" figure]
                else printf "%12s       ", "-"
            }
            print ""
        }
        function share(title, figure) { row(title, figure, "dax cached virtiofsd", "host") }
        { ns[$1 ":" $2] = $3 }
        END {
            printf "%-36s%12s%19s%19s%19s\n", "microseconds", "host itself", "fs with DAX", "fs without", "virtiofsd"
            share("tar: 1,000 files unpacked", "untar")
            share("ls -lR", "list")
            share("git add: 120 files", "git add")
            share("git status", "git status")
            share("gcc: 3 files", "compile")
            share("rm -r", "remove")
            share("1 MiB by reads of 128 KiB, first", "read first")
            share("1 MiB by reads of 128 KiB, again", "read again")
            share("a page read at random, first", "random first")
            share("a page read at random, again", "random again")
            share("a page written at random", "random writes")
            share("a page read, O_DIRECT", "direct reads")
            share("a page written, O_DIRECT", "direct writes")
            printf "\n%-36s%12s%19s%19s\n", "microseconds", "host itself", "blk", "qemu-storage-daemon"
            row("a page read, O_DIRECT", "direct reads", "blk daemon", "diskhost")
            row("a page written, O_DIRECT", "direct writes", "blk daemon", "diskhost")
        }' "$1"
}

main "$@"
