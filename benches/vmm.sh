# shellcheck shell=sh
# How each VMM boots a kernel, for the scripts that run on the emulated host: one vCPU, 256 MiB. HOTSLOT and QEMU are
# programs, KERNEL and IMAGE what guests boot; BESIDE has other VMMs, as words NAME=PATH.

# For VMMs that add no words to the kernel's command line: hotslot's own, but for the way in which a panic resets the
# machine, and `quiet`.
WORDS="console=ttyS0 8250.nr_uarts=1 cryptomgr.notests panic=-1 reboot=t quiet"

# The names of the VMMs that are there.
vmms() {
    echo hotslot
    [ -z "$QEMU" ] || printf '%s\n' microvm q35
    for pair in $BESIDE; do echo "${pair%%=*}"; done
}

# vmm NAME SOCKET WORD...: runs the WORDs (such as `exec`, or a program that takes a command), with the command line of
# that VMM behind them. SOCKET is that of a back-end of type fs, or empty; only hotslot and QEMU are given it.
vmm() {
    vmm_name=$1 socket=$2
    shift 2
    for pair in $BESIDE; do [ "${pair%%=*}" != "$vmm_name" ] || path=${pair#*=}; done
    case $vmm_name in
    hotslot)
        set -- "$@" "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 256M -c quiet
        [ -z "$socket" ] || set -- "$@" --vhost-user "$socket,type=fs,name=fs"
        "$@"
        ;;
    microvm) qemu microvm,rtc=on vhost-user-fs-device "$@" ;;
    q35) qemu q35 vhost-user-fs-pci "$@" ;;
    firecracker)
        # It has no other way to learn of a kernel but this file and its API's socket.
        cat >/tmp/firecracker.json <<END
{"boot-source": {"kernel_image_path": "$KERNEL", "initrd_path": "$IMAGE", "boot_args": "$WORDS"},
 "drives": [], "machine-config": {"vcpu_count": 1, "mem_size_mib": 256}}
END
        "$@" "$path" --no-api --config-file /tmp/firecracker.json
        ;;
    crosvm)
        "$@" "$path" run --disable-sandbox --mem 256 --cpus 1 --initrd "$IMAGE" -p "$WORDS" \
            --serial type=stdout,hardware=serial,console=true "$KERNEL"
        ;;
    alioth)
        "$@" "$path" run --kernel "$KERNEL" --initramfs "$IMAGE" --cmd-line "$WORDS" --mem-size 256M --num-cpu 1
        ;;
    cloud-hypervisor)
        "$@" "$path" --kernel "$KERNEL" --initramfs "$IMAGE" --cmdline "$WORDS" --cpus boot=1 --memory size=256M \
            --serial tty --console off
        ;;
    esac
}

# qemu MACHINE DEVICE WORD...: the same, for a machine of QEMU's and its device of type fs.
qemu() {
    machine=$1 device=$2
    shift 2
    set -- "$@" "$QEMU" -M "$machine" -no-reboot -enable-kvm -cpu host -m 256M -nodefaults -no-user-config -display none \
        -serial stdio -kernel "$KERNEL" -initrd "$IMAGE" -append "$WORDS"
    [ -z "$socket" ] || set -- "$@" -object memory-backend-memfd,id=ram,size=256M,share=on \
        -machine memory-backend=ram -chardev "socket,id=fs,path=$socket" -device "$device,chardev=fs,tag=share"
    "$@"
}
