#!/bin/bash
# usage: interop.sh [--reconnect SECONDS [--kills N]] [--cpus N] [--icount] [--list]
#                   [NAME... | many [NAME...] | debian | frontends]
#
# Runs vhost-user back-ends that others wrote, and a stock Linux guest that uses each in earnest; kills the back-end under
# the guest, and says what held. All of scripts/interop/backends where none is named.
#
#   many               those that are named, or seven of them, at once, in one guest with 4 vCPUs: each works, with its
#                      checksums, while the others do
#   debian             Debian with systemd: its root on the disk of qemu-storage-daemon, its network by passt; it boots to a
#                      login and installs packages that the host's HTTP server has
#   frontends          the other end: QEMU of both suites drives hotslot-backend blk and fs, and the newer one, which has
#                      SHMEM, also fs with a window, and pmem; without an emulated host
#   --reconnect SECONDS
#                      also kills each back-end with SIGKILL while it works, and starts it again: the guest's work must go on
#                      (the key reconnect=SECONDS). After that, as without this option, it is killed and stays dead
#   --kills N          kills and starts each back-end so many times (default: 1); the guest repeats its work meanwhile
#   --cpus N           vCPUs of the guests (default: 2; for many 4)
#   --icount           the clock of the emulated host counts instructions (lab.sh), and guests have one vCPU: on a busy
#                      machine no time limit of the guest's passes for that
#   --list             prints the back-ends, where they come from, and what is done with them
#
# The back-ends are Debian's packages, of its suite sid and of bookworm, each suite in a root of its own; or crates, which
# cargo builds; or an example of QEMU's, built from Debian's source package. Everything is kept in target/interop: 3 GB,
# and half an hour until it is there. It needs root for mmdebstrap. All but frontends runs on an emulated host (lab.sh),
# also where this machine has KVM: the back-ends run as root and in Debian's roots there. A back-end takes one to ten
# minutes.
#
# HOTSLOT_PROGRAMS=DIR   takes hotslot and hotslot-backend from there, and builds neither
#
# It prints a line for each: the back-end, its version, the work, the work while it died and came back, what the guest saw
# when it stayed dead; below it what hotslot and the back-end agreed on. Exit status: 1 when some work was wrong.
#
# Not among them, and why: Debian's kernels have no driver for virtio's i2c, gpio, can and spi devices; vhost-device-gpu
# needs the protocol of vhost-user-gpu, which hotslot does not speak; SPDK and crosvm are in no registry.
set -euo pipefail
# shellcheck source=scripts/lib.sh
source "$(dirname "$0")/lib.sh"

# lab.sh --share mounts what a link leads to.
WORK=$(realpath -m "$TARGET/interop")
INTEROP=$PROJECT/scripts/interop
# Where `field` looks: backends or frontends.
FILES=backends
MANY=(rng vsock passt disk scsi virtiofsd input)
# What the roots hold, by suite.
# shellcheck disable=SC2054 # the commas are mmdebstrap's
declare -A PACKAGES=(
    [sid]=passt,qemu-system-x86,qemu-utils,virtiofsd,dpdk-dev,vhost-device-vsock,linux-image-amd64
    [bookworm]=qemu-system-x86,qemu-system-common,qemu-utils
    [guest]=systemd-sysv,udev,kmod,e2fsprogs,iproute2,dbus
)
# Seconds for one guest.
LIMIT=1500
CLOCK=()

wrong=0

