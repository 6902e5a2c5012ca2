# shellcheck shell=sh
# Runs in two guests with one directory: `first` holds a lock until `second` has found it taken; then `second` waits for it.
mkdir -p /mnt
mount -t virtiofs -o dax=always share /mnt || exit 1
probe files "/mnt/files.$1" 2>&1
echo "host: $(probe locked /mnt/host)"

# wait_for FILE: until the other guest has made it.
wait_for() { until [ -e "$1" ]; do sleep 0.2; done; }

case $1 in
first)
    probe with-lock /mnt/lock '
        touch /mnt/held
        until [ -e /mnt/tried ]; do sleep 0.2; done
        # Time for the other to wait.
        sleep 2
        echo first >>/mnt/order'
    ;;
second)
    wait_for /mnt/held
    echo "first: $(probe locked /mnt/lock)"
    touch /mnt/tried
    probe with-lock /mnt/lock 'echo second >>/mnt/order'
    ;;
esac
umount /mnt
dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
exit 0
