# shellcheck shell=sh
# Runs in a guest: its processors and its memory; then what the first argument says.
online=$(cat /sys/devices/system/cpu/online)
echo "online: $online"
probe cpus
cpu=0
while [ -e /sys/devices/system/cpu/cpu$cpu ]; do
    # Field 39: the processor on which the reader itself runs.
    # shellcheck disable=SC2016 # for the shell over there
    taskset -c $cpu sh -c 'echo "on: $(cut -d " " -f 39 /proc/self/stat)"'
    cpu=$((cpu + 1))
done
sed -n 's/^MemTotal: *\([0-9]*\) kB/total: \1/p' /proc/meminfo
case $1 in
memory) probe memory ;;
reboot) reboot -f ;;
panic) probe panic ;;
dmesg)
    dmesg -r | grep '^<[0-4]>' | sed 's/^/dmesg: /'
    exit 77
    ;;
esac
