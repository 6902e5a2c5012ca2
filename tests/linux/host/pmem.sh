# shellcheck shell=sh
# A guest with three files as persistent memory: the second one read-only, the third one larger than the guest's memory, and of a
# length that is a multiple of nothing: the memory has 2054 MiB.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

backend disk0 pmem --file "$OUT/disk0.img"
backend disk1 pmem --file "$OUT/disk1.img" --read-only
large=$(mktemp -d)
truncate -s $((2054 * 1048576 - 5000)) "$large/img"
printf 'The last bytes.' | dd of="$large/img" bs=1 seek=$((2054 * 1048576 - 5015)) conv=notrunc 2>/dev/null
backend disk2 pmem --file "$large/img"
open_keyboard
guest pmem -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/pmem.sh" \
    --vhost-user "$OUT/disk0.sock,type=pmem,name=disk0" --vhost-user "$OUT/disk1.sock,type=pmem,name=disk1" \
    --vhost-user "$OUT/disk2.sock,type=pmem,name=disk2" \
    <"$KEYS" &
exec 3>"$KEYS"
# At each of these the guest waits for a line, so that the memory map is that of this moment.
maps=0
for state in mapped unbound bound; do
    wait_for "$OUT/pmem.out" "^now $state" || break
    kill -USR1 "$(cat "$OUT/pmem.pid")"
    maps=$((maps + 1))
    # The last device of each map; what follows is written at once.
    wait_for "$OUT/pmem.err" 'registers of disk2' "$maps"
    sleep 0.5
    echo go on >&3
done
wait
note middle "$(dd if="$large/img" bs=1M skip=1900 count=1 2>/dev/null | tr -d '\0')"
note length "$(wc -c <"$large/img")"
rm -r "$large"
