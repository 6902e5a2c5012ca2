# shellcheck shell=sh
# A guest with an entropy device and a pmem device makes HOTSLOT_REQUESTS requests to each. Each look is a line of
# statistics.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

requests=${HOTSLOT_REQUESTS:-1000}
backend rng torture
backend pmem pmem --file "$OUT/disk.img"
open_keyboard
LIMIT=$((120 + requests / 20)) guest exits -k "$VMLINUX" -m 256M --debug-exit --stats "$OUT/exits.stats" \
    -c "quiet -- sh /test/exits.sh $requests" \
    --vhost-user "$OUT/rng.sock,type=rng,name=rng" --vhost-user "$OUT/pmem.sock,type=pmem,name=pmem" <"$KEYS" &
exec 3>"$KEYS"
looks=0
for state in begins ends; do
    # However long the requests take.
    while [ ! -e "$OUT/exits.status" ] && ! wait_for "$OUT/exits.out" "^now $state"; do :; done
    kill -USR1 "$(cat "$OUT/exits.pid")"
    looks=$((looks + 1))
    wait_for "$OUT/exits.stats" run_ms "$looks"
    echo go on >&3
done
wait
