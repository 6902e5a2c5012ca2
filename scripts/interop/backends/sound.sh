# shellcheck shell=sh disable=SC2034
# A sound card whose sound goes nowhere: the guest plays two seconds.
FROM=crate:vhost-device-sound:0.3.0:--no-default-features
DEVICE=type=sound
# Debian's cloud kernel has no sound.
GUEST_KERNEL=sid
MODULES=virtio_snd
TOOLS=aplay:alsa-utils
FILES_IN_GUEST=/usr/share/alsa

back_end() { inside vhost-device-sound --socket "$SOCKET" --backend null; }

# A buffer of 160 ms, the driver's default, is too short on an emulated host: ALSA gives up after 1.1 times that.
work() {
    if [ ! -e /tmp/longer ]; then
        rmmod virtio_snd
        insmod "$(find /usr/lib/modules/ -name virtio_snd.ko)" pcm_buffer_ms=5000 pcm_period_ms_max=500
        touch /tmp/longer
    fi
    aplay -l
    head -c 400000 /dev/zero >data
    aplay -B 5000000 -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000 data
}
touch_it() { head -c 40000 /dev/zero | aplay -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000; }
