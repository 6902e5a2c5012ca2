# shellcheck shell=sh
# Guests with a directory of this host, by virtio-fs with DAX: one that does all that can be done there, while this side looks
# and changes things; one whose back-end is killed; one after that.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

share=$(mktemp -d)
mkdir "$share/files"
cp "$(which busybox)" "$share/busybox"
echo 'From the host, A.' >"$share/given"
probe fill "$share/cut" 1
probe fill "$share/kept" 4

# share NAME SCRIPT: a guest that runs SCRIPT, and gets what is written to descriptor 3.
share() {
    guest "$1" -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/$2.sh" \
        --vhost-user "$OUT/fs.sock,type=fs,name=fs" <"$KEYS" &
    exec 3>"$KEYS"
}
answer() { echo "$1" >&3; }

look() {
    wait_for "$OUT/fs.out" '^now looked' || return
    note told "$(cat "$share/told")"
    note append "$(cat "$share/files/append")"
    note names "$(stat -c %h "$share/files/link")"
    note target "$(readlink "$share/files/symlink")"
    note attribute "$(probe xattr "$share/files/xattr" user.hotslot)"
    note sparse "$(stat -c '%s' "$share/files/sparse")"
    note holes "$(($(stat -c '%b' "$share/files/sparse") / 2)) KiB"
    # In place: the guest has it mapped.
    printf 'From the host, B.' | dd of="$share/given" conv=notrunc 2>/dev/null
    echo new >"$share/made"
    answer go

    wait_for "$OUT/fs.out" '^now turns' || return
    probe turns "$share/turns" second >>"$OUT/host.out" 2>&1 &
    answer go

    wait_for "$OUT/fs.out" '^watch: ' || return
    truncate -s 16384 "$share/cut"
    answer again
    wait_for "$OUT/fs.out" '^watch: ' 2 || return
    answer ''
}

kill_backend() {
    wait_for "$OUT/killed.out" '^watch: ' || return
    kill -KILL "$backend"
    wait_for "$OUT/killed.err" 'fs: ' || return
    answer again
    wait_for "$OUT/killed.out" '^watch: ' 2 || return
    answer go
}

open_keyboard
backend fs fs --dir "$share" --tag share --window 64M
share fs fs
machine=$!
look
wait $machine

backend fs fs --dir "$share" --tag share --window 64M
backend=$!
share killed fs_killed
machine=$!
kill_backend
wait $machine

# An eighth of this is how many files the back-end holds.
# shellcheck disable=SC3045 # busybox has it
ulimit -n 160
backend fs fs --dir "$share" --tag share --window 64M
share next fs_next
wait $!
end_backends
rm -r "$share"
