//! The initial RAM file system: one or several files, of which the kernel unpacks one after the other.
//!
//! Documentation/driver-api/early-userspace/buffer-format.rst in the Linux sources. [`super::boot`] calls it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::kernel::{ImageFile, KernelError};
use crate::memory::PAGE_SIZE;

/// Why an initramfs cannot be used. Numbers are bytes and guest addresses.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum InitramfsError {
    #[error(transparent)]
    File(#[from] KernelError),
    /// `is_ram_end`: more RAM would leave more room.
    #[error(
        "the initramfs {paths} has {size} bytes, and only {room} bytes of RAM are left between the kernel's end at \
         {kernel_end:#x} and {limit:#x}{}",
        if *is_ram_end { "" } else { ", beyond which the kernel takes none" }
    )]
    TooLarge { paths: String, size: u64, room: u64, kernel_end: u64, limit: u64, is_ram_end: bool },
}

/// Where one archive may follow another. Linux skips the zeroes between them.
const ALIGN: u64 = 4;

/// The files, with a place in RAM for all of them together.
pub(super) struct Initramfs {
    images: Vec<ImageFile>,
    pub start: u64,
    /// In bytes.
    pub len: u64,
}

impl Initramfs {
    /// Opens the files. Their place is as high as possible: below `limit`, on a page boundary, not in the
    /// kernel. `is_ram_end` says whether more RAM would raise `limit`.
    pub fn plan(
        paths: &[PathBuf],
        kernel_end: u64,
        limit: u64,
        is_ram_end: bool,
    ) -> Result<Option<Initramfs>, InitramfsError> {
        if paths.is_empty() {
            return Ok(None);
        }
        let images = paths.iter().map(|path| ImageFile::open("initramfs", path));
        let images = images.collect::<Result<Vec<_>, _>>()?;
        let len = images.iter().fold(0, |len: u64, image| len.next_multiple_of(ALIGN) + image.len);
        match limit.checked_sub(len).map(|start| start & !(PAGE_SIZE - 1)) {
            Some(start) if start >= kernel_end => Ok(Some(Initramfs { images, start, len })),
            _ => Err(InitramfsError::TooLarge {
                paths: paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" and "),
                size: len,
                room: limit.saturating_sub(kernel_end),
                kernel_end,
                limit,
                is_ram_end,
            }),
        }
    }

    /// Reads the files into guest memory, which is zero there.
    pub fn load(&mut self, memory: &GuestMemoryMmap) -> Result<(), InitramfsError> {
        let mut start = self.start;
        for image in &mut self.images {
            memory
                .read_exact_volatile_from(GuestAddress(start), &mut image.file, image.len as usize)
                .map_err(|error| image.read_error(io::Error::other(error)))?;
            start += image.len.next_multiple_of(ALIGN);
        }
        Ok(())
    }
}
