# shellcheck shell=sh
# A guest with two shares: one as it is by default, and one with mapped attributes and ids and with device nodes.
# shellcheck source=tests/linux/host/lib.sh
. "${0%/*}/lib.sh"

share=$(mktemp -d)
mapped=$(mktemp -d)
chmod 755 "$share" "$mapped"
mkdir "$share/direct" "$share/cached" "$mapped/direct" "$share/upper" "$share/work" "$mapped/upper" "$mapped/work"
mkdir "$share/below" "$mapped/below"
mount -t tmpfs below "$mapped/below"
# Without ACLs; and root in the guest is not the owner, so that its kernel asks for them.
mount -t ramfs below "$share/below"
echo 'another file system' >"$share/below/file"
chmod 640 "$share/below/file"
chown 5:5 "$share/below/file"
chown -R 100000:100000 "$mapped"
backend share fs --dir "$share" --tag share --window 64M
backend mapped fs --dir "$mapped" --tag mapped --window 64M --xattr mapped --device-nodes --announce-submounts \
    --uid-map 0:100000:65536 --gid-map 0:100000:65536
guest rights -k "$VMLINUX" -m 256M --debug-exit -c "quiet -- sh /test/fs_rights.sh" \
    --vhost-user "$OUT/share.sock,type=fs,name=share" \
    --vhost-user "$OUT/mapped.sock,type=fs,name=mapped" </dev/null
end_backends
note user "$(stat -c '%u:%g' "$mapped/direct/group/member")"
note opaque "$(probe xattr "$mapped/upper/again" user.hotslot.trusted.overlay.opaque)"
note 'opaque with userxattr' "$(probe xattr "$share/upper/again" user.overlay.opaque)"
note whiteout "$(stat -c '%F %t %T' "$mapped/upper/gone")"
note device "$(stat -c '%F %t %T' "$mapped/disk")"
umount "$share/below" "$mapped/below"
rm -r "$share" "$mapped"
