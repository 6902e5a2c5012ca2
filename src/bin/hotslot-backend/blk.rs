//! A disk whose contents are a file or a block device: a VIRTIO block device (id 2) as a vhost-user back-end.
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
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vhost::vhost_user::VhostUserProtocolFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_config,
};
use virtio_queue::Queue;
use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, ReadVolatile,
    VolatileSlice, WriteVolatile,
};

use hotslot::report::{say, with_causes};

use crate::complaints::Complaints;
use crate::device::{self, Device, Memory, Request, Taken};
use crate::error::{Error, MAKE_DISK};
use crate::image::{Image, Open};
use crate::server;

const NAME: &str = "blk";

/// The unit of every address on the disk.
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
const ID_LEN: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Disk whose contents are a regular file or a block device (VIRTIO block)
///
/// The guest sees the file as /dev/vdX, in sectors of 512 bytes; an incomplete sector at its end is left out.
/// A block device keeps its block size.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    server: server::Options,

    /// Regular file or block device that is the disk
    #[arg(long, value_name = "PATH")]
    file: PathBuf,

    /// Let the guest read only; the file needs no write permission
    #[arg(long)]
    read_only: bool,

    /// Let others that are started with --shared or --read-only use the file at the same time. Without it, a
    /// second back-end on a file that one may write is refused. A guest does not learn what another writes: a
    /// file system that two guests mount at a time, one of them for writing, is destroyed, unless it is made
    /// for that
    #[arg(long)]
    shared: bool,

    /// Serial number that the guest sees, 1 to 20 printable ASCII characters [default: the beginning of the
    /// file's name]
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    serial: Option<String>,
}

fn serial(text: &str) -> Result<String, &'static str> {
    let printable = text.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    match text.len() {
        1..=ID_LEN if printable => Ok(text.to_owned()),
        _ => Err("a serial number has 1 to 20 printable ASCII characters"),
    }
}

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a wrong command line or file is found before the socket exists.
pub fn run(args: &Args) -> Result<(), Error> {
    let disk = Disk::open(args)?;
    let listening = server::listen(&args.server)?;
    say(format_args!(
        "{NAME}: {listening}: {:?}, {} sectors, {}",
        args.file,
        disk.sectors,
        disk.image.access()
    ));
    match disk.image.len % SECTOR {
        0 => {}
        rest => say(format_args!(
            "{NAME}: note: the guest does not see the last {rest} bytes of {:?}, no whole sector",
            args.file
        )),
    }
    server::serve(NAME, listening, move |memory, complaints| {
        Ok(Blk { disk: disk.clone(), memory, complaints, driver_flushes: AtomicBool::new(false) })
    })
}

/// The file, and how much of it is the disk.
#[derive(Clone)]
struct Disk {
    image: Arc<Image>,
    sectors: u64,
    /// The answer to `GET_ID`.
    id: [u8; ID_LEN],
}

impl Disk {
    fn open(args: &Args) -> Result<Self, Error> {
        let image = Image::open(Open {
            path: &args.file,
            read_only: args.read_only,
            shared: args.shared,
            create: false,
            block_device: true,
            missing: Some(MAKE_DISK),
        })?;
        let len = image.len;
        if len < SECTOR {
            return Err(Error::TooShort { path: image.path, len, sector: SECTOR });
        }
        let name = args.file.file_name().unwrap_or_default().as_encoded_bytes();
        let text = args.serial.as_ref().map_or(name, |serial| serial.as_bytes());
        let mut id = [0; ID_LEN];
        id.iter_mut().zip(text).for_each(|(to, from)| *to = *from);
        Ok(Disk { image: Arc::new(image), sectors: len / SECTOR, id })
    }

    /// The first byte of a range of the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len.div_ceil(SECTOR));
        if !len.is_multiple_of(SECTOR) || end.is_none_or(|end| end > self.sectors) {
            return Err(Failure::Range { sector, len });
        }
        Ok(sector * SECTOR)
    }
}

