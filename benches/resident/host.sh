# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: how much memory each VMM has beside its guest's, in bytes, when PID 1
# runs. HOTSLOT, BACKEND and QEMU are programs; VMM is benches/vmm.sh.
# shellcheck source=benches/vmm.sh
. "$VMM"

# All that is resident of a process, but for its guest's memory: a memfd, or (of a VMM that has no name for it) mappings
# of 64 MiB and more.
resident() {
    awk '
        function flush() { if (!is_guest && size < 65536) sum += rss }
        $1 ~ /^[0-9a-f]+-[0-9a-f]+$/ { flush(); is_guest = /memfd:/; size = rss = 0 }
        $1 == "Size:" { size = $2 }
        $1 == "Rss:" { rss = $2 }
        END { flush(); printf "%d\n", sum * 1024 }' "/proc/$1/smaps"
}

share=$(mktemp -d)
for name in $(vmms); do
    socket=/tmp/$name.sock
    case $name in
    hotslot | microvm | q35)
        "$BACKEND" fs --socket "$socket" --dir "$share" --tag share --once --window 0 2>"/tmp/$name.backend" &
        ;;
    *) socket='' ;;
    esac
    sleep 1
    (vmm "$name" "$socket" exec </dev/null >"/tmp/$name.out" 2>&1) &
    process=$!
    for _ in $(seq 30); do
        grep -q 'PID 1 runs' "/tmp/$name.out" && break
        sleep 1
    done
    if grep -q 'PID 1 runs' "/tmp/$name.out"; then
        echo "resident@$name: $(resident $process)"
    else
        echo "$name did not boot:" >&2
        tail -n 5 "/tmp/$name.out" >&2
    fi
    kill $process 2>/dev/null
    wait $process 2>/dev/null
done
