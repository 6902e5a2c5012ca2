#!/bin/bash
# usage: run.sh [OPTION]... [--] [COMMAND [ARG...]]
#
# Boots a stock Debian kernel under hotslot. With a COMMAND, the guest runs it: standard input, output and error are this
# script's, byte for byte, and so is the exit status. With options but no COMMAND you get a shell on the guest's serial
# console (its `poweroff` or Ctrl-a x ends it). Without either, the main job is shown, end to end: see below.
#
#   --kernel FILE      boots this bzImage, vmlinux or ELF file with a PVH note instead
#   --modules DIR      with --kernel: its modules, a /lib/modules/VERSION. Without, all that is needed must be built in
#   --root             this machine's own root file system, read-only, under an overlay in the guest's memory; COMMAND
#                      starts there in the directory where you are. /proc, /sys, /dev and /run are the guest's. (Where
#                      this machine mounts several file systems below /, the emulated host may take two for one)
#   --share DIR        the directory DIR of this machine at /mnt, where COMMAND starts
#   --no-dax           without DAX: files of --share and --root go through the guest's own page cache
#   --disk IMAGE       the file IMAGE as the disk /dev/vda; given again, /dev/vdb and so on
#   --net              a network (eth0), by passt of this machine, 2025 or later (Debian 13). On the emulated host it
#                      leads no further than there
#   --backend LINE --type TYPE[,KEY=VALUE]...
#                      a device of a back-end of yours: LINE is for the shell, with {socket} where the back-end is to
#                      listen; TYPE and the keys are those of `hotslot --vhost-user`. May be given several times. When one
#                      ends before it listens, no guest is started
#   --module NAME      loads this module of the kernel as well
#   --shell            a file of this machine, target/run/pmem.img, as persistent memory, mounted at /mnt with DAX
#   --cpus N, --memory SIZE, -m SIZE
#                      vCPUs (1) and memory (512M) of the guest
#   --tty              gives COMMAND a terminal, and passes on this one (Ctrl-] three times ends the guest)
#   --memory-picture FILE
#                      draws the guest's memory into FILE, as SVG, at each SIGUSR1 of hotslot and at the end
#   --verbose, -v      hotslot's messages on standard error; -vv more of them
#   HOTSLOT OPTION...  others of `hotslot --help` go to hotslot: -i, --initramfs, -c, --cmdline, --log, --log-file,
#                      --unavailable-page, --backend-loss, --trace-vhost-user, --connect-timeout, --sandbox, --dump; and
#                      --gdb, --vhost-user, but not on the emulated host
#   --help, -h         prints this text
#
# Options may stand in any order before COMMAND. Unknown ones, and missing files and directories, are refused before
# anything is built; what hotslot or the kernel judges (TYPE, modules, values of HOTSLOT OPTIONs), only after that. What
# is missing is installed and built first, which is told on standard error. Where this machine's KVM cannot boot Linux,
# everything runs on the emulated host of lab.sh, which the script says on a terminal and where there is no COMMAND. Only
# the time differs: there a guest is up after half a minute, or later where other programs use the processors.
#
# COMMAND is looked for in the guest: busybox, or with --root what this machine has. It runs as root, alone, with no
# environment but PATH, HOME and, with --tty, TERM. Without --share or --root it starts in /. It gets all of the input,
# then its end; what it writes comes out at once, in order within each stream. Once everything is built, standard error
# has nothing else on it, as long as it is no terminal and all goes well. When COMMAND ends, what it left running is
# killed, and disks are synchronised, but not unmounted. There is no time limit (timeout(1) sets one). However run.sh
# ends, also by SIGKILL, its processes and temporary files go with it.
#
# DIR itself is shared, not a copy: the guest may do there what you may. Each side sees at once what the other does. On
# the emulated host that is so for what the guest does, but for stores through a shared mapping, which take up to half a
# second; the guest sees what you change a second or two later, and in a file that it has mapped only after it has looked
# at that file's attributes or opened it again (lab.sh --share). There an IMAGE is copied in, and copied back at the end; so
# are the files of -i, --log-file, --dump, --memory-picture and --trace-vhost-user.
#
# Without any argument: a file of this machine, target/run/pmem.img, is the persistent memory of the guest (/dev/pmem0),
# mapped into it by a vhost-user back-end while it runs. The guest mounts it with DAX, writes a file through mmap and
# switches itself off; then that file is read out of the image here.
#
# HOTSLOT_PROGRAMS=DIR   takes hotslot and hotslot-backend from there, and builds neither
#
# Exit status: COMMAND's (128+n for signal n), or the shell's; 126 or 127 when COMMAND cannot be run; 125 when the guest
# was not started, or ended before COMMAND did, with the last lines of its console. 2 for a wrong option, 1 when
# something around it failed.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

