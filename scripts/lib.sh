# shellcheck shell=bash
# What the scripts share. Sourced, not run; expects `set -euo pipefail`.

# The project's directory, and where downloads and products are kept.
PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck disable=SC2034 # used by the scripts that source this
TARGET=$PROJECT/target

# System tools (depmod, mkfs.ext4) are not in every user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

# The script's own name, for its messages.
ME=${0##*/}

say() { printf '%s: %s\n' "$ME" "$*" >&2; }
die() {
    say "$*"
    exit "${DIE_STATUS:-1}"
}
# For a wrong command line: a status of its own, as hotslot and hotslot-backend have it.
wrong() { DIE_STATUS=${DIE_STATUS:-2} die "$*"; }

# Where hotslot and hotslot-backend are.
BUILT=${HOTSLOT_PROGRAMS:-$TARGET/release}

# need_programs [OPTION]...: builds them, with these options of cargo, unless HOTSLOT_PROGRAMS says where they are.
need_programs() {
    local name
    if [[ -z ${HOTSLOT_PROGRAMS-} ]]; then
        cargo build --release --manifest-path "$PROJECT/Cargo.toml" --bins "$@" </dev/null >&2
        return
    fi
    for name in hotslot hotslot-backend; do
        [[ -f $BUILT/$name && -x $BUILT/$name ]] || die "HOTSLOT_PROGRAMS=$BUILT: there is no program $name"
    done
}

# whole_number OPTION VALUE...: the value of an option, of the arguments that are left.
whole_number() {
    [[ ${2-} =~ ^[1-9][0-9]*$ ]] || wrong "$1 needs a whole number (--help describes it)"
    echo "$2"
}

# remove_at_end PATH: removes it when this script ends, however that is: also by SIGKILL, of its process group, too.
remove_at_end() {
    local open_until_then
    # shellcheck disable=SC2034,SC2016 # nobody writes to it: its end is the message; the shell inside expands $1
    exec {open_until_then}> >(exec setsid sh -c 'trap "" INT TERM HUP; cat >/dev/null; rm -rf "$1"' sh "$1" >/dev/null 2>&1)
}

# The header comment of the script that calls it, as its help.
usage() { sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$0"; }

# Prints what is missing of the given COMMAND:PACKAGE pairs: the packages, one a line.
missing_packages() {
    local pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || printf '%s\n' "${pair#*:}"
    done | sort -u
}

# Makes sure that commands are there: `need COMMAND:PACKAGE...`. Installs what is missing when it may.
need() {
    local missing
    missing=$(missing_packages "$@")
    [[ -n $missing ]] || return 0
    # shellcheck disable=SC2086 # one word per package
    set -- $missing
    command -v apt-get >/dev/null || die "missing: $*. These are names of Debian's packages; here is no apt-get to install them with."
    ((EUID == 0)) || die "missing: $*. Install them: sudo apt-get install --no-install-recommends $*"
    say "installing $*"
    apt_install "$@" || { apt_update && apt_install "$@"; } || die "could not install $*"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 -qq -y \
        --no-install-recommends install "$@" </dev/null >/dev/null
}

apt_update() {
    ((EUID == 0)) || { say "apt's lists look out of date, and only root can refresh them: sudo apt-get update" && return 1; }
    say "refreshing apt's lists"
    apt-get -qq update </dev/null >&2
}

# Where Linux can be booted: `kvm` when this machine's KVM can do it, `lab` when it takes the emulated host.
# (A /dev/kvm without vmx or svm behind it is software: enough for a few instructions, not for a kernel.)
host_kind() {
    if grep -qwE 'vmx|svm' /proc/cpuinfo && kvm_opens; then echo kvm; else echo lab; fi
}

kvm_opens() { (: <>/dev/kvm) 2>/dev/null; }

# Installs what the tests that boot Linux need. `need` reports what is missing and cannot be installed; the tests that
# need it fail then.
linux_tools() {
    (need busybox:busybox-static cpio:cpio depmod:kmod mkfs.ext4:e2fsprogs debugfs:e2fsprogs fio:fio \
        qemu-storage-daemon:qemu-system-common) || true
    [[ $(host_kind) == kvm ]] || (need qemu-system-x86_64:qemu-system-x86) || true
}

# Makes sure that a cargo subcommand is there: `need_cargo NAME VERSION [OPTION]...`.
need_cargo() {
    local name=$1
    shift
    need_crate "cargo-$name" "$@"
}

# Makes sure that the program of a crate of that name is there: `need_crate NAME VERSION [OPTION]...`, built into
# target/tools where it is missing.
need_crate() {
    local name=$1 version=$2
    shift 2
    command -v cargo >/dev/null || die "there is no cargo: install Rust, see https://rustup.rs"
    [[ :$PATH: == *":$TARGET/tools/bin:"* ]] || PATH=$TARGET/tools/bin:$PATH
    type -P "$name" >/dev/null && return
    say "installing $name $version into $TARGET/tools"
    cargo install --quiet --locked --version "$version" --root "$TARGET/tools" "$@" "$name" </dev/null >&2 ||
        die "could not install $name"
}

is_elf() { [[ $(od -An -tx1 -N 4 "$1" 2>/dev/null) == ' 7f 45 4c 46' ]]; }

# Builds the guest's static PID 1 where its sources are newer, and prints its path.
guest_init() {
    local triple=x86_64-unknown-linux-gnu
    local init=$TARGET/guest/$triple/release/init
    local sources=("$PROJECT/guest/src" "$PROJECT/guest/Cargo.toml" "$PROJECT/Cargo.toml" "$PROJECT/Cargo.lock")
    if [[ ! -x $init ]] || [[ -n $(find "${sources[@]}" -newer "$init" -print -quit) ]]; then
        command -v cargo >/dev/null || die "there is no cargo: install Rust, see https://rustup.rs"
        # With a target named, the flags do not reach build scripts; with a directory of its own, they do not throw
        # away what an ordinary build made.
        RUSTFLAGS='-C target-feature=+crt-static -C strip=symbols' cargo build --quiet --release \
            --manifest-path "$PROJECT/Cargo.toml" --package hotslot-guest \
            --target "$triple" --target-dir "$TARGET/guest" </dev/null >&2 ||
            die "could not build guest/"
        touch "$init"
    fi
    printf '%s\n' "$init"
}
