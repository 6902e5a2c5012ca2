# shellcheck shell=sh disable=SC2034
# A read-only SCSI disk, which is what this back-end has: all of it read, with checksums.
FROM=crate:vhost-device-scsi:0.1.0
DEVICE=type=scsi
MODULES='virtio_scsi sd_mod'

prepare() {
    head -c 32000000 /dev/urandom >"$DIR/scsi.img"
    truncate -s 32M "$DIR/scsi.img"
    sha256sum <"$DIR/scsi.img" >"$DIR/scsi.sum"
}
back_end() { inside vhost-device-scsi --read-only --socket-path "$SOCKET" "$DIR/scsi.img"; }
beside() {
    wait_for '^scsi: ' || return
    if grep -aq "^scsi: $(cat "$DIR/scsi.sum")" "$OUT/console"; then report scsi sum ok; else report scsi sum WRONG; fi
}

work() {
    disk=/dev/$(basename /sys/bus/virtio/drivers/virtio_scsi/virtio*/host*/target*/*/block/*)
    cat "/sys/block/${disk#/dev/}/device/vendor" "/sys/block/${disk#/dev/}/device/model"
    sum=$(dd if="$disk" bs=1M iflag=direct | sha256sum)
    [ -e sum ] || echo "scsi: $sum" | tee sum >/dev/console
    # The same in small pieces, in two readers at a time.
    dd if="$disk" bs=4k count=4096 iflag=direct | sha256sum >half &
    [ "scsi: $(dd if="$disk" bs=64k iflag=direct | sha256sum)" = "$(cat sum)" ]
    wait
    [ "$(cat half)" = "$(head -c 16777216 "$disk" | sha256sum)" ]
}
touch_it() { dd if="/dev/$(basename /sys/bus/virtio/drivers/virtio_scsi/virtio*/host*/target*/*/block/*)" of=/dev/null bs=4k count=1 iflag=direct; }
