# shellcheck shell=sh
# What a guest of host.sh runs until it is killed: writers on each persistent memory and each share, which print what they
# have synced. PMEM_OPTIONS are mount's.
for index in 0 1 2; do
    mkdir /pmem$index /fs$index
    mount -t ext4 -o "$PMEM_OPTIONS" /dev/pmem$index /pmem$index && mount -t virtiofs -o dax=always fs$index /fs$index || exit 1
done

# files NAME DIRECTORY: makes files with fio.
files() {
    cd "$2" || return
    /fs0/fio/ld-linux-x86-64.so.2 --library-path /fs0/fio /fs0/fio/fio "/jobs/$1" >"/tmp/$1" 2>&1 || {
        sed "s/^/fio $1: /" "/tmp/$1"
        echo "fio $1 failed."
    }
}

keep() { probe keep "$1" "$2/blocks" 2>&1 || echo "keep $1 failed."; }

for index in 0 1 2; do
    # pmem0 need not be the first device.
    name=$(cat /pmem$index/name)
    keep "$name" /pmem$index &
    [ "$name" != pmem0 ] || files pmem0 /pmem$index &
done
keep fs1 /fs1 &
keep fs2 /fs2 &
keep fs0 /fs0/files/fs0 &
files fs0 /fs0/files/fs0 &
wait
