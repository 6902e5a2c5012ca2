//! Bytes on the backend channel of a device with real windows: messages well and badly formed, in any splits,
//! with any descriptors; resets and starts between them; files that are cut short, and guests that touch what
//! is missing; a machine that refuses a slot, or does not give one back.
//!
//! The first two bytes choose what was agreed and the quota, the rest is a list of [`Device::step`]s.
//!
//! What must hold, beyond that nothing panics:
//!
//! - The machine is asked only for mappings inside their own window, disjoint, at host addresses that follow
//!   the guest's, and to unmap only what is live (`Machine`; SHM-35, SHM-50).
//! - The bookkeeping is what the machine has; never more than the quota (SHM-48, SHM-49).
//! - Each request that asks for an answer gets one, in order, of the right form (SHM-57 to SHM-63); the
//!   channel ends exactly when the stream is out of step (SHM-64).
//! - A request is granted only if the contract allows it, and while each is answered the mappings are those
//!   granted.
//! - After a reset nothing is mapped (SHM-69, SHM-71), and no file is; after the end no descriptor is left
//!   (SHM-27, SHM-78).

#![no_main]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use hotslot::memory::alloc::WindowAllocator;
use hotslot::memory::shmem::{Limits, SharedMemory};
use hotslot::memory::{Access, GuestMapper, GuestRange, SlotId};
use hotslot::vhost_user::link::{Link, Session};
use hotslot::vhost_user::shmem_handler::{BackendChannel, ShmemHandler};
use hotslot::vhost_user::wire::connection::Deadline;
use hotslot::vhost_user::wire::negotiate::Agreement;
use hotslot::virtio::interrupt::Interrupt;
use hotslot::virtio::register_page::RegisterPage;
use hotslot_fuzz::{Input, descriptors, log_to_nobody};
use hotslot_test_support::bench::{self, PAGE};
use hotslot_test_support::names::*;
use hotslot_test_support::wire::{
    self, Leash, MMap, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, Wire,
};
use libfuzzer_sys::fuzz_target;

/// Region ids, and their pages.
const REGIONS: [(u8, u64); 3] = [(0, 16), (7, 64), (255, 1)];

/// How long a reset may take, which it never does.
const PATIENCE: Duration = Duration::from_secs(20);

fuzz_target!(|data: &[u8]| {
    log_to_nobody();
    let files = files();
    let before = descriptors();
    let mut input = Input::new(data);
    let mut device = Device::new(&mut input);
    while input.has_more() {
        device.step(&mut input, files);
    }
    device.end();
    assert_eq!(descriptors(), before, "a descriptor was kept");
});

/// What a back-end may attach, the same for each input.
struct Files {
    /// Regular files, of [`Files::PAGES`] pages at the start of each input.
    regular: [File; 2],
    all: Vec<OwnedFd>,
}

impl Files {
    const PAGES: u64 = 16;
}

fn files() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    let files = FILES.get_or_init(|| {
        let regular = [0, 1].map(|_| bench::memfd(0));
        let read_only = File::open(format!("/proc/self/fd/{}", regular[0].as_raw_fd()));
        let (socket, _) = UnixDatagram::pair().unwrap();
        let (pipe, _) = Leash::new();
        let all = vec![
            regular[0].try_clone().unwrap().into(),
            regular[1].try_clone().unwrap().into(),
            read_only.unwrap().into(),
            bench::memfd(0).into(),
            File::open("/").unwrap().into(),
            File::open("/dev/zero").unwrap().into(),
            socket.into(),
            pipe,
        ];
        Files { regular, all }
    });
    for file in &files.regular {
        file.set_len(Files::PAGES * PAGE).unwrap();
    }
    files
}

/// How many parts of what [`files`] has are in the process' address space.
fn files_mapped() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:") && !line.contains("hotslot-registers")).count()
}

/// A machine that checks what it is asked for.
#[derive(Default)]
struct Machine(Mutex<Memory>);

