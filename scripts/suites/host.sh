# shellcheck shell=sh
# Runs on the emulated host, for suites.sh: one suite in one configuration, on an ext4 that is made for it.
#
# From suites.sh, in the environment: SUITE, SECONDS_ALL and ROLE for run.sh; CONFIG; HOTSLOT and BACKEND (programs), KERNEL
# and IMAGE (what the guest boots), BIN (the suites' programs); LIMIT, the seconds after which a guest is stopped.
work=$(mktemp -d)
share=$work/share
truncate -s 8G "$work/ext4"
mkfs.ext4 -q "$work/ext4"
mkdir -m 755 "$share"
chmod 755 "$work"
mount -t ext4 -o loop "$work/ext4" "$share" || exit 1
case $CONFIG in
ext4-*)
    DIR=$share exec sh "${0%/*}/run.sh"
    ;;
dax-*) window=1G options=dax=always ;;
nodax-*) window=0 options=rw ;;
esac
mkdir "$work/sockets"
as=''
nodes=--device-nodes
case $CONFIG in
*-rootless)
    nodes=
    chown 1000:1000 "$share" "$work/sockets"
    as="$BIN/setpriv --reuid 1000 --regid 1000 --clear-groups --"
    ;;
esac
# shellcheck disable=SC2153 # BACKEND is no misspelling
# shellcheck disable=SC2086 # one option or none
$as "$BACKEND" fs $nodes --socket "$work/sockets/fs" --dir "$share" --tag share --window "$window" --once &
backend=$!
timeout -s KILL "$LIMIT" "$HOTSLOT" -k "$KERNEL" -i "$IMAGE" -m 1G --debug-exit --connect-timeout 30s \
    -c "quiet OPTIONS=$options SUITE=$SUITE SECONDS_ALL=$SECONDS_ALL ROLE=$ROLE -- sh /suites/guest.sh" \
    --vhost-user "$work/sockets/fs,type=fs,name=fs" </dev/null
echo "hotslot: status $?"
# With --once the back-end ends with its front-end.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    kill -0 $backend 2>/dev/null || exit 0
    sleep 1
done
echo 'why: the back-end goes on; its threads:'
for task in "/proc/$backend/task/"*; do
    echo "why: $(cat "$task/comm"): $(cat "$task/wchan")"
    sed 's/^/why: /' "$task/stack"
done
echo 'case: back-end FAILED'
kill -KILL $backend
