#!/bin/bash
# usage: bench.sh [OPTION]... [all | PART...]
#        bench.sh many [COUNT]
#
# Measures, and prints a table: of each figure minimum, median, 99th percentile and maximum for each subject, and median
# and 99th percentile as multiples of those of the floor, or of what stands beside it in the same run. Without a PART:
# neighbour and files.
#
#   --runs N           how often each VMM boots each kernel (default: 5)
#   --beside NAME=PATH measures another VMM, too, where that makes sense: NAME is firecracker, crosvm, alioth or
#                      cloud-hypervisor, PATH its program; other NAMEs are for `size` alone. May be given several times
#   --hotslot NAME=PATH measures another hotslot, too (of an earlier version, say): boot, size, mapping, resident. Two are
#                      always there, `hotslot-small` and `hotslot-static`: the VMM alone, in profile `small`, which the
#                      second has together with the C library
#   --keep DIR         writes the figures (figures.txt), the table (table.txt) and a picture (picture.svg) into this
#                      directory. It may have figures of an earlier run: those of other parts stay
#
# The parts, in the order of `all`: first the two that take this machine's time. "By the clock" is by that of an emulated
# host (lab.sh --icount), which counts instructions: of the guest, its kernel, the VMM, the back-end and the host's kernel
# together. What else this machine does then changes nothing.
#
#   neighbour          how long requests to one device take while the back-end of another misbehaves, with small guests on
#                      this machine's /dev/kvm: beside rounds in which the other back-end does nothing. Use a machine that
#                      does nothing else
#   micro              the codec, the ledger and the backend channel alone, by criterion, on this machine; the channel beside
#                      the bare system calls of the same exchange
#   boot               how long it takes from the start of hotslot, and of QEMU's microvm and q35, to the first line of PID 1
#                      of a guest with a stock kernel (vmlinux, bzImage), 256 MiB and one vCPU; by the clock
#   size               how large the stripped program is, and how many crates are in it
#   mapping            how long a valid MAP, a valid UNMAP and a reset take, by the clock: with this hotslot, in its
#                      sandbox and without one, beside a server that only makes the system calls
#   resident           how much memory a VMM has beside its guest's, on the emulated host: with one device of type fs
#                      (hotslot and QEMU), or with none (other VMMs)
#   exits              exits to user space of a guest with 1,000 requests to an entropy device and 1,000 flushes of a pmem
#                      device, less those of a guest without them, by the counters of hotslot and of KVM
#   speed              how long a guest takes to read 16 MiB of a mapping, beside its own memory: with pages of 4 KiB, then
#                      of 2 MiB, which the host makes of the small ones (MADV_COLLAPSE) and KVM's counter pages_2m must
#                      show. On this machine if it has a KVM that is not software, else by the clock, which shows faults
#                      and exits, and no page walks
#   session            a session in a share by DAX, through a window that is smaller than the data, by the clock: with slots
#                      that outlive their mappings, and without
#   files              how long a guest takes to get at the files of a directory of the host, with DAX, without it, and
#                      without a cache; by the clock
#   programs           how long programs take that work with such files (tar, ls, git, gcc, pages at random), by the clock:
#                      on the emulated host itself, and in a guest with our back-ends and with virtiofsd (which cargo
#                      installs) and qemu-storage-daemon
#
# many runs COUNT (200) small machines at once on this machine's /dev/kvm, each with a share of one directory, and prints
# starts a second, and memory, threads, descriptors and memory areas of each. It needs 4 MiB for a machine.
#
# HOTSLOT_PROGRAMS=DIR   takes hotslot and hotslot-backend from there, and builds neither, nor hotslot-small and
#                        hotslot-static
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

ALL=(neighbour micro boot size mapping resident exits speed session files programs)

runs=5 beside=() hotslots=() keep=''

