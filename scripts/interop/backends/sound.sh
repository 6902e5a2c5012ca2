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

# By its source the back-end returns each buffer at once, also before PCM_START, which VIRTIO forbids. With the driver's
# default of 160 ms the ring of buffers is full before aplay starts: all of it comes back, Linux' driver counts that as one
# round, which is none, and no period ends any more (EIO). With 5 s the two seconds do not fill the ring.
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
