//! `hotslot-backend pmem`, seen by a front-end and by a user.
//!
//! The front-end here is the `vhost` crate's, and raw bytes where a byte matters: never hotslot's own codec.
//! The queue is made by hand. Every wait has a deadline: the one for the program ends it, and so whatever
//! waits for it.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use hotslot_test_support::driver::*;
use hotslot_test_support::program::{Backend, DEADLINE, assert_refused, directory, file};
use hotslot_test_support::wait::eventually;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const SHMEM_REGION: u64 = 1 << 0;

const BACKEND_REQ: u64 = 1 << 5;
const BACKEND_SEND_FD: u64 = 1 << 10;
const SHMEM: u64 = 1 << 22;

const SHMEM_MAP: u32 = 9;

// -------------------------------------------------------------------------------------- the front-end

/// A request on the back-end channel, by its bytes.
#[derive(Debug)]
struct MapRequest {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    file: Option<File>,
}

impl MapRequest {
    fn u64_at(&self, at: usize) -> u64 {
        u64::from_ne_bytes(self.body[at..at + 8].try_into().unwrap())
    }

    /// It has exactly these fields, and the file is that one.
    fn assert_is(&self, len: u64, map_flags: u64, path: &Path) {
        assert_eq!(self.request, SHMEM_MAP);
        assert_eq!(self.body.len(), 40);
        assert_eq!(self.body[..8], [0; 8], "shmid 0 and padding");
        assert_eq!((self.u64_at(8), self.u64_at(16)), (0, 0), "fd_offset and shm_offset");
        assert_eq!(self.u64_at(24), len, "len");
        assert_eq!(self.u64_at(32), map_flags, "flags");
        let (got, expected) = (self.file.as_ref().unwrap().metadata().unwrap(), fs::metadata(path).unwrap());
        assert_eq!((got.dev(), got.ino()), (expected.dev(), expected.ino()), "the file");
    }
}

/// The front-end's end of the back-end channel.
struct Channel(UnixStream);

impl Channel {
    fn receive(&self) -> MapRequest {
        // Header and body are sent at once and are far smaller than the socket's buffer.
        let mut bytes = [0; 256];
        let (count, file) = self.0.recv_with_fd(&mut bytes).expect("a request on the back-end channel");
        assert!(count >= 12, "{count} bytes are no request");
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(8) as usize, count - 12, "the size in the header");
        MapRequest { request: word(0), flags: word(4), body: bytes[12..count].to_vec(), file }
    }

    fn reply(&self, request: &MapRequest, value: u64) {
        let mut bytes = Vec::new();
        for word in [request.request, 0x5, 8] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(value.to_ne_bytes());
        (&self.0).write_all(&bytes).unwrap();
    }

    fn is_silent(&self) -> bool {
        self.0.set_nonblocking(true).unwrap();
        let result = self.0.recv_with_fd(&mut [0; 1]);
        self.0.set_nonblocking(false).unwrap();
        result.is_err_and(|e| e.errno() == libc::EAGAIN)
    }
}

const REQUEST: u64 = 0x5000;
const ANSWER: u64 = 0x6000;
const NO_ANSWER: u32 = 0xdead_beef;

/// A front-end and the guest behind it.
struct Machine {
    driver: Driver,
    channel: Channel,
}

impl std::ops::Deref for Machine {
    type Target = Driver;

    fn deref(&self) -> &Driver {
        &self.driver
    }
}

impl std::ops::DerefMut for Machine {
    fn deref_mut(&mut self) -> &mut Driver {
        &mut self.driver
    }
}

impl Machine {
    fn connect(backend: &Backend) -> Self {
        Self::connect_with(backend, VERSION_1 | SHMEM_REGION, REPLY_ACK)
    }

    /// Negotiates as a front-end does before there is a driver, and gives the back-end its channel.
    fn connect_with(backend: &Backend, features: u64, protocol_features: u64) -> Self {
        let protocol_features = protocol_features | BACKEND_REQ | CONFIG | RESET_DEVICE | SHMEM;
        let mut driver = Driver::connect(backend, features, protocol_features);
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        driver.front_end.set_backend_request_fd(&theirs).unwrap();
        Machine { driver, channel: Channel(ours) }
    }

