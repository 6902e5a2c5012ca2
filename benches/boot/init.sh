#!/busybox sh
# shellcheck shell=dash
# PID 1 of the guests that scripts/bench.sh boots.
echo 'PID 1 runs'
exec /busybox sleep 1000
