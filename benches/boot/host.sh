# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: each VMM boots the same kernel and initramfs RUNS times, up to the
# first line of PID 1. VMLINUX and BZIMAGE are kernels; VMM is benches/vmm.sh.
# shellcheck source=benches/vmm.sh
. "$VMM"
VMLINUX=$KERNEL

for name in $(vmms); do
    for KERNEL in "$VMLINUX" "$BZIMAGE"; do
        run=0
        # With all files in the host's page cache from the first run on, which does not count.
        while [ $run -le "$RUNS" ]; do
            line=$(vmm "$name" '' probe speed boot "boot-${KERNEL##*/}@$name") || break
            [ $run = 0 ] || echo "$line"
            run=$((run + 1))
        done
    done
done
