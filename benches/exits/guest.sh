# shellcheck shell=sh
# Runs in each guest of host.sh: so many requests of each device.
set -e
[ "$1" -gt 0 ] || exit 0
probe requests /dev/hwrng "$1" read >/dev/null
probe requests /dev/pmem0 "$1" flush >/dev/null
