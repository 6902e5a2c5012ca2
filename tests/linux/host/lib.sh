# shellcheck shell=sh
# What the sessions share. They run on the host, a real one or the emulated one, whose shell is busybox.
#
# From the test, in the environment: HOTSLOT, BACKEND and INIT (programs; the last has the probes), BZIMAGE and VMLINUX (kernels), IMAGE (initramfs),
# OUT (a directory for what the test will look at), INPUT (a file in it, where a test made one), BUSY (a factor for time limits).
# Of each guest: OUT/NAME.out, .err and .status.


# guest NAME OPTION...: runs one to its end. A guest that hangs must not take the others with it.
guest() {
    name=$1
    shift
    # shellcheck disable=SC2016 # for the inner shell
    timeout -s KILL $((${LIMIT:-120} * BUSY)) sh -c 'echo $$ >"$0"; exec "$@"' "$OUT/$name.pid" \
        "$HOTSLOT" -i "$IMAGE" --connect-timeout 30s "$@" >"$OUT/$name.out" 2>"$OUT/$name.err"
    echo $? >"$OUT/$name.status"
}

# backend NAME KIND OPTION...: starts a back-end at OUT/NAME.sock that ends with its front-end.
backend() {
    name=$1 kind=$2
    shift 2
    "$BACKEND" "$kind" --socket "$OUT/$name.sock" --once "$@" 2>"$OUT/$name.backend" &
    backends="${backends-} $!"
}

# end_backends: of guests that have ended. One whose guest never began would wait for it.
end_backends() {
    # shellcheck disable=SC2086 # one word per process
    kill $backends 2>/dev/null
    wait
    backends=
}

# probe ARGUMENT...: one of guest/'s, on this side.
probe() { "$INIT" probe "$@"; }

# note KEY VALUE: a line for the test, which finds it in OUT/host.out.
note() { echo "$1: $2" >>"$OUT/host.out"; }

# open_keyboard: makes the pipe KEYS for a guest's standard input. A session that writes after the guest's
# end does not die of SIGPIPE.
open_keyboard() {
    keyboard=$(mktemp -d)
    KEYS=$keyboard/keys
    mkfifo "$KEYS"
    trap 'rm -r "$keyboard"' EXIT
    trap '' PIPE
}

# wait_for FILE TEXT [COUNT]: until COUNT lines (1) of FILE match TEXT, or the guest has ended or should have.
wait_for() {
    tries=0
    touch "$1"
    while [ "$(grep -ac -- "$2" "$1")" -lt "${3:-1}" ]; do
        tries=$((tries + 1))
        [ ! -e "${1%.*}.status" ] || tries=$((500 * BUSY))
        [ $tries -lt $((500 * BUSY)) ] || {
            echo "no '$2' in $1" >&2
            return 1
        }
        sleep 0.2
    done
}
