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

mod args;
mod buffers;
mod disk;
mod failure;
mod limits;
mod resize;
mod sockets;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vhost::vhost_user::{Backend, VhostUserProtocolFeatures};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_OK, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP, virtio_blk_config,
};
use virtio_queue::Queue;
use vm_memory::volatile_memory::Error as VolatileError;
use vm_memory::{
    Bytes, GuestMemory, GuestMemoryError, GuestMemoryMmap, Permissions, ReadVolatile, VolatileSlice,
    WriteVolatile,
};

use hotslot::report::{say, with_causes};

pub use args::Args;
use buffers::Buffers;
use disk::Disk;
use failure::Failure;
use limits::{MAX_RANGE, MAX_RANGES, NAME, SECTOR, SEG_MAX, THREADS};
use resize::Told;

use crate::complaints::Complaints;
use crate::device::{self, Device, Request};
use crate::error::Error;
use crate::inflight::Kept;
use crate::lock::lock;
use crate::ring::{Memory, Taken};
use crate::{sandbox, server};

/// The field `writeback`, as the standard calls it.
const WRITEBACK: usize = offset_of!(virtio_blk_config, wce);
/// Its values, as they are kept; 0 is the default.
const KEPT_WRITETHROUGH: u8 = 1;
const KEPT_WRITEBACK: u8 = 2;

