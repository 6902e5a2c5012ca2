# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: the same session with slots that outlive their mappings, and without
# (a device with foreign-files=on keeps none). HOTSLOT and BACKEND are programs, KERNEL and IMAGE what guests boot.
for case in idle-slots no-idle-slots; do
    options=''
    [ $case = idle-slots ] || options=,foreign-files=on
    share=$(mktemp -d)
    probe fill "$share/data" 64 >/dev/null
    "$BACKEND" fs --socket /tmp/$case.sock --dir "$share" --tag share --once --window 16M 2>/dev/null &
    "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 768M --debug-exit -c "quiet -- sh /bench/guest.sh" \
        --vhost-user "/tmp/$case.sock,type=fs,name=fs$options" </dev/null >/tmp/$case.out 2>&1 || {
        cat /tmp/$case.out >&2
        exit 1
    }
    wait
    rm -r "$share"
    # A program's time in nanoseconds; of pages, how many in a second.
    sed -n "s/^.*speed \([a-z ]*\): \([0-9]*\).*/\1:\2/p" /tmp/$case.out | awk -F : -v case=$case '
        { gsub(/ /, "-", $1) }
        $1 == "random-first" { printf "session-random@%s: %.0f\n", case, 1e9 / $2; next }
        $1 != "memory" { printf "session-%s@%s: %s\n", $1, case, $2 }'
done