/// Why a request fails. The driver gets a status byte, stderr the sentence.
#[derive(Debug, thiserror::Error)]
enum Failure {
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
    #[error("{len} bytes from sector {sector} on are not whole sectors of the disk")]
    Range { sector: u64, len: u64 },
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
    fn status(&self) -> u32 {
        match self {
            Failure::Unsupported(_) | Failure::NotOffered(_) | Failure::Flags { .. } => VIRTIO_BLK_S_UNSUPP,
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

    /// Copies one of the device's, or as much of it as there is room for; returns how much.
    fn write(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut rest = bytes;
        for &(address, len) in &self.0 {
            let (here, behind) = rest.split_at(len.min(rest.len()));
            memory.write_slice(here, address)?;
            rest = behind;
        }
        Ok(bytes.len() - rest.len())
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
        if writes && self.disk.image.read_only {
            return Err(Failure::ReadOnly);
        }
        match kind {
            VIRTIO_BLK_T_IN => {
                self.seek(sector, writable.len())?;
                self.transfer(memory, writable, Permissions::Write, "read", |mut file, slice| {
                    file.read_exact_volatile(slice)
                })?;
                Ok(writable.len() as u32)
            }
            VIRTIO_BLK_T_OUT => {
                self.seek(sector, readable.len())?;
                self.transfer(memory, &readable, Permissions::Read, "write", |mut file, slice| {
                    file.write_all_volatile(slice)
                })?;
                self.written().map(|()| 0)
            }
            VIRTIO_BLK_T_FLUSH => self.flush().map(|()| 0),
            VIRTIO_BLK_T_GET_ID => {
                if writable.len() == 0 {
                    return Err(Failure::Short);
                }
                Ok(writable.write(memory, &self.disk.id)? as u32)
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
        let seek = (&self.disk.image.file).seek(SeekFrom::Start(start));
        seek.map(drop).map_err(|e| self.file_failure("seek in", e))
    }

    /// Reads or writes all of the buffers' bytes, from the file's position on.
    fn transfer(
        &self,
        memory: &GuestMemoryMmap,
        buffers: &Buffers,
        access: Permissions,
        action: &'static str,
        move_all: impl Fn(&File, &mut VolatileSlice) -> Result<(), VolatileError>,
    ) -> Result<(), Failure> {
        for &(address, len) in &buffers.0 {
            for slice in memory.get_slices(address, len, access)? {
                move_all(&self.disk.image.file, &mut slice?).map_err(|e| match e {
                    // A buffer in a shared mapping, past the end of its file.
                    VolatileError::IOError(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                        Failure::Memory(GuestMemoryError::IOError(e))
                    }
                    VolatileError::IOError(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
                        Failure::Cut(self.disk.image.path.clone())
                    }
                    VolatileError::IOError(e) => self.file_failure(action, e),
                    e => Failure::Memory(e.into()),
                })?;
            }
        }
        Ok(())
    }

    /// Discards or zeroes the ranges in the request's data: all of them, or none if one is wrong.
    fn ranges(&self, memory: &GuestMemoryMmap, mut data: Buffers, kind: u32) -> Result<(), Failure> {
        let bytes = data.len();
        if bytes == 0 || !bytes.is_multiple_of(RANGE) || bytes > RANGE * MAX_RANGES as usize {
            return Err(Failure::Ranges { bytes });
        }
        let (action, allowed) = match kind {
            VIRTIO_BLK_T_DISCARD => ("discard in", 0),
            _ => ("zero in", VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP),
        };
        let mut ranges = Vec::new();
        while data.len() > 0 {
            let (range, rest) = data.split(RANGE);
            data = rest;
            let [sector @ .., n0, n1, n2, n3, f0, f1, f2, f3] = range.read::<RANGE>(memory)?;
            let flags = u32::from_le_bytes([f0, f1, f2, f3]);
            if flags & !allowed != 0 {
                return Err(Failure::Flags { flags });
            }
            let count = u32::from_le_bytes([n0, n1, n2, n3]);
            if count > MAX_RANGE {
                return Err(Failure::RangeTooLong(count));
            }
            let len = u64::from(count) * SECTOR;
            let start = self.disk.range(u64::from_le_bytes(sector), len)?;
            ranges.push((start, len, kind == VIRTIO_BLK_T_DISCARD || flags != 0));
        }
        // fallocate(2) refuses a length of 0.
        for (start, len, unmap) in ranges.into_iter().filter(|(_, len, _)| *len > 0) {
            let mode = if unmap { FallocateFlags::PUNCH_HOLE } else { FallocateFlags::ZERO_RANGE };
            let mode = mode | FallocateFlags::KEEP_SIZE;
            let file = &self.disk.image.file;
            match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, start, len)) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP) => return Err(Failure::NotOffered(self.disk.image.path.clone())),
                Err(e) => return Err(self.file_failure(action, e.into())),
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
        self.disk.image.flush().map_err(|e| self.file_failure("flush", e))
    }

    fn file_failure(&self, action: &'static str, source: io::Error) -> Failure {
        Failure::File { action, path: self.disk.image.path.clone(), source }
    }

    /// The configuration space, section 5.2.4.
    fn config_space(&self) -> [u8; size_of::<virtio_blk_config>()] {
        let mut space = [0; size_of::<virtio_blk_config>()];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(offset_of!(virtio_blk_config, capacity), &self.disk.sectors.to_le_bytes());
        let block = self.disk.image.block_size;
        for (at, value) in [
            (offset_of!(virtio_blk_config, seg_max), SEG_MAX),
            (offset_of!(virtio_blk_config, blk_size), block),
            (offset_of!(virtio_blk_config, max_discard_sectors), MAX_RANGE),
            (offset_of!(virtio_blk_config, max_discard_seg), MAX_RANGES),
            (offset_of!(virtio_blk_config, discard_sector_alignment), block / SECTOR as u32),
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
        let access = match self.disk.image.read_only {
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