#[derive(Default)]
struct Memory {
    windows: Vec<GuestRange>,
    live: BTreeMap<u32, (GuestRange, Access)>,
    /// The ranges of idle slots.
    idle: Vec<GuestRange>,
    slots: u32,
    /// For each window, how far host addresses are from guest addresses.
    distance: BTreeMap<u64, u64>,
    /// The next call fails.
    fail: bool,
}

impl GuestMapper for Machine {
    unsafe fn map(&self, guest: GuestRange, host: *mut u8, access: Access) -> io::Result<SlotId> {
        let mut memory = self.0.lock().unwrap();
        let inside = |window: &&GuestRange| window.start() <= guest.start() && guest.last() <= window.last();
        let window = *memory.windows.iter().find(inside).expect("it is in no window");
        assert!(guest.start().is_multiple_of(PAGE) && guest.len().is_multiple_of(PAGE));
        let others = memory.live.values();
        assert!({ others }.all(|(other, _)| !other.overlaps(&guest)), "{guest:?} overlaps");
        let distance = (host as u64).wrapping_sub(guest.start());
        assert_eq!(*memory.distance.entry(window.start()).or_insert(distance), distance);
        if std::mem::take(&mut memory.fail) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        memory.idle.retain(|idle| !idle.overlaps(&guest));
        memory.slots += 1;
        let slot = memory.slots;
        memory.live.insert(slot, (guest, access));
        Ok(SlotId(slot))
    }

    fn unmap(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut memory = self.0.lock().unwrap();
        assert!(memory.live.contains_key(&slot), "slot {slot} is not live");
        if std::mem::take(&mut memory.fail) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        memory.live.remove(&slot);
        Ok(())
    }

    fn release(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut memory = self.0.lock().unwrap();
        let (guest, _) = memory.live.remove(&slot).expect("it is live");
        memory.idle.push(guest);
        Ok(())
    }

    fn retire(&self, range: GuestRange, most: usize) -> io::Result<usize> {
        let mut memory = self.0.lock().unwrap();
        let (mut left, before) = (most, memory.idle.len());
        memory.idle.retain(|idle| {
            let goes = left > 0 && idle.overlaps(&range);
            left -= usize::from(goes);
            !goes
        });
        Ok(before - memory.idle.len())
    }
}

impl Machine {
    fn was_asked(&self) -> bool {
        !self.0.lock().unwrap().distance.is_empty()
    }

    /// Where something is mapped, in order.
    fn live(&self) -> Vec<(u64, u64, Access)> {
        let memory = self.0.lock().unwrap();
        let live = memory.live.values();
        let mut live: Vec<_> = live.map(|(guest, access)| (guest.start(), guest.len(), *access)).collect();
        live.sort_by_key(|&(start, ..)| start);
        live
    }
}

/// A whole message as the back-end sent it.
struct Request {
    id: u32,
    flags: u32,
    payload: Vec<u8>,
    /// Begun before the last reset.
    stale: bool,
}

/// Our side: a device's channel and its shared memory. Their side: the stream so far, and what was answered.
struct Device {
    machine: Arc<Machine>,
    shmem: Arc<SharedMemory>,
    channel: BackendChannel,
    peer: UnixStream,
    agreed: u64,
    quota: usize,
    /// Sent, and not yet a whole message.
    begun: Vec<u8>,
    begun_before_reset: bool,
    started: bool,
    ended: bool,
    hung_up: bool,
    /// Where the guest sees what was granted, and how it was asked for.
    granted: BTreeMap<(u8, u64), (u64, Access)>,
    /// Something was asked for without an answer: what was granted is not known until the next reset.
    blind: bool,
}

