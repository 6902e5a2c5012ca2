# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: how much memory a VMM has beside its guest's, in bytes, when PID 1 runs.
# BACKEND is a program; VMM is benches/vmm.sh.
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

socket='' share=$(mktemp -d)
if takes_backends; then
    socket=/tmp/fs.sock
    "$BACKEND" fs --socket "$socket" --dir "$share" --tag share --once --window 0 2>/tmp/backend &
    sleep 1
fi
(vmm "$socket" exec </dev/null >/tmp/out 2>&1) &
process=$!
for _ in $(seq 30); do
    grep -q 'PID 1 runs' /tmp/out && break
    sleep 1
done
status=0
if grep -q 'PID 1 runs' /tmp/out; then
    echo "resident@$NAME: $(resident $process)"
else
    status=1
    echo "$NAME did not boot:" >&2
    tail -n 5 /tmp/out >&2
fi
kill $process 2>/dev/null
wait $process 2>/dev/null
exit $status
