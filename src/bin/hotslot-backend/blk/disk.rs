//! The disk: its file, how much of it the guest sees, and in which blocks.
//!
//! Called by [`super`].

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::args::Args;
use super::failure::Failure;
use super::limits::{ID_LEN, SECTOR, THREADS};
use super::sockets::Sockets;
use crate::error::{Error, MAKE_DISK};
use crate::image::{Image, Open, failed};

/// The unit in which Linux' page cache reads and writes a file.
const PAGE: u32 = 4096;

/// What all front-ends, one after another, see.
pub struct Disk {
    pub image: Image,
    pub sockets: Sockets,
    /// For each thread one, which is opened again: each has a position of its own, where read(2) and write(2)
    /// go. `vm-memory` has no pread(2) into the guest's memory.
    files: Vec<File>,
    pub queues: u16,
    /// The unit of each request, and the least that is written without reading what is around it.
    pub block: u32,
    pub physical_block: u32,
    /// Whole blocks only, in sectors.
    sectors: AtomicU64,
    /// The answer to `GET_ID`.
    pub id: [u8; ID_LEN],
}

impl Disk {
    pub fn open(args: &Args) -> Result<Self, Error> {
        let image = Image::open(Open {
            path: &args.file,
            read_only: args.read_only,
            shared: args.shared,
            create: false,
            block_device: true,
            missing: Some(MAKE_DISK),
        })?;
        let path = || image.path.clone();
        let block = args.block_size.unwrap_or(image.block_size);
        if block < image.block_size {
            return Err(Error::BlockSize { path: path(), block, least: image.block_size });
        }
        if image.len < u64::from(block) {
            return Err(Error::TooShort { path: path(), len: image.len, block });
        }
        let files =
            (0..usize::from(args.queues) * THREADS).map(|_| image.open_again()).collect::<io::Result<_>>();
        let files = files.map_err(failed("open again", &args.file, None))?;

        let name = args.file.file_name().unwrap_or_default().as_encoded_bytes();
        let text = args.serial.as_ref().map_or(name, |serial| serial.as_bytes());
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(text).for_each(|(to, from)| *to = *from);

        let sockets = Sockets::open().map_err(Error::set_up("a look at the sockets"))?;
        let physical_block = image.physical_block_size.unwrap_or(PAGE).max(block);
        let sectors = AtomicU64::new(whole_blocks(image.len, block));
        Ok(Disk { image, sockets, files, queues: args.queues, block, physical_block, sectors, id })
    }

    pub fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// Looks how long the file is now. Returns the sectors.
    pub fn measure(&self) -> io::Result<u64> {
        let sectors = whole_blocks(self.image.measure()?, self.block);
        self.sectors.store(sectors, Ordering::Relaxed);
        Ok(sectors)
    }

    /// The file with the position that only this thread uses.
    pub fn file(&self, thread: usize) -> &File {
        &self.files[thread]
    }

    /// The first byte of a range of the disk.
    pub fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let block = u64::from(self.block);
        let end = sector.checked_add(len.div_ceil(SECTOR));
        if !len.is_multiple_of(block)
            || !sector.is_multiple_of(block / SECTOR)
            || end.is_none_or(|end| end > self.sectors())
        {
            return Err(Failure::Range { sector, len, block: self.block });
        }
        Ok(sector * SECTOR)
    }
}

fn whole_blocks(len: u64, block: u32) -> u64 {
    let block = u64::from(block);
    len / block * (block / SECTOR)
}
