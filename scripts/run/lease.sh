#!/bin/sh
# What udhcpc calls in a guest of run.sh --net, with the lease in the environment: sets the address, the route and the name
# servers. ROOT is where the root file system is mounted.
# shellcheck disable=SC2154 # they come from udhcpc
case $1 in
deconfig) ip link set "$interface" up ;;
bound | renew)
    ip address replace "$ip/$mask" dev "$interface"
    [ -z "$router" ] || ip route replace default via "${router%% *}" dev "$interface"
    # It may be a link to a place that does not exist here.
    rm -f "$ROOT/etc/resolv.conf"
    for server in $dns; do echo "nameserver $server"; done >"$ROOT/etc/resolv.conf"
    ;;
esac
