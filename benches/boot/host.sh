# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: each VMM boots the same kernel and initramfs RUNS times, up to the
# first line of PID 1, with the words for the kernel that hotslot gives it. HOTSLOT is a program, VMLINUX, BZIMAGE and IMAGE what guests boot, QEMU a program or nothing.
WORDS='console=ttyS0 8250.nr_uarts=1 cryptomgr.notests panic=-1 reboot=t quiet'

# boot NAME PROGRAM ARG...: with all files in the host's page cache from the first run on, which does not count.
boot() {
    name=$1
    shift
    run=0
    while [ $run -le "$RUNS" ]; do
        line=$(probe speed boot "$name" "$@") || return 0
        [ $run = 0 ] || echo "$line"
        run=$((run + 1))
    done
}

for kernel in "vmlinux $VMLINUX" "bzImage $BZIMAGE"; do
    file=${kernel#* } kernel=${kernel%% *}
    boot "boot-$kernel@hotslot" "$HOTSLOT" -k "$file" -i "$IMAGE" -m 256M -c quiet
    [ -n "$QEMU" ] || continue
    set -- -no-reboot -enable-kvm -cpu host -m 256M -nodefaults -no-user-config -display none -serial stdio -kernel "$file" \
        -initrd "$IMAGE" -append "$WORDS"
    boot "boot-$kernel@microvm" "$QEMU" -M microvm,rtc=on "$@"
    boot "boot-$kernel@q35" "$QEMU" -M q35 "$@"
done
