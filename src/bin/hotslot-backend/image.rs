//! The file or block device whose contents a device shows: opened, locked against other processes, and made
//! durable.
//!
//! Opened by `blk` and by `backing` before they listen; flushed by the thread of a queue.
//!
//! The lock is fcntl(2)'s lock of the open file description (F_OFD_SETLK) on the whole file, whatever its
//! size becomes. QEMU's locks are of the same kind, but read locks on single bytes even where it writes. So a
//! lock for writing and QEMU's exclude each other, and a lock for reading does not find QEMU's. Locks are
//! advisory: a program that takes none is not kept out. A lock ends with the last descriptor or mapping of
//! this open file description: for `pmem`, the front-end's mapping.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::Error;

/// How a file is opened.
pub struct Open<'a> {
    pub path: &'a Path,
    pub read_only: bool,
    /// Lock only as a reader does, and let others write.
    pub shared: bool,
    pub create: bool,
    /// Whether a block device will do, too.
    pub block_device: bool,
    /// The hint for a file that does not exist.
    pub missing: Option<&'static str>,
}

/// An open file or block device.
pub struct Image {
    pub file: File,
    pub path: PathBuf,
    /// Bytes, when it was opened.
    pub len: u64,
    /// The unit of the block device, or 512.
    pub block_size: u32,
    /// The unit of the medium behind a block device.
    pub physical_block_size: Option<u32>,
    pub read_only: bool,
    /// The error of the first fdatasync(2) that failed.
    lost: OnceLock<i32>,
}

impl Image {
    /// Opens and locks it.
    ///
    /// # Errors
    ///
    /// See [`Error`]; a file may have been created, but no existing one was changed.
    pub fn open(open: Open) -> Result<Self, Error> {
        let Open { path, read_only, shared, create, block_device, missing } = open;
        // Not opened yet: an open of a FIFO waits, and an open of a device may have any effect.
        let kind = match fs::metadata(path) {
            Ok(metadata) => Some(metadata.file_type()),
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("look at", path, None)(e)),
            Err(_) if !create => return Err(Error::NoFile { path: path.to_owned(), hint: missing }),
            Err(_) => None,
        };
        let is_device = kind.is_some_and(|kind| kind.is_block_device());
        if let Some(kind) = kind.and_then(kind_if_not_regular)
            && !(block_device && is_device)
        {
            let allowed = if block_device { "a regular file or a block device" } else { "a regular file" };
            return Err(Error::NotRegular { path: path.to_owned(), kind, allowed });
        }

        let (action, hint) = match read_only {
            true => ("open for reading", None),
            false => ("open for reading and writing", Some("--read-only needs no write permission")),
        };
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).create(kind.is_none());
        if is_device && !read_only && !shared {
            // A claim to the device, which mount(2) and the like respect, and which fails where one has it.
            options.custom_flags(libc::O_EXCL);
        }
        let file = match options.open(path) {
            Err(e) if is_device && e.raw_os_error() == Some(libc::EBUSY) => {
                return Err(Error::Claimed(path.to_owned()));
            }
            result => result.map_err(failed(action, path, hint))?,
        };
        lock(&file, path, !read_only && !shared, shared)?;

        let looked = || -> io::Result<_> {
            let (block_size, physical_block_size) = match is_device {
                true => (rustix::fs::ioctl_blksszget(&file)?, Some(rustix::fs::ioctl_blkpbszget(&file)?)),
                false => (512, None),
            };
            Ok((measure(&file)?, block_size, physical_block_size))
        };
        let (len, block_size, physical_block_size) = looked().map_err(failed("look at", path, None))?;
        let lost = OnceLock::new();
        Ok(Image { file, path: path.to_owned(), len, block_size, physical_block_size, read_only, lost })
    }

    /// Bytes now.
    pub fn measure(&self) -> io::Result<u64> {
        measure(&self.file)
    }

    /// The same file, whatever has its name now, with a position of its own. Locks nothing.
    pub fn open_again(&self) -> io::Result<File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        OpenOptions::new().read(true).write(!self.read_only).open(path)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    ///
    /// That of the first fdatasync(2) that failed, from then on: Linux marks pages clean that it could not
    /// write back, so that a later fdatasync(2) succeeds without them.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        if let Some(errno) = self.lost.get() {
            return Err(io::Error::from_raw_os_error(*errno));
        }
        self.file.sync_data().inspect_err(|e| {
            // Set already: another queue's flush failed meanwhile.
            let _ = self.lost.set(e.raw_os_error().unwrap_or(libc::EIO));
        })
    }

    pub fn access(&self) -> &'static str {
        if self.read_only { "read-only" } else { "read-write" }
    }
}

/// For `map_err`: what could not be done with the file.
pub fn failed(
    action: &'static str,
    path: &Path,
    hint: Option<&'static str>,
) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, hint, source }
}

/// Bytes in all. The metadata of a block device have no length.
fn measure(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// Locks it for writing, or for reading.
fn lock(file: &File, path: &Path, exclusive: bool, shared: bool) -> Result<(), Error> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    // From byte 0 on; a length of 0 is to the end, wherever that will be.
    let mut lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let errno = match fcntl(file.as_raw_fd(), FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => return Ok(()),
        Err(errno) => errno,
    };
    match errno {
        Errno::EAGAIN | Errno::EACCES => {
            // Whose lock it is. If that is gone meanwhile, the lock is F_UNLCK, and the process has no
            // number.
            let asked = fcntl(file.as_raw_fd(), FcntlArg::F_OFD_GETLK(&mut lock));
            let writing = lock.l_type == libc::F_WRLCK as libc::c_short;
            let pid = (asked.is_ok() && lock.l_pid > 0).then_some(lock.l_pid);
            Err(Error::InUseFile { path: path.to_owned(), writing, pid })
        }
        // A network file system without locks, whose user has said that it is shared.
        Errno::ENOLCK | Errno::EOPNOTSUPP if shared => Ok(()),
        Errno::ENOLCK | Errno::EOPNOTSUPP => {
            Err(failed("lock", path, Some("--shared goes on without a lock"))(errno.into()))
        }
        _ => Err(failed("lock", path, None)(errno.into())),
    }
}

fn kind_if_not_regular(kind: fs::FileType) -> Option<&'static str> {
    match kind {
        _ if kind.is_file() => None,
        _ if kind.is_dir() => Some("directory"),
        _ if kind.is_block_device() => Some("block device"),
        _ if kind.is_char_device() => Some("character device"),
        _ if kind.is_fifo() => Some("FIFO"),
        _ if kind.is_socket() => Some("socket"),
        _ => Some("special file"),
    }
}
