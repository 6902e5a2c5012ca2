# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: exits to user space of a guest that makes REQUESTS requests of an
# entropy device and as many flushes of a pmem device, less those of a guest that makes none. HOTSLOT and BACKEND are
# programs, KERNEL and IMAGE what guests boot.
dd if=/dev/zero of=/tmp/disk bs=1M count=4 2>/dev/null

# run COUNT: one guest. Its counters are in /tmp/COUNT.stats.
run() {
    "$BACKEND" torture --socket /tmp/rng.sock --once >/dev/null 2>&1 &
    "$BACKEND" pmem --socket /tmp/pmem.sock --file /tmp/disk --once 2>/dev/null &
    "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 256M --debug-exit --stats "/tmp/$1.stats" \
        -c "quiet -- sh /bench/guest.sh $1" --vhost-user /tmp/rng.sock,type=rng,name=rng \
        --vhost-user /tmp/pmem.sock,type=pmem,name=pmem </dev/null >/tmp/out 2>&1 || {
        cat /tmp/out >&2
        exit 1
    }
    wait
}

# counted COUNT WORD...: the sum of counters of the vCPU, which come first in a line.
counted() {
    stats=/tmp/$1.stats sum=0
    shift
    for counter in "$@"; do
        number=$(sed -n '$s/.*"vcpus":\(.*\)"devices".*/\1/p' "$stats" | grep -o "\"$counter\":[0-9]*")
        sum=$((sum + ${number##*:}))
    done
    echo $sum
}

run 0
run "$REQUESTS"
exits=$(($(counted "$REQUESTS" mmio_reads mmio_writes) - $(counted 0 mmio_reads mmio_writes)))
echo "exits@hotslot: $((exits > 0 ? exits : 0))"
exits=$(($(counted "$REQUESTS" mmio_exits) - $(counted 0 mmio_exits)))
echo "exits@kvm: $((exits > 0 ? exits : 0))"
