# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: a guest for each way to get at the files of a directory. HOTSLOT and
# BACKEND are programs, KERNEL and IMAGE what guests boot.
share=$(mktemp -d)
probe fill "$share/data" 64 >/dev/null

# case_of NAME MOUNT-OPTIONS BACKEND-OPTION...
case_of() {
    name=$1 options=$2
    shift 2
    "$BACKEND" fs --socket "/tmp/$name.sock" --dir "$share" --tag share --once "$@" &
    "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 512M --debug-exit \
        -c "quiet OPTIONS=$options -- sh /bench/guest.sh" \
        --vhost-user "/tmp/$name.sock,type=fs,name=fs" </dev/null >"/tmp/$name.out" || {
        cat "/tmp/$name.out" >&2
        exit 1
    }
    wait
    sed -n "s/^.*speed \([a-z ]*\): \([0-9]*\).*/$name:\1:\2/p" "/tmp/$name.out"
}

case_of dax dax=always --window 256M
case_of cached rw --window 0
case_of uncached rw --window 0 --cache never