/// `struct virtio_blk_req`: type, reserved, sector; then data, then the status byte. Section 5.2.6.
const HEADER: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`: sector, number of sectors, flags.
const RANGE: usize = 16;

/// Runs the back-end until it is told to end.
///
/// # Errors
///
/// See [`Error`]; a wrong command line or file is found before the socket exists.
pub fn run(args: &Args) -> Result<(), Error> {
    let disk = Arc::new(Disk::open(args)?);
    let listening = server::listen(&args.server)?;
    say(format_args!(
        "{NAME}: {listening}: {:?}, {} sectors, {}",
        args.file,
        disk.sectors(),
        disk.image.access()
    ));
    match disk.image.len % u64::from(disk.block) {
        0 => {}
        rest => say(format_args!(
            "{NAME}: note: the guest does not see the last {rest} bytes of {:?}, less than a block of {}",
            args.file, disk.block
        )),
    }
    server::serve(NAME, listening, sandbox::blk, move |memory, complaints| {
        Ok(Blk {
            disk: Arc::clone(&disk),
            memory,
            complaints,
            features: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            kept: Mutex::default(),
            told: Arc::default(),
        })
    })
}

/// The device, for one front-end.
struct Blk {
    disk: Arc<Disk>,
    memory: Memory,
    complaints: Arc<Complaints>,
    /// What the driver accepted.
    features: AtomicU64,
    /// The field `writeback`. A reset leaves it as it is: a front-end may show the next driver what the last
    /// one wrote, and a driver that reads 0 sends no flushes.
    writeback: AtomicBool,
    /// Where that field outlives this process. Innermost lock.
    kept: Mutex<Option<Kept>>,
    told: Arc<Told>,
}

impl Blk {
    fn has(&self, feature: u32) -> bool {
        self.features.load(Ordering::Relaxed) & (1 << feature) != 0
    }

    fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
        if let Some(kept) = &*lock(&self.kept) {
            kept.set(if writeback { KEPT_WRITEBACK } else { KEPT_WRITETHROUGH });
        }
    }

    /// Returns how many bytes of `writable` were written.
    fn execute(
        &self,
        thread: usize,
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
                let file = self.seek(thread, sector, writable.len())?;
                self.transfer(file, memory, writable, Permissions::Write, "read", |mut file, slice| {
                    file.read_exact_volatile(slice)
                })?;
                Ok(writable.len() as u32)
            }
            VIRTIO_BLK_T_OUT => {
                let file = self.seek(thread, sector, readable.len())?;
                self.transfer(file, memory, &readable, Permissions::Read, "write", |mut file, slice| {
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

    /// The thread's file, at this position.
    fn seek(&self, thread: usize, sector: u64, len: usize) -> Result<&File, Failure> {
        let start = self.disk.range(sector, len as u64)?;
        let mut file = self.disk.file(thread);
        file.seek(SeekFrom::Start(start)).map_err(|e| self.file_failure("seek in", e))?;
        Ok(file)
    }

    /// Reads or writes all of the buffers' bytes, from the file's position on.
    fn transfer(
        &self,
        file: &File,
        memory: &GuestMemoryMmap,
        buffers: &Buffers,
        access: Permissions,
        action: &'static str,
        move_all: impl Fn(&File, &mut VolatileSlice) -> Result<(), VolatileError>,
    ) -> Result<(), Failure> {
        for &(address, len) in &buffers.0 {
            for slice in memory.get_slices(address, len, access)? {
                move_all(file, &mut slice?).map_err(|e| match e {
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

    /// The file was changed: makes it durable, unless the driver flushes (section 5.2.6.2, what a write is
    /// stable after). There is no FUA: a driver writes and then flushes.
    fn written(&self) -> Result<(), Failure> {
        let writeback = match self.has(VIRTIO_BLK_F_CONFIG_WCE) {
            true => self.writeback.load(Ordering::Relaxed),
            false => self.has(VIRTIO_BLK_F_FLUSH),
        };
        if writeback { Ok(()) } else { self.flush() }
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
        let Disk { block, physical_block, .. } = *self.disk;
        put(offset_of!(virtio_blk_config, capacity), &self.disk.sectors().to_le_bytes());
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
        // Both are powers of two: logical blocks in a physical one, as an exponent and as the best unit.
        let blocks = physical_block / block;
        put(offset_of!(virtio_blk_config, physical_block_exp), &[blocks.ilog2() as u8]);
        put(offset_of!(virtio_blk_config, min_io_size), &(blocks as u16).to_le_bytes());
        put(WRITEBACK, &[self.writeback.load(Ordering::Relaxed).into()]);
        put(offset_of!(virtio_blk_config, num_queues), &self.disk.queues.to_le_bytes());
        put(offset_of!(virtio_blk_config, write_zeroes_may_unmap), &[1]);
        space
    }
}

impl Device for Blk {
    type Request = Request;

    fn features(&self) -> u64 {
        let mut features =
            vec![VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_FLUSH];
        match self.disk.image.read_only {
            true => features.push(VIRTIO_BLK_F_RO),
            false => {
                features.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES])
            }
        }
        if self.disk.queues > 1 {
            features.push(VIRTIO_BLK_F_MQ);
        }
        features.iter().fold(0, |all, feature| all | 1 << feature)
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Relaxed);
        if self.has(VIRTIO_BLK_F_CONFIG_WCE) && !self.has(VIRTIO_BLK_F_FLUSH) {
            self.set_writeback(false);
        }
    }

    fn queues(&self) -> u16 {
        self.disk.queues
    }

    fn threads(&self) -> usize {
        THREADS
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // GET_PROTOCOL_FEATURES comes before the configuration space is read, and before there is a channel.
        self.told.begin(&self.disk);
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS | VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn connect(&self, backend: Backend) {
        if let Err(e) = self.told.channel(backend, &self.disk) {
            say(format_args!("{NAME}: note: the guest will not be told when the disk's size changes: {e}"));
        }
    }

    fn config(&self) -> Vec<u8> {
        self.told.reads_config.store(true, Ordering::Relaxed);
        self.config_space().to_vec()
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) {
        match bytes {
            [value @ (0 | 1)] if offset as usize == WRITEBACK && self.has(VIRTIO_BLK_F_CONFIG_WCE) => {
                self.set_writeback(*value == 1);
            }
            _ => self.complaints.say(format_args!(
                "the driver writes {} bytes at {offset:#x} of the configuration space; only 0 or 1 in the field \
                 writeback is allowed, where CONFIG_WCE was accepted",
                bytes.len()
            )),
        }
    }

    fn keep(&self, kept: Kept) {
        match kept.get() {
            KEPT_WRITETHROUGH => self.writeback.store(false, Ordering::Relaxed),
            KEPT_WRITEBACK => self.writeback.store(true, Ordering::Relaxed),
            _ => {}
        }
        *lock(&self.kept) = Some(kept);
    }

    fn take(&self, queue: &mut Queue) -> Taken<Request> {
        device::take(queue, &self.memory)
    }

    /// A request without room for its status is not executed.
    fn answer(&self, thread: usize, request: Request) -> u32 {
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
        let (written, status) = match self.execute(thread, memory, readable, &data) {
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
