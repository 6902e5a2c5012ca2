# shellcheck shell=sh
# The second guest of debian.sh's row "two": it has the directory /check/two of the first guest at /mnt. check.py's `two` is
# the other side. It answers in the file `second`, a line for each thing seen. The shell is busybox.

mkdir -p /mnt
mount -t virtiofs two /mnt || exit 1
cd /mnt || exit 1

# until_true COMMAND...: tries it again for two minutes.
until_true() {
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 600 ] || {
            echo "second.sh: never true: $*"
            return 1
        }
        sleep 0.2
    done
}
answer() { echo "$*" >>second; }

until_true grep -q '^one$' given && answer given
until_true test -e renamed && until_true test ! -e old && answer renamed
until_true test ! -e removed && answer removed
until_true grep -q '^TWO$' given && answer stored
until_true test -e locked && {
    if ! flock -n given true; then
        answer 'flock: a file that nobody locked cannot be locked'
    elif flock -n lock true; then
        answer 'flock: not seen'
    else
        answer 'flock: seen'
    fi
}
answer end
until_true test -e over
