#!/bin/bash
# usage: lab.sh [OPTION]... -- COMMAND [ARG...]
#
# Runs COMMAND on an emulated host that has KVM: QEMU without KVM, with nested SVM, and a stock Debian kernel. Its
# standard input, output and error and its exit status are COMMAND's there.
#
#   --file PATH        copies this file or directory in, at the same absolute path
#   --exec PATH        copies this executable in, with its shared libraries, at the same absolute path
#   --out PATH         copies this file or directory back at the end, from the same absolute path
#   --module NAME      loads this module of the stock kernel there
#   --share DIR        mounts this directory there, at the same absolute path (/ at /host), by virtio-fs: see below
#   --memory SIZE      memory of the emulated host, in MiB or with K, M, G or T (default: 2G)
#   --env NAME=VALUE   adds to COMMAND's environment
#   --timeout SECONDS  time limit for all of it (default: 300; with --tty none)
#   --tty              gives COMMAND a terminal, and passes on this one (Ctrl-] three times ends the lab)
#   --icount           the clock counts instructions: slower, but repeated runs measure the same. For guests with one
#                      vCPU: no Linux with more vCPUs came up so. An emulated host that stands still is given up
#                      (exit status 125): src/design.md says why some do
#   --append WORDS     adds to the emulated host's kernel command line
#   --log FILE         writes the emulated host's kernel log there
#   --verbose          prints when the emulated host is up
#
# COMMAND is copied in with its shared libraries when it is a path, or a name that busybox does not have. It runs as
# root, in a directory of the same name as this one, in which there is nothing but what --file brought.
#
# Both sides of --share have one directory, and COMMAND may do there what you may. This side sees at once what COMMAND
# writes to a file, and within about half a second what it stores through a shared mapping. COMMAND sees names and
# attributes that are at most a second old, and the new contents of a file when it opens it, or looks at its attributes,
# a second after the change. A file in DIR that --file names is not copied.
#
# HOTSLOT_PROGRAMS=DIR   for --share: takes hotslot-backend from there, and does not build it
#
# Exit status: COMMAND's (128+n for signal n); 124 at the time limit; 125 for a wrong command line, a COMMAND
# that is found nowhere, and where the lab itself failed, with the last lines of the kernel's log on standard error; 126 or
# 127 when COMMAND cannot be run there.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

# irqbypass, ccp and kvm come with it.
BASE_MODULES=(kvm-amd)

# The lab's own errors must differ from COMMAND's exit statuses.
DIE_STATUS=125

# These choose the guest's kernel; the emulated host's is always the stock one.
unset KERNEL MODULES

main() {
    local options=() packed=() modules=() shares=() limit='' terminal='' path command
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --) shift && break ;;
        --tty) terminal=1 options+=(--tty) && shift && continue ;;
        --icount | --verbose) options+=("$1") && shift && continue ;;
        --file | --exec | --module | --out | --share | --memory | --env | --timeout | --append | --log) (($# > 1)) || wrong "$1 needs a value (--help describes it)" ;;
        *) wrong "$1: unknown option (--help lists them; COMMAND goes behind --)" ;;
        esac
        case $1 in
        --file | --exec)
            [[ -e $2 ]] || wrong "$1 $2: there is no such file"
            packed+=("$1" "$(realpath -s "$2")")
            ;;
        --module) modules+=("$2") ;;
        --out) options+=(--out "$(realpath -ms "$2")") ;;
        --share)
            [[ -d $2 ]] || wrong "--share $2: this is not a directory"
            shares+=("$(realpath "$2")")
            ;;
        --timeout) limit=$(whole_number "$@") ;;
        # What is right goes on as the others do.
        --memory) [[ $2 =~ ^[1-9][0-9]*[KMGTkmgt]?$ ]] || wrong "--memory $2: this is not a size: MiB, or a number with K, M, G or T" ;;&
        --env) [[ $2 == ?*=* ]] || wrong "--env $2: this is not NAME=VALUE" ;;&
        --append) [[ $2 != *$'\n'* ]] || wrong "--append: the kernel's command line is one line" ;;&
        *) options+=("$1" "$2") ;;
        esac
        shift 2
    done
    (($#)) || wrong "there is no COMMAND to run (--help describes it)"
    need qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio
    [[ -n $limit || -n $terminal ]] || limit=300
    [[ -z $limit ]] || options+=(--timeout "$limit")
    [[ -z $terminal ]] || options+=(--env "TERM=${TERM:-vt100}")

    command=$1
    shift
    if [[ $command == */* ]]; then
        path=$(realpath -ms "$command")
    elif has_applet "$command"; then
        path=''
    else
        path=$(command -v -- "$command") || die "$command: not found, neither here nor in busybox"
    fi
    # A path that does not exist here may exist on the emulated host.
    if [[ -e $path ]]; then
        packed+=(--exec "$path")
    fi
    command=${path:-$command}

    local kernel init base extra name
    # The list of the second image takes the place of the first one's.
    ((${#modules[@]} == 0)) || for name in "${BASE_MODULES[@]}" "${modules[@]}"; do packed+=(--module "$name"); done
    kernel=$("$PROJECT/scripts/kernel.sh") || exit 125
    init=$(guest_init) || exit 125
    base=$(base_image "$kernel" "$init") || exit 125
    options+=(--initramfs "$base")
    for path in "${shares[@]}"; do options+=(--share "$path"); done
    if ((${#shares[@]})); then
        need_programs --quiet --locked || exit 125
        options+=(--backend "$BUILT/hotslot-backend")
    fi
    if ((${#packed[@]})); then
        # Open, and without a name from now on: nothing is left to clean up, however this ends.
        extra=$(mktemp)
        exec 9<>"$extra"
        rm "$extra"
        "$PROJECT/scripts/image.sh" --bare "${packed[@]}" -o - >&9 </dev/null || exit 125
        options+=(--initramfs /dev/fd/9)
    fi
    exec "$init" lab --qemu "$(command -v qemu-system-x86_64)" --kernel "$(kernel_file "$kernel")" \
        "${options[@]}" -- "$command" "$@"
}

has_applet() { busybox --list | grep -xF -- "$1" >/dev/null; }

# The image that every run begins with; packed anew when something in it is newer.
base_image() {
    local kernel=$1 init=$2 base=$TARGET/images/lab-${1##*/}.cpio
    local script=$PROJECT/scripts/image.sh name modules=()
    for name in "${BASE_MODULES[@]}"; do modules+=(--module "$name"); done
    if [[ ! $base -nt $init || ! $base -nt $kernel/complete || ! $base -nt $script || ! $base -nt $0 ]]; then
        mkdir -p "$TARGET/images"
        "$script" -o "$base" "${modules[@]}" </dev/null || return 1
    fi
    printf '%s\n' "$base"
}

kernel_file() {
    # The unpacked one: a second less than to unpack it under emulation.
    echo "$1/vmlinux"
}

main "$@"
