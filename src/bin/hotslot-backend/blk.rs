//! A disk whose contents are a file: a VIRTIO block device (id 2) as a vhost-user back-end.
//!
//! VIRTIO 1.2, section 5.2. Called by `main`. Data go straight between the file and the guest's memory, by
//! read(2) and write(2) on the guest's buffers.
//!
//! It has no mappings of its own. But a guest's buffer may be in memory that another device's back-end
//! mapped: O_DIRECT between a file of a DAX file system and this disk. A front-end that shares those mappings
//! adds them to this back-end's memory by ADD_MEM_REG (protocol feature CONFIGURE_MEM_SLOTS). Without that,
//! or after a REM_MEM_REG, such a buffer is at an address that does not exist here, and its request fails. A
//! shared mapping may reach past the end of its file. There read(2) and write(2) fail with EFAULT, but a load
//! or store would raise SIGBUS. Loads and stores reach only the driver's own structures, which are never in a
//! file: rings, headers and status.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::offset_of;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_config,
};
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use hotslot::report::{say, with_causes};

use crate::backing;
use crate::complaints::Complaints;
use crate::device::{self, Device, Memory, Request, Taken};
use crate::error::{Error, MAKE_DISK};
use crate::server;

const NAME: &str = "blk";

/// The unit of every address on the disk, and the block size in the configuration space.
const SECTOR: u64 = 512;
/// Buffers in a request besides header and status: 128, the smallest queue that drivers use, less two.
const SEG_MAX: u32 = 126;
/// Ranges in a request to discard or zero, and sectors in a range (1 GiB).
const MAX_RANGES: u32 = 32;
const MAX_RANGE: u32 = 1 << 21;

/// `struct virtio_blk_req`: type, reserved, sector; then data, then the status byte. Section 5.2.6.
const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE: usize = 16;

/// Disk whose contents are a regular file (VIRTIO block)
///
/// The guest sees the file as /dev/vdX, in sectors of 512 bytes; an incomplete sector at its end is left out.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    /// Regular file that is the disk
    #[arg(long, value_name = "PATH")]
    file: PathBuf,

    /// Let the guest read only; the file needs no write permission
    #[arg(long)]
    read_only: bool,
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a wrong command line or file is found before the socket exists.
pub fn run(args: &Args) -> Result<(), Error> {
    let disk = Disk::open(&args.file, args.read_only)?;
    let listening = server::listen(&args.server)?;
    say(format_args!(
        "{NAME}: {listening}: {:?}, {} sectors, {}",
        args.file,
        disk.sectors,
        if disk.read_only { "read-only" } else { "read-write" }
    ));
    server::serve(NAME, listening, move |memory, complaints| {
        Ok(Blk { disk: disk.clone(), memory, complaints, driver_flushes: AtomicBool::new(false) })
    })
}

/// The file, and how much of it is the disk.
#[derive(Clone)]
struct Disk {
    file: Arc<File>,
    path: PathBuf,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let (file, len) = backing::open_file(path, read_only, false, Some(MAKE_DISK))?;
        let path = path.to_owned();
        match len {
            ..SECTOR => Err(Error::TooShort { path, len, sector: SECTOR }),
            _ => Ok(Disk { file: Arc::new(file), path, sectors: len / SECTOR, read_only }),
        }
    }

    /// The first byte of a range of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len.div_ceil(SECTOR));
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(Failure::Range { sector, len });
        }
        Ok(sector * SECTOR)
    }

    /// The answer to `GET_ID`: the name of the file, cut to the size of an id.
    fn id(&self) -> [u8; VIRTIO_BLK_ID_BYTES as usize] {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        let name = self.path.file_name().unwrap_or_default().as_encoded_bytes();
        let len = name.len().min(id.len());
        id[..len].copy_from_slice(&name[..len]);
        id
    }
}

/// Why a request fails. The driver gets a status byte, stderr the sentence.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("a request has the unknown type {0}")]
    Unsupported(u32),
    #[error("the file system under the file cannot do it")]
    NotOffered,
    #[error("{len} bytes from sector {sector} on are not whole sectors of the disk")]
    Range { sector: u64, len: u64 },
    #[error("a request to write, to a disk that is read-only")]
    ReadOnly,
    #[error("a request's buffers are too short")]
    Short,
    #[error("a request's buffers cannot be used")]
    Memory(#[from] GuestMemoryError),
    #[error("cannot access {path:?}")]
    File { path: PathBuf, source: io::Error },
}

