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

# The back-end returns each buffer at once, also before PCM_START, which VIRTIO forbids. aplay by itself starts when
# the ring of buffers is full: then all of it has come back already, Linux' driver has counted it as one round, which is
# none, and no period ends any more. So it starts with the first period.
work() {
    aplay -l
    head -c 400000 /dev/zero >data
    aplay -R 1 -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000 data
}
touch_it() { head -c 40000 /dev/zero | aplay -R 1 -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000; }
