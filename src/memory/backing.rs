//! The files behind the mappings of one device: one descriptor of each is kept, as it came (SHM-46).
//!
//! An access that fails does not say why. Only the file's size tells whether the file ends before the page,
//! or has the page and the host cannot provide it (SHM-45, SHM-87). Called by [`super::shmem`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::fs::{StatVfs, StatxFlags};
use rustix::io::Errno;

use super::PAGE_SIZE;
use super::origin::{FileId, Origin, id, look};

/// From statfs(2): files made of huge pages, which can only be mapped in whole huge pages.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// What must be known of a file before it is mapped.
#[derive(Clone, Copy, Debug)]
pub struct FileInfo {
    id: Option<FileId>,
    /// The size of its pages in bytes: what is mapped of it are multiples of that.
    pub page_size: u64,
}

impl FileInfo {
    /// Looks at a file that may be mapped. Asks the kernel, not the file's server.
    pub fn of(file: BorrowedFd<'_>, origin: Origin) -> io::Result<FileInfo> {
        if let Origin::FileSystem { id } = origin {
            return Ok(FileInfo { id, page_size: PAGE_SIZE });
        }
        let fs = rustix::fs::fstatfs(file)?;
        let is_huge = fs.f_type == HUGETLBFS_MAGIC;
        let page_size =
            if is_huge { u64::try_from(fs.f_bsize).map_err(|_| Errno::INVAL)? } else { PAGE_SIZE };
        Ok(FileInfo { id: look(file, StatxFlags::INO).ok().map(|found| id(&found)), page_size })
    }
}

/// A file of which something is mapped.
#[derive(Debug)]
pub struct BackingFile {
    fd: Arc<OwnedFd>,
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
pub struct BackingFiles(BTreeMap<FileId, Weak<BackingFile>>);

impl BackingFiles {
    /// The file, by the descriptor that is kept of it already, or by this one.
    pub fn keep(&mut self, file: &Arc<OwnedFd>, info: FileInfo) -> Arc<BackingFile> {
        if let Some(kept) = info.id.and_then(|id| self.0.get(&id)).and_then(Weak::upgrade) {
            return kept;
        }
        self.0.retain(|_, file| file.strong_count() > 0);
        let file = Arc::new(BackingFile { fd: Arc::clone(file), info });
        self.0.extend(info.id.map(|id| (id, Arc::downgrade(&file))));
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> (Arc<OwnedFd>, FileInfo) {
        let file = OwnedFd::from(tempfile::tempfile().unwrap());
        let id = look(file.as_fd(), StatxFlags::INO).ok().map(|found| id(&found));
        (Arc::new(file), FileInfo { id, page_size: PAGE_SIZE })
    }

    #[test]
    fn a_file_is_kept_once_and_as_long_as_it_is_used() {
        let (file, info) = file();
        let mut files = BackingFiles::default();
        let kept = [0, 1].map(|_| files.keep(&file, info));
        assert!(Arc::ptr_eq(&kept[0], &kept[1]));
        for (size, end) in [(0, 0), (1, 4096), (4096, 4096), (5000, 8192)] {
            rustix::fs::ftruncate(&file, size).unwrap();
            assert_eq!(kept[0].end().unwrap(), end);
        }
        drop(kept);
        assert!(files.0[&info.id.unwrap()].upgrade().is_none());
        let (other, info) = self::file();
        let _other = files.keep(&other, info);
        assert_eq!(files.0.len(), 1);
    }
}
