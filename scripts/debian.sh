#!/bin/bash
# usage: debian.sh [CONFIGURATION]... [--programs NAME,NAME...]
#
# Boots Debian in hotslot with its root on a back-end, logs in on the console, runs ordinary programs there, and prints
# which of them were right in which configuration; all configurations where none is named:
#
#   fs-dax    a directory, mounted with dax=always
#   fs        a directory, without a window
#   blk       a disk with ext4
#   pmem      persistent memory with ext4, mounted with dax=always
#
#   --programs LIST   only these, separated by commas; --list names them
#   --list            prints the configurations and the programs
#   --keep            keeps the images of the roots (target/debian/CONFIGURATION.img)
#
# It needs root, for mmdebstrap and a loop mount. The root is made of Debian's packages, as apt is configured here, and kept
# (target/debian/base-*.img): three minutes and 2 GB, and as much for each configuration while it runs. On an idle machine's
# emulated host (lab.sh), which is used where this machine's KVM cannot boot Linux, blk and pmem take five minutes each, and
# the directories about fifteen; on KVM a minute or two. What was printed is in target/debian/CONFIGURATION.
#
# Exit status: 0, all were right; 1, something was wrong or could not be run.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

CONFIGURATIONS=(fs-dax fs blk pmem)
PROGRAMS=(login dpkg apt git sqlite postgresql cargo pip rsync tar overlay_lower overlay_upper overlay_userxattr loop swap
    open_files names directory two locks)

# What a guest has: systemd with a login, and the programs that check.sh runs.
PACKAGES=(systemd-sysv udev kmod attr e2fsprogs git sqlite3 postgresql cargo python3-pip rsync)
# What it installs: check.sh's FIRST and SECOND.
DEBS=(hello bc time tree ed jq libjq1 libonig5 zip unzip)

WORK=$TARGET/debian
# Seconds for one guest on the emulated host.
LIMIT=3600

