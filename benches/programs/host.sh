# shellcheck shell=sh
# Runs on the emulated host, for scripts/bench.sh: the same work on the host itself, or in a guest for a way to get at
# the files of a directory, or at a disk; CASE is which. HOTSLOT, BACKEND, VIRTIOFSD and DAEMON are programs, KERNEL and
# IMAGE what the guest boots; WORK is what is done.
share=$(mktemp -d)
disk=$(mktemp)
probe fill "$share/data" 64 >/dev/null
cp "$share/data" "$disk"

# report NAME: the figures among the lines of the input.
report() { sed -n "s/^.*speed \([a-z ]*\): \([0-9]*\).*/$1:\1:\2/p"; }

# on_host NAME [VARIABLE=VALUE]... PROGRAM ARG...: the work without a guest.
on_host() {
    name=$1
    shift
    env MEMORY=64 "$@" >"/tmp/$name.out" || exit 1
    report "$name" <"/tmp/$name.out"
}

# case_of NAME TYPE VARIABLES BACK-END...: a guest on this back-end, which has been given the socket.
case_of() {
    name=$1 type=$2 variables=$3
    shift 3
    "$@" >"/tmp/$name.backend" 2>&1 &
    server=$!
    tries=0
    while [ ! -S "/tmp/$name.sock" ] && [ $tries -lt 100 ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
    "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 768M --debug-exit \
        -c "quiet MEMORY=200 $variables -- sh /bench/work.sh" \
        --vhost-user "/tmp/$name.sock,type=$type,name=$type" </dev/null >"/tmp/$name.out" 2>&1 || {
        cat "/tmp/$name.backend" "/tmp/$name.out" >&2
        exit 1
    }
    # Not all of them end with their front-end.
    kill $server 2>/dev/null
    wait $server
    report "$name" <"/tmp/$name.out"
}

case $CASE in
host) on_host host sh "$WORK" "$share" ;;
cached) case_of cached fs OPTIONS=rw "$BACKEND" fs --socket /tmp/cached.sock --dir "$share" --once --window 0 ;;
virtiofsd)
    # An initramfs cannot be pivoted out of, which is what its other sandbox does.
    case_of virtiofsd fs OPTIONS=rw "$VIRTIOFSD" --socket-path /tmp/virtiofsd.sock --shared-dir "$share" --tag share \
        --sandbox chroot
    ;;
dax) case_of dax fs OPTIONS=dax=always "$BACKEND" fs --socket /tmp/dax.sock --dir "$share" --once --window 256M ;;
diskhost) on_host diskhost "DISK=$disk" sh "$WORK" ;;
blk) case_of blk blk DISK=/dev/vda "$BACKEND" blk --socket /tmp/blk.sock --file "$disk" --once ;;
daemon)
    case_of daemon blk DISK=/dev/vda "$DAEMON" --blockdev "driver=file,node-name=disk,filename=$disk" \
        --export "type=vhost-user-blk,id=disk,node-name=disk,addr.type=unix,addr.path=/tmp/daemon.sock,writable=on"
    ;;
esac
