//! Which file it is, and by which name it is found.
//!
//! Used by [`super::records`], [`super::inodes`] and [`super::change`].

use std::ffi::{CStr, CString};
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::SystemTime;

use rustix::fs::FileType;
use rustix::io::Errno;

use super::handles::Handle;

/// FUSE_ROOT_ID.
pub const ROOT: u64 = 1;

/// Which file it is.
#[derive(Clone)]
pub struct Identity {
    /// Device and inode number, which the host gives to another file once this one is gone and no descriptor
    /// holds it. The rest tells these apart, as far as the host's file system has it.
    pub id: (u64, u64),
    pub kind: FileType,
    pub born: Option<SystemTime>,
    pub handle: Option<Handle>,
}

impl Identity {
    pub fn new(metadata: &Metadata, handle: Option<Handle>) -> Self {
        Identity {
            id: (metadata.dev(), metadata.ino()),
            kind: FileType::from_raw_mode(metadata.mode()),
            born: metadata.created().ok(),
            handle,
        }
    }

    pub fn is(&self, other: &Identity) -> bool {
        let other_handle = self.handle.is_some() && other.handle.is_some() && self.handle != other.handle;
        (self.id, self.kind, self.born) == (other.id, other.kind, other.born) && !other_handle
    }
}

/// A name by which a file was found: the node of a directory, and the name in it.
pub type Name = (u64, CString);

/// A name that refers to an entry of a directory, and to nothing elsewhere.
pub fn one_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL.into()),
        _ => Ok(name),
    }
}
