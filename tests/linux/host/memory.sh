# shellcheck shell=sh
# Machines with RAM up to the gap below 4 GiB, and on both sides of it.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

# Touching gigabytes a page at a time takes the emulated host minutes; in huge pages the same pages of the guest count.
[ -z "${LAB-}" ] || echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled

# shellcheck disable=SC2034 # used by guest()
LIMIT=300
for size in 3584M 6G; do
    guest $size -m $size -k "$BZIMAGE" --debug-exit -c "quiet -- sh /test/look.sh memory" </dev/null
done
