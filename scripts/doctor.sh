#!/bin/bash
# usage: doctor.sh [--help]
#
# Lists what the scripts need, whether this machine has it, and for each lack what to do. Changes nothing.
#
# Exit status: 0 when everything needed to boot a guest is here (an emulated host counts), 1 otherwise.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

# Command, Debian package, what it is for.
TOOLS=(
    'qemu-system-x86_64 qemu-system-x86 the emulated host'
    'busybox busybox-static programs in the guest'
    'cpio cpio packing an initramfs'
    'depmod kmod the order of kernel modules'
    'dpkg-deb dpkg unpacking the guest kernel'
    'zstd zstd unpacking the guest kernel'
    'xz xz-utils unpacking its modules'
    'mkfs.ext4 e2fsprogs disks for guests'
    'fio fio verified writes of the tests'
    'cc gcc linking'
)
MEMORY_MIB=3072
DISK_MIB=4096

lacks=0

# Each line begins with ok, with note (a script installs it, or goes on without) or with LACKING (it stops a script).
ok() { printf '  ok      %s\n' "$*"; }
note() { printf '  note    %s\n' "$*"; }
lack() {
    printf '  LACKING %s\n' "$*"
    lacks=$((lacks + 1))
}

main() {
    (($# <= 1)) || wrong "$2: not understood (there is only --help)"
    case ${1-} in
    '') ;;
    -h | --help) usage && return ;;
    *) wrong "$1: unknown option (there is only --help)" ;;
    esac
    echo 'Where guests run:'
    virtualisation
    echo 'Tools:'
    rust
    tools
    echo 'Guest kernel:'
    kernel
    echo 'Room:'
    room
    if ((lacks)); then
        echo "$lacks lacking: see above."
        exit 1
    fi
    echo "Everything needed is here; guests run on $(host_name "$(host_kind)")."
}

host_name() {
    case $1 in
    kvm) echo "this machine's KVM" ;;
    *) echo 'an emulated host (scripts/lab.sh)' ;;
    esac
}

virtualisation() {
    local flags
    flags=$(grep -owE 'vmx|svm' /proc/cpuinfo | sort -u | paste -sd ' ') || true
    if [[ $(uname -m) != x86_64 ]]; then
        lack "this is $(uname -m): hotslot is for x86_64 alone"
    fi
    if [[ -n $flags ]]; then ok "the processor offers $flags"; else note 'the processor offers neither vmx nor svm (in a virtual machine: nested virtualisation is off)'; fi
    if [[ ! -e /dev/kvm ]]; then
        note 'there is no /dev/kvm (in a container: --device /dev/kvm; else: modprobe kvm-intel or kvm-amd)'
    elif ! kvm_opens; then
        note "/dev/kvm does not open for $(id -un) (it is $(stat -c '%A %U:%G' /dev/kvm); usermod -aG kvm, or run as root)"
    elif [[ -z $flags ]]; then
        note '/dev/kvm opens, without hardware behind it: enough for tests of a few instructions, not for Linux'
    else
        ok '/dev/kvm opens'
    fi
    [[ $(host_kind) == kvm ]] || note 'so Linux boots on an emulated host here: slower, one processor at a time, same results'
}

rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$PROJECT/Cargo.toml")
    if ! command -v cargo >/dev/null || ! found=$(cd "$PROJECT" && rustc --version 2>/dev/null | cut -d ' ' -f 2); then
        lack "Rust $wanted or later: see https://rustup.rs"
    elif [[ $(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1) != "$wanted" ]]; then
        lack "Rust $found is older than $wanted: rustup update"
    else
        ok "Rust $found ($wanted or later)"
    fi
}

tools() {
    local line command package purpose version
    for line in "${TOOLS[@]}"; do
        read -r command package purpose <<<"$line"
        if command -v "$command" >/dev/null; then
            version=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null) || version='not from a package'
            ok "$command ($purpose): $version"
        elif ((EUID == 0)) && command -v apt-get >/dev/null; then
            note "$command ($purpose): missing, the scripts install it when they need it"
        else
            lack "$command ($purpose): sudo apt-get install --no-install-recommends $package"
        fi
    done
}

kernel() {
    local current=$TARGET/guest-kernel/current
    if [[ -n ${KERNEL-} ]]; then
        if [[ -e $KERNEL ]]; then ok "KERNEL=$KERNEL"; else lack "KERNEL=$KERNEL: there is no such file"; fi
    elif [[ -e $current/complete ]]; then
        ok "$(<"$current/version"), in $(realpath "$current")"
    elif ! command -v apt-get >/dev/null; then
        lack "none here, and no apt-get to fetch Debian's: KERNEL=FILE takes a bzImage or vmlinux"
    elif apt-cache pkgnames linux-image- | grep '^linux-image-.*-cloud-amd64-unsigned$' >/dev/null; then
        note 'none here yet: scripts/kernel.sh fetches it (12 MB) when it is needed'
    elif ((EUID == 0)); then
        note "none here yet, and apt's lists are empty: scripts/kernel.sh refreshes them and fetches it"
    else
        lack "none here yet, and apt's lists name none: sudo apt-get update, on Debian 12 or later; or KERNEL=FILE"
    fi
}

room() {
    local memory disk
    memory=$(($(sed -n 's/^MemAvailable: *\([0-9]*\) kB/\1/p' /proc/meminfo) / 1024))
    disk=$(df -Pm "$PROJECT" | awk 'NR == 2 { print $4 }')
    if ((memory >= MEMORY_MIB)); then
        ok "$memory MiB of memory are free"
    else
        note "$memory MiB of memory are free: the emulated host's default is 2048 (lab.sh --memory), and building needs some"
    fi
    if ((disk >= DISK_MIB)); then
        ok "$disk MiB of disk are free"
    else
        note "$disk MiB of disk are free; a build with its tests takes about $DISK_MIB"
    fi
}

main "$@"