    /// Sends SET_FEATURES and SET_MEM_TABLE from a thread of its own, as its answer may wait for ours. What
    /// is received says that the answer came.
    fn set_mem_table(&self) -> Receiver<()> {
        let (front_end, features) = (self.front_end.clone(), self.features);
        let ram = self.ram_file.try_clone().unwrap();
        let region = VhostUserMemoryRegionInfo { mmap_handle: ram.as_raw_fd(), ..self.ram_region() };
        let (done, answered) = mpsc::channel();
        thread::spawn(move || {
            let _open = ram;
            front_end.set_features(features).unwrap();
            front_end.set_mem_table(&[region]).unwrap();
            done.send(()).unwrap();
        });
        answered
    }

    /// A start of the device (with SET_FEATURES, which a reset forgets) up to the mapping, which is answered
    /// with `value`.
    fn map(&self, value: u64) -> MapRequest {
        let answered = self.set_mem_table();
        let request = self.channel.receive();
        self.channel.reply(&request, value);
        answered.recv_timeout(DEADLINE).expect("an answer to SET_MEM_TABLE");
        request
    }

    /// The chain at `head` comes back: how many bytes were written, and what the answer is.
    fn await_used(&mut self, head: u16) -> (u32, u32) {
        let written = self.driver.await_used(head);
        (written, self.ram.read_obj(GuestAddress(ANSWER)).unwrap())
    }

    /// Prepares the buffers of a request of type `kind`.
    fn buffers(&self, kind: u32) {
        self.ram.write_obj(kind, GuestAddress(REQUEST)).unwrap();
        self.ram.write_obj(NO_ANSWER, GuestAddress(ANSWER)).unwrap();
    }

    /// A request as Linux makes it: one readable descriptor, one writable one.
    fn request(&mut self, kind: u32) -> (u32, u32) {
        self.buffers(kind);
        self.descriptor(0, (REQUEST, 4, NEXT, 1));
        self.descriptor(1, (ANSWER, 4, WRITE, 0));
        self.offer(0);
        self.await_used(0)
    }
}

// -------------------------------------------------------------------------------------- what is offered

/// SHM-10, SHM-11: by raw bytes, header and all.
#[test]
fn offers_the_device_and_its_region() {
    let dir = directory();
    file(&dir, 16 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut socket = backend.connect();
    let mut ask = |request: u32, body: &[u8], replies: bool| -> Vec<u8> {
        for word in [request, 1, body.len() as u32] {
            socket.write_all(&word.to_ne_bytes()).unwrap();
        }
        socket.write_all(body).unwrap();
        if !replies {
            return Vec::new();
        }
        let mut header = [0; 12];
        socket.read_exact(&mut header).unwrap();
        assert_eq!(header[..4], request.to_ne_bytes());
        assert_eq!(header[4..8], 5u32.to_ne_bytes());
        let mut body = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
        socket.read_exact(&mut body).unwrap();
        body
    };

    let features = u64::from_ne_bytes(ask(1, &[], true).try_into().unwrap());
    assert_eq!(features, VERSION_1 | PROTOCOL_FEATURES | SHMEM_REGION | INDIRECT_DESC | EVENT_IDX);
    let offered = u64::from_ne_bytes(ask(15, &[], true).try_into().unwrap());
    let needed = REPLY_ACK | BACKEND_REQ | CONFIG | BACKEND_SEND_FD | RESET_DEVICE | SHMEM;
    assert_eq!(offered & needed, needed, "offered {offered:#x}");
    ask(16, &needed.to_ne_bytes(), false);

    let config = ask(44, &[], true);
    assert_eq!(config.len(), 2056);
    assert_eq!(config[..4], 1u32.to_ne_bytes(), "nregions");
    assert_eq!(config[8..16], (16 * MIB).to_ne_bytes(), "the size of region 0");
    assert!(config[16..].iter().all(|byte| *byte == 0), "all other regions are absent");
}

#[test]
fn configuration_space_is_zero() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    let (_, space) =
        machine.front_end.get_config(0x0, 16, VhostUserConfigFlags::empty(), &[0xff; 16]).unwrap();
    assert_eq!(space, [0; 16]);
}