impl Device {
    fn new(input: &mut Input) -> Device {
        let settings = input.byte();
        let agreed = input.pick(&[
            PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM | PROTOCOL_F_REPLY_ACK,
            PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM,
            PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_REPLY_ACK,
        ]);
        let quota = [4096, 1, 3, 8][usize::from(settings % 4)];
        let limits = Limits { mappings: quota, bytes: u64::MAX, foreign_files: false, prefault: false };
        let machine = Arc::<Machine>::default();
        let sizes = REGIONS.map(|(shmid, pages)| (shmid, pages * PAGE));
        let mut windows = WindowAllocator::new(1 << 32, 1 << 40);
        let shmem =
            SharedMemory::new("fuzz", sizes, &mut windows, Arc::clone(&machine) as _, limits).unwrap();
        let shmem = Arc::new(shmem);
        machine.0.lock().unwrap().windows = shmem.regions().into_iter().map(|(_, range)| range).collect();
        let (ours, peer) = UnixStream::pair().unwrap();
        peer.set_nonblocking(true).unwrap();
        let (main, _) = UnixStream::pair().unwrap();
        let interrupt = Interrupt::new(RegisterPage::new().unwrap()).unwrap();
        let session = Session::new(Arc::new(main), None);
        let link = Link::new("fuzz", interrupt, Arc::clone(&shmem), session, None, None, None);
        Device {
            channel: BackendChannel::new(
                &agreement(agreed),
                ours,
                ShmemHandler::new(link, Arc::clone(&shmem), None, Arc::default()),
                None,
            ),
            machine,
            shmem,
            peer,
            agreed,
            quota,
            begun: Vec::new(),
            begun_before_reset: false,
            started: true,
            ended: false,
            hung_up: false,
            granted: BTreeMap::new(),
            blind: false,
        }
    }

    /// One of the things that can happen. Nothing happens to a channel that has ended, but the rest goes on.
    fn step(&mut self, input: &mut Input, files: &Files) {
        let what = input.byte();
        match what % 13 {
            0..6 => self.send_request(input, files),
            6 => {
                let len = usize::from(input.byte());
                let bytes = input.bytes(len);
                self.send(&bytes, &attached(input.byte(), files));
            }
            7 => self.reset(),
            8 => {
                self.shmem.open_gate();
                self.started = true;
            }
            9 => {
                let file = &files.regular[usize::from(input.byte()) % 2];
                file.set_len(u64::from(input.byte() % 32) * PAGE).unwrap();
            }
            10 => {
                let window =
                    self.machine.0.lock().unwrap().windows[usize::from(input.byte()) % REGIONS.len()];
                let access = [Access::ReadOnly, Access::ReadWrite][usize::from(input.byte()) % 2];
                self.shmem.provide(window.start().saturating_add(input.offset()), access);
            }
            11 => self.machine.0.lock().unwrap().fail = true,
            _ => self.hang_up(),
        }
        // Otherwise more is sent before anybody looks.
        if what & 0x80 == 0 {
            self.serve();
        }
        self.check();
    }

    /// A request that is mostly well formed, in one part or in two, between which it may be served.
    fn send_request(&mut self, input: &mut Input, files: &Files) {
        let form = input.byte();
        let id = [SHMEM_MAP, SHMEM_UNMAP, SHMEM_MAP, u32::from(form)][usize::from(form % 4)];
        let flags = match form >> 4 {
            0..12 => VERSION_1 | NEED_REPLY,
            12..15 => VERSION_1,
            _ => input.word(),
        };
        let request = MMap {
            shmid: input.pick(&[0, 7, 255, 1]),
            padding: [form; 7],
            fd_offset: input.offset(),
            shm_offset: input.offset(),
            len: input.offset(),
            flags: match input.byte() {
                flags @ ..0xf0 => u64::from(flags % 2),
                _ => input.quad(),
            },
        };
        let fds = attached(input.byte(), files);
        let mut bytes = wire::message(id, flags, &request.bytes());
        if form & 0x0c == 0x0c {
            // Another size, said or not.
            let size = input.byte();
            bytes.resize(usize::from(size).max(1), 0);
            if size.is_multiple_of(2) && bytes.len() >= 12 {
                let payload = bytes.len() as u32 - 12;
                bytes[8..12].copy_from_slice(&payload.to_ne_bytes());
            }
        }
        let (first, second) = bytes.split_at(usize::from(input.byte()) % bytes.len());
        if first.is_empty() {
            return self.send(second, &fds);
        }
        let with_first = input.byte();
        self.send(first, if with_first & 1 == 0 { &[] } else { &fds });
        if with_first & 2 == 0 {
            self.serve();
        }
        self.send(second, if with_first & 1 == 0 { &fds } else { &[] });
    }

