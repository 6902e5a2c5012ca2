# shellcheck shell=sh disable=SC2034
# Entropy: two samples that differ, and FIPS 140-2's tests.
FROM=crate:vhost-device-rng:0.1.0
DEVICE=type=rng SUFFIX=0
MODULES=virtio-rng
TOOLS=rngtest:rng-tools5

back_end() { inside vhost-device-rng --socket-path "$SOCKET"; }

work() {
    cat /sys/class/misc/hw_random/rng_current
    grep -q '^virtio_rng' /sys/class/misc/hw_random/rng_current
    # The driver asks for 64 bytes at a time.
    head -c 50004 /dev/hwrng >one
    head -c 50004 /dev/hwrng >two
    if cmp -s one two; then return 1; fi
    # By chance one block of some 1,250 fails.
    rngtest <one 2>&1 | tee tests || true
    [ "$(sed -n 's/.*FIPS 140-2 successes: //p' tests)" -ge 19 ]
}
touch_it() { head -c 4096 /dev/hwrng | wc -c; }
