#!/bin/bash
# usage: interop.sh [--reconnect SECONDS] [--cpus N] [--list] [NAME... | many]
#
# Runs vhost-user back-ends that others wrote, and a stock Linux guest that uses each in earnest; kills the back-end under
# the guest, and says what held. All of scripts/interop/backends where none is named.
#
#   many               seven of them at once, in one guest with 4 vCPUs: each works, with its checksums, while the others do
#   --reconnect N      also kills each back-end with SIGKILL while it works, and starts it again: the guest's work must go on
#                      (the key reconnect=N). After that, as without this option, it is killed for good
#   --cpus N           vCPUs of the guests (default: 2)
#   --list             prints the back-ends, where they come from, and what is done with them
#
# The back-ends are Debian's packages, of its suite sid and of bookworm, each suite in a root of its own, or crates, which
# cargo builds. Everything is kept in target/interop: 3 GB, and half an hour until it is there. It needs root for
# mmdebstrap. Everything runs on an emulated host (lab.sh), also where this machine has KVM: the back-ends run as root and in
# Debian's roots there. A back-end takes one to five minutes.
#
# It prints a line for each: the back-end, its version, the work, the work while it died and came back, what the guest saw
# when it was dead for good; below it what hotslot and the back-end agreed on. Exit status: 1 when some work was wrong.
#
# Not among them, and why: Debian's kernels have no driver for virtio's i2c, gpio, can and spi devices; vhost-device-gpu
# needs the protocol of vhost-user-gpu, which hotslot does not speak; SPDK and crosvm are in no registry.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

WORK=$TARGET/interop
BACKENDS=$PROJECT/scripts/interop/backends
MANY=(rng vsock passt disk scsi virtiofsd console)
# What the roots hold, by suite.
declare -A PACKAGES=(
    [sid]=passt,qemu-system-x86,qemu-utils,virtiofsd,dpdk-dev,vhost-device-vsock,linux-image-amd64
    [bookworm]=qemu-system-x86,qemu-system-common,qemu-utils
)
# Seconds for one guest.
LIMIT=2400

wrong=0

