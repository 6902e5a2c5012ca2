# shellcheck shell=sh disable=SC2034
# A console: the guest echoes what the host types into its TCP connection, and the host compares.
FROM=crate:vhost-device-console:0.1.0
DEVICE=type=console
SUFFIX=0

back_end() { inside vhost-device-console --socket-path "$SOCKET" --backend network --tcp-port 12345; }
beside() {
    wait_for '^console waits' || return
    for line in $(seq 1 100); do echo "line $line of one hundred"; done >"$DIR/console.data"
    # It takes what is typed when it comes, not faster than its queue.
    while read -r line; do
        echo "$line"
        sleep 0.1
    done <"$DIR/console.data" | nc 127.0.0.1 12345 >"$DIR/console.back" &
    if wait_for '^console has'; then sleep 5; fi
    kill $!
    if grep -a '^line' "$DIR/console.back" | tr -d '\r' | cmp - "$DIR/console.data"; then
        report console echo ok
    else
        report console echo WRONG "$(head -c 100 "$DIR/console.back")"
    fi
}

work() {
    ls -l /dev/hvc0 /dev/vport* || true
    # Open throughout: the last one that closes it resets its settings.
    exec 3<>/dev/hvc0
    stty raw -echo <&3
    # It drops what is typed before the guest has written something.
    echo hello >&3
    echo 'console waits' >/dev/console
    # From the first to the last line.
    while read -r line; do
        echo "$line"
        echo "$line" >&2
        [ "$line" != 'line 100 of one hundred' ] || break
    done <&3 >&3
    echo 'console has all' >/dev/console
}
touch_it() { echo hello >/dev/hvc0; }
