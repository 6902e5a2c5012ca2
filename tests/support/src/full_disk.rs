//! A file system that is full until room is made: a tmpfs of its own, which no directory shows.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::files::PAGE;

const FILLER: &str = "filler";

pub struct FullDisk(OwnedFd);

impl FullDisk {
    /// `None` where this process may not mount.
    pub fn new() -> Option<FullDisk> {
        let context = match rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC) {
            Err(Errno::PERM) => return None,
            context => context.unwrap(),
        };
        rustix::mount::fsconfig_set_string(&context, "size", "256k").unwrap();
        rustix::mount::fsconfig_create(&context).unwrap();
        let none = MountAttrFlags::empty();
        Some(FullDisk(rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, none).unwrap()))
    }

    fn open(&self, name: &str) -> File {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
        rustix::fs::openat(&self.0, name, flags, Mode::RUSR | Mode::WUSR).unwrap().into()
    }

    /// A file of `pages` pages, of which only the first is there, full of `byte`. Then the disk is full.
    pub fn sparse_file(&self, pages: u64, byte: u8) -> File {
        let mut file = self.open("sparse");
        file.write_all(&[byte; PAGE as usize]).unwrap();
        file.set_len(pages * PAGE).unwrap();
        let mut filler = self.open(FILLER);
        while filler.write_all(&[1; PAGE as usize]).is_ok() {}
        file
    }

    /// A path that leads to it, as long as this is not dropped.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()).into()
    }

    pub fn make_room(&self) {
        rustix::fs::unlinkat(&self.0, FILLER, AtFlags::empty()).unwrap();
    }
}