impl Failure {
    fn status(&self) -> u32 {
        match self {
            Failure::Unsupported(_) | Failure::NotOffered => VIRTIO_BLK_S_UNSUPP,
            _ => VIRTIO_BLK_S_IOERR,
        }
    }
}

/// A request's buffers in their order: address and length.
struct Buffers(Vec<(GuestAddress, usize)>);

impl Buffers {
    fn len(&self) -> usize {
        // At most 2^32: the crate ends a chain of ring descriptors there.
        self.0.iter().map(|(_, len)| len).sum()
    }

    /// Cuts in two, at `at` bytes.
    fn split(self, at: usize) -> (Buffers, Buffers) {
        let (mut front, mut back, mut left) = (Vec::new(), Vec::new(), at);
        for (address, len) in self.0 {
            let here = len.min(left);
            left -= here;
            if here > 0 {
                front.push((address, here));
            }
            if here < len {
                // The driver's address plus the driver's length: what wraps around is in no memory.
                back.push((GuestAddress(address.0.wrapping_add(here as u64)), len - here));
            }
        }
        (Buffers(front), Buffers(back))
    }

    /// Copies one of the driver's own structures.
    fn read<const N: usize>(&self, memory: &GuestMemoryMmap) -> Result<[u8; N], GuestMemoryError> {
        let mut bytes = [0; N];
        let mut at = 0;
        for &(address, len) in &self.0 {
            let end = N.min(at + len);
            memory.read_slice(&mut bytes[at..end], address)?;
            at = end;
        }
        Ok(bytes)
    }
}

/// The device, for one front-end.
struct Blk {
    disk: Disk,
    memory: Memory,
    complaints: Arc<Complaints>,
    /// Whether the driver accepted VIRTIO_BLK_F_FLUSH. If not, each write must be durable before it is
    /// answered.
    driver_flushes: AtomicBool,
}

impl Blk {
    /// Returns how many bytes of `writable` were written.
    fn execute(
        &self,
        memory: &GuestMemoryMmap,
        readable: Buffers,
        writable: &Buffers,
    ) -> Result<u32, Failure> {
        if readable.len() < HEADER {
            return Err(Failure::Short);
        }
        let (header, readable) = readable.split(HEADER);
        let header: [u8; HEADER] = header.read(memory)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);