main() {
    local parts=() part status
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        many) many "${@:2}" && return ;;
        --runs)
            runs=$(whole_number "$@")
            shift
            ;;
        --beside | --hotslot)
            [[ ${2-} == ?*=?* && -f ${2#*=} && -x ${2#*=} ]] || wrong "$1 ${2-}: this is not NAME=PATH with the path of a program"
            if [[ $1 == --beside ]]; then beside+=("${2%%=*}=$(realpath "${2#*=}")"); else hotslots+=("${2%%=*}=$(realpath "${2#*=}")"); fi
            shift
            ;;
        --keep)
            (($# > 1)) || wrong "--keep needs a directory"
            mkdir -p "$2" 2>/dev/null || wrong "--keep $2: this is no directory, and cannot be made one"
            keep=$(realpath "$2")
            shift
            ;;
        all) parts+=("${ALL[@]}") ;;
        *)
            [[ " ${ALL[*]} " == *" $1 "* ]] || wrong "$1: not understood (--help lists what is)"
            parts+=("$1")
            ;;
        esac
        shift
    done
    ((${#parts[@]})) || parts=(neighbour files)
    cd "$PROJECT"
    work=$(mktemp -d)
    remove_at_end "$work"
    hotslot=$BUILT/hotslot backend=$BUILT/hotslot-backend
    need_programs --quiet --locked
    if [[ -z ${HOTSLOT_PROGRAMS-} ]]; then
        local small=(cargo build --quiet --profile small --locked --no-default-features --bin hotslot)
        local triple=x86_64-unknown-linux-gnu
        "${small[@]}"
        RUSTFLAGS='-C target-feature=+crt-static' "${small[@]}" --target "$triple"
        hotslots+=("hotslot-small=$TARGET/small/hotslot" "hotslot-static=$TARGET/$triple/small/hotslot")
    fi
    kernel=$(scripts/kernel.sh)
    cargo build --quiet --locked --package hotslot-figures
    local failed=() figures=$work/all
    about >"$figures"
    [[ -z $keep || ! -e $keep/figures.txt ]] || grep -v '^#' "$keep/figures.txt" >>"$figures" || true
    for part in "${parts[@]}"; do
        say "$part"
        # Not behind `if` or `||`: there a failure inside would go on.
        set +e
        (set -e && "$part" >"$work/part")
        status=$?
        set -e
        [[ $status == 0 && -s $work/part ]] || failed+=("$part")
        cat "$work/part" >>"$figures"
    done
    target/debug/hotslot-figures table "$figures" | tee "$work/table"
    if [[ -n $keep ]]; then
        target/debug/hotslot-figures picture "$figures" >"$work/picture"
        cp "$figures" "$keep/figures.txt" && cp "$work/table" "$keep/table.txt" && cp "$work/picture" "$keep/picture.svg"
    fi
    ((${#failed[@]} == 0)) || die "without figures, or without all of them: ${failed[*]}"
}

# What a reader of the figures must know of their origin.
about() {
    local kvm
    kvm=$([[ $(host_kind) == kvm ]] && echo "KVM" || echo "KVM in software")
    echo "# $(LC_ALL=C date -u '+%-d %B %Y'), commit $(git describe --always --dirty 2>/dev/null || echo unknown)"
    echo "# $(nproc) processors ($(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)), Linux $(uname -r), $kvm"
}

# Lines of NAME: NUMBER, in any order, as lines of NAME MINIMUM MEDIAN P99 MAXIMUM. The median is the least number that
# half of them do not exceed, P99 the least that 99 of 100 do not exceed.
statistics() {
    LC_ALL=C sort -t : -k 1,1 -k 2n | awk -F ': ' '
        function flush() {
            if (count) print name, all[1], all[int((count + 1) / 2)], all[int(count * 0.99 + 0.99)], all[count]
            count = 0
        }
        $1 != name { flush(); name = $1 }
        { all[++count] = $2 }
        END { flush() }'
}

size() {
    local pair program=$work/stripped
    need strip:binutils
    for pair in "hotslot=$hotslot" "${hotslots[@]}" "qemu=$(type -P qemu-system-x86_64 || true)" "${beside[@]}"; do
        [[ -n ${pair#*=} ]] || continue
        strip -o "$program" "${pair#*=}"
        echo "stripped@${pair%%=*}: $(stat -c %s "$program")" | statistics
    done
    echo "crates@hotslot: $(crates | wc -l)" | statistics
    echo "crates-all@hotslot: $(crates all | wc -l)" | statistics
}

# The crates that the VMM alone is made of, itself among them; with `all` those that only run in the compiler, too.
crates() {
    local edges=normal
    [[ ${1-} == all ]] || edges+=,no-proc-macro
    cargo tree --locked --package hotslot --no-default-features --edges "$edges" --prefix none --format '{p}' |
        sed 's/ (.*//' | sort -u
}

micro() {
    rm -rf "$TARGET/criterion"
    cargo bench --quiet --locked --package hotslot-micro >&2
    target/debug/hotslot-figures criterion "$TARGET/criterion" | statistics
}

neighbour() {
    need cc:gcc
    cargo bench --quiet --locked --bench neighbour | statistics
}

many() {
    local count=${1-200}
    [[ $count =~ ^[1-9][0-9]*$ && $# -le 1 ]] || wrong "many $*: how many machines, as a whole number"
    cd "$PROJECT"
    cargo bench --quiet --locked --bench many -- "$count"
}

boot() {
    vmms boot $((240 + 90 * runs)) --file "$kernel/bzImage" --env "RUNS=$runs" \
        --env "BZIMAGE=$kernel/bzImage"
}

resident() { vmms resident 300; }

# vmms PART SECONDS OPTION...: a part that starts each VMM, with a guest whose PID 1 only says that it runs. Each has an
# emulated host of its own: one that does not come to its end takes no figure of the others with it.
vmms() {
    local part=$1 limit=$2 qemu firmware pair status=0 lab=()
    shift 2
    need qemu-system-x86_64:qemu-system-x86 busybox:busybox-static
    qemu=$(type -P qemu-system-x86_64)
    scripts/image.sh -o "$work/guest.cpio" --bare --exec "$(type -P busybox):/busybox" --file benches/boot/init.sh:/init
    for firmware in /usr/share/qemu /usr/share/seabios; do lab+=(--file "$firmware"); done
    for pair in "${hotslots[@]}" "${beside[@]}"; do lab+=(--exec "${pair#*=}"); done
    for pair in "hotslot=$hotslot" "${hotslots[@]}" "microvm=$qemu" "q35=$qemu" "${beside[@]}"; do
        measure "$limit" "$PROJECT/benches/$part/host.sh" --memory 2G --exec "$qemu" "${lab[@]}" --file benches/vmm.sh \
            --env "VMM=$PROJECT/benches/vmm.sh" --env "NAME=${pair%%=*}" --env "PROGRAM=${pair#*=}" "$@" || status=1
        sed 's/^speed //' "$work/figures" | statistics
    done
    return $status
}

exits() {
    scripts/image.sh -o "$work/guest.cpio" --module virtio_mmio --module virtio_rng --module virtio_pmem --module nd_pmem \
        --file "$PROJECT/benches/exits/guest.sh:/bench/guest.sh"
    measure 600 "$PROJECT/benches/exits/host.sh" --memory 2G --env REQUESTS=1000
    statistics <"$work/figures"
}

session() {
    need git:git
    tree "$work/small-tree" 3
    tar -C "$work/small-tree" --owner 0 --group 0 --numeric-owner -cf "$work/tree.tar" .
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio --exec "$(type -P git)" \
        --file "$PROJECT/benches/session/guest.sh:/bench/guest.sh" --file "$work/tree.tar:/bench/tree.tar"
    measure 900 "$PROJECT/benches/session/host.sh" --memory 2G
    statistics <"$work/figures"
}

files() {
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio \
        --file "$PROJECT/benches/files/guest.sh:/bench/guest.sh"
    measure 600 "$PROJECT/benches/files/host.sh" --memory 2G
    named files <"$work/figures" | statistics
}

mapping() {
    local pair lab=() programs=("hotslot=$hotslot" "no-sandbox=$hotslot --sandbox off" "${hotslots[@]}")
    for pair in "hotslot=$hotslot" "${hotslots[@]}"; do lab+=(--exec "${pair#*=}"); done
    by_the_clock 1800 "${lab[@]}" -- "$(client mapping)" "${programs[@]}"
}

speed() {
    local client
    client=$(client speed)
    if [[ $(host_kind) == kvm ]]; then
        "$client" "$hotslot" | statistics
    else
        by_the_clock 600 --exec "$hotslot" -- "$client" "$hotslot" | statistics
    fi
}

# client BENCH: builds the program of a benchmark with small guests, and prints where it is. A debug build, as the tests
# have it: its own time is in all figures.
client() {
    local built
    built=$(cargo test --locked --bench "$1" --no-run 2>&1 | sed -n 's/^ *Executable .*(\(.*\))$/\1/p')
    realpath "$built"
}

programs() {
    local tools virtiofsd daemon cases case status=0 work_script=$PROJECT/benches/programs/work.sh
    need git:git gcc:gcc qemu-storage-daemon:qemu-system-common
    daemon=$(type -P qemu-storage-daemon)
    virtiofsd=$(virtiofsd) || say "there is no virtiofsd, and so no column for it"
    tree "$work/tree" 25
    tar -C "$work/tree" --owner 0 --group 0 --numeric-owner -cf "$work/tree.tar" .
    tools=(--exec "$(type -P git)" --exec "$(type -P gcc)" --exec "$(type -P as)" --exec "$(gcc -print-prog-name=cc1)")
    "$PROJECT/scripts/image.sh" -o "$work/guest.cpio" --module virtio_mmio --module virtio_blk "${tools[@]}" \
        --file "$work_script:/bench/work.sh" --file "$work/tree.tar:/bench/tree.tar"
    cases=(host cached ${virtiofsd:+virtiofsd} dax diskhost blk daemon)
    for case in "${cases[@]}"; do
        measure 900 "$PROJECT/benches/programs/host.sh" --memory 3G "${tools[@]}" --file "$work_script" \
            --file "$work/tree.tar" --env "WORK=$work_script" --env "TREE=$work/tree.tar" --exec "$daemon" \
            --env "DAEMON=$daemon" ${virtiofsd:+--exec "$virtiofsd"} --env "VIRTIOFSD=$virtiofsd" --env "CASE=$case" ||
            status=1
        named programs <"$work/figures" | statistics
    done
    return $status
}

# measure SECONDS SCRIPT OPTION...: runs a script on an emulated host, with these options of lab.sh; what it prints are
# figures.
measure() {
    local limit=$1 host=$2
    shift 2
    by_the_clock "$limit" --exec "$hotslot" --exec "$backend" --file "$host" --file "$kernel/vmlinux" \
        --file "$work/guest.cpio" --env "HOTSLOT=$hotslot" --env "BACKEND=$backend" --env "KERNEL=$kernel/vmlinux" \
        --env "IMAGE=$work/guest.cpio" "$@" -- /bin/sh "$host" >"$work/figures"
}

# by_the_clock SECONDS WORD...: lab.sh --icount with these words. QEMU may take so many seconds of processor time, however
# busy this machine is, and ten times as long by the wall clock. Some runs stand still (src/design.md): then there is
# another.
by_the_clock() {
    local limit=$1 tries=8 try status
    shift
    for ((try = 1; try <= tries; try++)); do
        status=0
        (ulimit -t "$limit" && exec scripts/lab.sh --icount --timeout $((10 * limit)) "$@") >"$work/printed" || status=$?
        case $status in
        0) cat "$work/printed" && return ;;
        124 | 125) say "run $try of $tries ended with status $status (124: the time limit; 125: it stood still, took more than $limit s of the processor, or the lab failed)" ;;
        *) say "what ran on the emulated host ended with status $status" && return 1 ;;
        esac
    done
    return 1
}

# Makes sure that the newest virtiofsd is there (Debian's is older), and prints where.
virtiofsd() {
    local libraries=(libcap-ng-dev libseccomp-dev)
    dpkg-query -W "${libraries[@]}" >/dev/null 2>&1 || apt_install "${libraries[@]}"
    need_crate virtiofsd 1.14.0
    type -P virtiofsd
}

# named PART: lines of CASE:FIGURE:NANOSECONDS as lines of PART-FIGURE@CASE: NANOSECONDS.
named() { awk -F : -v part="$1" '{ gsub(/ /, "-", $2); print part "-" $2 "@" $1 ": " $3 }'; }

# tree DIR COUNT: 40 small files in each of COUNT directories, and the sources of 3 programs in C.
tree() {
    mkdir -p "$1/source"
    awk -v top="$1" -v count="$2" '
        function random(below) { state = (state * 16807) % 2147483647; return state % below }
        BEGIN {
            state = 1
            for (d = 0; d < count; d++) {
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

main "$@"
