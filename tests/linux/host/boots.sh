# shellcheck shell=sh
# The same machine, HOTSLOT_ENDURANCE_BOOTS times (3): how each boot ended and how long it took, and what is in use of the
# host before and after.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# A boot takes seconds; an emulated host on a busy machine may need minutes.
# shellcheck disable=SC2034 # used by guest()
LIMIT=300

# uptime: of the host, in hundredths of a second.
uptime() {
    read -r seconds _ </proc/uptime
    echo "${seconds%.*}${seconds#*.}"
}

# used MOMENT: notes what is in use.
used() {
    # Pages that wait for the end of a grace period, for example.
    sleep 1
    note "$1" "processes of hotslot $(pidof hotslot | wc -w)"
    note "$1" "Unix sockets $(wc -l </proc/net/unix)"
    note "$1" "open files $(cut -f 1 /proc/sys/fs/file-nr)"
    awk '/^(MemAvailable|Slab|SUnreclaim|KernelStack|PageTables|Percpu|Shmem):/ { print $1, $2, "KiB" }
        /^kvm/ { print "slab", $1, $2 }' /proc/meminfo /proc/slabinfo |
        while read -r figure; do note "$1" "$figure"; done
}

boot() {
    guest boot -k "$VMLINUX" -m 128M --debug-exit -c 'quiet -- sh -c "exit 77"' </dev/null
    read -r status <"$OUT/boot.status"
}

# What is made once is made.
boot
used before
count=0
while [ $count -lt "${HOTSLOT_ENDURANCE_BOOTS:-3}" ]; do
    begin=$(uptime)
    boot
    note boot "$status after $(($(uptime) - begin))"
    count=$((count + 1))
done
used after