main() {
    local names=() cpus='' reconnect='' kills=1 list='' mode='' name
    while (($#)); do
        case $1 in
        -h | --help) usage && return ;;
        --list) list=1 ;;
        --reconnect)
            reconnect=$(whole_number "$@")
            shift
            ;;
        --kills)
            kills=$(whole_number "$@")
            shift
            ;;
        --cpus)
            cpus=$(whole_number "$@")
            shift
            ;;
        --icount) CLOCK=(--icount) ;;
        many | debian | frontends) mode=$1 ;;
        *)
            [[ -e $INTEROP/backends/$1.sh ]] || wrong "$1: no such back-end (--list)"
            names+=("$1")
            ;;
        esac
        shift
    done
    [[ -n $reconnect || $kills == 1 ]] || wrong "--kills needs --reconnect SECONDS"
    # No Linux with more processors comes up by that clock.
    ((${#CLOCK[@]} == 0)) || cpus=1
    [[ -z $list ]] || { list && return; }
    LIMIT=$((LIMIT + 60 * (kills - 1)))
    # An instruction clock is slower than the time.
    LAB_LIMIT=$(((LIMIT + 300) * (${#CLOCK[@]} ? 8 : 1)))
    if [[ -z $mode ]] && ((${#names[@]} == 0)); then mapfile -t names < <(all backends); fi
    ((EUID == 0)) || die "this needs root, for mmdebstrap"

    need_programs --quiet --locked
    mkdir -p "$WORK"
    case $mode in
    many)
        ((${#names[@]})) || names=("${MANY[@]}")
        # Four vCPUs and seven works share one processor there.
        LIMIT=$((2 * LIMIT)) LAB_LIMIT=$((2 * LAB_LIMIT))
        run "many-${names[0]}" "${cpus:-4}" "$reconnect" "${names[@]}"
        names=()
        ;;
    debian) debian "${cpus:-2}" ;;
    frontends) frontends ;;
    esac
    for name in ${names[@]+"${names[@]}"}; do run "$name" "${cpus:-2}" "$reconnect" "$name"; done
    ((wrong == 0))
}

# all DIRECTORY: the names of the files there.
all() { (cd "$INTEROP/$1" && printf '%s\n' *.sh | sed 's/\.sh$//'); }

# field NAME VARIABLE: what a file sets.
field() {
    # shellcheck disable=SC2030,SC2031 # for this one file
    (
        export NAME=$1 INTEROP
        # shellcheck source=/dev/null
        source "$INTEROP/$FILES/$1.sh"
        printf '%s\n' "${!2-}"
    )
}

list() {
    local name
    for FILES in backends frontends; do
        for name in $(all "$FILES"); do
            printf '%-17s %-32s %s\n' "$name" "$(field "$name" FROM | cut -d : -f 1-3)" \
                "$(sed -n '2s/^# //p' "$INTEROP/$FILES/$name.sh")"
        done
    done
}

# pack OUT NAME...: the image of a guest that uses these, OUT/guest.cpio, and its kernel in $kernel.
pack() {
    local out=$1 name each words modules=() tools=() files=()
    shift
    for name; do
        read -ra words <<<"$(field "$name" MODULES)"
        for each in "${words[@]}"; do modules+=(--module "$each"); done
        read -ra words <<<"$(field "$name" TOOLS)"
        for each in "${words[@]}"; do need "$each" && tools+=(--exec "$(type -P "${each%%:*}")"); done
        read -ra words <<<"$(field "$name" FILES_IN_GUEST)"
        for each in "${words[@]}"; do files+=(--file "$each"); done
    done
    unset KERNEL MODULES
    for name; do
        [[ $(field "$name" GUEST_KERNEL) == sid ]] || continue
        words=("$WORK"/sid/usr/lib/modules/*)
        export KERNEL=${words[0]}/vmlinuz MODULES=${words[0]}
    done
    rm -rf "$out"
    mkdir -p "$out"
    kernel=$("$PROJECT/scripts/kernel.sh")
    "$PROJECT/scripts/image.sh" -o "$out/guest.cpio" --module virtio_mmio "${modules[@]}" --file "$INTEROP:/interop" \
        ${tools[@]+"${tools[@]}"} ${files[@]+"${files[@]}"}
}

# run TITLE CPUS RECONNECT NAME...: one guest with these back-ends.
run() {
    local cpus=$2 reconnect=$3 out=$WORK/out/$1 name kernel
    shift 3
    pack "$out" "$@"
    # The emulated host's processor has AVX and no XSAVE, which Linux takes for a working AVX.
    on_lab "$out" "$kernel" CPUS="$cpus" RECONNECT="$reconnect" KILLS="$kills" NAMES="$*" \
        WORDS="noxsave hotslot.debug_exit=0xf4 NAMES=$(tr ' ' , <<<"$*") RECONNECT=$reconnect -- sh /interop/guest.sh"
    for name; do
        row "$out" "$name" "$(version "$(field "$name" FROM)")"
        printf '    permanent death: %s; hotslot ended with status %s\n' \
            "$(sed -n "s/^SEEN $name //p" "$out/lines")" "$(cat "$out/status" 2>/dev/null)"
        grep -E ": $name(-[ab])?: " "$out/hotslot" | grep -v 'waiting for a back-end' | sed 's/^/    /' || true
    done
}

# on_lab OUT KERNEL VARIABLE=VALUE...: runs host.sh on an emulated host; NAMES are the back-ends, OUT/guest.cpio is the image.
on_lab() {
    local out=$1 kernel=$2 each words name names from lab=()
    shift 2
    for each in "$@"; do
        lab+=(--env "$each")
        [[ $each != NAMES=* ]] || read -ra names <<<"${each#*=}"
    done
    for name in "${names[@]}"; do
        from=$(field "$name" FROM)
        provide "$from"
        [[ $from != crate:* && $from != qemu-source:* ]] || lab+=(--exec "$WORK/bin/$(cut -d : -f 2 <<<"$from")")
        read -ra words <<<"$(field "$name" HOST_TOOLS)"
        for each in "${words[@]}"; do need "$each" && lab+=(--exec "$(type -P "${each%%:*}")"); done
        read -ra words <<<"$(field "$name" HOST_MODULES)"
        for each in "${words[@]}"; do lab+=(--module "$each"); done
    done
    for each in INTEROP="$INTEROP" OUT="$out" WORK="$WORK" HOTSLOT="$BUILT/hotslot" LIMIT="$LIMIT" \
        KERNEL="$kernel/vmlinux" IMAGE="$out/guest.cpio"; do lab+=(--env "$each"); done
    say "${out##*/}: started at $(date +%T), see $out"
    "$PROJECT/scripts/lab.sh" --memory 4G --timeout "$LAB_LIMIT" ${CLOCK[@]+"${CLOCK[@]}"} --share "$WORK" --exec "$BUILT/hotslot" \
        --file "$INTEROP" --file "$kernel/vmlinux" --log "$out/kernel" "${lab[@]}" -- /bin/sh "$INTEROP/host.sh" \
        </dev/null >"$out/lab" 2>&1 || say "the emulated host did not come to its end: $(tail -n 1 "$out/lab")"
    rm "$out/guest.cpio"
    touch "$out/hotslot" "$out/console"
    # Without what a shell tells a terminal.
    sed 's/\r//g; s/\x1b\[[?0-9;]*[A-Za-z]//g' "$out/console" >"$out/lines"
}

# debian CPUS: Debian, with its root on one back-end and its network by another.
debian() {
    local out=$WORK/out/debian root=$WORK/guest kernel name
    make_root guest
    unset KERNEL MODULES
    kernel=$("$PROJECT/scripts/kernel.sh")
    rm -rf "$out"
    mkdir -p "$out"
    repository "$out/www"
    truncate -s 2G "$out/disk.img"
    mkfs.ext4 -q -d "$root" "$out/disk.img"
    "$PROJECT/scripts/image.sh" -o "$out/guest.cpio" --module virtio_mmio --module virtio_blk --module virtio_net \
        --file "$PROJECT/scripts/debian:/check" --file "$INTEROP/login.sh:/check/login.sh"
    on_lab "$out" "$kernel" CPUS="$1" RECONNECT= NAMES='disk passt' DISK="$out/disk.img" WWW="$out/www" \
        LOGIN='exec bash /check/login.sh' WORDS='noxsave rdinit=/check/init.sh CONFIGURATION=blk'
    {
        if e2fsck -fn "$out/disk.img" >"$out/fsck" 2>&1; then echo 'CHECK debian fsck ok'; else echo 'CHECK debian fsck WRONG'; fi
        # A guest that did not come to the login checks nothing.
        if (($(grep -c '^CHECK debian .* ok' "$out/lines") == 4)); then echo 'CHECK debian work ok'; fi
    } >"$out/host"
    rm "$out/disk.img"
    row "$out" debian "disk $(version sid:qemu-utils), passt $(version sid:passt)"
}

# repository DIRECTORY: packages as apt reads them from an HTTP server.
repository() {
    local file
    mkdir "$1"
    # The user _apt could not write into our directory.
    (cd "$1" && apt-get -qq -o APT::Sandbox::User=root download hello tree ed </dev/null >&2) || die "could not download packages"
    for file in "$1"/*.deb; do
        dpkg-deb -f "$file"
        printf 'Filename: ./%s\nSize: %s\nSHA256: %s\n\n' "${file##*/}" "$(stat -c %s "$file")" \
            "$(sha256sum "$file" | cut -d ' ' -f 1)"
    done >"$1/Packages"
}

# The other end: each file of frontends/, with QEMU of each suite that can.
frontends() {
    local name suite out suites kernel
    FILES=frontends
    need mkfs.ext4:e2fsprogs debugfs:e2fsprogs
    for name in $(all frontends); do
        read -ra suites <<<"$(field "$name" SUITES)"
        ((${#suites[@]})) || suites=(bookworm sid)
        for suite in "${suites[@]}"; do
            make_root "$suite"
            out=$WORK/out/$name-$suite
            pack "$out" "$name"
            cp "$kernel/bzImage" "$out/kernel"
            say "$name with $suite's QEMU: started at $(date +%T), see $out"
            # What it mounts is mounted for it alone.
            env NAME="$name" INTEROP="$INTEROP" ROOT="$WORK/$suite" OUT="$out" LIMIT="$LIMIT" \
                BACKEND="$BUILT/hotslot-backend" unshare -m /bin/sh "$INTEROP/qemu.sh" || true
            rm -rf "$out/kernel" "$out/guest.cpio" "$out/files"
            tr -d '\r' <"$out/console" >"$out/lines"
            row "$out" "$name" "QEMU $(version "$suite:qemu-system-x86")"
        done
    done
}

# row DIRECTORY NAME VERSION: prints what came of it.
row() {
    local out=$1 name=$2 lines
    touch "$out/host" "$out/lines"
    lines=$(grep -h "^CHECK $name " "$out/lines" "$out/host") || true
    # A work that was repeated is one entry, with its number.
    printf '%-17s %-24s %s\n' "$name" "$3" "$(cut -d ' ' -f 3- <<<"$lines" | sed 's/ WRONG.*/ WRONG/; s/^\(return ok\).*/\1/' |
        uniq -c | sed 's/^ *1 //; s/^ *\([0-9]*\) \(.*\)/\2 (\1 times)/' | paste -sd ';')"
    grep WRONG <<<"$lines" | sed 's/^/    /' || true
    # Of back-ends that keep a record of them.
    ! grep -qs '[1-9]' "$out/in-flight" || printf '    requests in flight at each death: %s\n' "$(paste -sd ' ' "$out/in-flight")"
    # What the guest's kernel complained of while no back-end stayed dead.
    grep '^KERNEL [wr]' "$out/lines" | sed 's/^/    /' || true
    if ! grep -q ' work ok' <<<"$lines" || grep -q WRONG <<<"$lines"; then wrong=1; fi
}

# version FROM
version() {
    local suite name rest
    IFS=: read -r suite name rest <<<"$1"
    case $suite in
    crate) echo "${rest%%:*}" ;;
    qemu-source) cat "$WORK/bin/$name.version" ;;
    *) dpkg-query --admindir="$WORK/$suite/var/lib/dpkg" -W -f '${Version}' "$name" ;;
    esac
}

# provide FROM: makes sure that a back-end is there: SUITE:PACKAGE, crate:NAME:VERSION[:OPTION...], or qemu-source:NAME.
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
    qemu-source) [[ -e $WORK/bin/$name.version ]] || build_of_qemu "$name" ;;
    *) make_root "$kind" ;;
    esac
}

# build_of_qemu NAME: builds contrib/NAME/NAME of QEMU, which no binary package has, from Debian's source package.
build_of_qemu() (
    local program=contrib/$1/$1 uri each private=()
    need dpkg-source:dpkg-dev meson:meson ninja:ninja-build gcc:gcc pkg-config:pkg-config
    pkg-config --exists glib-2.0 || apt_install libglib2.0-dev || die "could not install libglib2.0-dev"
    uri=$(known_debian_uri) || exit
    say "building $1 of QEMU"
    rm -rf "$WORK/qemu"
    mkdir -p "$WORK/qemu/lists/partial" "$WORK/qemu/cache/archives/partial" "$WORK/qemu/build" "$WORK/bin"
    cd "$WORK/qemu"
    # The machine's own lists have no sources, and stay as they are.
    echo "deb-src $uri bookworm main" >sources.list
    for each in Dir::Etc::SourceList="$PWD/sources.list" Dir::Etc::SourceParts=/dev/null Dir::State::Lists="$PWD/lists" \
        Dir::Cache="$PWD/cache" APT::Sandbox::User=root Acquire::Check-Valid-Until=false; do private+=(-o "$each"); done
    if ! {
        apt-get -qq "${private[@]}" update && apt-get -qq "${private[@]}" source --download-only qemu &&
            dpkg-source --no-check -x ./*.dsc source && cd build &&
            ../source/configure --without-default-features --disable-system --disable-user --enable-tools --enable-vhost-user &&
            nice -n 15 ninja "$program"
    } </dev/null >"$WORK/qemu.log" 2>&1; then die "could not build $1: $WORK/qemu.log"; fi
    cp "$program" "$WORK/bin/$1"
    sed -n 's/^Version: //p' ../*.dsc | head -n 1 >"$WORK/bin/$1.version"
    rm -rf "$WORK/qemu"
)

# make_root SUITE: a root of Debian's with the packages of that suite.
make_root() {
    local suite=$1 uri
    [[ ! -d $WORK/$suite ]] || return 0
    need mmdebstrap:mmdebstrap
    uri=$(known_debian_uri)
    say "making a root of Debian's $suite"
    rm -rf "$WORK/$suite.new"
    # A mirror may lag behind. The signatures are verified all the same.
    mmdebstrap --quiet --aptopt='Acquire::Check-Valid-Until "false"' --variant=minbase --include="${PACKAGES[$suite]}" \
        "${suite/guest/bookworm}" "$WORK/$suite.new" "deb $uri ${suite/guest/bookworm} main" >"$WORK/$suite.log" 2>&1 ||
        die "mmdebstrap failed: $WORK/$suite.log"
    [[ $suite != guest ]] || guest_root "$WORK/$suite.new"
    mv "$WORK/$suite.new" "$WORK/$suite"
}

# What makes a root a guest's: a login without a password, and the network by DHCP.
guest_root() {
    mkdir "$1/check"
    echo debian >"$1/etc/hostname"
    : >"$1/etc/fstab"
    printf '%s\n' '[Match]' Type=ether '[Network]' DHCP=ipv4 >"$1/etc/systemd/network/any.network"
    chroot "$1" sh -c 'passwd -qd root && systemctl -q enable systemd-networkd && systemctl -q disable apt-daily.timer apt-daily-upgrade.timer'
}

# Debian's archive as this machine's apt knows it.
known_debian_uri() {
    local uri
    uri=$(debian_uri)
    [[ -n $uri ]] || { apt_update && uri=$(debian_uri); }
    [[ -n $uri ]] || die "apt knows no archive of Debian here"
    echo "$uri"
}
# shellcheck disable=SC2016 # apt fills it in
debian_uri() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n 1; }

main "$@"
