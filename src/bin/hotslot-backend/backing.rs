//! The file that is a device's memory: which files can be, and how much of one is mapped.
//!
//! Called by `pmem` before it listens.

use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use hotslot::size;

use crate::error::Error;
use crate::image::{Image, Open, failed};

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

    /// Let others that are started with --shared or --read-only use the file at the same time. Without it, a
    /// second back-end on a file that one may write is refused. Guests see each other's stores at once; but a
    /// file system that two guests mount at a time, one of them for writing, is destroyed, unless it is made
    /// for that
    #[arg(long)]
    shared: bool,
}

/// The file, and how much of it is the memory.
#[derive(Clone)]
pub struct Backing {
    pub image: Arc<Image>,
    /// Bytes of the region and of its mapping, a multiple of the page size; the file may be shorter or
    /// longer.
    pub size: u64,
}

impl Backing {
    /// Opens, creates and extends the file as the command line says.
    ///
    /// # Errors
    ///
    /// See [`Error`]; a file is created or extended only once all else is right.
    pub fn open(args: &Args) -> Result<Self, Error> {
        if let Some(size) = args.size.filter(|size| *size == 0 || size % PAGE != 0) {
            return Err(Error::BadSize { size, page: PAGE });
        }
        let read_only = args.read_only;
        let mut image = Image::open(Open {
            path: &args.file,
            read_only,
            shared: args.shared,
            create: !read_only && args.size.is_some(),
            block_device: false,
            missing: (!read_only).then_some("--size SIZE creates it"),
        })?;

        let path = || args.file.clone();
        let size = match args.size {
            Some(size) => size,
            None if image.len == 0 => return Err(Error::Empty { path: path(), read_only }),
            None => image
                .len
                .checked_next_multiple_of(LINUX_UNIT)
                .ok_or_else(|| Error::TooLong { path: path(), len: image.len })?,
        };
        if !read_only && args.size.is_some() && image.len < size {
            image.file.set_len(size).map_err(failed("extend", &args.file, None))?;
            image.len = size;
        }
        Ok(Backing { image: Arc::new(image), size })
    }

    /// What the user may not expect.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let Image { len, read_only, .. } = *self.image;
        if len < self.size && !read_only {
            notes.push(format!(
                "the last {} bytes of the memory lie past the end of the file: the guest's writes there are lost \
                 (--size {} extends the file)",
                self.size - len,
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
        write!(f, "{:?}, {} bytes, {}", self.image.path, self.size, self.image.access())
    }
}
