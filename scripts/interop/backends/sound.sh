# shellcheck shell=sh disable=SC2034
# A sound card: what the guest plays is in a file of the host, byte by byte.
FROM=crate:vhost-device-sound:0.3.0:--no-default-features:--features:alsa-backend
DEVICE=type=sound
# Debian's cloud kernel has no sound.
GUEST_KERNEL=sid
MODULES=virtio_snd
TOOLS=aplay:alsa-utils
FILES_IN_GUEST=/usr/share/alsa

prepare() {
    # No sound card: what is played goes into a file, and then nowhere.
    cat >"$DIR/alsa.conf" <<-END
	pcm.nowhere { type null }
	pcm.default { type file slave.pcm nowhere file "$DIR/sound.raw" format raw }
	END
}
back_end() {
    export ALSA_CONFIG_PATH="$DIR/alsa.conf"
    inside vhost-device-sound --socket "$SOCKET" --backend alsa
}
beside() {
    wait_for '^sound: ' || return
    sum=$(head -c 400000 "$DIR/sound.raw" | sha256sum)
    if grep -aq "^sound: $sum" "$OUT/console"; then report sound played ok; else report sound played WRONG; fi
}

work() {
    aplay -l
    head -c 400000 /dev/urandom >data
    aplay -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000 data
    [ -e sum ] || echo "sound: $(sha256sum <data)" | tee sum >/dev/console
}
touch_it() { head -c 40000 /dev/urandom | aplay -D hw:0,0 -t raw -f S16_LE -c 2 -r 48000; }
