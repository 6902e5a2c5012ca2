#!/bin/bash
# usage: image.sh -o FILE [--module NAME]... [--file SRC[:DEST]]... [--exec PATH[:DEST]]...
#                 [--command LINE | -- COMMAND [ARG...]]
#
# Packs an initramfs: the guest's PID 1 (guest/), busybox with all its commands, and
#
#   --module NAME        a module of the kernel (kernel.sh's, or KERNEL= and MODULES=) and those it needs; PID 1
#                        loads them in this order. One that is built in is skipped
#   --file SRC[:DEST]    a file, or a directory with what is in it; without DEST at the same absolute path
#   --exec PATH[:DEST]   an executable, with its shared libraries and, for a script, its interpreter
#   --command LINE       what PID 1 runs: a line for the shell
#   -- COMMAND [ARG...]  what PID 1 runs, without a shell. (The kernel's command line goes before either; with none
#                        of them, PID 1 runs a shell)
#   --bare               only what is named: for appending to another image (the kernel unpacks them in turn)
#
# FILE - is standard output. The archive is not compressed: emulated processors unpack more slowly than they copy.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

out='' bare='' modules=() files=() executables=() command=()

main() {
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --bare) bare=1 && shift && continue ;;
        --) shift && command=("$@") && break ;;
        -o | --module | --file | --exec | --command) (($# > 1)) || wrong "$1 needs a value (--help describes it)" ;;
        *) wrong "$1: unknown option (--help lists them)" ;;
        esac
        case $1 in
        -o) out=$2 ;;
        --module) modules+=("$2") ;;
        --file) files+=("$2") ;;
        --exec) executables+=("$2") ;;
        --command) command=(/bin/sh -c "$2") ;;
        esac
        shift 2
    done
    [[ -n $out ]] || wrong "no -o FILE: where should the image go?"
    need cpio:cpio

    stage=$(mktemp -d)
    remove_at_end "$stage"
    chmod 755 "$stage"
    [[ -n $bare ]] || add_base
    ((${#modules[@]} == 0)) || add_modules "${modules[@]}"
    local each
    for each in ${files[@]+"${files[@]}"}; do add_file "$each"; done
    for each in ${executables[@]+"${executables[@]}"}; do add_executable "$each"; done
    copy_collected
    if ((${#command[@]})); then
        mkdir -p "$stage/etc/hotslot"
        printf '%s\0' "${command[@]}" >"$stage/etc/hotslot/command"
    fi
    if [[ $out == - ]]; then
        pack
    else
        # A machine that boots from the old image keeps it, and no machine sees half a file.
        local new
        new=$(mktemp "$out.XXXXXX")
        remove_at_end "$new"
        pack >"$new" || die "could not pack $out"
        chmod 644 "$new"
        mv "$new" "$out"
    fi
}

# PID 1, busybox, and Debian's directories: programs and libraries in /usr, the old names as links.
add_base() {
    need busybox:busybox-static
    local name init
    init=$(guest_init)
    mkdir -p "$stage"/{dev,etc/hotslot,proc,run,root,sys,tmp,usr/{bin,sbin,lib,lib64},var/tmp}
    for name in bin sbin lib lib64; do ln -s "usr/$name" "$stage/$name"; done
    ln -s ../run "$stage/var/run"
    ln -s /proc/mounts "$stage/etc/mtab"
    cp "$init" "$stage/init"
    ln -s /init "$stage/usr/bin/probe"
    busybox --install -s "$stage/usr/bin"
    # It linked itself, too.
    cp -L --remove-destination "$(command -v busybox)" "$stage/usr/bin/busybox"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$stage/etc/passwd"
    echo 'root:x:0:' >"$stage/etc/group"
    echo '127.0.0.1 localhost' >"$stage/etc/hosts"
}

# Modules with what they need, unpacked, and the order in which PID 1 loads them (one line per name).
add_modules() {
    local kernel version source lines file
    kernel=$("$PROJECT/scripts/kernel.sh")
    source=$kernel/modules
    [[ -e $source/modules.dep ]] || die "the kernel in $kernel came without modules (MODULES=DIR names them)"
    version=$(<"$kernel/version")
    mkdir -p "$stage/etc/hotslot" "$stage/usr/lib/modules/$version"
    lines=$(resolve_modules "$source" "$@") || exit 1
    while read -r file; do
        unpack_module "$source/$file" "$stage/usr/lib/modules/$version/$file"
    done < <(sed 's/^[^ ]* //; s/ /\n/g' <<<"$lines" | grep . | sort -u)
    # An emulated processor takes 0.7 s to verify a signature, and this kernel does not require one.
    if grep -qxF '# CONFIG_MODULE_SIG_FORCE is not set' "$kernel/config" 2>/dev/null && command -v strip >/dev/null; then
        find "$stage/usr/lib/modules" -name '*.ko' -exec strip --strip-debug {} +
    fi
    sed "s# kernel/# /usr/lib/modules/$version/kernel/#g; s#\.ko\.[a-z0-9]*#.ko#g" <<<"$lines" >"$stage/etc/hotslot/modules"
}

# For each name a line: the name, then the files to load, dependencies first (modules.dep has them last first).
resolve_modules() {
    local source=$1
    shift
    awk -v names="$*" '
        function plain(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
        FILENAME ~ /modules.builtin$/ { builtin[plain($1)] = 1; next }
        { file = $1; sub(/:$/, "", file); line = ""
          for (i = NF; i > 1; i--) line = line " " $i
          files[plain(file)] = line " " file }
        END {
            count = split(names, wanted, " ")
            for (i = 1; i <= count; i++) {
                key = wanted[i]; gsub(/-/, "_", key)
                if (key in files) print wanted[i] files[key]
                else if (!(key in builtin)) { missing = missing " " wanted[i] }
            }
            if (missing) { print "image.sh: this kernel has no module" missing > "/dev/stderr"; exit 1 }
        }' "$source/modules.builtin" "$source/modules.dep"
}

unpack_module() {
    local packed=$1 module=${2%.ko*}.ko
    mkdir -p "${module%/*}"
    case $packed in
    *.ko) cp "$packed" "$module" ;;
    *.xz) need xz:xz-utils && xz -dc "$packed" >"$module" ;;
    *.zst) need zstd:zstd && zstd -dcq "$packed" >"$module" ;;
    *.gz) gzip -dc "$packed" >"$module" ;;
    *) die "$packed: a compression that this script does not know" ;;
    esac
}

# Splits SRC[:DEST] into src and dest; only an absolute path after a colon is a DEST.
split_pair() {
    src=$1 dest=''
    if [[ $1 == *:/* && ! -e $1 ]]; then
        src=${1%:/*} dest=/${1##*:/}
    fi
    [[ -e $src ]] || die "$src: there is no such file"
    src=$(realpath -s "$src")
    dest=$(place "${dest:-$src}")
}

# Where a path lies in the image: /bin, /sbin, /lib and /lib64 are links into /usr there, /var/run is one to /run.
place() {
    case $1 in
    /bin/* | /sbin/* | /lib/* | /lib64/*) printf '/usr%s\n' "$1" ;;
    /var/run/*) printf '%s\n' "${1#/var}" ;;
    *) printf '%s\n' "$1" ;;
    esac
}

# What keeps its path is collected and copied by one process: an executable may have a hundred libraries.
collected=()

add_file() {
    local src dest
    split_pair "$1"
    if [[ $src == "$dest" ]]; then
        collected+=("$src")
    else
        mkdir -p "$stage${dest%/*}"
        if [[ -d $src && -d $stage$dest ]]; then src=$src/.; fi
        cp -RHT --preserve=mode,timestamps "$src" "$stage$dest"
    fi
}

copy_collected() {
    ((${#collected[@]})) || return 0
    # Each once: cp warns otherwise. From /: with --parents and --preserve, cp 9.1 fails for absolute paths elsewhere.
    mapfile -t -d '' collected < <(printf '%s\0' "${collected[@]#/}" | sort -zu)
    (cd / && cp -RH --preserve=mode,timestamps --parents -- "${collected[@]}" "$stage")
}

add_executable() {
    local src dest words word library
    split_pair "$1"
    [[ -f $src && -x $src ]] || die "$src is not an executable file"
    add_file "$src:$dest"
    if is_elf "$src"; then
        while read -r library; do
            [[ -e $(place "$library") ]] && library=$(place "$library")
            add_file "$library:$(place "$library")"
        done < <(libraries "$src")
    elif [[ $(head -c 2 "$src" | tr -d '\0') == '#!' ]]; then
        # `#!/usr/bin/env bash` needs both; busybox has many of them already.
        read -ra words < <(head -n 1 "$src" | cut -c 3-)
        for word in "${words[@]:0:2}"; do
            if busybox --list | grep -xF -- "${word##*/}" >/dev/null; then continue; fi
            word=$(command -v -- "$word" 2>/dev/null) || continue
            [[ $word != /* ]] || add_executable "$word"
        done
    fi
}

# The shared libraries and the loader that an ELF file names; nothing for a static one.
libraries() {
    local answer
    answer=$(ldd "$1" 2>&1) || return 0
    ! grep -F 'not found' <<<"$answer" >&2 || die "$1: shared libraries are missing, see above"
    sed -n 's/^.*=> \(\/[^ ]*\) .*$/\1/p; s/^[[:space:]]*\(\/[^ ]*\) (.*$/\1/p' <<<"$answer"
}

# newc, of root's, in one order and with one date: the same input gives the same image.
pack() {
    (
        cd "$stage"
        find . -exec touch -hd @0 {} +
        find . -mindepth 1 -print0 | LC_ALL=C sort -z |
            cpio --null --create --format=newc --owner=0:0 --reproducible --quiet
    )
}

main "$@"
