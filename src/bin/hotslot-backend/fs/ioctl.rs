//! FUSE_IOCTL: the flags of files that `lsattr` shows and `chattr` sets.
//!
//! Linux reads them as FS_IOC_FSGETXATTR, too, before it sets them: the project and the sizes of extents
//! there are left zero, and cannot be set. All other commands are ENOTTY, as for a file system that lacks
//! them. Called by [`super::requests`].

use std::io;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};

use super::directory::Directory;

/// Both are defined with a `long`, but an `int` is read and written.
const FS_IOC_GETFLAGS: Opcode = opcode::read::<i64>(b'f', 1);
const FS_IOC_SETFLAGS: Opcode = opcode::write::<i64>(b'f', 2);

/// `struct fsxattr`: five numbers, of which the first is the flags, and eight bytes more.
const FS_IOC_FSGETXATTR: Opcode = opcode::read::<[u32; 7]>(b'X', 31);

/// The flags with their bits in `struct fsxattr` (Linux' `FS_XFLAG_*`).
const FLAGS: [(IFlags, u32); 6] = [
    (IFlags::IMMUTABLE, 0x8),
    (IFlags::APPEND, 0x10),
    (IFlags::SYNC, 0x20),
    (IFlags::NOATIME, 0x40),
    (IFlags::NODUMP, 0x80),
    (IFlags::PROJECT_INHERIT, 0x200),
];

impl Directory {
    /// Returns what the call gives.
    ///
    /// # Errors
    ///
    /// ENOTTY for another command; what the host says.
    pub fn control(&self, node: u64, handle: u64, command: u32, argument: &[u8]) -> io::Result<Vec<u8>> {
        let open = self.opens.get(node, handle)?;
        match Opcode::from(command) {
            FS_IOC_GETFLAGS => Ok(ioctl_getflags(&open.file)?.bits().to_le_bytes().to_vec()),
            FS_IOC_SETFLAGS => {
                self.check_writable()?;
                let flags = argument.first_chunk().ok_or(Errno::INVAL)?;
                ioctl_setflags(&open.file, IFlags::from_bits_retain(u32::from_le_bytes(*flags)))?;
                Ok(Vec::new())
            }
            FS_IOC_FSGETXATTR => {
                let flags = ioctl_getflags(&open.file)?;
                let set = FLAGS.iter().filter(|(flag, _)| flags.contains(*flag));
                Ok(set.fold(0, |sum, (_, bit)| sum | bit).to_le_bytes().to_vec())
            }
            _ => Err(Errno::NOTTY.into()),
        }
    }
}
