# shellcheck shell=sh
# Small machines of each kind, and each way in which a machine ends.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

guest off -k "$VMLINUX" -m 128M -c 'quiet -- sh /test/look.sh memory' </dev/null
guest reset -k "$BZIMAGE" --cpus 2 -c 'quiet -- sh /test/look.sh reboot' </dev/null
guest panic -k "$VMLINUX" --cpus 4 -c 'quiet -- sh /test/look.sh panic' </dev/null
# Whether or not the guest has the driver of pvpanic.
guest panic-early -k "$VMLINUX" --cpus 2 -c 'quiet hotslot.modules= -- sh /test/look.sh panic' </dev/null
guest crash -k "$BZIMAGE" --cpus 4 -c 'quiet reboot=t -- sh /test/look.sh reboot' </dev/null
guest status -k "$BZIMAGE" --debug-exit -c "quiet -- sh /test/look.sh dmesg" </dev/null
