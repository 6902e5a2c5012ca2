//! The file that is a device's memory: which files can be, and how much of one is mapped.
//!
//! Called by `pmem` and, to open its file, by `blk`, before they listen.

use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hotslot::size;

use crate::error::Error;

const PAGE: u64 = 4096;
/// Linux' unit of `struct page`s, the sub-section: it refuses a pmem region or a DAX window whose ends are
/// not multiples of 2 MiB ("misaligned, unable to map"). So a region is rounded up to that unless `--size`
/// names its size.
pub const LINUX_UNIT: u64 = 2 << 20;

/// Which file, and how much of it.
#[derive(clap::Args)]
#[group(skip)]
pub struct Args {
    /// Regular file that is the memory
    #[arg(long, value_name = "PATH")]
    file: PathBuf,

    /// Size of the memory (4096, 64K, 16M, 8G), exactly; a shorter or missing file is extended to it,
    /// sparsely, unless --read-only; of a longer file the guest sees the beginning
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,

    /// Let the guest read only; the file is neither created nor extended, and needs no write permission
    #[arg(long)]
    read_only: bool,
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
        if let Some(size) = args.size.filter(|size| *size == 0 || size % PAGE != 0) {
            return Err(Error::BadSize { size, page: PAGE });
        }
        let hint = (!read_only).then_some("--size SIZE creates it");
        let (file, mut file_len) = open_file(&path, read_only, !read_only && args.size.is_some(), hint)?;

        let size = match args.size {
            Some(size) => size,
            None if file_len == 0 => return Err(Error::Empty { path, read_only }),
            None => file_len
                .checked_next_multiple_of(LINUX_UNIT)
                .ok_or(Error::TooLong { path: path.clone(), len: file_len })?,
        };
        if !read_only && args.size.is_some() && file_len < size {
            file.set_len(size).map_err(failed("extend", &path, None))?;
            file_len = size;
        }
        Ok(Backing { file: Arc::new(file), path, size, file_len, read_only })
    }

    pub fn access(&self) -> &'static str {
        if self.read_only { "read-only" } else { "read-write" }
    }

    /// What the user may not expect.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.file_len < self.size && !self.read_only {
            notes.push(format!(
                "the last {} bytes of the memory lie past the end of the file: the guest's writes there are lost \
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

/// Opens a regular file, for reading only or for writing, too; creates it where `create` says so. Returns its
/// length, too.
///
/// # Errors
///
/// See [`Error`]; `missing` is the hint for a file that is not there.
pub fn open_file(
    path: &Path,
    read_only: bool,
    create: bool,
    missing: Option<&'static str>,
) -> Result<(File, u64), Error> {
    // Not opened yet: an open of a FIFO waits, and an open of a device may have any effect.
    let exists = match fs::metadata(path) {
        Ok(metadata) => match kind_if_not_regular(metadata.file_type()) {
            Some(kind) => return Err(Error::NotRegular { path: path.to_owned(), kind }),
            None => true,
        },
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed("look at", path, None)(e)),
        Err(_) if !create => return Err(Error::NoFile { path: path.to_owned(), hint: missing }),
        Err(_) => false,
    };
    let (action, hint) = match read_only {
        true => ("open for reading", None),
        false => ("open for reading and writing", Some("--read-only needs no write permission")),
    };
    let file = OpenOptions::new().read(true).write(!read_only).create(!exists).open(path);
    let file = file.map_err(failed(action, path, hint))?;
    let metadata = file.metadata().map_err(failed("look at", path, None))?;
    Ok((file, metadata.len()))
}

fn failed(action: &'static str, path: &Path, hint: Option<&'static str>) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File { action, path, hint, source }
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
