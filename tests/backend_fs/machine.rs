//! A running back-end, a front-end, and the guest behind it, whose queues are made by hand.

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

pub use hotslot_test_support::files::{MIB, memfd};
use hotslot_test_support::names::*;
use hotslot_test_support::program::{self, Backend};
use hotslot_test_support::wait::eventually;
pub use hotslot_test_support::wire::{MMap, Message, SHMEM_MAP, SHMEM_UNMAP, Wire};
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::fuse;

// ---------------------------------------------------------------------------------------- the program

/// A directory with the shared directory `dir` in it, and `outside`, which nobody may reach from there.
pub struct Place {
    pub top: TempDir,
}

pub const SECRET: &str = "a secret";

impl Place {
    pub fn new() -> Self {
        let top = program::directory();
        fs::create_dir(top.path().join("dir")).unwrap();
        fs::create_dir(top.path().join("outside")).unwrap();
        fs::write(top.path().join("outside/secret"), SECRET).unwrap();
        Place { top }
    }

    /// A path in the shared directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.top.path().join("dir").join(name)
    }

    pub fn outside(&self) -> PathBuf {
        self.top.path().join("outside")
    }

    pub fn write(&self, name: &str, data: impl AsRef<[u8]>) {
        fs::write(self.path(name), data).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }
}

/// Starts the program, and waits until it listens.
pub fn start(place: &Place, args: &str) -> Backend {
    start_as(place, args, None)
}

/// The same, as that user if one is named.
pub fn start_as(place: &Place, args: &str, user: Option<u32>) -> Backend {
    let mut command = program::command("fs", &place.top);
    command.args(["--dir", "dir"]).args(args.split_whitespace());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    Backend::spawn(command, &place.top)
}

/// The same, with at most so many descriptors.
pub fn start_with(descriptors: u32, place: &Place, args: &str, user: Option<u32>) -> Backend {
    let unlimited = program::command("fs", &place.top);
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"")]);
    command.arg(unlimited.get_program()).args(unlimited.get_args());
    command.current_dir(place.top.path()).args(["--dir", "dir"]).args(args.split_whitespace());
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    Backend::spawn(command, &place.top)
}

// -------------------------------------------------------------------------------------- the front-end

/// SHMEM_MAP or SHMEM_UNMAP, offset in the window, length, offset in the file, flags; of region 0.
pub fn fields(asked: &Message) -> (u32, u64, u64, u64, u64) {
    let MMap { shmid, padding, fd_offset, shm_offset, len, flags } = asked.mmap();
    assert_eq!((shmid, padding), (0, [0; 7]));
    assert_eq!(asked.fds.len(), usize::from(asked.request == SHMEM_MAP), "a descriptor");
    (asked.request, shm_offset, len, fd_offset, flags)
}

/// Where the front-end claims to have the guest's memory; only the differences matter.
const USER_ADDRESS: u64 = 0x7000_0000_0000;
pub const RAM: u64 = 8 * MIB;
pub const QUEUE_SIZE: u16 = 16;
/// Each queue has a part of the memory of this size: descriptors, available and used ring, an indirect table,
/// and the buffers of requests.
const PART: u64 = 2 * MIB;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
pub const INDIRECT: u64 = 0x3000;
pub const REQUEST: u64 = 0x10_000;
pub const ANSWER: u64 = 0x14_0000;
pub const ANSWER_LEN: u32 = 0xc_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const TABLE: u16 = 4;

/// Address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

struct Ring {
    kick: EventFd,
    call: EventFd,
    avail: u16,
    used: u16,
}

/// A front-end and the guest behind it. Queue 0 is the high priority queue.
pub struct Machine {
    pub front_end: Frontend,
    pub channel: Wire,
    ram_file: File,
    ram: GuestMemoryMmap,
    rings: Vec<Ring>,
    /// The window's guest address and size, if the back-end is told at the start.
    window: Option<(u64, u64)>,
    /// The guest's user.
    pub user: (u32, u32),
    /// The number of the request.
    pub unique: u64,
    /// The rings stand where the used index says, not where the driver does.
    pub goes_on: bool,
}

fn region((address, len): (u64, u64), file: &File, offset: u64) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: address,
        memory_size: len,
        userspace_addr: USER_ADDRESS + address,
        mmap_offset: offset,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Error number, 0 for none, and what follows the header.
pub type Answer = (i32, Vec<u8>);

