#!/bin/bash
# What interop.sh debian types at the login of its guest: looks at systemd and at the network that passt gives, installs
# packages that the host serves, and switches the guest off. Prints `CHECK debian WHAT ok SECONDS` or `WRONG text`.
set -uo pipefail
TERMINAL=$(tty)
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

check() {
    local start=$SECONDS text
    if text=$("$1" 2>&1); then echo "CHECK debian $1 ok $((SECONDS - start))"; else echo "CHECK debian $1 WRONG $(tail -n 3 <<<"$text" | paste -sd ' ')"; fi
}
login() {
    systemctl is-system-running --wait
    [[ $TERMINAL == /dev/ttyS0 && $(findmnt -no SOURCE /) == /dev/vda && $(systemctl is-system-running) == running ]]
}
network() {
    ip -4 -o addr show | grep -F 10.0.2.15/24 && ip route | grep 'default via 10.0.2.2'
}
update() {
    echo 'deb [trusted=yes] http://10.0.2.2:8080 ./' >/etc/apt/sources.list
    apt-get -q update
}
install() {
    apt-get -qy install hello tree ed && [[ $(hello) == 'Hello, world!' && -z $(dpkg --verify hello tree ed) ]]
}

dmesg -n 1
for each in login network update install; do check $each; done </dev/null
systemctl poweroff