/// Each command line, and the size of the region and of the file that come of it.
#[test]
fn sizes() {
    #[rustfmt::skip]
    let sizes = [
        (Some(2 * MIB), "", 2 * MIB, 2 * MIB, ""),
        (Some(5000), "", 2 * MIB, 5000, "past the end of the file"),
        (Some(5000), "--read-only", 2 * MIB, 5000, ""),
        (Some(5000), "--size 4M", 4 * MIB, 4 * MIB, ""),
        (Some(5000), "--size 4M --read-only", 4 * MIB, 5000, ""),
        (Some(6 * MIB), "--size 64K", 64 << 10, 6 * MIB, "not a multiple of 2 MiB"),
        (None, "--size 4M", 4 * MIB, 4 * MIB, ""),
    ];
    for (len, args, region, file_len, note) in sizes {
        let dir = directory();
        let path = dir.path().join("memory.img");
        if let Some(len) = len {
            file(&dir, len);
        }
        let backend = Backend::start("pmem", &dir, args);
        let mut machine = Machine::connect(&backend);
        let config = machine.front_end.get_shmem_config().unwrap();
        assert_eq!(config.memory_sizes[0], region, "{len:?} {args:?}");
        assert_eq!(machine.map(0).u64_at(24), region, "{len:?} {args:?}");
        assert_eq!(fs::metadata(&path).unwrap().len(), file_len, "{len:?} {args:?}");
        let notes = backend.stderr().matches("note:").count();
        assert_eq!(notes, usize::from(!note.is_empty()), "{}", backend.stderr());
        assert!(backend.stderr().contains(note), "{}", backend.stderr());
    }
}

// ------------------------------------------------------------------------------------------ the mapping

#[test]
fn maps_for_writing_before_set_mem_table_is_answered() {
    let dir = directory();
    let path = file(&dir, 4 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let machine = Machine::connect(&backend);

    let answered = machine.set_mem_table();
    let request = machine.channel.receive();
    request.assert_is(4 * MIB, 1, &path);
    assert_eq!(request.flags, 0x9, "version 1, NEED_REPLY");
    request.file.as_ref().unwrap().write_all_at(b"by the front-end", 0).unwrap();
    assert!(answered.recv_timeout(Duration::from_millis(200)).is_err(), "answered without its mapping");
    machine.channel.reply(&request, 0);
    answered.recv_timeout(DEADLINE).unwrap();
    assert!(fs::read(&path).unwrap().starts_with(b"by the front-end"));
    assert!(machine.channel.is_silent());
}

#[test]
fn maps_read_only_with_a_descriptor_that_cannot_write() {
    let dir = directory();
    let path = file(&dir, 4 * MIB);
    let backend = Backend::start("pmem", &dir, "--read-only");
    let mut machine = Machine::connect(&backend);
    let request = machine.map(0);
    request.assert_is(4 * MIB, 0, &path);
    let file = request.file.unwrap();
    file.read_exact_at(&mut [0; 16], 0).unwrap();
    file.write_all_at(b"x", 0).expect_err("the descriptor can write");
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0), "a flush has nothing to do");
}

#[test]
fn without_reply_ack_it_maps_and_waits_for_nothing() {
    let dir = directory();
    let path = file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect_with(&backend, VERSION_1 | SHMEM_REGION, 0);
    machine.set_mem_table();
    let request = machine.channel.receive();
    request.assert_is(2 * MIB, 1, &path);
    assert_eq!(request.flags, 0x1, "no NEED_REPLY");
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
}

#[test]
fn a_refused_mapping_is_said_and_the_device_goes_on() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(-libc::ENOMEM as u64);
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for(
        "SHMEM_MAP of region 0, offset 0, 2097152 bytes, read-write, failed: the front-end refused",
    );
    machine.reset();
    machine.map(0);
}

/// A front-end of one thread answers SHMEM_MAP only after it has the answer to its own request.
#[test]
fn a_front_end_that_does_not_answer_is_not_waited_for_forever() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    let answered = machine.set_mem_table();
    answered.recv_timeout(DEADLINE).expect("an answer to SET_MEM_TABLE");
    backend.wait_for("no answer to SHMEM_MAP");
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
    let request = machine.channel.receive();
    machine.channel.reply(&request, 0);
}

#[test]
fn maps_again_at_each_start() {
    let dir = directory();
    let path = file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    for _ in 0..3 {
        machine.map(0).assert_is(2 * MIB, 1, &path);
        machine.start_queue();
        assert_eq!(machine.request(0), (4, 0));
        machine.reset();
    }
    assert!(!backend.stderr().contains("failed"), "{}", backend.stderr());
}

/// SHM-35: without a reset the mapping is still there, and to unmap it would open a hole under a running
/// guest.
#[test]
fn a_second_memory_table_without_a_reset_does_not_unmap() {
    let dir = directory();
    let path = file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();
    machine.map(-libc::EEXIST as u64).assert_is(2 * MIB, 1, &path);
    assert!(machine.channel.is_silent());
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for("it was mapped before");

    // After a reset it is not mapped before.
    machine.reset();
    machine.map(-libc::ENOMEM as u64);
    eventually("a second failure", || backend.stderr().matches("failed").count() == 2);
    assert_eq!(backend.stderr().matches("it was mapped before").count(), 1);
}

