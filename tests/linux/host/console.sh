# shellcheck shell=sh
# A shell on the serial console, and someone who types.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

screen=$OUT/console.out
open_keyboard
guest console -k "$VMLINUX" -c 'quiet' <"$KEYS" &
exec 3>"$KEYS"
# shellcheck disable=SC2016 # the guest's shell shall compute
if
    wait_for "$screen" '# ' &&
        echo 'echo the answer is $((6 * 7))' >&3 &&
        wait_for "$screen" 'the answer is 42' &&
        # The line discipline would take some bytes for keys; raw, all arrive.
        echo 'stty raw -echo; echo send now; head -c 10240 | sha256sum; stty sane' >&3 &&
        wait_for "$screen" '^send now' &&
        cat "$INPUT" >&3 &&
        wait_for "$screen" '  -'
then
    echo poweroff >&3
fi
wait
sha256sum <"$INPUT" >"$OUT/input.sum"