main() {
    local configurations=() programs=("${PROGRAMS[@]}") keep='' each
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --list) printf '%s\n' "configurations: ${CONFIGURATIONS[*]}" "programs: ${PROGRAMS[*]}" && return ;;
        --keep) keep=1 ;;
        --programs)
            [[ -n ${2-} ]] || wrong "--programs needs a list (--list names what there is)"
            IFS=, read -ra programs <<<"$2"
            shift
            ;;
        -*) wrong "$1: unknown option (--help lists them)" ;;
        *) configurations+=("$1") ;;
        esac
        shift
    done
    ((${#configurations[@]})) || configurations=("${CONFIGURATIONS[@]}")
    for each in "${configurations[@]}"; do one_of "$each" "${CONFIGURATIONS[@]}" || wrong "$each: no such configuration (--list)"; done
    for each in "${programs[@]}"; do one_of "$each" "${PROGRAMS[@]}" || wrong "$each: no such program (--list)"; done
    ((EUID == 0)) || die "this needs root, for mmdebstrap and a loop mount"

    need mmdebstrap:mmdebstrap mkfs.ext4:e2fsprogs busybox:busybox-static cpio:cpio
    need_programs --quiet --locked
    kernel=$("$PROJECT/scripts/kernel.sh")
    mkdir -p "$WORK"
    make_base
    "$PROJECT/scripts/image.sh" -o "$WORK/guest.cpio" --module virtio_mmio --module virtio_blk --module virtio_pmem \
        --module nd_pmem --file "$PROJECT/scripts/debian:/check" --exec "$(command -v flock)"
    for each in "${configurations[@]}"; do run "$each" "${programs[@]}"; done
    table "${#programs[@]}" "${programs[@]}" "${configurations[@]}"
}

one_of() {
    local word=$1
    shift
    [[ " $* " == *" $word "* ]]
}

# Makes $base, an ext4 with Debian; another one when what goes in changes.
make_base() {
    local sum sources root=$WORK/root
    sum=$(printf '%s\n' "${PACKAGES[@]}" "${DEBS[@]}" "$(<"$kernel/version")" "$(declare -f make_base)" | sha256sum | head -c 12)
    base=$WORK/base-$sum.img
    [[ ! -e $base ]] || return 0
    sources=$(debian_sources)
    [[ -n $sources ]] || { apt_update && sources=$(debian_sources); }
    [[ -n $sources ]] || die "apt knows no archive of Debian here"
    say "making a root of Debian's packages"
    rm -rf "$root" "$WORK"/base-*.img
    mmdebstrap --quiet --variant=minbase --include="$(IFS=, && echo "${PACKAGES[*]}")" \
        "$(. /etc/os-release && echo "$VERSION_CODENAME")" "$root" - <<<"$sources" >"$WORK/mmdebstrap.log" 2>&1 ||
        die "mmdebstrap failed: $WORK/mmdebstrap.log"
    mkdir -p "$root/check/debs"
    # The user _apt could not write into our directory.
    (cd "$root/check/debs" && apt-get -qq -o APT::Sandbox::User=root download "${DEBS[@]}" </dev/null >&2) ||
        die "could not download the packages to install"
    mkdir -p "$root/usr/lib/modules/$(<"$kernel/version")"
    cp -RL "$kernel/modules/." "$root/usr/lib/modules/$(<"$kernel/version")/"
    echo debian >"$root/etc/hostname"
    : >"$root/etc/fstab"
    # PostgreSQL is started by its check.
    chroot "$root" sh -c 'passwd -qd root && systemctl -q disable postgresql apt-daily.timer apt-daily-upgrade.timer'
    truncate -s 4G "$base.new"
    mkfs.ext4 -q -b 4096 -d "$root" "$base.new"
    rm -rf "$root"
    mv "$base.new" "$base"
}

# A line of sources.list for each of Debian's suites that apt has here.
# shellcheck disable=SC2016 # apt fills these in
debian_sources() {
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian'
}

# run CONFIGURATION PROGRAM...: one guest. Leaves $WORK/CONFIGURATION/results: a line for each program, its name and the result.
run() {
    local configuration=$1 out=$WORK/$1 image=$WORK/$1.img status=0 loop='' file
    shift
    say "$configuration: started at $(date +%T), see $out/console"
    rm -rf "$out"
    mkdir "$out"
    cp --sparse=always --reflink=auto "$base" "$image"
    local host=$PROJECT/scripts/debian/host.sh hotslot=$BUILT/hotslot backend=$BUILT/hotslot-backend
    local variables=(HOTSLOT="$hotslot" BACKEND="$backend" KERNEL="$kernel/vmlinux" GUEST="$WORK/guest.cpio"
        CONFIGURATION="$configuration" IMAGE="$image" OUT="$out" PROGRAMS="$*" LIMIT="$LIMIT")
    case $(host_kind) in
    kvm) env "${variables[@]}" LOOP= /bin/sh "$host" >"$out/host" 2>&1 || status=$? ;;
    lab)
        file=$(find "$kernel/modules/" -name 'loop.ko*' -print -quit)
        loop=$WORK/loop.ko
        case $file in
        *.xz) xz -dc "$file" >"$loop" ;;
        *) cp "$file" "$loop" ;;
        esac
        local lab=("$PROJECT/scripts/lab.sh" --memory 4G --timeout $((LIMIT + 300)) --share "$WORK" --exec "$hotslot"
            --exec "$backend" --file "$host" --file "$kernel/vmlinux" --log "$out/kernel") variable
        for variable in "${variables[@]}" LOOP="$loop"; do lab+=(--env "$variable"); done
        "${lab[@]}" -- /bin/sh "$host" >"$out/host" 2>&1 || status=$?
        ;;
    esac
    tr -d '\r' <"$out/console" | sed -n 's/^RESULT //p' >"$out/results"
    {
        if ((status == 0)); then echo "poweroff ok"; else echo "poweroff wrong status $status: $(tail -n 1 "$out/host")"; fi
        # With -n it calls an image good that was not unmounted.
        if e2fsck -fn "$image" >"$out/fsck" 2>&1 && ! grep -q 'skipping journal' "$out/fsck"; then
            echo "fsck ok"
        else
            echo "fsck wrong $(sed 1d "$out/fsck" | grep -v '^Pass' | head -n 1)"
        fi
    } >>"$out/results"
    [[ -n $keep ]] || rm "$image"
}

# table COUNT PROGRAM... CONFIGURATION...: fails where something is wrong.
table() {
    local programs=("${@:2:$1}") configurations=("${@:2+$1}") program configuration line result wrong=()
    printf '%-20s' program
    printf ' %-8s' "${configurations[@]}"
    echo
    for program in "${programs[@]}" poweroff fsck; do
        line=$(printf '%-20s' "$program")
        for configuration in "${configurations[@]}"; do
            result=$(sed -n "s/^$program //p" "$WORK/$configuration/results" | head -n 1)
            case $result in
            ok* | -*) ;;
            *) wrong+=("$configuration $program: ${result:-no result}") ;;
            esac
            line+=$(printf ' %-8s' "$(cut -d ' ' -f 1 <<<"${result:-none}")")
        done
        echo "$line"
    done
    ((${#wrong[@]} == 0)) || {
        printf '%s\n' "${wrong[@]}"
        return 1
    }
}

main "$@"
