# shellcheck shell=sh
# What run.sh runs on the host, a real one or the emulated one, whose shell is busybox: a back-end, and hotslot with the
# guest. The arguments are options for hotslot.
#
# From run.sh, in the environment: HOTSLOT and BACKEND (programs), KERNEL, GUEST (initramfs), JOB (demo, shell or share),
# IMAGE (persistent memory), SHARE (a directory), WINDOW (the size of its DAX window), WRITTEN (what the guest of the demo
# prints when its file is written). Exit status: hotslot's.

dir=$(mktemp -d)
trap 'kill "$backend_pid" 2>/dev/null; rm -rf "$dir"' EXIT
if [ "$JOB" = share ]; then
    "$BACKEND" fs --socket "$dir/socket" --dir "$SHARE" --tag share --window "$WINDOW" --once &
    device=type=fs,name=share
else
    "$BACKEND" pmem --socket "$dir/socket" --file "$IMAGE" --once &
    device=type=pmem,name=pmem0
fi
backend_pid=$!
set -- "$HOTSLOT" -k "$KERNEL" -i "$GUEST" --debug-exit -c quiet \
    --vhost-user "$dir/socket,$device" "$@"
if [ "$JOB" != demo ]; then
    "$@"
    exit
fi

# With the file written, hotslot is asked for its memory map.
mkfifo "$dir/console"
"$@" </dev/null >"$dir/console" &
hotslot_pid=$!
while IFS= read -r line; do
    printf '%s\n' "$line"
    case $line in *"$WRITTEN"*) kill -USR1 $hotslot_pid ;; esac
done <"$dir/console"
wait $hotslot_pid