    fn send(&mut self, bytes: &[u8], fds: &[RawFd]) {
        if bytes.is_empty() || self.hung_up || self.ended {
            return;
        }
        let peer = Wire::new(self.peer.try_clone().unwrap());
        match peer.send_with(bytes, fds) {
            Ok(()) => self.begun.extend(bytes),
            // Too much was sent before anybody looked, or too many descriptors.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::ETOOMANYREFS)) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn hang_up(&mut self) {
        if !self.ended {
            self.hung_up = true;
            self.peer.shutdown(Shutdown::Write).unwrap();
        }
    }

    /// What the device's thread does.
    fn serve(&mut self) {
        while !self.ended && is_readable(self.channel.socket()) {
            self.ended = self.channel.serve().is_err();
        }
        self.look_at_answers(true);
    }

    /// What the device does when the driver writes 0 to Status.
    fn reset(&mut self) {
        self.shmem.close_gate();
        self.started = false;
        let drained = self.channel.drain(Deadline::after(PATIENCE));
        if !self.ended {
            self.ended = drained.is_err();
            self.look_at_answers(false);
            self.begun_before_reset = !self.begun.is_empty();
        }
        let fails = self.machine.0.lock().unwrap().fail;
        let result = self.shmem.unmap_all(|| {});
        assert!(result.is_ok() || fails);
        if result.is_ok() {
            assert!(!self.shmem.has_mappings() && self.machine.live().is_empty());
            self.granted.clear();
            self.blind = false;
        } else {
            self.blind = true;
        }
    }

    /// Compares what was sent with what came back. A hang-up is only seen when somebody reads (`all_read`).
    fn look_at_answers(&mut self, all_read: bool) {
        let mut answers = Vec::new();
        match (&self.peer).read_to_end(&mut answers) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // That is how an end with unread bytes in it looks.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            result => drop(result.unwrap()),
        }
        let mut answers = answers.as_slice();
        let out_of_step = loop {
            match self.next_request() {
                Ok(Some(request)) => self.judge(&request, &mut answers),
                Ok(None) => break false,
                Err(OutOfStep) => break true,
            }
        };
        assert!(answers.is_empty(), "answers that nobody asked for: {answers:x?}");
        let ends = out_of_step || self.hung_up && all_read;
        assert!(self.ended || !ends, "the channel goes on, out of step or after its end");
        assert!(ends || self.hung_up || !self.ended, "the channel ended for no reason");
    }

    fn next_request(&mut self) -> Result<Option<Request>, OutOfStep> {
        let Some((header, rest)) = self.begun.split_at_checked(12) else {
            return Ok(None);
        };
        let field = |index: usize| u32::from_ne_bytes(header[4 * index..][..4].try_into().unwrap());
        let [id, flags, size] = [0, 1, 2].map(field);
        if flags & 3 != 1 || size > 4096 {
            return Err(OutOfStep);
        }
        let Some(payload) = rest.get(..size as usize) else {
            return Ok(None);
        };
        if flags & REPLY != 0 {
            return Err(OutOfStep);
        }
        let payload = payload.to_vec();
        self.begun.drain(..12 + payload.len());
        Ok(Some(Request { id, flags, payload, stale: std::mem::take(&mut self.begun_before_reset) }))
    }

    fn judge(&mut self, request: &Request, answers: &mut &[u8]) {
        if self.agreed & PROTOCOL_F_REPLY_ACK == 0 || request.flags & NEED_REPLY == 0 {
            self.blind |= request.id == SHMEM_MAP || request.id == SHMEM_UNMAP;
            return;
        }
        let (answer, rest) = answers.split_at_checked(20).expect("there is no answer");
        *answers = rest;
        let value = i64::from_ne_bytes(answer[12..].try_into().unwrap());
        assert_eq!(answer[..12], wire::words([request.id, VERSION_1 | REPLY, 8]));
        assert!((-4095..=0).contains(&value), "{value} is neither 0 nor -errno");
        if value == 0 {
            self.granted(request).expect("it should have been refused");
        }
    }

