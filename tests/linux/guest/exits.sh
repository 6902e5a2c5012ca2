# shellcheck shell=sh
# Runs in a guest with an entropy device and a pmem device: $1 requests to each, between two looks of the host.
set -e
stty -echo

# tell STATE: lets the host look at us.
tell() {
    echo "now $1"
    read -r _
}
interrupts() { awk -v device="$1" '$NF == device { sum += $2 } END { print sum + 0 }' /proc/interrupts; }

rng=$(interrupts virtio0)
pmem=$(interrupts virtio1)
tell begins
probe requests /dev/hwrng "$1" read
probe requests /dev/pmem0 "$1" flush
tell ends
echo "interrupts of rng: $(($(interrupts virtio0) - rng))"
echo "interrupts of pmem: $(($(interrupts virtio1) - pmem))"
