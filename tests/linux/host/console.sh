# shellcheck shell=sh
# A shell on the serial console, and a typist: this script.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

screen=$OUT/console.out
pieces='0 1 2 3 4'

type_pieces() {
    for piece in $pieces; do
        wait_for "$screen" "^send $piece" || return
        dd if="$INPUT" bs=2048 skip="$piece" count=1 2>/dev/null >&3
    done
}

open_keyboard
guest console -k "$VMLINUX" -c 'quiet' <"$KEYS" &
exec 3>"$KEYS"
# shellcheck disable=SC2016 # the guest's shell computes it
if
    wait_for "$screen" '# ' &&
        echo 'echo the answer is $((6 * 7))' >&3 &&
        wait_for "$screen" 'the answer is 42' &&
        # The line discipline would take some bytes for keys; raw, all arrive. It keeps 4 KiB for a reader that is late, and
        # no serial port can tell it of more to come: so each piece is asked for.
        echo "stty raw -echo; { for n in $pieces; do echo send \$n >&2; head -c 2048; done; } | sha256sum; stty sane" >&3 &&
        type_pieces &&
        wait_for "$screen" '  -'
then
    echo poweroff >&3
fi
wait
sha256sum <"$INPUT" >"$OUT/input.sum"
