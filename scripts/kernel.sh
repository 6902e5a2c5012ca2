#!/bin/bash
# usage: kernel.sh [--help]
#
# Fetches a stock Linux kernel for guests and for the emulated host, and prints the directory where it lies:
#
#   bzImage   the kernel as Debian ships it
#   vmlinux   the same, unpacked: an ELF file
#   modules/  its modules, with modules.dep
#   config    how it was built (where known)
#   version   its `uname -r`
#
# It is the newest linux-image-*-cloud-amd64-unsigned, 6.12 or later, that apt knows of; it is unpacked, not
# installed, and kept under target/guest-kernel. The archive is asked again after a week.
#
# KERNEL=FILE   takes this bzImage or ELF file instead
# MODULES=DIR   with KERNEL: its /lib/modules/VERSION
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

CACHE=$TARGET/guest-kernel
OLDEST=6.12
RECENT_DAYS=7

main() {
    (($# <= 1)) || wrong "$2: not understood (--help lists what is)"
    case ${1-} in
    '') ;;
    -h | --help) usage && return ;;
    *) wrong "$1: unknown option (--help lists them)" ;;
    esac
    mkdir -p "$CACHE"
    # One at a time; the others then find it there.
    exec 8>"$CACHE/lock"
    flock 8
    if [[ -n ${KERNEL-} ]]; then
        from_file "$KERNEL" "${MODULES-}"
        return
    fi
    local current=$CACHE/current
    if [[ -e $current/complete && -n $(find "$CACHE/asked" -mtime "-$RECENT_DAYS" 2>/dev/null) ]]; then
        realpath "$current"
        return
    fi
    if from_archive; then
        touch "$CACHE/asked"
    elif [[ -e $current/complete ]]; then
        say "going on with the kernel that is here: $(<"$current/version")"
    else
        die "there is no kernel. KERNEL=FILE takes a bzImage or vmlinux of your own."
    fi
    realpath "$current"
}

# Makes $CACHE/current the newest kernel of the archive.
from_archive() {
    command -v apt-get >/dev/null || {
        say "there is no apt-get here to fetch Debian's kernel with"
        return 1
    }
    local package
    package=$(newest_package)
    if [[ -z $package ]]; then
        apt_update || true
        package=$(newest_package)
    fi
    [[ -n $package ]] || {
        say "apt knows no linux-image-*-cloud-amd64-unsigned of $OLDEST or later"
        return 1
    }
    if [[ ! -e $CACHE/$package/complete ]]; then
        download "$package" || {
            # Old kernels leave the archive: what the lists name may be gone.
            apt_update && package=$(newest_package) && download "$package"
        } || {
            say "could not download $package"
            return 1
        }
    fi
    ln -sfn "$package" "$CACHE/current"
}

newest_package() {
    local package
    apt-cache pkgnames linux-image- 2>/dev/null |
        grep -E '^linux-image-[0-9].*-cloud-amd64-unsigned$' | sort -V | tail -n 1 |
        while read -r package; do
            # sort puts the older first: fine when that is the limit, or the package itself when they agree.
            [[ $(printf '%s\n' "$OLDEST" "${package#linux-image-}" | sort -V | head -n 1) != "$OLDEST" ]] || echo "$package"
        done
}

download() {
    local package=$1 work
    [[ ! -e $CACHE/$package/complete ]] || return 0
    need dpkg-deb:dpkg depmod:kmod
    say "downloading $package"
    work=$(mktemp -d "$CACHE/new.XXXXXX")
    # shellcheck disable=SC2064 # this directory, now
    trap "rm -rf '$work'" EXIT
    # The user _apt could not write into our directory; apt would warn of it.
    (cd "$work" && apt-get -qq -o APT::Sandbox::User=root download "$package" </dev/null >&2) || return 1
    dpkg-deb -x "$work"/*.deb "$work/tree"
    local version images=("$work"/tree/boot/vmlinuz-*)
    version=${images[0]##*/vmlinuz-}
    local modules=$work/tree/lib/modules
    [[ -d $modules ]] || modules=$work/tree/usr/lib/modules
    mkdir -p "$work/kernel/lib"
    mv "${images[0]}" "$work/kernel/bzImage"
    mv "$work/tree/boot/config-$version" "$work/kernel/config"
    mv "$modules" "$work/kernel/lib/modules"
    ln -s "lib/modules/$version" "$work/kernel/modules"
    depmod -b "$work/kernel" "$version"
    complete "$work/kernel" "$version" "$package"
    rm -rf "$work"
    trap - EXIT
}

