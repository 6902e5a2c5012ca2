# shellcheck shell=sh
# Two guests at a time with one directory, whose locks are the host's: each has to wait for the other, and for this side.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# Two at a time take longer.
LIMIT=240
share=$(mktemp -d)
mkdir "$share/files.first" "$share/files.second"
probe with-lock "$share/host" 'sleep 600' &
holder=$!
for name in first second; do
    backend $name fs --dir "$share" --tag share --window 64M --locks host
    guest "$name" -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/fs_locks.sh $name" \
        --vhost-user "$OUT/$name.sock,type=fs,name=share" </dev/null &
    machines="${machines-} $!"
done
# shellcheck disable=SC2086 # one word per process
wait $machines
kill $holder
end_backends
note order "$(tr '\n' ' ' <"$share/order")"
rm -r "$share"
