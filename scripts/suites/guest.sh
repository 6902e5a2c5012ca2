# shellcheck shell=sh
# What a guest of host.sh runs: it mounts the share and runs the suite there. OPTIONS are mount's.
#
# Not at /mnt: pjdfstest fails where the number of letters up to its own directory is 31 more than a multiple of 127.
export BIN=/suites/bin DIR=/share
mkdir $DIR
mount -t virtiofs -o "$OPTIONS" share $DIR || exit 1
dmesg -c >/dev/null
sh /suites/run.sh
# What the kernel complained of is a case, too: but for processors that stood still, as emulated ones do, and for what
# stress-ng means to provoke.
dmesg -r | grep '^<[0-4]>' | grep -vE '(clocksource|hrtimer|sched|workqueue): |stress-ng-' >/tmp/dmesg
sed 's/^/why: /' /tmp/dmesg
if [ -s /tmp/dmesg ]; then echo 'case: kernel FAILED'; else echo 'case: kernel ok'; fi