#[test]
fn a_driver_without_the_feature_is_named() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let machine = Machine::connect_with(&backend, VERSION_1, REPLY_ACK);
    machine.map(0);
    backend.wait_for("the driver did not accept VIRTIO_PMEM_F_SHMEM_REGION");
}

// ------------------------------------------------------------------------------------------ the queue

/// How much of the mapping of `path` in this process is not yet on the disk, in KiB.
fn dirty(path: &Path) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let name = path.to_str().unwrap();
    maps.lines()
        .skip_while(|line| !line.ends_with(name))
        .skip(1)
        .take_while(|line| !line.starts_with("VmFlags"))
        .filter(|line| line.starts_with("Shared_Dirty:") || line.starts_with("Private_Dirty:"))
        .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
        .sum()
}

/// What the guest wrote through the mapping, played by a mapping of ours, is on the disk when the flush is
/// answered.
#[test]
fn a_flush_writes_the_mapping_back() {
    let dir = directory();
    let path = file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    let request = machine.map(0);
    let range = (GuestAddress(0), 2 * MIB as usize, Some(FileOffset::new(request.file.unwrap(), 0)));
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
    machine.start_queue();
    for page in 0..16 {
        memory.write_obj(page, GuestAddress(page * 4096)).unwrap();
    }
    let path = fs::canonicalize(path).unwrap();
    assert_eq!(dirty(&path), 64);
    assert_eq!(machine.request(0), (4, 0));
    if is_on_tmpfs(&path) {
        eprintln!("SKIPPED: {path:?} is on a tmpfs, which writes nothing back");
    } else {
        assert_eq!(dirty(&path), 0);
    }
}

fn is_on_tmpfs(path: &Path) -> bool {
    let output = Command::new("stat").args(["-f", "-c", "%T"]).arg(path).output().unwrap();
    output.stdout.starts_with(b"tmpfs")
}

#[test]
fn an_unknown_request_is_answered_with_minus_one() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();
    assert_eq!(machine.request(7), (4, u32::MAX));
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for("a request has the unknown type 7");
}

/// VIRTIO 1.2, section 2.7.4: how a request is cut into descriptors means nothing.
#[test]
fn any_framing_and_indirect_tables() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine =
        Machine::connect_with(&backend, VERSION_1 | SHMEM_REGION | INDIRECT_DESC | EVENT_IDX, REPLY_ACK);
    machine.map(0);
    machine.start_queue();

    machine.buffers(0);
    machine.descriptor(2, (REQUEST, 1, NEXT, 3));
    machine.descriptor(3, (REQUEST + 1, 3, NEXT, 4));
    machine.descriptor(4, (ANSWER, 2, WRITE | NEXT, 5));
    machine.descriptor(5, (ANSWER + 2, 2, WRITE, 0));
    machine.offer(2);
    assert_eq!(machine.await_used(2), (4, 0));

    // The driver of EVENT_IDX asks for an interrupt at the next used buffer.
    machine.ram.write_obj(1u16, GuestAddress(AVAIL + 4 + 2 * u64::from(QUEUE_SIZE))).unwrap();
    machine.buffers(0);
    machine.descriptor_at(INDIRECT, 0, (REQUEST, 4, NEXT, 1));
    machine.descriptor_at(INDIRECT, 1, (ANSWER, 4, WRITE, 0));
    machine.descriptor(6, (INDIRECT, 32, TABLE, 0));
    machine.offer(6);
    assert_eq!(machine.await_used(6), (4, 0));
    // And the device asks for a notification of the next available one.
    let avail_event: u16 = machine.ram.read_obj(GuestAddress(USED + 4 + 8 * u64::from(QUEUE_SIZE))).unwrap();
    assert_eq!(avail_event, 2);
}