impl Machine {
    /// A front-end whose guest has mounted the file system; with two queues.
    pub fn mounted(backend: &Backend) -> Self {
        let mut machine = Self::connect(backend, 2);
        machine.start();
        machine.ok(fuse::INIT, 0, &fuse::init());
        machine
    }

    /// The same, and the back-end is told where the window is.
    pub fn told(backend: &Backend, window: (u64, u64)) -> Self {
        let mut machine = Self::connect(backend, 2);
        machine.window = Some(window);
        machine.start();
        machine.ok(fuse::INIT, 0, &fuse::init());
        machine
    }

    /// The back-end has died, and this one has taken its place: connects to it and goes on, without a
    /// FUSE_INIT. Its questions on the channel are not served yet.
    pub fn reconnect(&mut self, backend: &Backend) {
        self.reconnect_and_serve(backend, 0);
    }

    /// The same, and serves so many questions on the channel meanwhile, slowly. Returns those that the
    /// back-end had asked when it gave the last answer that a start takes.
    pub fn reconnect_and_serve(&mut self, backend: &Backend, count: usize) -> Vec<Message> {
        // The back-end serves one connection at a time.
        self.front_end = Frontend::from_stream(UnixStream::pair().unwrap().0, 1);
        (self.front_end, self.channel) = Self::negotiate(backend, self.rings.len());
        let channel = self.channel.try_clone();
        let answered = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&answered);
        let serve = move |_| {
            let asked = channel.receive().unwrap();
            thread::sleep(Duration::from_millis(50));
            counts.fetch_add(1, Ordering::SeqCst);
            channel.reply(&asked, 0);
            asked
        };
        let served = thread::spawn(move || (0..count).map(serve).collect::<Vec<_>>());
        self.goes_on = true;
        self.start();
        self.goes_on = false;
        let in_time = answered.load(Ordering::SeqCst);
        served.join().unwrap().into_iter().take(in_time).collect()
    }

    /// As if the last request of a queue were not answered.
    pub fn take_answer_back(&mut self, queue: usize) {
        let used = self.used_index(queue).wrapping_sub(1);
        self.put(self.address(queue, USED + 2), &used.to_le_bytes());
        self.rings[queue].used = used;
        self.put(self.address(queue, ANSWER), &[0xee; 256]);
    }

    fn negotiate(backend: &Backend, queues: usize) -> (Frontend, Wire) {
        let mut front_end = Frontend::from_stream(backend.connect(), queues as u64);
        front_end.set_owner().unwrap();
        front_end.get_features().unwrap();
        let offered = front_end.get_protocol_features().unwrap();
        let wanted = PROTOCOL_F_MQ
            | PROTOCOL_F_REPLY_ACK
            | PROTOCOL_F_BACKEND_REQ
            | PROTOCOL_F_CONFIG
            | PROTOCOL_F_RESET_DEVICE
            | PROTOCOL_F_CONFIGURE_MEM_SLOTS
            | PROTOCOL_F_SHMEM
            | PROTOCOL_F_SHMEM_ADDRESSES;
        let agreed = offered & VhostUserProtocolFeatures::from_bits_retain(wanted);
        front_end.set_protocol_features(agreed).unwrap();
        front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let (ours, theirs) = UnixStream::pair().unwrap();
        if agreed.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            front_end.set_backend_request_fd(&theirs).unwrap();
        }
        (front_end, Wire::new(ours))
    }

    pub fn connect(backend: &Backend, queues: usize) -> Self {
        let (front_end, channel) = Self::negotiate(backend, queues);
        let ram_file = tempfile::tempfile().unwrap();
        ram_file.set_len(RAM).unwrap();
        let range = (GuestAddress(0), RAM as usize, Some(FileOffset::new(ram_file.try_clone().unwrap(), 0)));
        let ram = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();
        let ring = |_| Ring {
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            avail: 0,
            used: 0,
        };
        Machine {
            front_end,
            channel,
            ram_file,
            ram,
            rings: (0..queues).map(ring).collect(),
            window: None,
            user: (0, 0),
            unique: fuse::UNIQUE,
            goes_on: false,
        }
    }

    /// The driver starts the device.
    pub fn start(&mut self) {
        self.front_end.set_features(VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: USER_ADDRESS,
            mmap_offset: 0,
            mmap_handle: self.ram_file.as_raw_fd(),
        };
        self.front_end.set_mem_table(&[region]).unwrap();
        if let Some(window) = self.window {
            // SHM-82
            let file = memfd(window.1);
            file.set_permissions(Permissions::from_mode(0o0)).unwrap();
            self.add_memory(window, &file, 0);
        }
        for (index, ring) in self.rings.iter().enumerate() {
            let base = USER_ADDRESS + index as u64 * PART;
            let config = VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: base,
                used_ring_addr: base + USED,
                avail_ring_addr: base + AVAIL,
                log_addr: None,
            };
            self.front_end.set_vring_num(index, QUEUE_SIZE).unwrap();
            self.front_end.set_vring_addr(index, &config).unwrap();
            let stands = if self.goes_on { self.used_index(index) } else { ring.avail };
            self.front_end.set_vring_base(index, stands).unwrap();
            self.front_end.set_vring_call(index, &ring.call).unwrap();
            self.front_end.set_vring_kick(index, &ring.kick).unwrap();
            self.front_end.set_vring_enable(index, true).unwrap();
        }
    }

    /// ADD_MEM_REG of a guest address and length, in a file at an offset.
    pub fn add_memory(&mut self, range: (u64, u64), file: &File, offset: u64) {
        self.front_end.add_mem_region(&region(range, file, offset)).unwrap();
    }

    /// REM_MEM_REG.
    pub fn remove_memory(&mut self, range: (u64, u64), file: &File, offset: u64) {
        self.front_end.remove_mem_region(&region(range, file, offset)).unwrap();
    }

    /// The status is zeroed: the rings are stopped and the device is reset.
    pub fn reset(&mut self) {
        for index in 0..self.rings.len() {
            self.front_end.get_vring_base(index).unwrap();
        }
        self.front_end.reset_device().unwrap();
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let base = GuestAddress(index as u64 * PART);
            self.ram.write_slice(&[0; INDIRECT as usize], base).unwrap();
            (ring.avail, ring.used) = (0, 0);
        }
    }

    /// Writes a descriptor of a table at an address of the queue's part.
    pub fn descriptor(&self, queue: usize, table: u64, index: u16, descriptor: Descriptor) {
        let (address, len, flags, next) = descriptor;
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = queue as u64 * PART + table + 16 * u64::from(index);
        self.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// An address of the queue's part, as the guest says it.
    pub fn address(&self, queue: usize, offset: u64) -> u64 {
        queue as u64 * PART + offset
    }

    /// Puts bytes anywhere into the guest's memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    /// What is anywhere in the guest's memory.
    pub fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Puts a request into its buffer, and nothing into the answer's.
    pub fn fill(&self, queue: usize, request: &[u8]) {
        let at = |offset| GuestAddress(self.address(queue, offset));
        self.ram.write_slice(request, at(REQUEST)).unwrap();
        self.ram.write_slice(&[0xee; 16], at(ANSWER)).unwrap();
    }

    /// Makes the chain that starts at descriptor `head` available, and notifies.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let base = queue as u64 * PART + AVAIL;
        let slot = base + 4 + 2 * u64::from(ring.avail % QUEUE_SIZE);
        self.ram.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        self.ram.write_obj(ring.avail, GuestAddress(base + 2)).unwrap();
        ring.kick.write(1).unwrap();
    }

    fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.address(queue, USED + 2));
        self.ram.read_obj(at).unwrap()
    }

    pub fn is_used(&self, queue: usize) -> bool {
        self.used_index(queue) != self.rings[queue].used
    }

    /// A buffer comes back: its head, and how many bytes were written.
    pub fn await_used(&mut self, queue: usize) -> (u32, u32) {
        // Most come at once, and some tests send thousands of requests.
        let _ = (0..1000).find(|_| {
            thread::yield_now();
            self.is_used(queue)
        });
        eventually("a used buffer", || self.is_used(queue));
        let ring = &mut self.rings[queue];
        eventually("a call", || ring.call.read().is_ok());
        let slot = u64::from(ring.used % QUEUE_SIZE);
        ring.used = ring.used.wrapping_add(1);
        let at = GuestAddress(self.address(queue, USED + 4 + 8 * slot));
        let [head, written]: [u32; 2] = self.ram.read_obj(at).unwrap();
        (head, written)
    }

    /// What is in the answer's buffer.
    pub fn answer(&self, queue: usize, written: u32) -> Answer {
        let mut bytes = vec![0; written as usize];
        let at = GuestAddress(self.address(queue, ANSWER));
        self.ram.read_slice(&mut bytes, at).unwrap();
        assert!(bytes.len() >= 16, "{written} bytes are no answer");
        assert_eq!(fuse::u32_at(&bytes, 0), written, "the length in the header");
        assert_eq!(fuse::u64_at(&bytes, 8), self.unique);
        (-(fuse::u32_at(&bytes, 4) as i32), bytes[16..].to_vec())
    }

    /// Makes a chain of buffers available: address, length, and whether it is [`WRITE`].
    pub fn offer_chain(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) {
        for (index, &(address, len, flags)) in buffers.iter().enumerate() {
            let next = index as u16 + 1;
            let more = if usize::from(next) < buffers.len() { NEXT } else { 0 };
            self.descriptor(queue, 0, index as u16, (address, len, flags | more, next));
        }
        self.offer(queue, 0);
    }

    /// Sends a request as Linux does: one readable descriptor, one writable one.
    pub fn send(&mut self, queue: usize, opcode: u32, node: u64, body: &[u8]) {
        let mut request = fuse::request(opcode, node, self.user, body);
        request[8..16].copy_from_slice(&self.unique.to_le_bytes());
        self.fill(queue, &request);
        self.send_filled(queue, request.len() as u32);
    }

    /// The same, with whatever is in the buffer.
    pub fn send_filled(&mut self, queue: usize, len: u32) {
        let [request, answer] = [REQUEST, ANSWER].map(|offset| self.address(queue, offset));
        self.descriptor(queue, 0, 0, (request, len, NEXT, 1));
        self.descriptor(queue, 0, 1, (answer, ANSWER_LEN, WRITE, 0));
        self.offer(queue, 0);
    }

    /// A request and its answer.
    pub fn ask(&mut self, opcode: u32, node: u64, body: &[u8]) -> Answer {
        self.send(1, opcode, node, body);
        self.finish()
    }

    /// The answer to what was sent.
    pub fn finish(&mut self) -> Answer {
        let (head, written) = self.await_used(1);
        assert_eq!(head, 0);
        self.answer(1, written)
    }

    /// What a request that succeeds is answered.
    #[track_caller]
    pub fn ok(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let (error, answer) = self.ask(opcode, node, body);
        assert_eq!(error, 0, "opcode {opcode}");
        answer
    }

    /// The error of a request that fails.
    pub fn error(&mut self, opcode: u32, node: u64, body: &[u8]) -> i32 {
        self.ask(opcode, node, body).0
    }

    /// The node of a name in the shared directory.
    #[track_caller]
    pub fn lookup(&mut self, name: &str) -> u64 {
        fuse::u64_at(&self.ok(fuse::LOOKUP, fuse::ROOT, &fuse::name(name)), 0)
    }

    #[track_caller]
    pub fn open(&mut self, node: u64, flags: i32) -> u64 {
        fuse::u64_at(&self.ok(fuse::OPEN, node, &fuse::open(flags)), 0)
    }

    /// Node and handle of a new file in the shared directory.
    #[track_caller]
    pub fn create(&mut self, name: &str, flags: i32, mode: u32) -> (u64, u64) {
        let body = fuse::create(flags | libc::O_CREAT, mode, name);
        let answer = self.ok(fuse::CREATE, fuse::ROOT, &body);
        assert_eq!(answer.len(), 128 + 16);
        (fuse::u64_at(&answer, 0), fuse::u64_at(&answer, 128))
    }

    /// What the front-end is asked next, answered with `value`.
    pub fn serve(&self, value: i64) -> Message {
        let asked = self.channel.receive().unwrap();
        self.channel.reply(&asked, value);
        asked
    }

    /// A request during which the front-end is asked these things and grants them.
    #[track_caller]
    pub fn asking(
        &mut self,
        opcode: u32,
        node: u64,
        body: &[u8],
        expected: &[(u32, u64, u64, u64, u64)],
    ) -> Vec<Message> {
        self.send(1, opcode, node, body);
        let asked: Vec<_> = expected.iter().map(|_| self.serve(0)).collect();
        assert_eq!(self.finish().0, 0);
        let fields: Vec<_> = asked.iter().map(fields).collect();
        assert_eq!(fields, expected);
        assert!(self.channel.is_silent());
        asked
    }
}
