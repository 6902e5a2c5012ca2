# shellcheck shell=sh disable=SC2034
# An input device: the first of the host, on which the host presses the power key; the guest counts that.
FROM=crate:vhost-device-input:0.1.0
DEVICE=type=input
SUFFIX=0
MODULES='virtio_input evdev'
HOST_MODULES=evdev

back_end() { inside vhost-device-input --socket-path "$SOCKET" --event-list /dev/input/event0; }
# key VALUE: KEY_POWER (116) and SYN_REPORT as struct input_event has them.
key() { printf '%b' '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\001\0\164\0\00'"$1"'\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'; }
# What is written to an event device is an event of it.
beside() {
    wait_for '^input waits' || return
    name=$(cat /sys/class/input/event0/device/name)
    if grep -aq "^input waits for $name" "$OUT/console"; then report input name ok; else report input name WRONG "$name"; fi
    while wait_for '^input waits'; do
        for value in 1 0; do
            key $value >/dev/input/event0
            sleep 0.2
        done
    done
}

work() {
    event=/dev/input/$(basename /sys/bus/virtio/drivers/virtio_input/virtio*/input/input*/event*)
    echo "input waits for $(cat "/sys/class/input/${event#/dev/input/}/device/name")" >/dev/console
    # Ten events and what ends each.
    dd if="$event" of=events bs=24 count=20
    od -An -v -t u2 -j 16 -w24 events | awk '$1 == 1 && $2 == 116' | tee keys
    [ "$(wc -l <keys)" = 10 ]
}
touch_it() { timeout 10 dd if="/dev/input/$(basename /sys/bus/virtio/drivers/virtio_input/virtio*/input/input*/event*)" bs=24 count=1; }
