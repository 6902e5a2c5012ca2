//! The file that is a device's memory: which files can be, and how much of one is mapped.
//!
//! Called by `pmem`, once, before it listens; `blk` opens its file here, too.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use hotslot::size::parse as parse_size;

const OPEN_READ: &str = "open for reading";
const OPEN_WRITE: &str = "open for reading and writing";

const PAGE: u64 = 4096;
/// Linux refuses a pmem region whose ends are not multiples of 2 MiB ("misaligned, unable to map": the
/// sub-section, in which the kernel hands out `struct page`s), so a region is rounded up to that unless
/// `--size` names its size.
const LINUX_UNIT: u64 = 2 << 20;

/// Which file, and how much of it.
#[derive(clap::Args)]
#[group(skip)]
pub struct Args {
    /// Regular file that is the memory
    #[arg(long, value_name = "PATH")]
    file: PathBuf,

    /// Size of the memory (4096, 64K, 16M, 8G), exactly; a shorter or missing file is extended to it,
    /// sparsely, unless --read-only; of a longer file the guest sees the beginning
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,

    /// Let the guest read only; the file is neither created nor extended, and needs no write permission
    #[arg(long)]
    read_only: bool,
}

/// Why a file cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("there is no file {path:?}")]
    NoFile { path: PathBuf, read_only: bool },
    #[error("{path:?} is a {kind}; only a regular file can be served")]
    NotRegular { path: PathBuf, kind: &'static str },
    #[error("{path:?} is empty, so the memory would have no size")]
    Empty { path: PathBuf, read_only: bool },
    #[error("--size {0} is not a multiple of the page size, {PAGE}, or is zero")]
    BadSize(u64),
    #[error("{path:?} has {len} bytes, more than a region can have")]
    TooLong { path: PathBuf, len: u64 },
    #[error("cannot {what} {path:?}")]
    File { what: &'static str, path: PathBuf, source: io::Error },
}

impl Error {
    /// What the user could do.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Error::NoFile { read_only: false, .. } => Some("--size SIZE creates it"),
            Error::Empty { read_only: false, .. } => Some("--size SIZE extends it"),
            Error::NotRegular { kind: "block device", .. } => {
                Some("serve a disk through a vhost-user block back-end")
            }
            Error::File { what: OPEN_WRITE, .. } => Some("--read-only needs no write permission"),
            _ => None,
        }
    }
}

/// The file, and how much of it is the memory.
#[derive(Clone)]
pub struct Backing {
    pub file: Arc<File>,
    pub path: PathBuf,
    /// Bytes of the region and of its mapping, a multiple of the page size.
    pub size: u64,
    /// Bytes of the file when it was opened: less than `size`, or more.
    file_len: u64,
    pub read_only: bool,
}

impl Backing {
    /// Opens, creates and extends the file as the command line says.
    ///
    /// # Errors
    ///
    /// See [`Error`]; a file is created or extended only once all else is right.
    pub fn open(args: &Args) -> Result<Self, Error> {
        let path = args.file.clone();
        let read_only = args.read_only;
        let failed = |what| {
            let path = path.clone();
            move |source| Error::File { what, path, source }
        };

        if let Some(size) = args.size.filter(|size| *size == 0 || size % PAGE != 0) {
            return Err(Error::BadSize(size));
        }
        let file = open_file(&path, read_only, !read_only && args.size.is_some())?;
        let mut file_len = file.metadata().map_err(failed("look at"))?.len();

        let size = match args.size {
            Some(size) => size,
            None if file_len == 0 => return Err(Error::Empty { path, read_only }),
            None => file_len
                .checked_next_multiple_of(LINUX_UNIT)
                .ok_or(Error::TooLong { path: path.clone(), len: file_len })?,
        };
        if !read_only && args.size.is_some() && file_len < size {
            file.set_len(size).map_err(failed("extend"))?;
            file_len = size;
        }
        Ok(Backing { file: Arc::new(file), path, size, file_len, read_only })
    }

    /// For messages.
    pub fn access(&self) -> &'static str {
        if self.read_only { "read-only" } else { "read-write" }
    }

    /// What works, but perhaps not as expected.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.file_len < self.size && !self.read_only {
            notes.push(format!(
                "the last {} bytes of the memory lie past the end of the file: what the guest writes there is lost \
                 (--size {} extends the file)",
                self.size - self.file_len,
                self.size
            ));
        }
        if !self.size.is_multiple_of(LINUX_UNIT) {
            notes.push(format!(
                "Linux refuses memory whose size, here {}, is not a multiple of 2 MiB",
                self.size
            ));
        }
        notes
    }
}

impl Display for Backing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {} bytes, {}", self.path, self.size, self.access())
    }
}

/// Opens a regular file, for reading only or for writing, too; creates it where `create` says so.
///
/// # Errors
///
/// See [`Error`].
pub fn open_file(path: &Path, read_only: bool, create: bool) -> Result<File, Error> {
    let failed = |what| {
        let path = path.to_owned();
        move |source| Error::File { what, path, source }
    };
    // Looked at before it is opened: opening a FIFO waits, and opening a device may do anything.
    let missing = match fs::metadata(path) {
        Ok(metadata) => {
            if let Some(kind) = kind_if_not_regular(metadata.file_type()) {
                let path = path.to_owned();
                return Err(Error::NotRegular { path, kind });
            }
            false
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("look at")(e)),
        Err(_) if !create => {
            let path = path.to_owned();
            return Err(Error::NoFile { path, read_only });
        }
        Err(_) => true,
    };
    OpenOptions::new().read(true).write(!read_only).create(missing).open(path).map_err(failed(if read_only {
        OPEN_READ
    } else {
        OPEN_WRITE
    }))
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
