//! The sockets of this process. Called by [`super::resize`].

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::Mutex;

use rustix::fs::{Mode, OFlags, RawDir, SeekFrom};

use crate::lock::lock;

/// For a few dozen entries; more take another call.
const BUFFER: usize = 1024;

/// `/proc/self/fd`, opened while files can be opened. Lock order: innermost; held for a look.
pub struct Sockets(Mutex<File>);

impl Sockets {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// There is no /proc.
    pub fn open() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Sockets(Mutex::new(rustix::fs::open(c"/proc/self/fd", flags, Mode::empty())?.into())))
    }

    /// The number and the kernel's name of each.
    pub fn list(&self) -> io::Result<HashSet<(RawFd, CString)>> {
        let directory = &*lock(&self.0);
        rustix::fs::seek(directory, SeekFrom::Start(0))?;
        let mut sockets = HashSet::new();
        let mut buffer = Vec::with_capacity(BUFFER);
        let mut entries = RawDir::new(directory, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            // A descriptor may be gone when it is looked at.
            let (Ok(target), Some(Ok(number))) =
                (rustix::fs::readlinkat(directory, name, Vec::new()), name.to_str().ok().map(str::parse))
            else {
                continue;
            };
            if target.to_bytes().starts_with(b"socket:[") {
                sockets.insert((number, target));
            }
        }
        Ok(sockets)
    }
}
