# shellcheck shell=sh disable=SC2034
# Network: an address by DHCP, ping, a file of the host's HTTP server, and a connection from the host into the guest.
FROM=sid:passt
DEVICE=type=net
MODULES=virtio_net
GATEWAY=10.0.2.2

prepare() {
    mkdir -p "$DIR/www"
    head -c 3000000 /dev/urandom >"$DIR/www/file"
    (cd "$DIR/www" && sha256sum file >file.sha256)
    # A directory of the user's, for a guest that installs packages.
    [ -z "${WWW-}" ] || cp "$WWW"/* "$DIR/www/"
    httpd -p 127.0.0.1:8080 -h "$DIR/www"
    # passt answers pings with sockets for them.
    echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range
}
back_end() {
    inside passt --foreground --vhost-user --socket "$SOCKET" --address 10.0.2.15 --netmask 24 \
        --gateway $GATEWAY --map-host-loopback $GATEWAY --ipv4-only -t 127.0.0.1/5001
}
beside() {
    wait_for '^passt listens' || return
    wanted=$(sha256sum <"$DIR/www/file")
    # The guest may not listen yet.
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        sleep 3
        [ "$(nc 127.0.0.1 5001 <"$DIR/www/file")" != "$wanted" ] || { report passt from-host ok && return; }
    done
    report passt from-host WRONG
}

work() {
    interface=$(basename /sys/bus/virtio/drivers/virtio_net/virtio*/net/*)
    if [ ! -e /tmp/address ]; then
        # shellcheck disable=SC2016 # udhcpc fills these in
        printf '%s\n' '#!/bin/sh' '[ "$1" = bound ] || exit 0' 'ip addr add "$ip/$mask" dev "$interface"' \
            'ip route add default via "$router"' 'echo "$ip" >/tmp/address' >/tmp/udhcpc
        chmod +x /tmp/udhcpc
        ip link set "$interface" up
        udhcpc -i "$interface" -n -q -t 20 -s /tmp/udhcpc
        while true; do nc -l -p 5001 -e sha256sum; done &
        echo 'passt listens' >/dev/console
    fi
    grep '^10.0.2.15$' /tmp/address
    ping -c 5 -s 1200 $GATEWAY
    # Debian's static busybox has a wget that crashes where shared libraries are.
    for file in file file.sha256 file; do
        printf 'GET /%s HTTP/1.0\r\n\r\n' $file | nc $GATEWAY 8080 >answer
        tail -c "$(tr -d '\r' <answer | sed -n 's/^Content-Length: //Ip' | head -n 1)" answer >$file
    done
    sha256sum -c file.sha256
}
touch_it() { ping -c 3 -W 3 $GATEWAY; }
