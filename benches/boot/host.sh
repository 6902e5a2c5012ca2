# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: a VMM boots each kernel with the same initramfs RUNS times, up to the
# first line of PID 1. VMLINUX and BZIMAGE are kernels; VMM is benches/vmm.sh.
# shellcheck source=benches/vmm.sh
. "$VMM"
VMLINUX=$KERNEL

for KERNEL in "$VMLINUX" "$BZIMAGE"; do
    run=0
    # With all files in the host's page cache from the first run on, which does not count.
    while [ $run -le "$RUNS" ]; do
        line=$(vmm '' probe speed boot "boot-${KERNEL##*/}@$NAME") || exit 1
        [ $run = 0 ] || echo "$line"
        run=$((run + 1))
    done
done