/// Each chain is given back, with what answer there is room for, and the next flush works.
#[test]
fn malformed_chains_are_survived() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();

    let nowhere = 0xffff_ffff_ffff_f000;
    let nothing = (0, NO_ANSWER);
    let failed = (4, u32::MAX);
    #[rustfmt::skip]
    let chains = [
        ("no writable descriptor", (REQUEST, 4, 0, 0), (0, 0, 0, 0), nothing),
        ("room for three bytes", (REQUEST, 4, NEXT, 1), (ANSWER, 3, WRITE, 0), nothing),
        ("the answer is outside", (REQUEST, 4, NEXT, 1), (RAM - 2, 4, WRITE, 0), nothing),
        ("the answer is nowhere", (REQUEST, 4, NEXT, 1), (nowhere, 4, WRITE, 0), nothing),
        ("the next is not in the table", (REQUEST, 4, NEXT, 999), (ANSWER, 4, WRITE, 0), nothing),
        ("the request is outside", (RAM, 4, NEXT, 1), (ANSWER, 4, WRITE, 0), failed),
        ("the request is nowhere", (nowhere, 4, NEXT, 1), (ANSWER, 4, WRITE, 0), failed),
        ("the request is short", (REQUEST, 3, NEXT, 1), (ANSWER, 4, WRITE, 0), failed),
        ("there is no request", (ANSWER, 4, WRITE, 0), (0, 0, 0, 0), failed),
        ("empty buffers", (REQUEST, 0, NEXT, 1), (ANSWER, 0, WRITE, 0), nothing),
        ("a loop of readable ones", (REQUEST, 4, NEXT, 0), (0, 0, 0, 0), nothing),
        ("a loop of both", (REQUEST, 4, NEXT, 1), (ANSWER, 4, WRITE | NEXT, 0), (4, 0)),
        ("a table in a table", (DESCRIPTORS, 16, TABLE, 0), (0, 0, 0, 0), nothing),
        ("a table of odd size", (DESCRIPTORS, 17, TABLE, 0), (0, 0, 0, 0), nothing),
        ("a table outside", (nowhere, 16, TABLE, 0), (0, 0, 0, 0), nothing),
        ("more than 4 GiB", (0, u32::MAX, NEXT, 1), (ANSWER, 4, WRITE, 0), nothing),
    ];
    for (what, first, second, expected) in chains {
        machine.buffers(0);
        machine.descriptor(0, first);
        machine.descriptor(1, second);
        machine.offer(0);
        assert_eq!(machine.await_used(0), expected, "{what}");
        assert_eq!(machine.request(0), (4, 0), "after: {what}");
    }
    let complaints = backend.stderr().matches("pmem: a").count();
    assert!(complaints <= 10, "a guest filled stderr:\n{}", backend.stderr());
}

/// A ring that lies is no reason to stop for good: a reset makes it right.
#[test]
fn a_broken_ring_is_survived() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();

    // More is available than the queue can hold.
    machine.ram.write_obj(1000u16, GuestAddress(AVAIL + 2)).unwrap();
    machine.kick.write(1).unwrap();
    backend.wait_for("the request queue is broken");
    machine.reset();
    machine.map(0);
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));

    // The ring's index is in the guest's memory, and its first entry is not.
    machine.reset();
    machine.map(0);
    machine.avail_ring = RAM - 4;
    machine.start_queue();
    machine.ram.write_obj(1u16, GuestAddress(RAM - 2)).unwrap();
    machine.kick.write(1).unwrap();
    eventually("a second complaint", || backend.stderr().matches("queue is broken").count() >= 2);
    machine.ram.write_obj(0u16, GuestAddress(RAM - 2)).unwrap();
    machine.reset();
    machine.map(0);
    machine.avail_ring = AVAIL;
    machine.start_queue();

    // A head that is no descriptor: there is nothing to give back. The request behind it comes with the same
    // kick.
    machine.front_end.set_vring_enable(0, false).unwrap();
    machine.offer(QUEUE_SIZE);
    machine.buffers(0);
    machine.descriptor(0, (REQUEST, 4, NEXT, 1));
    machine.descriptor(1, (ANSWER, 4, WRITE, 0));
    machine.offer(0);
    machine.front_end.set_vring_enable(0, true).unwrap();
    eventually("the one that can be given back", || machine.used_index() == 1);
    backend.wait_for("request 8 cannot be handed back");
    machine.reset();
    machine.map(0);
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
}

#[test]
fn requests_wait_for_the_queue_to_be_enabled() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();
    machine.front_end.set_vring_enable(0, false).unwrap();
    machine.buffers(0);
    machine.descriptor(0, (REQUEST, 4, NEXT, 1));
    machine.descriptor(1, (ANSWER, 4, WRITE, 0));
    machine.offer(0);
    thread::sleep(Duration::from_millis(100));
    assert_eq!(machine.used_index(), 0);
    machine.front_end.set_vring_enable(0, true).unwrap();
    assert_eq!(machine.await_used(0), (4, 0));
}

