//! Extended attributes of the host's files, as the guest sees them (`--xattr`).
//!
//! Names of `user.*` and the POSIX ACLs are the host's. The guest's kernel enforces ACLs (FUSE_POSIX_ACL).
//! The host's kernel gives them to new files, and keeps modes in step with them. Setting `trusted.*` and most
//! of `security.*` takes CAP_SYS_ADMIN, which would let these threads do far more than serve files. So
//! `--xattr mapped` keeps them under other names. Called by [`super::passthrough`] and [`super::requests`].

use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::fs::MetadataExt;

use fuse_backend_rs::api::filesystem::{GetxattrReply, ListxattrReply};
use rustix::fs::{AtFlags, Mode, XattrFlags};
use rustix::io::Errno;

use super::change::Before;
use super::directory::{Directory, number};
use super::ids::Side;
use super::inodes::Inode;
use super::policy::Xattrs;

/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const MAX: usize = 64 << 10;
/// Before the names that are not the host's.
const PREFIX: &[u8] = b"user.hotslot.";
const ACL_PREFIX: &[u8] = b"system.posix_acl_";
const ACCESS_ACL: &[u8] = b"system.posix_acl_access";
const CAPABILITY: &[u8] = b"security.capability";

impl Directory {
    /// FUSE_SETXATTR. `drops_setgid`: the guest's process may not leave a set-group-id bit in a mode that it
    /// changes by an ACL.
    pub fn set_attribute(
        &self,
        node: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        drops_setgid: bool,
    ) -> io::Result<()> {
        self.check_writable()?;
        let inode = self.inodes.get(node)?;
        let mut flags = XattrFlags::from_bits_retain(flags);
        let host_name = self.host_name(name, Errno::PERM)?;
        if flags.contains(XattrFlags::CREATE) {
            let is_absent =
                || rustix::fs::getxattr_query(number(&inode.path), &*host_name) == Err(Errno::NODATA);
            if self.keeper.attempt(|| is_absent().then_some(Before::default())).is_some() {
                flags.remove(XattrFlags::CREATE);
            }
        }
        if !is_acl(name) {
            return Ok(rustix::fs::setxattr(number(&inode.path), &*host_name, value, flags)?);
        }
        let mut acl = value.to_vec();
        self.policy.ids.exchange(&mut acl, Side::Outside)?;
        rustix::fs::setxattr(number(&inode.path), name, &acl, flags)?;
        if drops_setgid && name.to_bytes() == ACCESS_ACL {
            self.drop_bits(&inode, Mode::SGID)
        } else {
            Ok(())
        }
    }

    /// FUSE_GETXATTR.
    pub fn attribute(&self, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.inodes.get(node)?;
        let path = number(&inode.path);
        let host_name = self.host_name(name, Errno::NODATA)?;
        let result = if size == 0 {
            rustix::fs::getxattr_query(path, &*host_name).map(|len| (len, Vec::new()))
        } else {
            let mut value = vec![0; MAX.min(size as usize)];
            rustix::fs::getxattr(path, &*host_name, &mut value[..]).map(|len| (len, value))
        };
        let (len, mut value) = match result {
            // The guest's kernel asks for ACLs before it allows anything, and would take this for its answer.
            Err(Errno::OPNOTSUPP) if is_acl(name) => return Err(Errno::NODATA.into()),
            result => result?,
        };
        if size == 0 {
            return Ok(GetxattrReply::Count(u32::try_from(len).map_err(io::Error::other)?));
        }
        value.truncate(len);
        if is_acl(name) {
            self.policy.ids.exchange(&mut value, Side::Inside)?;
        }
        Ok(GetxattrReply::Value(value))
    }

    /// FUSE_LISTXATTR.
    pub fn attribute_names(&self, node: u64, size: u32) -> io::Result<ListxattrReply> {
        self.check_attributes()?;
        let inode = self.inodes.get(node)?;
        let mut names = vec![0; MAX];
        let len = rustix::fs::listxattr(number(&inode.path), &mut names[..])?;
        names.truncate(len);
        if self.policy.xattrs == Xattrs::Mapped {
            let each = names.split_inclusive(|&byte| byte == 0);
            names = each.filter_map(|name| self.guest_name(name)).flatten().copied().collect();
        }
        match size as usize {
            0 => Ok(ListxattrReply::Count(u32::try_from(names.len()).map_err(io::Error::other)?)),
            size if size < names.len() => Err(Errno::RANGE.into()),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    /// FUSE_REMOVEXATTR.
    pub fn remove_attribute(&self, node: u64, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        let inode = self.inodes.get(node)?;
        let host_name = self.host_name(name, Errno::PERM)?;
        let is_there = || rustix::fs::getxattr_query(number(&inode.path), &*host_name).is_ok();
        let again = self.keeper.attempt(|| is_there().then_some(Before::default())).is_some();
        match rustix::fs::removexattr(number(&inode.path), &*host_name) {
            Err(Errno::NODATA) if again => Ok(()),
            result => Ok(result?),
        }
    }

    /// Clears bits of the mode of a file, if they are set.
    pub fn drop_bits(&self, inode: &Inode, bits: Mode) -> io::Result<()> {
        let mode = Mode::from_raw_mode(inode.path.metadata()?.mode() & 0o7777);
        if mode.intersects(bits) {
            rustix::fs::chmodat(&self.root.proc, number(&inode.path), mode - bits, AtFlags::empty())?;
        }
        Ok(())
    }

    /// ENOSYS: the guest's kernel does not ask again.
    fn check_attributes(&self) -> io::Result<()> {
        match self.policy.xattrs {
            Xattrs::Off => Err(Errno::NOSYS.into()),
            Xattrs::Host | Xattrs::Mapped => Ok(()),
        }
    }

    fn is_mapped(&self, name: &[u8]) -> bool {
        let is_host_s = name == CAPABILITY && self.root.credentials.may_set_capabilities();
        (name.starts_with(b"trusted.") || name.starts_with(b"security.")) && !is_host_s
    }

    /// What the host calls an attribute; or `error`, if the guest may not know that name.
    fn host_name(&self, name: &CStr, error: Errno) -> io::Result<CString> {
        self.check_attributes()?;
        let bytes = name.to_bytes();
        if self.policy.xattrs == Xattrs::Mapped {
            if bytes.starts_with(PREFIX) {
                return Err(error.into());
            }
            if self.is_mapped(bytes) {
                return Ok(CString::new([PREFIX, bytes].concat())?);
            }
        }
        Ok(name.to_owned())
    }

    /// The reverse, with the zero at the end: `None` for what the guest does not see.
    fn guest_name<'a>(&self, name: &'a [u8]) -> Option<&'a [u8]> {
        let is_mapped = |name: &[u8]| self.is_mapped(name.strip_suffix(b"\0").unwrap_or(name));
        match name.strip_prefix(PREFIX) {
            Some(mapped) => is_mapped(mapped).then_some(mapped),
            None => (!is_mapped(name)).then_some(name),
        }
    }
}

fn is_acl(name: &CStr) -> bool {
    name.to_bytes().starts_with(ACL_PREFIX)
}
