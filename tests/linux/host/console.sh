# shellcheck shell=sh
# A shell on the serial console, and someone who types.
. "${0%/*}/lib.sh"

screen=$OUT/console.out
mkfifo "$OUT/keys"
guest console -k "$VMLINUX" -c 'quiet' <"$OUT/keys" &
exec 3>"$OUT/keys"
{
    wait_for "$screen" '# $' || wait_for "$screen" '# '
    # shellcheck disable=SC2016 # for the guest
    echo 'echo the answer is $((6 * 7))' >&3
    wait_for "$screen" 'the answer is 42'
    # The line discipline would take some bytes for keys; raw, all arrive.
    echo 'stty raw -echo; echo send now; head -c 10240 | sha256sum; stty sane' >&3
    wait_for "$screen" '^send now'
    cat "$INPUT" >&3
    wait_for "$screen" '  -'
    echo poweroff >&3
} && wait
exec 3>&-
wait
sha256sum <"$INPUT" >"$OUT/input.sum"
