# shellcheck shell=sh disable=SC2034
# Streams in both directions, compared at their end.
FROM=sid:vhost-device-vsock
DEVICE=type=vsock
MODULES=vmw_vsock_virtio_transport
TOOLS=socat:socat
HOST_TOOLS=socat:socat

back_end() {
    rm -f "$DIR/vsock.uds"
    inside vhost-device-vsock --guest-cid 3 --socket "$SOCKET" --uds-path "$DIR/vsock.uds"
}
# The host's end: echoes what comes to port 1234, and sends to port 1235 what must come back.
beside() {
    socat "UNIX-LISTEN:$DIR/vsock.uds_1234,fork" EXEC:cat &
    head -c 1000000 /dev/urandom >"$DIR/vsock.data"
    wait_for '^LISTENING' || return
    # The guest may not listen yet. The answer to CONNECT comes first; the data have an end of their own.
    for _ in 1 2 3 4 5; do
        sleep 5
        { echo CONNECT 1235 && sleep 2 && cat "$DIR/vsock.data" && sleep 60; } |
            timeout 60 socat - "UNIX-CONNECT:$DIR/vsock.uds" | tail -n +2 | head -c 1000000 >"$DIR/vsock.back"
        ! cmp "$DIR/vsock.data" "$DIR/vsock.back" || { report vsock from-host ok && return; }
    done
    report vsock from-host "WRONG $(stat -c %s "$DIR/vsock.back") bytes came back"
}

work() {
    pidof socat || {
        socat VSOCK-LISTEN:1235,fork EXEC:cat &
        sleep 1
        echo LISTENING >/dev/console
    }
    head -c 4000000 /dev/urandom >data
    for try in 1 2 3; do
        socat -t 60 - VSOCK-CONNECT:2:1234 <data >back
        cmp data back
    done
}
touch_it() { echo hello | socat -t 10 - VSOCK-CONNECT:2:1234; }
