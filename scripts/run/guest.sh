# shellcheck shell=sh
# What run.sh runs in the guest, whose shell is busybox: sets up what the words of the first argument name, then runs the
# command of the other arguments, or a shell. Words: root, share (both with :dax or without), pmem, net, demo.

fail() {
    echo "guest.sh: $*" >&2
    exit 125
}

# mount_share TAG:dax PLACE
mount_share() {
    options=''
    case $1 in *:dax) options='-o dax=always' ;; esac
    mkdir -p "$2"
    # shellcheck disable=SC2086 # none, or two words
    mount -t virtiofs $options "${1%:*}" "$2" || fail "cannot mount the directory of the host: ${1%:*}"
}

# The host's root file system, and over it a tmpfs for all that is written; the kernel's file systems are this guest's.
mount_root() {
    mount_share "$1" /host/lower
    mkdir -p /host/upper /host/root
    layers=lowerdir=/host/lower,upperdir=/host/upper/files,workdir=/host/upper/work
    mount -t tmpfs upper /host/upper || fail 'cannot mount a tmpfs'
    mkdir /host/upper/files /host/upper/work
    # An overlay takes these for "not there". Below them the host has other file systems; their root directories may
    # have one inode number, and the overlay would take them for one directory.
    for place in proc sys dev run; do mknod /host/upper/files/$place c 0 0; done
    mount -t overlay -o $layers root /host/root || fail "cannot mount an overlay over the host's root file system"
    for place in proc sys dev run; do
        mkdir /host/root/$place
        mount -o rbind /$place /host/root/$place || fail "cannot mount /$place"
    done
    root=/host/root
}

setup=$1 directory=$PWD root='' what=''
shift
for word in $setup; do
    case $word in
    root*) mount_root "$word" ;;
    share*)
        mount_share "$word" "$root/mnt"
        directory=/mnt
        what='a directory of the host'
        case $word in *:dax) what="$what, its files mapped into your memory" ;; esac
        ;;
    pmem)
        mkdir -p /mnt
        mount -t ext4 -o dax /dev/pmem0 "$root/mnt" || fail 'cannot mount /dev/pmem0'
        directory=/mnt
        what='a file of the host, mapped into your memory'
        ;;
    net)
        ROOT=$root udhcpc -i eth0 -n -q -f -s /etc/hotslot/run/lease.sh >/dev/console 2>&1 ||
            fail 'the network gave this guest no address'
        ;;
    demo)
        uname -sr
        grep pmem0 /proc/mounts
        probe pmem-write /mnt/hello.txt "Hello from Linux $(uname -r), written through mmap." || exit 1
        # host.sh waits for this line, and then has two seconds.
        echo 'the guest has written'
        sleep 2
        umount /mnt
        exit
        ;;
    esac
done

if [ $# = 0 ]; then
    echo "This is the guest.${what:+ /mnt is $what.} poweroff ends it."
    set -- sh -i
fi
# Where a path of the host's does not exist, the guest has made an empty directory.
# shellcheck disable=SC2016 # for the inner shell
[ -z "$root" ] || exec chroot "$root" /bin/sh -c 'cd "$0" && exec "$@"' "$directory" "$@"
[ -n "$what" ] || directory=/
cd "$directory" && exec "$@"