    /// What a request does that was granted; why it should not have been.
    fn granted(&mut self, request: &Request) -> Result<(), &'static str> {
        let payload: &[u8; 40] = request.payload.as_slice().try_into().map_err(|_| "size")?;
        let field = |index: usize| u64::from_ne_bytes(payload[8 * index..][..8].try_into().unwrap());
        let [fd_offset, shm_offset, len, flags] = [1, 2, 3, 4].map(field);
        let shmid = payload[0];
        let (_, pages) = REGIONS.into_iter().find(|region| region.0 == shmid).ok_or("no such region")?;
        if request.stale || self.agreed & PROTOCOL_F_SHMEM == 0 {
            return Err("nothing is granted now");
        }
        let end = shm_offset.checked_add(len).ok_or("overflow")?;
        if request.id == SHMEM_UNMAP {
            if self.blind {
                return Ok(());
            }
            let found = self.granted.remove(&(shmid, shm_offset));
            return found.filter(|mapping| mapping.0 == len).map(drop).ok_or("no such mapping");
        }
        let file_end = fd_offset.checked_add(len).ok_or("overflow in the file")?;
        for (holds, otherwise) in [
            (request.id == SHMEM_MAP, "unknown request"),
            (self.started, "the device is reset"),
            (len > 0, "empty"),
            (shm_offset % PAGE == 0 && fd_offset % PAGE == 0, "unaligned"),
            (end <= pages * PAGE, "out of bounds"),
            (i64::try_from(file_end).is_ok(), "beyond what a file can have"),
            (flags <= 1, "unknown flags"),
        ] {
            holds.then_some(()).ok_or(otherwise)?;
        }
        let access = [Access::ReadOnly, Access::ReadWrite][flags as usize];
        self.granted.insert((shmid, shm_offset), (len, access));
        Ok(())
    }

    /// The bookkeeping is what the machine has; and that is what was granted, where all was answered.
    fn check(&self) {
        let live = self.machine.live();
        let booked = self.shmem.mappings();
        let mut booked: Vec<_> = booked
            .iter()
            .map(|mapping| (mapping.guest.start(), mapping.guest.len(), mapping.access))
            .collect();
        booked.sort_by_key(|&(start, ..)| start);
        assert_eq!(booked, live);
        assert_eq!(self.shmem.has_mappings(), !live.is_empty());
        assert!(live.len() <= self.quota, "{} mappings", live.len());
        if self.blind {
            return;
        }
        let mut granted: Vec<_> = self
            .granted
            .iter()
            .map(|(&(shmid, offset), &(len, access))| {
                let start = self.shmem.region(shmid).unwrap().start() + offset;
                (start, len.next_multiple_of(PAGE), access)
            })
            .collect();
        granted.sort_by_key(|&(start, ..)| start);
        assert_eq!(granted, live);
    }

    /// A reset, after which all is served and nothing fails, and the end of the device.
    fn end(mut self) {
        self.serve();
        self.machine.0.lock().unwrap().fail = false;
        self.reset();
        // It takes a while, and not all inputs get there.
        if self.machine.was_asked() {
            assert_eq!(files_mapped(), 0, "a file is still mapped");
        }
        drop(self.channel);
        drop(self.shmem);
        assert!(self.machine.live().is_empty());
    }
}

/// After this no message can be found in the stream (SHM-64).
struct OutOfStep;

fn agreement(protocol_features: u64) -> Agreement {
    Agreement {
        protocol_features: Some(protocol_features),
        shmem: protocol_features & PROTOCOL_F_SHMEM != 0,
        ..Agreement::default()
    }
}

/// How many descriptors, and which of [`files`] is the first.
fn attached(choice: u8, files: &Files) -> Vec<RawFd> {
    let count = [0, 1, 1, 2, 3, 17, 130, 253][usize::from(choice >> 4 & 7)];
    let all = files.all.iter().cycle().skip(usize::from(choice % 8));
    all.take(count).map(AsRawFd::as_raw_fd).collect()
}

fn is_readable(socket: &impl AsFd) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, on our stack.
    unsafe { libc::poll(&mut poll, 1, 0) == 1 }
}
