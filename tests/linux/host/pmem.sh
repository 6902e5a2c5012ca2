# shellcheck shell=sh
# A guest with two files as persistent memory, the second one read-only.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

backend disk0 pmem --file "$OUT/disk0.img"
backend disk1 pmem --file "$OUT/disk1.img" --read-only
open_keyboard
guest pmem -k "$VMLINUX" --debug-exit -c "$DEBUG_EXIT -- sh /test/pmem.sh" \
    --vhost-user "$OUT/disk0.sock,type=pmem,name=disk0" --vhost-user "$OUT/disk1.sock,type=pmem,name=disk1" \
    <"$KEYS" &
exec 3>"$KEYS"
# At each of these the guest waits for a line, so that the memory map is that of this moment.
maps=0
for state in mapped unbound bound; do
    wait_for "$OUT/pmem.out" "^now $state" || break
    kill -USR1 "$(cat "$OUT/pmem.pid")"
    maps=$((maps + 1))
    # The last device of each map; what follows is written at once.
    wait_for "$OUT/pmem.err" 'registers of disk1' "$maps"
    sleep 0.5
    echo go on >&3
done
wait
