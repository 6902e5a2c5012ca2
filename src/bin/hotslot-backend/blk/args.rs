//! The command line of `blk`.

use std::path::PathBuf;

use super::limits::ID_LEN;
use crate::server;

/// Each of a queue's 8 threads has the file open: 32 * 8 = 256 descriptors of the 1024 that a process usually
/// may have.
const MAX_QUEUES: i64 = 32;

/// Disk whose contents are a regular file or a block device (VIRTIO block)
///
/// The guest sees the file as /dev/vdX; an incomplete block at its end is left out.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub server: server::Options,

    /// Regular file or block device that is the disk
    #[arg(long, value_name = "PATH")]
    pub file: PathBuf,

    /// Let the guest read only; the file needs no write permission
    #[arg(long)]
    pub read_only: bool,

    /// Let others that are started with --shared or --read-only use the file at the same time. Without it, a
    /// second back-end is refused where one of the two may write. A guest's cache misses the writes of other
    /// guests: when two guests mount a file system and one of them writes, an ordinary one (ext4) is
    /// destroyed
    #[arg(long)]
    pub shared: bool,

    /// Serial number that the guest sees, 1 to 20 printable ASCII characters [default: the beginning of the
    /// file's name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    pub serial: Option<String>,

    /// Size of the guest's logical blocks, 512 or 4096 bytes: requests for parts of a block are refused
    /// [default: 512, or that of the block device]
    #[arg(long, value_name = "BYTES", value_parser = block_size)]
    pub block_size: Option<u32>,

    /// Queues; of each, up to eight requests are executed at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES))]
    pub queues: u16,
}

fn block_size(text: &str) -> Result<u32, &'static str> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("a block has 512 or 4096 bytes"),
    }
}

fn serial(text: &str) -> Result<String, &'static str> {
    let printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    match text.len() {
        1..=ID_LEN if printable => Ok(text.to_owned()),
        _ => Err("a serial number has 1 to 20 printable ASCII characters"),
    }
}
