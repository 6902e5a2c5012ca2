//! The files behind the mappings of one device: one descriptor of each is kept (SHM-46).
//!
//! An access that fails does not say why. Only the file's size tells whether the file ends before the page,
//! or has the page and the host cannot provide it (SHM-45, SHM-87). Called by [`super::shmem`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::fs::{AtFlags, StatVfs, Statx, StatxFlags};
use rustix::io::Errno;

use super::PAGE_SIZE;
use super::origin::Origin;

/// From statfs(2): files made of huge pages, which can only be mapped in whole huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What must be known of a file before it is mapped.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    /// Device, by its two numbers, and inode; `None` where the file's server hides them.
    id: Option<(u32, u32, u64)>,
    /// The size of its pages in bytes: what is mapped of it are multiples of that.
    pub page_size: u64,
}

impl FileInfo {
    /// Looks at a file that may be mapped. Asks the kernel, not the file's server.
    pub fn of(file: BorrowedFd<'_>, origin: Origin) -> io::Result<FileInfo> {
        let page_size = match origin {
            Origin::Memory => {
                let fs = rustix::fs::fstatfs(file)?;
                let is_huge = fs.f_type == HUGETLBFS_MAGIC;
                if is_huge { u64::try_from(fs.f_bsize).map_err(|_| Errno::INVAL)? } else { PAGE_SIZE }
            }
            Origin::FileSystem => PAGE_SIZE,
        };
        let found = look(file, StatxFlags::INO);
        let id = found.ok().map(|found| (found.stx_dev_major, found.stx_dev_minor, found.stx_ino));
        Ok(FileInfo { id, page_size })
    }
}

/// What the kernel knows of a file without asking its server.
fn look(file: BorrowedFd<'_>, what: StatxFlags) -> rustix::io::Result<Statx> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, what)
}

/// A file of which something is mapped.
#[derive(Debug)]
pub struct BackingFile {
    fd: OwnedFd,
    info: FileInfo,
}

impl BackingFile {
    /// Where the file ends now, in whole pages of its own. Asks the kernel, not the file's server.
    pub fn end(&self) -> io::Result<u64> {
        let size = look(self.fd.as_fd(), StatxFlags::SIZE)?.stx_size;
        size.checked_next_multiple_of(self.info.page_size).ok_or(Errno::OVERFLOW.into())
    }

    /// Why a page of the file may be unavailable, in words. It may wait for the file system.
    pub fn likely_reason(&self) -> &'static str {
        match rustix::fs::fstatvfs(&self.fd) {
            Ok(StatVfs { f_bavail: 0, .. }) if self.info.page_size > PAGE_SIZE => {
                "the host has no free huge page"
            }
            Ok(StatVfs { f_bavail: 0, .. }) => "its file system is full",
            _ => "an I/O error, a quota or a full file system",
        }
    }
}

/// The files of which something is mapped, one descriptor each.
#[derive(Debug, Default)]
pub struct BackingFiles(BTreeMap<(u32, u32, u64), Weak<BackingFile>>);

impl BackingFiles {
    /// The file, by the descriptor that is kept of it already, or by a new one. Fails with EMFILE.
    pub fn keep(&mut self, file: BorrowedFd<'_>, info: FileInfo) -> io::Result<Arc<BackingFile>> {
        if let Some(kept) = info.id.and_then(|id| self.0.get(&id)).and_then(Weak::upgrade) {
            return Ok(kept);
        }
        self.0.retain(|_, file| file.strong_count() > 0);
        let fd = rustix::io::fcntl_dupfd_cloexec(file.as_fd(), 0)?;
        let file = Arc::new(BackingFile { fd, info });
        self.0.extend(info.id.map(|id| (id, Arc::downgrade(&file))));
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_once_and_as_long_as_it_is_used() {
        let file = tempfile::tempfile().unwrap();
        let info = FileInfo::of(file.as_fd(), Origin::FileSystem).unwrap();
        let mut files = BackingFiles::default();
        let kept = [0, 1].map(|_| files.keep(file.as_fd(), info).unwrap());
        assert!(Arc::ptr_eq(&kept[0], &kept[1]));
        for (size, end) in [(0, 0), (1, 4096), (4096, 4096), (5000, 8192)] {
            file.set_len(size).unwrap();
            assert_eq!(kept[0].end().unwrap(), end);
        }
        drop(kept);
        assert!(files.0[&info.id.unwrap()].upgrade().is_none());
        let other = tempfile::tempfile().unwrap();
        let _other =
            files.keep(other.as_fd(), FileInfo::of(other.as_fd(), Origin::FileSystem).unwrap()).unwrap();
        assert_eq!(files.0.len(), 1);
    }
}
