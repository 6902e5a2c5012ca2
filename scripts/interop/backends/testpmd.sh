# shellcheck shell=sh disable=SC2034
# Two network cards that DPDK's testpmd joins: a stream from one to the other, between two network namespaces of the guest.
FROM=sid:dpdk-dev
MODULES=virtio_net

devices() {
    echo "$DIR/testpmd-a.sock,type=net,name=testpmd-a"
    echo "$DIR/testpmd-b.sock,type=net,name=testpmd-b"
}
back_end() {
    # It ends with its input.
    rm -f "$DIR"/testpmd-?.sock "$DIR/testpmd.in"
    mkfifo "$DIR/testpmd.in"
    exec <>"$DIR/testpmd.in"
    # Its offloads as they were before DPDK 21.11: a checksum that the sender leaves out is left out for the receiver, too.
    inside dpdk-testpmd --no-huge -m 256 --no-pci --in-memory --no-telemetry --lcores 0@0,1@0 \
        --vdev "net_vhost0,iface=$DIR/testpmd-a.sock,legacy-ol-flags=1" \
        --vdev "net_vhost1,iface=$DIR/testpmd-b.sock,legacy-ol-flags=1" -- --forward-mode=io --total-num-mbufs=4096
}

other() { nsenter -t "$(cat /tmp/other)" -n "$@"; }
work() {
    if [ ! -e /tmp/other ]; then
        a='' b=''
        for interface in /sys/bus/virtio/drivers/virtio_net/virtio*/net/*; do
            b=$a a=${interface##*/}
        done
        unshare -n sleep 100000 &
        echo $! >/tmp/other
        sleep 1
        ip link set "$b" netns "$(cat /tmp/other)"
        other ip addr add 10.1.0.2/24 dev "$b"
        other ip link set "$b" up
        ip addr add 10.1.0.1/24 dev "$a"
        ip link set "$a" up
    fi
    ping -c 5 -s 1200 10.1.0.2
    head -c 3000000 /dev/urandom >data
    for try in 1 2 3; do
        other nc -l -p 5002 -e sha256sum &
        sleep 1
        [ "$(nc 10.1.0.2 5002 <data)" = "$(sha256sum <data)" ]
        wait
    done
}
touch_it() { ping -c 3 -W 3 10.1.0.2; }
