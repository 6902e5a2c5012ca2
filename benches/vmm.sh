# shellcheck shell=sh
# How a VMM boots a kernel, for the scripts that run on the emulated host: one vCPU, 256 MiB. NAME is which one: microvm
# and q35 are QEMU's, names that are no other's are hotslot's. PROGRAM is its program; KERNEL and IMAGE are what it boots.

# For VMMs that add no words to the kernel's command line: hotslot's own, but for the way in which a panic resets the
# machine, and `quiet`.
WORDS="console=ttyS0 8250.nr_uarts=1 cryptomgr.notests panic=-1 reboot=t quiet"

# vmm SOCKET WORD...: runs the WORDs (such as `exec`, or a program that takes a command), with the command line of the
# VMM behind them. SOCKET is that of a back-end of type fs, or empty; only hotslot and QEMU are given it.
vmm() {
    socket=$1
    shift
    case $NAME in
    microvm) qemu microvm,rtc=on vhost-user-fs-device "$@" ;;
    q35) qemu q35 vhost-user-fs-pci "$@" ;;
    firecracker)
        # It has no other way to learn of a kernel but this file and its API's socket.
        cat >/tmp/firecracker.json <<END
{"boot-source": {"kernel_image_path": "$KERNEL", "initrd_path": "$IMAGE", "boot_args": "$WORDS"},
 "drives": [], "machine-config": {"vcpu_count": 1, "mem_size_mib": 256}}
END
        "$@" "$PROGRAM" --no-api --config-file /tmp/firecracker.json
        ;;
    crosvm)
        "$@" "$PROGRAM" run --disable-sandbox --mem 256 --cpus 1 --initrd "$IMAGE" -p "$WORDS" \
            --serial type=stdout,hardware=serial,console=true "$KERNEL"
        ;;
    alioth)
        "$@" "$PROGRAM" run --kernel "$KERNEL" --initramfs "$IMAGE" --cmd-line "$WORDS" --mem-size 256M --num-cpu 1
        ;;
    cloud-hypervisor)
        "$@" "$PROGRAM" --kernel "$KERNEL" --initramfs "$IMAGE" --cmdline "$WORDS" --cpus boot=1 --memory size=256M \
            --serial tty --console off
        ;;
    *)
        set -- "$@" "$PROGRAM" -k "$KERNEL" -i "$IMAGE" -m 256M -c quiet
        [ -z "$socket" ] || set -- "$@" --vhost-user "$socket,type=fs,name=fs"
        "$@"
        ;;
    esac
}

# qemu MACHINE DEVICE WORD...: the same, for a machine of QEMU's and its device of type fs.
qemu() {
    machine=$1 device=$2
    shift 2
    set -- "$@" "$PROGRAM" -M "$machine" -no-reboot -enable-kvm -cpu host -m 256M -nodefaults -no-user-config -display none \
        -serial stdio -kernel "$KERNEL" -initrd "$IMAGE" -append "$WORDS"
    [ -z "$socket" ] || set -- "$@" -object memory-backend-memfd,id=ram,size=256M,share=on \
        -machine memory-backend=ram -chardev "socket,id=fs,path=$socket" -device "$device,chardev=fs,tag=share"
    "$@"
}

# Whether the VMM takes a back-end.
takes_backends() {
    case $NAME in
    firecracker | crosvm | alioth | cloud-hypervisor) return 1 ;;
    esac
}
