//! Numbers of the device, for all of [`super`].

use virtio_bindings::virtio_blk::VIRTIO_BLK_ID_BYTES;

pub const NAME: &str = "blk";

/// The unit of every address on the disk.
pub const SECTOR: u64 = 512;
/// Buffers in a request besides header and status: 128, the smallest queue that drivers use, less two.
pub const SEG_MAX: u32 = 126;
/// Ranges in a request to discard or zero, and sectors in a range (1 GiB).
pub const MAX_RANGES: u32 = 32;
pub const MAX_RANGE: u32 = 1 << 21;

pub const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;
/// Threads for each queue. Where requests wait for a disk, eight do several times as much as one; more did no
/// more.
pub const THREADS: usize = 8;