        let writes = matches!(kind, VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES);
        if writes && self.disk.read_only {
            return Err(Failure::ReadOnly);
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                self.seek(sector, writable.len())?;
                for &(address, len) in &writable.0 {
                    memory.read_exact_volatile_from(address, &mut self.disk.file.as_ref(), len)?;
                }
                Ok(writable.len() as u32)
            }
            VIRTIO_BLK_T_OUT => {
                self.seek(sector, readable.len())?;
                for &(address, len) in &readable.0 {
                    memory.write_all_volatile_to(address, &mut self.disk.file.as_ref(), len)?;
                }
                self.written().map(|()| 0)
            }
            VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => {
                let id = self.disk.id();
                let [(address, len), ..] = writable.0[..] else {
                    return Err(Failure::Short);
                };
                let len = len.min(id.len());
                memory.write_slice(&id[..len], address)?;
                Ok(len as u32)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.ranges(memory, readable, kind)?;
                self.written().map(|()| 0)
            }
            _ => Err(Failure::Unsupported(kind)),
        }
    }

    /// Sets the file's position, which only this queue's thread uses.
    fn seek(&self, sector: u64, len: usize) -> Result<(), Failure> {
        let start = self.disk.range(sector, len as u64)?;
        let seek = self.disk.file.as_ref().seek(SeekFrom::Start(start));
        seek.map(drop).map_err(|e| self.file_failure(e))
    }

    /// Discards or zeroes the ranges in the request's data.
    fn ranges(&self, memory: &GuestMemoryMmap, mut data: Buffers, kind: u32) -> Result<(), Failure> {
        if !data.len().is_multiple_of(RANGE) || data.len() > RANGE * MAX_RANGES as usize {
            return Err(Failure::Short);
        }
        while data.len() > 0 {
            let (range, rest) = data.split(RANGE);
            data = rest;
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range.read::<RANGE>(memory)?;
            let sector = u64::from_le_bytes(sector);
            let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR;
            let unmap = u32::from_le_bytes([f0, f1, f2, f3]) & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            let start = self.disk.range(sector, len)?;
            let mode = if kind == VIRTIO_BLK_T_DISCARD || unmap {
                FallocateFlags::PUNCH_HOLE
            } else {
                FallocateFlags::ZERO_RANGE
            };
            if len == 0 {
                continue;
            }
            match rustix::fs::fallocate(&self.disk.file, mode | FallocateFlags::KEEP_SIZE, start, len) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP) => return Err(Failure::NotOffered),
                Err(e) => return Err(self.file_failure(e.into())),
            }
        }
        Ok(())
    }

    /// The file was changed: makes it durable if the driver does not flush.
    fn written(&self) -> Result<(), Failure> {
        match self.driver_flushes.load(Ordering::Relaxed) {
            true => Ok(()),
            false => self.flush(),
        }
    }

    fn flush(&self) -> Result<(), Failure> {
        if self.disk.read_only {
            return Ok(());
        }
        self.disk.file.sync_data().map_err(|e| self.file_failure(e))
    }

    fn file_failure(&self, source: io::Error) -> Failure {
        let path = self.disk.path.clone();
        Failure::File { path, source }
    }

    /// The configuration space, section 5.2.4.
    fn config_space(&self) -> [u8; size_of::<virtio_blk_config>()] {
        let mut space = [0; size_of::<virtio_blk_config>()];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(offset_of!(virtio_blk_config, capacity), &self.disk.sectors.to_le_bytes());
        for (at, value) in [
            (offset_of!(virtio_blk_config, seg_max), SEG_MAX),
            (offset_of!(virtio_blk_config, blk_size), SECTOR as u32),
            (offset_of!(virtio_blk_config, max_discard_sectors), MAX_RANGE),
            (offset_of!(virtio_blk_config, max_discard_seg), MAX_RANGES),
            (offset_of!(virtio_blk_config, discard_sector_alignment), 1),
            (offset_of!(virtio_blk_config, max_write_zeroes_sectors), MAX_RANGE),
            (offset_of!(virtio_blk_config, max_write_zeroes_seg), MAX_RANGES),
        ] {
            put(at, &value.to_le_bytes());
        }
        put(offset_of!(virtio_blk_config, write_zeroes_may_unmap), &[1]);
        space
    }
}

impl Device for Blk {
    type Request = Request;

    fn features(&self) -> u64 {
        let access = match self.disk.read_only {
            true => 1 << VIRTIO_BLK_F_RO,
            false => (1 << VIRTIO_BLK_F_DISCARD) | (1 << VIRTIO_BLK_F_WRITE_ZEROES),
        };
        (1 << VIRTIO_BLK_F_SEG_MAX) | (1 << VIRTIO_BLK_F_BLK_SIZE) | (1 << VIRTIO_BLK_F_FLUSH) | access
    }

    fn acked_features(&self, features: u64) {
        self.driver_flushes.store(features & (1 << VIRTIO_BLK_F_FLUSH) != 0, Ordering::Relaxed);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn config(&self) -> Vec<u8> {
        self.config_space().to_vec()
    }

    fn take(&self, queue: &mut Queue) -> Taken<Request> {
        device::take(queue, &self.memory)
    }

    /// A request without room for its status is not executed.
    fn answer(&self, request: Request) -> u32 {
        let memory = request.memory();
        let buffers = |writable| {
            let all = request.clone().filter(|d| d.is_write_only() == writable);
            Buffers(all.map(|d| (d.addr(), d.len() as usize)).collect())
        };
        let (readable, writable) = (buffers(false), buffers(true));
        let Some(data_len) = writable.len().checked_sub(1) else {
            self.complaints.say("a request has no room for its status");
            return 0;
        };
        let (data, status_at) = writable.split(data_len);
        let (written, status) = match self.execute(memory, readable, &data) {
            Ok(written) => (written, VIRTIO_BLK_S_OK),
            Err(failure) => {
                self.complaints.say(with_causes(&failure));
                (0, failure.status())
            }
        };
        let [(status_at, _)] = status_at.0[..] else {
            return 0;
        };
        match memory.write_obj(status as u8, status_at) {
            Ok(()) => written + 1,
            Err(e) => {
                self.complaints.say(format_args!("the status of a request has no valid place: {e}"));
                0
            }
        }
    }
}