RUN=$TARGET/run
IMAGE=$RUN/pmem.img
# As guest.sh writes it.
GREETING=/hello.txt
HOTSLOT=$BUILT/hotslot
BACKEND=$HOTSLOT-backend

# As CMDLINE_MOST of src/arch/x86_64/kernel.rs.
CMDLINE_MOST=2047

# What the options ask for.
job=console kernel='' modules_of='' root='' share='' dax=1 disks=() net='' shell='' tty='' verbose='' written=() command=() memory=512M
lines=() types=() modules=(virtio_mmio) hotslot_options=() cmdline='' read=() local_sockets=()

main() {
    (($#)) || job=demo shell=1
    parse "$@"
    ((${#command[@]} == 0)) || job='command'
    local host
    host=$(host_kind)
    [[ $host == kvm || ${#local_sockets[@]} == 0 ]] ||
        wrong "${local_sockets[0]}: its sockets are this machine's, and hotslot runs on an emulated host (for a back-end: --backend)"
    build
    # Without a terminal, a COMMAND's standard error is its own.
    [[ $host == kvm || ($job == command && ! -t 2) ]] || say "this machine's KVM cannot boot Linux: running on an emulated host (scripts/lab.sh)"
    devices "$host"
    find_kernel
    pack_guest
    local variables=(HOTSLOT="$HOTSLOT" BACKEND="$BACKEND" KERNEL="$kernel" GUEST="$guest" JOB="$job" SETUP="$setup"
        DEVICES="$devices" CMDLINE="$cmdline" PATH="$PATH")
    local script=$PROJECT/scripts/run/host.sh status=0
    if [[ $job == command ]]; then
        run_command "$host"
    else
        run_console "$host" "${hotslot_options[@]}" || status=$?
        ((status == 0)) || return "$status"
        [[ $job != demo ]] || show_greeting
    fi
}

parse() {
    local option
    while (($#)); do
        case $1 in
        # As other programs take them.
        --*=*) option=$1 && shift && set -- "${option%%=*}" "${option#*=}" "$@" ;;
        -[mic]?*) option=$1 && shift && set -- "${option:0:2}" "${option:2}" "$@" ;;
        esac
        case $1 in
        -h | --help) usage && exit ;;
        --) shift && break ;;
        --root) root=1 && shift && continue ;;
        --no-dax) dax='' && shift && continue ;;
        --net) net=1 && shift && continue ;;
        --shell) shell=1 && shift && continue ;;
        --tty) tty=1 && shift && continue ;;
        --verbose | -v | -vv) verbose=1 hotslot_options+=("$1") && shift && continue ;;
        --kernel | --modules | --share | --disk | --backend | --type | --module | --memory-picture | --cpus | -m | --memory | -i | --initramfs | -c | --cmdline | --log | --log-file | --unavailable-page | --backend-loss | --trace-vhost-user | --connect-timeout | --sandbox | --gdb | --dump | --vhost-user)
            (($# > 1)) || wrong "$1 needs a value (--help describes it)"
            ;;
        -*) wrong "$1: there is no such option (--help lists them)" ;;
        *) break ;;
        esac
        case $1 in
        --kernel) check_kernel "$2" && kernel=$(realpath "$2") ;;
        --modules)
            [[ -d $2 ]] || wrong "--modules $2: this is not a directory"
            modules_of=$(realpath "$2")
            ;;
        --share)
            [[ -d $2 ]] || wrong "--share $2: this is not a directory"
            [[ -z $share ]] || wrong "--share $2: there is a --share already, $share"
            share=$(realpath "$2")
            ;;
        --disk)
            [[ -f $2 && -r $2 && -w $2 ]] || wrong "--disk $2: this is not a file that can be read and written"
            disks+=("$(realpath "$2")")
            ;;
        --backend)
            [[ $2 == *'{socket}'* ]] || wrong "--backend $2: {socket} is missing, where the back-end is to listen"
            ((${#lines[@]} == ${#types[@]})) || wrong "--backend $2: the one before it has no --type"
            lines+=("$2")
            ;;
        --type)
            ((${#lines[@]} == ${#types[@]} + 1)) || wrong "--type $2: there is no --backend before it"
            types+=("$2")
            ;;
        --module) modules+=("$2") ;;
        -c | --cmdline)
            (($(printf %s "$2" | wc -c) <= CMDLINE_MOST)) ||
                wrong "$1: $(printf %s "$2" | wc -c) bytes, and the kernel takes $CMDLINE_MOST, with the words that are always there"
            cmdline+=${cmdline:+ }$2
            ;;
        --cpus)
            [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || wrong "--cpus $2: this is not a number of processors"
            hotslot_options+=("$1" "$2")
            ;;
        -m | --memory)
            [[ $2 =~ ^[1-9][0-9]*[KMGTkmgt]?$ ]] || wrong "$1 $2: this is not a size, such as 512M or 1G"
            memory=${2^^}
            hotslot_options+=("$1" "$2")
            ;;
        -i | --initramfs)
            [[ -f $2 && -r $2 ]] || wrong "$1 $2: there is no such file, or it cannot be read"
            read+=("$(realpath "$2")")
            hotslot_options+=("$1" "${read[-1]}")
            ;;
        --gdb | --vhost-user) local_sockets+=("$1 $2") hotslot_options+=("$1" "$2") ;;
        --trace-vhost-user | --memory-picture | --log-file | --dump)
            [[ ! -e $2 || -f $2 ]] || wrong "$1 $2: this is not a regular file"
            # The emulated host gets it and gives it back.
            { : >>"$2"; } 2>/dev/null || wrong "$1 $2: this file cannot be written"
            written+=("$(realpath "$2")")
            hotslot_options+=("$1" "${written[-1]}")
            ;;
        *) hotslot_options+=("$1" "$2") ;;
        esac
        shift 2
    done
    command=("$@")
    ((${#lines[@]} == ${#types[@]})) || wrong "--backend ${lines[-1]}: its --type is missing"
    [[ -z $modules_of || -n $kernel ]] || wrong "--modules $modules_of: they belong to a --kernel, which is missing"
    [[ -z $shell || -z $share ]] || wrong "--shell and --share: both take /mnt"
    [[ -z $tty ]] || ((${#command[@]})) || wrong "--tty: there is no COMMAND, and the shell has a terminal anyway"
    [[ -z $tty || -t 0 ]] || wrong "--tty: standard input is no terminal"
    [[ -z $net ]] || has_passt || wrong "--net: this machine has no passt that knows --vhost-user; package passt of Debian 13 does"
}

check_kernel() {
    [[ -f $1 && -r $1 ]] || wrong "--kernel $1: there is no such file, or it cannot be read"
    is_elf "$1" || [[ $(dd if="$1" bs=1 skip=$((0x202)) count=4 status=none 2>/dev/null | tr -d '\0') == HdrS ]] ||
        wrong "--kernel $1: this is neither a bzImage nor an ELF file"
}

has_passt() { passt --help 2>&1 | grep -e --vhost-user >/dev/null; }

build() {
    command -v cargo >/dev/null || die "there is no cargo: install Rust, see https://rustup.rs"
    local progress=(--quiet)
    # The first build takes minutes: cargo shows how far it is.
    [[ -x $HOTSLOT && -x $BACKEND ]] || progress=()
    need_programs "${progress[@]}"
    need mkfs.ext4:e2fsprogs debugfs:e2fsprogs busybox:busybox-static cpio:cpio
    [[ -x $TARGET/guest/x86_64-unknown-linux-gnu/release/init ]] || say "building the guest's PID 1"
    init=$(guest_init)
    mkdir -p "$RUN"
    [[ -z $shell ]] || make_image
}

make_image() {
    [[ -e $IMAGE ]] && return
    # DAX needs blocks of a page, and no journal keeps a small image small.
    truncate -s 64M "$IMAGE.new"
    mkfs.ext4 -q -b 4096 -O '^has_journal' "$IMAGE.new"
    mv "$IMAGE.new" "$IMAGE"
}

# For host.sh: DEVICES, a line for each (type and keys, then the back-end's command line); and SETUP, words for guest.sh.
devices() {
    devices='' setup='' lab=()
    local here='' window=1G number fs file
    # There these are not files of the host's own disk, but of a directory that lab.sh shares.
    [[ $1 == kvm ]] || here=,foreign-files=on
    [[ -n $dax ]] || window=0
    fs="$(quote "$BACKEND") fs --once --socket {socket} --window $window"
    # lab.sh has the root directory elsewhere.
    local top=/
    [[ $1 == kvm ]] || top=/host
    if [[ -n $root ]]; then
        device "type=fs,name=root$here" "$fs --tag root --read-only --dir $top"
        setup+=" root${dax:+:dax}" modules+=(overlay) lab+=(--share /)
    fi
    if [[ -n $share ]]; then
        local place=$share
        [[ $share != / ]] || place=$top
        device "type=fs,name=share$here" "$fs --tag share --dir $(quote "$place")"
        setup+=" share${dax:+:dax}" lab+=(--share "$share")
    fi
    for file in "${read[@]}"; do lab+=(--file "$file"); done
    for file in "${written[@]}"; do lab+=(--file "$file" --out "$file"); done
    if [[ -n $shell ]]; then
        device type=pmem,name=pmem0 "$(quote "$BACKEND") pmem --once --socket {socket} --file $(quote "$IMAGE")"
        setup+=" pmem" modules+=(virtio_pmem nd_pmem) lab+=(--file "$IMAGE" --out "$IMAGE")
    fi
    for number in "${!disks[@]}"; do
        device "type=blk,name=disk$number" "$(quote "$BACKEND") blk --once --socket {socket} --file $(quote "${disks[number]}")"
        modules+=(virtio_blk) lab+=(--file "${disks[number]}" --out "${disks[number]}")
    done
    if [[ -n $net ]]; then
        local passt='passt --foreground --quiet --one-off --vhost-user --socket {socket}'
        # There it finds no user called nobody, and cannot leave an initramfs by pivot_root: it gets a root of its own.
        [[ $1 == kvm ]] || passt="unshare -m sh -c 'mkdir /passt && mount -o rbind / /passt && cd /passt &&
            mount -o move . / && exec chroot . \"\$@\"' sh $(command -v passt) --runas 65534 ${passt#passt}"
        device type=net,name=net "${passt//$'\n'/ }"
        setup+=" net" modules+=(virtio_net) lab+=(--exec "$(command -v passt)")
    fi
    for number in "${!lines[@]}"; do
        device "type=${types[number]}" "${lines[number]}"
        lab_words "${lines[number]}"
        case ${types[number]%%,*} in
        net | 1) modules+=(virtio_net) ;;
        blk | 2) modules+=(virtio_blk) ;;
        vsock | 19) modules+=(vmw_vsock_virtio_transport) ;;
        pmem | 27) modules+=(virtio_pmem nd_pmem) ;;
        esac
    done
    [[ $job != demo ]] || setup+=" demo"
}

device() { devices+="$1 $2"$'\n'; }

quote() { printf "'%s'" "${1//\'/\'\\\'\'}"; }

# What the emulated host needs of a back-end's command line: its program, and each word that is a file here.
lab_words() {
    local words word
    read -ra words <<<"$1"
    for word in "${words[@]}"; do
        if [[ $word == "${words[0]}" ]]; then
            word=$(command -v -- "$word") && lab+=(--exec "$word")
        elif [[ -d $word && $word != / ]]; then
            lab+=(--share "$word")
        elif [[ -f $word ]]; then
            lab+=(--file "$word")
        fi
    done
}

# The kernel file to boot, in `kernel`.
find_kernel() {
    export KERNEL=${kernel:-${KERNEL-}} MODULES=${modules_of:-${MODULES-}}
    [[ -n $KERNEL ]] || unset KERNEL MODULES
    kernel_directory=$("$PROJECT/scripts/kernel.sh")
    # To unpack a bzImage takes an emulated host twenty seconds.
    kernel=$kernel_directory/vmlinux
}

# The initramfs, in `guest`: one for each kernel and set of modules, packed anew when something in it is newer.
pack_guest() {
    local options=() module script=$PROJECT/scripts/run/guest.sh
    if [[ -e $kernel_directory/modules/modules.dep ]]; then
        for module in "${modules[@]}"; do options+=(--module "$module"); done
    fi
    guest=$RUN/${kernel_directory##*/}$(printf '_%s' "${modules[@]}").cpio
    local made_of=("$init" "$script" "${script%/*}/lease.sh" "$PROJECT/scripts/image.sh" "$kernel_directory/complete")
    if [[ ! -e $guest || -n $(find "${made_of[@]}" -newer "$guest" -print -quit) ]]; then
        "$PROJECT/scripts/image.sh" -o "$guest" "${options[@]}" --file "${script%/*}:/etc/hotslot/run" </dev/null
    fi
}

# The command line of lab.sh, up to the command there, in `lab`.
lab_line() {
    local variable mib image guest_mib
    guest_mib=$(($(numfmt --from=iec "$memory") / 1048576))
    mib=$((1536 + guest_mib))
    # A dump has all of the guest's memory.
    [[ " ${hotslot_options[*]} " != *" --dump "* ]] || mib=$((mib + guest_mib))
    # An image is there twice for a moment: as it was copied in, and unpacked.
    for image in ${shell:+"$IMAGE"} "${disks[@]}"; do mib=$((mib + $(stat -c %s "$image") / 524288)); done
    lab=("$PROJECT/scripts/lab.sh" --file "$guest" --file "$PROJECT/scripts/run" --file "$kernel" --exec "$HOTSLOT"
        --exec "$BACKEND" --memory "${mib}M" "${lab[@]}")
    for variable in "${variables[@]}"; do lab+=(--env "$variable"); done
    # A user may stay as long as they like; lab.sh by itself would stop a run without a terminal.
    [[ $job == demo ]] || lab+=(--timeout 86400)
}

# Replaces this script, so that signals arrive where they are waited for.
run_command() {
    local link=("$init" lab --script "$script") option
    [[ -z $tty ]] || link+=(--tty --env "TERM=${TERM:-vt100}")
    [[ -z $verbose ]] || link+=(--verbose)
    # HOTSLOT_OPTIONS is a line for the shell.
    variables+=(HOTSLOT_OPTIONS="$(for option in "${hotslot_options[@]}"; do printf '%s ' "$(quote "$option")"; done)")
    link+=(-- /bin/sh /etc/hotslot/run/guest.sh "$setup" "${command[@]}")
    [[ $1 == lab ]] || exec env "${variables[@]}" "${link[@]}"
    lab_line
    [[ -z $tty ]] || lab+=(--tty)
    exec "${lab[@]}" -- "${link[@]}"
}

run_console() {
    local host=$1
    shift
    if [[ $host == kvm ]]; then
        env "${variables[@]}" /bin/sh "$script" "$@"
        return
    fi
    lab_line
    [[ $job == demo || ! -t 0 ]] || lab+=(--tty)
    "${lab[@]}" -- /bin/sh "$script" "$@"
}

show_greeting() {
    say "$GREETING in ${IMAGE#"$(pwd -P)/"}, as this machine reads it:"
    # The guest's file is a whole page: text, then zeroes.
    debugfs -R "cat $GREETING" "$IMAGE" 2>/dev/null | tr -d '\0'
    echo
}

main "$@"