main() {
    local names=() cpus=2 reconnect='' list='' many='' name
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --list) list=1 ;;
        --reconnect | --cpus)
            [[ ${2-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a whole number"
            if [[ $1 == --cpus ]]; then cpus=$2; else reconnect=$2; fi
            shift
            ;;
        many) many=1 ;;
        *)
            [[ -e $BACKENDS/$1.sh ]] || die "$1: no such back-end (--list)"
            names+=("$1")
            ;;
        esac
        shift
    done
    if [[ -z $many ]] && ((${#names[@]} == 0)); then
        mapfile -t names < <(cd "$BACKENDS" && printf '%s\n' *.sh | sed 's/\.sh$//')
    fi
    [[ -z $list ]] || { list "${names[@]}" && return; }
    ((EUID == 0)) || die "this needs root, for mmdebstrap"

    cargo build --quiet --release --locked --manifest-path "$PROJECT/Cargo.toml" --bins
    mkdir -p "$WORK"
    if [[ -n $many ]]; then
        run many 4 "$reconnect" "${MANY[@]}"
    fi
    for name in ${names[@]+"${names[@]}"}; do run "$name" "$cpus" "$reconnect" "$name"; done
    ((wrong == 0))
}

# field NAME VARIABLE: what a back-end's file sets.
field() {
    (
        NAME=$1 INTEROP=$PROJECT/scripts/interop
        # shellcheck source=/dev/null
        source "$BACKENDS/$1.sh"
        printf '%s\n' "${!2-}"
    )
}

list() {
    local name
    for name; do
        printf '%-14s %-34s %s\n' "$name" "$(field "$name" FROM)" "$(sed -n '2s/^# //p' "$BACKENDS/$name.sh")"
    done
}

# run TITLE CPUS RECONNECT NAME...: one guest with these back-ends.
run() {
    local title=$1 cpus=$2 reconnect=$3 out=$WORK/out/$1 name pair modules=() tools=() lab=() each kernel
    local hotslot=$TARGET/release/hotslot host=$PROJECT/scripts/interop/host.sh guest_files=()
    shift 3
    for name; do
        provide "$(field "$name" FROM)"
        read -ra each <<<"$(field "$name" MODULES)"
        for pair in "${each[@]}"; do modules+=(--module "$pair"); done
        read -ra each <<<"$(field "$name" TOOLS)"
        for pair in "${each[@]}"; do need "$pair" && tools+=(--exec "$(type -P "${pair%%:*}")"); done
        read -ra each <<<"$(field "$name" FILES)"
        for pair in "${each[@]}"; do guest_files+=(--file "$pair"); done
        read -ra each <<<"$(field "$name" HOST_TOOLS)"
        for pair in "${each[@]}"; do need "$pair" && lab+=(--exec "$(type -P "${pair%%:*}")"); done
        read -ra each <<<"$(field "$name" HOST_MODULES)"
        for pair in "${each[@]}"; do lab+=(--module "$pair"); done
        case $(field "$name" FROM) in
        crate:*) lab+=(--exec "$WORK/bin/$(crate "$name")") ;;
        esac
    done
    if [[ $(field "$1" GUEST_KERNEL) == sid ]]; then
        each=("$WORK"/sid/usr/lib/modules/*)
        export KERNEL=${each[0]}/vmlinuz MODULES=${each[0]}
    else
        unset KERNEL MODULES
    fi
    kernel=$("$PROJECT/scripts/kernel.sh")
    rm -rf "$out"
    mkdir -p "$out"
    "$PROJECT/scripts/image.sh" -o "$out/guest.cpio" --module virtio_mmio "${modules[@]}" \
        --file "$PROJECT/scripts/interop:/interop" ${tools[@]+"${tools[@]}"} ${guest_files[@]+"${guest_files[@]}"}
    unset KERNEL MODULES
    local variables=(NAMES="$*" INTEROP="$PROJECT/scripts/interop" OUT="$out" WORK="$WORK" HOTSLOT="$hotslot"
        KERNEL="$kernel/vmlinux" IMAGE="$out/guest.cpio" CPUS="$cpus" RECONNECT="$reconnect" LIMIT="$LIMIT")
    for each in "${variables[@]}"; do lab+=(--env "$each"); done
    say "$title: see $out"
    "$PROJECT/scripts/lab.sh" --memory 4G --timeout $((LIMIT + 300)) --share "$WORK" --exec "$hotslot" \
        --file "$PROJECT/scripts/interop" --file "$kernel/vmlinux" --log "$out/kernel" "${lab[@]}" \
        -- /bin/sh "$host" </dev/null >"$out/lab" 2>&1 || say "the emulated host did not come to its end: $(tail -n 1 "$out/lab")"
    rm "$out/guest.cpio"
    for name; do row "$out" "$name"; done
}

# The name of a crate, which is its program's, too.
crate() { field "$1" FROM | cut -d : -f 2; }

# row DIRECTORY NAME: prints what came of it.
row() {
    local out=$1 name=$2 work back seen
    touch "$out/host" "$out/hotslot" "$out/console"
    tr -d '\r' <"$out/console" >"$out/lines"
    work=$(result "$name" work) back=$(result "$name" return)
    seen=$(sed -n "s/^SEEN $name //p" "$out/lines")
    printf '%-14s %-24s work: %s; ' "$name" "$(version "$name")" "$work"
    [[ -z $back ]] || printf 'death and return: %s; ' "$back"
    printf 'death for good: %s; hotslot ended with %s\n' "${seen:-nothing seen}" "$(cat "$out/status" 2>/dev/null || echo none)"
    grep -h "^CHECK $name .*WRONG" "$out/lines" "$out/host" | sed 's/^/    /' || true
    grep -h '^KERNEL [wr]' "$out/lines" | sed 's/^/    /' || true
    grep -F "$name: " "$out/hotslot" | sed 's/^/    /' || true
    case $work$back in
    *WRONG* | *none* | *KERNEL*) wrong=1 ;;
    esac
}

# result NAME PHASE: ok, WRONG or none; the host's results count as the work's.
result() {
    local name=$1 phase=$2 lines
    lines=$(sed -n "s/^CHECK $name $phase //p" "$out/lines" | cut -d ' ' -f 1)
    [[ $phase == work || -n $lines ]] || return 0
    if [[ $phase == work ]] && grep -q "^CHECK $name .*WRONG" "$out/host"; then lines=WRONG; fi
    printf '%s\n' "${lines:-none}"
}

version() {
    local suite name rest
    IFS=: read -r suite name rest <<<"$(field "$1" FROM)"
    case $suite in
    crate) echo "$rest" ;;
    *) dpkg-query --admindir="$WORK/$suite/var/lib/dpkg" -W -f '${Version}' "$name" ;;
    esac
}

# provide FROM: makes sure that a back-end is there: SUITE:PACKAGE, or crate:NAME:VERSION[:OPTION...].
provide() {
    local kind name rest options
    IFS=: read -r kind name rest <<<"$1"
    case $kind in
    crate)
        [[ ! -e $WORK/bin/$name ]] || return 0
        IFS=: read -ra options <<<"$rest"
        say "building $name ${options[0]}"
        CARGO_TARGET_DIR=$WORK/build nice -n 15 cargo install --quiet --locked -j2 "$name" --version "${options[0]}" \
            --root "$WORK" "${options[@]:1}" </dev/null >&2 || die "could not build $name"
        ;;
    *) make_root "$kind" ;;
    esac
}

# make_root SUITE: a root of Debian's with the packages of that suite.
make_root() {
    local suite=$1 uri
    [[ ! -d $WORK/$suite ]] || return 0
    need mmdebstrap:mmdebstrap
    uri=$(debian_uri)
    [[ -n $uri ]] || { apt_update && uri=$(debian_uri); }
    [[ -n $uri ]] || die "apt knows no archive of Debian here"
    say "making a root of Debian's $suite"
    rm -rf "$WORK/$suite.new"
    # A mirror may lag behind. The signatures are verified all the same.
    mmdebstrap --quiet --aptopt='Acquire::Check-Valid-Until "false"' --variant=minbase --include="${PACKAGES[$suite]}" \
        "$suite" "$WORK/$suite.new" "deb $uri $suite main" >"$WORK/$suite.log" 2>&1 || die "mmdebstrap failed: $WORK/$suite.log"
    mv "$WORK/$suite.new" "$WORK/$suite"
}

# shellcheck disable=SC2016 # apt fills it in
debian_uri() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1; }

main "$@"
