# shellcheck shell=sh
# Runs on the emulated host, for kills.sh: guests number FIRST to LAST, each with new images and directories.
#
# From kills.sh, in the environment: HOTSLOT, BACKEND and INIT (programs; the last has the probes), KERNEL and IMAGE (what the
# guest boots), FIRST, LAST, and SECONDS_MOST (how long the guest writes at most from one kill to the next).
# How long a guest may take until all of its programs write.
START_SECONDS=600
work=$(mktemp -d)
truncate -s 2G "$work/ext4"
mkfs.ext4 -q "$work/ext4"
mkdir "$work/host" "$work/image" "$work/name"
mount_host() { mount -t ext4 -o loop "$work/ext4" "$work/host"; }
mount_host || exit 1
files=$work/host/files console=$work/console

# fio for the guest, with its libraries. In the guest's initramfs these 80 MiB would take half a minute to unpack.
mkdir "$work/host/fio"
loader=/lib64/ld-linux-x86-64.so.2
# shellcheck disable=SC2046 # one word per library
cp "$(command -v fio)" $loader $($loader --list "$(command -v fio)" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p') "$work/host/fio/"

probe() { "$INIT" probe "$@"; }

# last PATTERN: the number at the end of the last such line, or 0. A kill can leave half a line behind, without a point.
last() { tr -d '\r' <"$console" | sed -n "s/^$1 \([0-9]*\)\.\$/\1/p" | tail -n 1 | grep . || echo 0; }

# pause MILLISECONDS: for a random time up to this.
pause() {
    milliseconds=$(shuf -n 1 -i "0-$1")
    waited=$((waited + milliseconds))
    sleep "$((milliseconds / 1000)).$(printf %03d $((milliseconds % 1000)))"
}

fault() {
    echo "$*"
    result=LOST
}

# check NAME DIRECTORY: whether all that was reported of NAME is there.
check() {
    synced=$(last "synced $1") verified=$(last "verified $1") file=1
    [ "$synced" -gt 0 ] || fault "the guest reported nothing of $1"
    probe kept "$2/blocks" "$synced" || fault "$1: what was synced is not there"
    while [ $file -le "$verified" ]; do
        fio --name=file --filename="$2/fio.$file" --size=128k --bs=4k --rw=randwrite --ioengine=psync --randseed=1 \
            --fallocate=none --verify=crc32c --verify_only --verify_fatal=1 >"$work/fio.out" 2>&1 || {
            cat "$work/fio.out"
            fault "$1: file $file of fio is not as it was verified"
        }
        file=$((file + 1))
    done
    writes=$((writes + synced)) all_verified=$((all_verified + verified))
}

# check_image NAME: its journal is replayed and its file system checked first.
check_image() {
    image=$files/$1.img
    # 1: it has repaired what an orderly crash leaves.
    e2fsck -p "$image" >"$work/fsck" 2>&1
    if [ $? -gt 1 ] || ! e2fsck -fn "$image" >>"$work/fsck" 2>&1; then
        cat "$work/fsck"
        fault "$1: its file system is broken"
    fi
    # For writing: fio opens so what it verifies.
    mount -t ext4 -o loop "$image" "$work/image" || fault "$1: it cannot be mounted"
    check "$1" "$work/image"
    umount "$work/image"
}

for number in $(seq "$FIRST" "$LAST"); do
    result=kept writes=0 all_verified=0 waited=0 signs='' kills=''
    rm -rf "$files"
    mkdir "$files"
    set -- --debug-exit
    for index in 0 1 2; do
        echo "pmem$index" >"$work/name/name"
        truncate -s 64M "$files/pmem$index.img"
        mkfs.ext4 -q -b 4096 -d "$work/name" "$files/pmem$index.img"
        "$BACKEND" pmem --socket "$work/pmem$index" --file "$files/pmem$index.img" --once &
        eval "pmem$index=\$!"
        mkdir "$files/fs$index"
        share=$files/fs$index
        # The first has the programs, too.
        [ $index -gt 0 ] || share=$work/host
        "$BACKEND" fs --socket "$work/fs$index" --dir "$share" --tag "fs$index" --window 256M --once &
        eval "fs$index=\$!"
        set -- "$@" --vhost-user "$work/pmem$index,type=pmem,name=pmem$index" --vhost-user "$work/fs$index,type=fs,name=fs$index"
        signs="$signs synced:pmem$index synced:fs$index"
    done
    sync
    options=$([ $((number % 2)) = 0 ] && echo rw || echo dax)
    # shellcheck disable=SC2153 # they are no misspellings
    "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 512M --connect-timeout 30s "$@" \
        -c "quiet PMEM_OPTIONS=$options -- sh /kills/guest.sh" </dev/null >"$console" 2>"$work/err" &
    hotslot=$!
    began=$(date +%s)
    # fio takes longest to start: there is to be a file of either kind that it has verified.
    for sign in $signs verified:pmem0 verified:fs0; do
        until [ "$(last "${sign%:*} ${sign#*:}")" -gt 0 ] || ! kill -0 $hotslot 2>/dev/null; do
            [ $(($(date +%s) - began)) -lt "$START_SECONDS" ] || { fault "nothing was $sign in $START_SECONDS s" && break; }
            sleep 1
        done
    done
    booted=$(($(date +%s) - began))

    # In a random order.
    for victim in $(printf '%s\n' pmem1 pmem2 fs1 fs2 | shuf) hotslot; do
        pause "${SECONDS_MOST}000"
        if tr -d '\r' <"$console" | grep -a ' failed\.$' | grep -avE "keep ($(echo "none$kills" | tr ' ' '|')) |fio ($(echo "none$kills" | tr ' ' '|')) "; then
            fault 'a program of the guest failed before the kill'
        fi
        eval "kill -KILL \$$victim" || fault "$victim had ended"
        kills="$kills $victim"
        echo "killed $victim after line $(wc -l <"$console") of the console"
    done
    power=
    if [ $((number % 4)) -ge 2 ]; then
        power=', power cut'
        probe cut "$work/host" >/dev/null || fault 'the power could not be cut'
    fi
    # The two that have not ended by themselves.
    # shellcheck disable=SC2154 # eval sets them
    kill -KILL "$pmem0" "$fs0" 2>/dev/null
    wait
    if [ -n "$power" ]; then
        umount "$work/host" && mount_host || exit 1
    fi
    for index in 0 1 2; do
        check "fs$index" "$files/fs$index"
        check_image "pmem$index"
    done
    sed 's/^/console: /' "$console"
    sed 's/^/hotslot: /' "$work/err"
    echo "guest $number: up in $booted s, pmem mounted with $options; killed in $waited ms:$kills$power; $writes writes, $all_verified files: $result"
done
