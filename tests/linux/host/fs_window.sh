# shellcheck shell=sh
# Files that are larger than the window through which they are read and written: HOTSLOT_FS_FILE_MIB, through one of a twelfth of
# that. FIO is Debian's fio, which the guest gets by the share, with its libraries. Then two guests with the same directory.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

mib=${HOTSLOT_FS_FILE_MIB:-192}
share=$(mktemp -d)
probe fill "$share/big" "$mib"
note big "$(probe sum "$share/big" read)"
# Of their full size: fio would fill what is shorter, on this side, too.
truncate -s $((mib / 3))M "$share/random.mmap" "$share/random.psync"
mkdir "$share/fio"
loader=/lib64/ld-linux-x86-64.so.2
$loader --list "$FIO" | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p' >"$share/fio/list"
# shellcheck disable=SC2046 # one word per library
cp $(cat "$share/fio/list") "$FIO" $loader "$share/fio/"

LIMIT=$((120 + mib * 2))
backend window fs --dir "$share" --tag share --window $((mib / 12))M
guest window -k "$VMLINUX" -m 256M --debug-exit -c "quiet SIZE=$((mib / 3))M WRITES=$((256 + mib / 4)) -- sh /test/fs_window.sh" \
    --vhost-user "$OUT/window.sock,type=fs,name=fs" </dev/null
end_backends
for engine in mmap psync; do
    fio --name=random --filename="$share/random.$engine" --size=$((mib / 3))M --rw=randwrite --bs=4k --ioengine=psync \
        --number_ios=$((256 + mib / 4)) --fallocate=none --randseed=1 --verify=crc32c --verify_only --verify_fatal=1 >"$OUT/verify.$engine" 2>&1
    note "verified $engine" $?
done
rm -r "$share"

# Each guest reads the file, and stays until it is measured.
share=$(mktemp -d)
probe fill "$share/common" 48
for each in one two; do
    backend "$each" fs --dir "$share" --tag share --window 64M
    mkfifo "$OUT/$each.keys"
    guest "$each" -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/fs_shared.sh" \
        --vhost-user "$OUT/$each.sock,type=fs,name=fs" <"$OUT/$each.keys" &
done
exec 4>"$OUT/one.keys" 5>"$OUT/two.keys"

# Of all mappings of files in the share: resident, and proportional.
measure() {
    pid=$(cat "$OUT/$1.pid")
    awk -v share="$share" '/^[0-9a-f]+-/ { ours = index($0, share) }
        ours && /^(Rss|Pss):/ { sum[$1] += $2 }
        END { print sum["Rss:"] + 0, sum["Pss:"] + 0 }' "/proc/$pid/smaps" | while read -r rss pss; do
        note "rss $1" "$rss"
        note "pss $1" "$pss"
    done
    sed -n "s/^\([RP]ss\): *\([0-9]*\) kB/all $1 \1: \2/p" "/proc/$pid/smaps_rollup" >>"$OUT/host.out"
}
if wait_for "$OUT/one.out" '^now read' && wait_for "$OUT/two.out" '^now read'; then
    measure one
    measure two
fi
echo go >&4
echo go >&5
# Until the guests have ended: their back-ends end with them.
wait
rm -r "$share" "$OUT"/*.keys