# A kernel of the user's: the same names, in a directory of its own.
from_file() {
    local file modules=$2 version=unknown work name
    file=$(realpath -e "$1" 2>/dev/null) || die "KERNEL=$1: there is no such file"
    if [[ -n $modules ]]; then
        modules=$(realpath -e "$modules" 2>/dev/null) || die "MODULES=$2: there is no such directory"
        version=${modules##*/}
    fi
    name=custom-$(stat -c '%n %s %y' "$file" ${modules:+"$modules"} | sha256sum | head -c 12)
    if [[ -e $CACHE/$name/complete ]]; then
        printf '%s\n' "$CACHE/$name"
        return
    fi
    work=$(mktemp -d "$CACHE/new.XXXXXX")
    # shellcheck disable=SC2064 # this directory, now
    trap "rm -rf '$work'" EXIT
    mkdir "$work/kernel"
    if is_elf "$file"; then
        ln -s "$file" "$work/kernel/vmlinux"
    else
        ln -s "$file" "$work/kernel/bzImage"
    fi
    if [[ -n $modules ]]; then
        if [[ -e $modules/modules.dep ]]; then
            ln -s "$modules" "$work/kernel/modules"
        else
            need depmod:kmod
            mkdir -p "$work/kernel/lib/modules"
            cp -a "$modules" "$work/kernel/lib/modules/$version"
            ln -s "lib/modules/$version" "$work/kernel/modules"
            depmod -b "$work/kernel" "$version"
        fi
    fi
    complete "$work/kernel" "$version" "$name"
    rm -rf "$work"
    trap - EXIT
    printf '%s\n' "$CACHE/$name"
}

# The last steps, then the move to the final name.
complete() {
    local directory=$1 version=$2 name=$3
    printf '%s\n' "$version" >"$directory/version"
    if [[ ! -e $directory/vmlinux ]]; then
        unpack_bzimage "$directory/bzImage" "$directory/vmlinux"
    fi
    touch "$directory/complete"
    rm -rf "${CACHE:?}/$name"
    mv "$directory" "$CACHE/$name"
}

# Takes the ELF file out of a bzImage: Documentation/arch/x86/boot.rst, payload_offset and payload_length.
unpack_bzimage() {
    local file=$1 out=$2 sectors offset length magic filter
    [[ $(dd if="$file" bs=1 skip=$((0x202)) count=4 status=none) == HdrS ]] ||
        die "$file is neither an ELF file nor a bzImage"
    sectors=$(number "$file" $((0x1f1)) 1)
    offset=$((($(number "$file" $((0x248)) 4)) + (sectors + 1) * 512))
    length=$(number "$file" $((0x24c)) 4)
    magic=$(od -An -tx1 -j "$offset" -N 4 "$file" | tr -d ' ')
    # All but gzip have the unpacked size behind them, four bytes that their tools take for damage.
    length=$((length - 4))
    case $magic in
    7f454c46) filter='cat' ;;
    1f8b*) filter='gzip -dc' length=$((length + 4)) ;;
    28b52ffd) filter='zstd -dcq' && need zstd:zstd ;;
    fd377a58) filter='xz -dc' && need xz:xz-utils ;;
    5d0000*) filter='xz -dc --format=lzma' && need xz:xz-utils ;;
    425a68*) filter='bzip2 -dc' && need bzip2:bzip2 ;;
    02214c18) filter='lz4 -dcq' && need lz4:lz4 ;;
    894c5a4f) filter='lzop -dcq' && need lzop:lzop ;;
    *) die "$file: its payload begins with $magic, a compression that this script does not know" ;;
    esac
    # shellcheck disable=SC2086 # a command and its options
    tail -c +$((offset + 1)) "$file" | head -c "$length" | $filter >"$out" || true
    is_elf "$out" || die "$file: no ELF file came out of its payload"
}

# The little-endian number of COUNT bytes at OFFSET of FILE.
number() {
    od -An -v --endian=little "-tu$3" -j "$2" -N "$3" "$1" | tr -d ' '
}

main "$@"
