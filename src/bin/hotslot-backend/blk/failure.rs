//! Why a request fails: the driver gets the status byte, stderr the sentence.
//!
//! Called by [`super`] and [`super::disk`].

use std::io;
use std::path::PathBuf;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP};
use vm_memory::GuestMemoryError;

use super::limits::{MAX_RANGE, MAX_RANGES};

#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("a request has the unknown type {0}")]
    Unsupported(u32),
    #[error("{0:?} cannot discard or zero: its file system or device does not offer it")]
    NotOffered(PathBuf),
    #[error("a range to discard or zero has the flags {flags:#x}, of which not all are known and allowed")]
    Flags { flags: u32 },
    #[error("{bytes} bytes are not 1 to {max} ranges", max = MAX_RANGES)]
    Ranges { bytes: usize },
    #[error("a range has {0} sectors, more than {max}", max = MAX_RANGE)]
    RangeTooLong(u32),
    #[error("{len} bytes from sector {sector} on are not whole blocks, of {block} bytes, of the disk")]
    Range { sector: u64, len: u64, block: u32 },
    #[error("a request to write, to a disk that is read-only")]
    ReadOnly,
    #[error("a request's buffers are too short")]
    Short,
    #[error("a request's buffers cannot be used")]
    Memory(#[from] GuestMemoryError),
    #[error("{0:?} has become shorter than the disk")]
    Cut(PathBuf),
    #[error("cannot {action} {path:?}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
}

impl Failure {
    pub fn status(&self) -> u32 {
        match self {
            Failure::Unsupported(_) | Failure::NotOffered(_) | Failure::Flags { .. } => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}