// --------------------------------------------------------------------------------------- the program's life

#[test]
fn serves_one_front_end_after_another_and_loses_no_descriptor() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut count = None;
    for _ in 0..4 {
        let mut machine = Machine::connect(&backend);
        machine.map(0);
        machine.start_queue();
        assert_eq!(machine.request(0), (4, 0));
        // The same point of each session.
        assert_eq!(*count.get_or_insert(backend.descriptors()), backend.descriptors());
    }
    assert!(backend.is_running());
}

#[test]
fn a_front_end_that_talks_nonsense_is_dropped_and_the_next_is_served() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let mut socket = backend.connect();
    socket.write_all(&[0xff; 64]).unwrap();
    let _ = socket.read(&mut [0; 1]);
    backend.wait_for("waiting for the next front-end");
    let mut machine = Machine::connect(&backend);
    machine.map(0);
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
}

#[test]
fn once_ends_after_the_first_front_end() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "--once");
    // Someone who only looks whether it listens is not a front-end.
    drop(backend.connect());
    let machine = Machine::connect(&backend);
    machine.map(0);
    assert!(backend.is_running());
    drop(machine);
    assert_eq!(backend.wait().code(), Some(0), "{}", backend.stderr());
    assert!(!backend.socket.exists());
}

#[test]
fn signals_end_it_with_status_zero_and_no_socket() {
    for signal in ["INT", "TERM"] {
        for busy in [false, true] {
            let dir = directory();
            file(&dir, 2 * MIB);
            let backend = Backend::start("pmem", &dir, "");
            let machine = busy.then(|| Machine::connect(&backend));
            if let Some(machine) = &machine {
                machine.map(0);
            }
            let kill = format!("kill -{signal} {}", backend.pid());
            assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
            let status = backend.wait();
            assert_eq!((status.code(), status.signal()), (Some(0), None), "SIG{signal}, busy {busy}");
            assert!(!backend.socket.exists());
        }
    }
}

#[test]
fn bad_command_lines_are_refused() {
    let dir = directory();
    file(&dir, 2 * MIB);
    fs::write(dir.path().join("empty"), "").unwrap();
    fs::create_dir(dir.path().join("directory")).unwrap();
    let long = format!("--file memory.img --socket {}", "x".repeat(108));
    #[rustfmt::skip]
    let refused = [
        ("--socket s", "--file <PATH>"),
        ("--file memory.img", "--socket <PATH>"),
        ("--socket s --file missing", "error: there is no file \"missing\"\nhint: --size SIZE creates"),
        ("--socket s --file missing --read-only", "there is no file \"missing\"\n"),
        ("--socket s --file missing --read-only --size 2M", "there is no file \"missing\"\n"),
        ("--socket s --file directory", "\"directory\" is a directory; only a regular file"),
        ("--socket s --file /dev/zero", "\"/dev/zero\" is a character device; only a regular file"),
        ("--socket s --file empty", "\"empty\" is empty, so the memory would have no size\nhint: --size"),
        ("--socket s --file memory.img --size 0", "--size 0 is not a multiple of the page size"),
        ("--socket s --file memory.img --size 5000", "--size 5000 is not a multiple of the page size"),
        ("--socket s --file memory.img --size 2Q", "\"2Q\" is not a size"),
        ("--socket s --file memory.img --size 99999999T", "is more than 2^64 - 1 bytes"),
        ("--socket s --file memory.img --size 16000000T", "cannot extend \"memory.img\": "),
        (long.as_str(), "has 108 bytes, more than the 107 that fit"),
        ("--socket memory.img --file memory.img", "\"memory.img\": there is a file that is not a socket"),
        ("--socket missing/s --file memory.img", "cannot listen on \"missing/s\": No such file"),
    ];
    for (args, sentence) in refused {
        assert_refused("pmem", &dir, args, sentence);
    }
    assert_eq!(fs::metadata(dir.path().join("memory.img")).unwrap().len(), 2 * MIB);
    assert!(!dir.path().join("missing").exists());
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_dead_one_is_taken_over() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    assert_refused(
        "pmem",
        &dir,
        "--socket s --file memory.img",
        "cannot listen on \"s\": another process is listening there",
    );
    Machine::connect(&backend).map(0);
    drop(backend); // killed: the socket stays
    assert!(dir.path().join("s").exists());
    let backend = Backend::start("pmem", &dir, "");
    Machine::connect(&backend).map(0);
}
