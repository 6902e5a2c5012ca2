# shellcheck shell=sh
# What run.sh runs on the host, a real one or the emulated one, whose shell is busybox: the back-ends, and hotslot with the
# guest. The arguments are options for hotslot.
#
# From run.sh, in the environment: HOTSLOT and BACKEND (programs), KERNEL, GUEST (initramfs), JOB (demo, console or
# command), DEVICES (a line for each back-end: type and keys, then its command line), SETUP (words for guest.sh), CMDLINE
# (the user's words for the kernel's command line, which hotslot takes once).
#
# A command's job is started by `init lab` (guest/src/lab/script.rs): standard input is the socket of the link, standard
# output a log whose end says that all is to end; HOTSLOT_OPTIONS, for the shell, are the options for hotslot. Otherwise
# the guest's console is standard input and output, and the exit status is hotslot's.

dir=$(mktemp -d)
backends='' number=0 devices=''
# shellcheck disable=SC2086 # one word per process
finish() {
    kill $backends 2>/dev/null
    rm -rf "$dir"
}
trap finish EXIT

# backend TYPE LINE: starts one, and adds its device to hotslot's arguments. Its standard input is descriptor 3 of this shell.
backend() {
    socket=$dir/$number
    number=$((number + 1))
    line=$(printf '%s\n' "$2" | sed "s|{socket}|$socket|g")
    printf '%s\n' "$2" >"$socket.line"
    sh -c "exec $line" <&3 3<&- &
    backends="$backends $!"
    devices="$devices --vhost-user $socket,$1"
}

# Waits until each back-end listens, 30 seconds for all together: after that hotslot waits, by its own limit, and names the
# device. Fails when one has ended before.
all_listen() {
    number=0 tries=0
    for pid in $backends; do
        while [ ! -S "$dir/$number" ] && [ $tries -lt 1500 ]; do
            if ended "$pid"; then
                echo "run.sh: a back-end ended before it listened: $(cat "$dir/$number.line")" >&2
                return 1
            fi
            sleep 0.02
            tries=$((tries + 1))
        done
        number=$((number + 1))
    done
}

# ended PID: whether it has; until it is waited for it is a zombie.
ended() {
    { read -r stat <"/proc/$1/stat"; } 2>/dev/null || return 0
    case $stat in *') Z '*) return 0 ;; esac
    return 1
}

if [ "$JOB" = command ]; then
    exec 3<&0 </dev/null
    backend type=console,name=link "'$BACKEND' console --once --socket {socket} --port run=-"
    cmdline="quiet hotslot.link=run${CMDLINE:+ $CMDLINE}"
    eval "set -- $HOTSLOT_OPTIONS"
else
    cmdline="quiet${CMDLINE:+ $CMDLINE} -- sh /etc/hotslot/run/guest.sh \"$SETUP\""
fi
# Only the console's back-end may hold the link's socket, which must close when that back-end ends.
exec 3</dev/null
# shellcheck disable=SC2153 # it is run.sh's
while read -r type line; do
    [ -z "$type" ] || backend "$type" "$line"
done <<END
$DEVICES
END
# shellcheck disable=SC2086 # its paths are of mktemp
set -- "$HOTSLOT" -k "$KERNEL" -i "$GUEST" --debug-exit -c "$cmdline" $devices "$@"

case $JOB in
console) all_listen && "$@" ;;
command)
    { all_listen && exec "$@"; } &
    hotslot_pid=$!
    # Either may end first: `init lab`, or the guest. What does not end within three seconds is made to.
    {
        cat <&1 >/dev/null
        kill $hotslot_pid
        sleep 3
        kill -KILL 0
    } 2>/dev/null &
    wait $hotslot_pid
    finish
    # shellcheck disable=SC2086 # one word per process
    wait $backends
    kill -KILL 0
    ;;
demo)
    # When guest.sh has written its file, hotslot is asked for its memory map.
    mkfifo "$dir/console"
    { all_listen && exec "$@"; } </dev/null >"$dir/console" &
    hotslot_pid=$!
    while IFS= read -r line; do
        printf '%s\n' "$line"
        case $line in *'the guest has written'*) kill -USR1 $hotslot_pid ;; esac
    done <"$dir/console"
    wait $hotslot_pid
    ;;
esac
