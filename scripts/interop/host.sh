# shellcheck shell=sh disable=SC2153,SC2317,SC2329 # the back-ends' files set variables and call functions
# What interop.sh runs on the emulated host, whose shell is busybox: back-ends, and one guest that uses all of them at the
# same time. At the guest's word it kills them, and starts them again where hotslot is to reconnect.
#
# From interop.sh, in the environment: NAMES (files in backends/, one word each), INTEROP (this directory), OUT (a directory
# for what is printed), WORK (where Debian's roots and the crates' programs lie), HOTSLOT, KERNEL and IMAGE, CPUS, RECONNECT
# (seconds; empty where a device stays lost), KILLS (how often each dies and returns then), LIMIT (seconds for the guest),
# WORDS (of the kernel's command line). For a guest with a login: LOGIN (what is typed there) and DISK (the image of its root).
export DIR=/run/interop
mkdir -p $DIR
# passt becomes "nobody", and makes its socket.
chmod 1777 $DIR
ip link set lo up
if [ -n "$DISK" ]; then
    touch $DIR/disk.img
    mount --bind "$DISK" $DIR/disk.img || exit 1
fi
for root in "$WORK/sid" "$WORK/bookworm"; do
    [ -d "$root" ] || continue
    for each in dev proc sys run/interop; do
        mkdir -p "$root/$each"
        mount --rbind "/$each" "$root/$each" || exit 1
    done
    mount --rbind "$root" "$root" || exit 1
done

# What a back-end's file may leave out.
beside() { :; }
# shellcheck disable=SC2153 # the file sets SUFFIX and DEVICE
devices() { echo "$SOCKET${SUFFIX-},$DEVICE,name=$NAME"; }
prepare() { :; }

# load NAME: in a subshell.
load() {
    NAME=$1 SOCKET=$DIR/$1.sock
    # shellcheck source=/dev/null
    . "$INTEROP/backends/$1.sh"
}
# inside PROGRAM ARG...: becomes that program, of where the back-end's file says that it is from.
inside() {
    case $FROM in
    crate:* | qemu-source:*) PATH=$WORK/bin:$PATH exec "$@" ;;
    esac
    # shellcheck disable=SC2016 # the inner shell has them
    # Not only chroot: passt makes a user namespace, which Linux refuses in one.
    exec unshare -m sh -c 'cd "$0" && mount --move . / && exec chroot . "$@"' "$WORK/${FROM%%:*}" "$@"
}
start() {
    (load "$1" && back_end) >>"$OUT/$1.back-end" 2>&1 &
    echo $! >"$DIR/$1.pid"
}
# report NAME WORD...: a result of this side.
report() { echo "CHECK $*" >>"$OUT/host"; }
# wait_for TEXT [SECONDS]: until the console shows it, or the guest has ended.
wait_for() {
    tries=$((${2-$LIMIT} * 5))
    until grep -aq -- "$1" "$OUT/console"; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] && [ ! -e "$OUT/status" ] || return 1
        sleep 0.2
    done
}
# wait_for_return DEATH: until each device's back-end was back for so many times.
wait_for_return() {
    for device in $all; do
        tries=$((RECONNECT * 5))
        until [ "$(grep -c ": $device: the back-end is back" "$OUT/hotslot")" -ge "$1" ]; do
            tries=$((tries - 1))
            if [ $tries = 0 ] || [ -e "$OUT/status" ]; then
                report "${device%-[ab]}" "death $1 WRONG: the back-end of $device is not back"
                return 1
            fi
            sleep 0.2
        done
    done
}
# in_flight: how many requests the records hold that hotslot keeps for its back-ends (INFLIGHT_SHMFD), of 16 bytes each.
in_flight() {
    # shellcheck disable=SC2012 # links of /proc
    for fd in $(ls -l "/proc/$(pidof hotslot)/fd" | sed -n 's/.* \([0-9]*\) -> .*memfd:hotslot-inflight.*/\1/p'); do
        od -An -v -t u1 -w16 "/proc/$(pidof hotslot)/fd/$fd"
    done | awk '$1 == 1' | wc -l
}
kill_all() { for name in $NAMES; do kill -KILL "$(cat "$DIR/$name.pid")"; done; }

set --
all=''
for name in $NAMES; do
    (load "$name" && prepare) || exit 1
    start "$name"
    for device in $(load "$name" && devices); do
        all="$all ${device##*name=}"
        set -- "$@" --vhost-user "$device${RECONNECT:+,reconnect=$RECONNECT}"
    done
done
: >"$OUT/console"
mkfifo "$DIR/keys"
# Open for writing, too: otherwise to open it would wait.
exec 3<>"$DIR/keys"
{
    timeout -s KILL "$LIMIT" "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 1G --cpus "$CPUS" -v --debug-exit --connect-timeout 30s \
        --trace-vhost-user "$OUT/trace" -c "quiet $WORDS" "$@" <"$DIR/keys" >>"$OUT/console" 2>"$OUT/hotslot"
    echo $? >"$OUT/status"
} &
guest=$!
for name in $NAMES; do (load "$name" && beside) & done

if [ -n "$LOGIN" ] && wait_for 'login: $'; then
    echo root >&3
    if wait_for '# $'; then echo "$LOGIN" >&3; fi
fi
if [ -n "$RECONNECT" ] && wait_for '^DEATH and return'; then
    for death in $(seq "$KILLS"); do
        sleep 2
        kill_all
        in_flight >>"$OUT/in-flight"
        for name in $NAMES; do start "$name"; done
        wait_for_return "$death" || break
    done
    echo enough >&3
fi
if wait_for '^DEATH permanent'; then kill_all; fi
wait $guest
for name in $NAMES; do kill -KILL "$(cat "$DIR/$name.pid")" 2>/dev/null; done
exit 0
