# shellcheck shell=sh disable=SC2153 # NAMES is of the kernel's command line
# What the guest of host.sh runs: the work of each back-end's file, all at the same time; the same while the back-ends die and
# come back, where RECONNECT is set; then what a guest sees of a back-end that stays dead.
#
# FILES=frontends: the work of the files there, and no death.
#
# It prints lines of `CHECK NAME PHASE ok SECONDS`, `CHECK NAME PHASE WRONG text`, `KERNEL text` and `SEEN NAME text`.

# Seconds for one work on an emulated host with everything else at the same time.
LIMIT=1000

# each NAME FUNCTION: what a file defines, in a process that can be killed.
if [ "${1-}" = each ]; then
    # shellcheck disable=SC2034 # for the file
    NAME=$2
    # shellcheck source=/dev/null
    . "/interop/${FILES:-backends}/$2.sh"
    set -e
    $3
    exit
fi

names=$(echo "$NAMES" | tr , ' ')

# phase WORD: everything at once.
phase() {
    for name in $names; do
        (
            mkdir -p "/tmp/$name"
            cd "/tmp/$name" || exit
            start=$(date +%s)
            if timeout -s KILL $LIMIT sh -x /interop/guest.sh each "$name" work >"/tmp/$name.log" 2>&1 </dev/null; then
                echo "CHECK $name $1 ok $(($(date +%s) - start))"
            else
                echo "CHECK $name $1 WRONG status $?: $(tail -n 2 "/tmp/$name.log" | tr '\n' ' ')"
                { cat "/tmp/$name.log" && grep virtio /proc/interrupts; } | sed "s/^/LOG $name: /"
            fi
        ) &
    done
    wait
    # But for processors that stand still, as emulated ones do.
    dmesg -r | grep '^<[0-4]>' | grep -vE '(clocksource|hrtimer|sched|workqueue|watchdog): ' | sed "s/^/KERNEL $1 /"
    dmesg -c >/dev/null
}

dmesg -n 1
dmesg -c | grep -i virtio | sed 's/^/BOOT /'
phase work
if [ -n "$RECONNECT" ]; then
    echo 'DEATH and return'
    # The host types a line when it has killed often enough.
    { read -r _ </dev/console && touch /tmp/enough; } &
    while true; do
        phase return
        [ ! -e /tmp/enough ] || break
    done
fi
[ -z "${FILES-}" ] || exit 0
sync
echo 'DEATH permanent'
sleep $((${RECONNECT:-0} + 5))
for name in $names; do
    # Perhaps nothing can kill it.
    (
        cd "/tmp/$name" || exit
        sh /interop/guest.sh each "$name" touch_it >seen 2>&1 </dev/null
        echo "status $?: $(tail -n 1 seen)" >seen.end
    ) &
done
sleep 30
for name in $names; do echo "SEEN $name $(cat "/tmp/$name/seen.end" 2>/dev/null || echo 'no answer in 30 s')"; done
dmesg -r | grep '^<[0-4]>' | sed 's/^/KERNEL lost /'
echo END
# Without sync, which would wait for a lost disk.
poweroff -nf
