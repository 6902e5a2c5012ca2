//! `hotslot-backend pmem`, seen by a front-end and by a user.
//!
//! The front-end here is the `vhost` crate's, and raw bytes where a byte matters: never hotslot's own codec.
//! The queue is made by hand. Every wait has a deadline: the one for the program ends it, and so whatever
//! waits for it.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs;
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

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::child;
use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::process::{Confinement, confinements};
use hotslot_test_support::program::{
    Backend, DEADLINE, FAILS_LATER, assert_refused, command, directory, file, start_after,
};
use hotslot_test_support::wait::eventually;
use hotslot_test_support::wire::{
    self, MMap, Message, NEED_REPLY, REPLY, SHMEM_MAP, Wire, message, shmem_config,
};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const SHMEM_REGION: u64 = 1 << 0;

// -------------------------------------------------------------------------------------- the front-end

/// It maps all of the file at the start of region 0, and nothing else.
fn assert_maps(request: &Message, len: u64, flags: u64, path: &Path) {
    assert_eq!(request.request, SHMEM_MAP);
    assert_eq!(request.mmap(), MMap { len, flags, ..MMap::default() });
    let (got, expected) = (request.file().metadata().unwrap(), fs::metadata(path).unwrap());
    assert_eq!((got.dev(), got.ino()), (expected.dev(), expected.ino()), "the file");
}

const REQUEST: u64 = 0x5000;
const ANSWER: u64 = 0x6000;
const NO_ANSWER: u32 = 0xdead_beef;

/// A front-end and the guest behind it.
struct Machine {
    driver: Driver,
    channel: Wire,
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
        Self::connect_with(backend, VIRTIO_F_VERSION_1 | SHMEM_REGION, PROTOCOL_F_REPLY_ACK)
    }

    /// One whose driver has started the device.
    fn started(backend: &Backend) -> Self {
        let mut machine = Machine::connect(backend);
        machine.map(0);
        machine.start_queue();
        machine
    }

    /// Negotiates as a front-end does before there is a driver, and gives the back-end its channel.
    fn connect_with(backend: &Backend, features: u64, protocol_features: u64) -> Self {
        let protocol_features = protocol_features
            | PROTOCOL_F_BACKEND_REQ
            | PROTOCOL_F_CONFIG
            | PROTOCOL_F_RESET_DEVICE
            | PROTOCOL_F_SHMEM;
        let mut driver = Driver::connect(backend, features, protocol_features);
        let (ours, theirs) = UnixStream::pair().unwrap();
        driver.front_end.set_backend_request_fd(&theirs).unwrap();
        Machine { driver, channel: Wire::new(ours) }
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
    fn map(&self, value: i64) -> Message {
        let answered = self.set_mem_table();
        let request = self.channel.receive().unwrap();
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
    let backend = Backend::on_file("pmem", 16 * MIB, "");
    let socket = Wire::new(backend.connect());
    let ask = |id: u32, payload: &[u8]| socket.send(&message(id, wire::VERSION_1, payload));
    let answer = |id: u32| {
        ask(id, &[]);
        let answer = socket.receive().unwrap();
        assert_eq!((answer.request, answer.flags), (id, wire::VERSION_1 | REPLY));
        answer
    };
    let features = answer(request::GET_FEATURES).quad(0);
    assert_eq!(
        features,
        VIRTIO_F_VERSION_1
            | VHOST_USER_F_PROTOCOL_FEATURES
            | SHMEM_REGION
            | VIRTIO_F_INDIRECT_DESC
            | VIRTIO_F_EVENT_IDX
    );
    let offered = answer(request::GET_PROTOCOL_FEATURES).quad(0);
    let needed = PROTOCOL_F_REPLY_ACK
        | PROTOCOL_F_BACKEND_REQ
        | PROTOCOL_F_CONFIG
        | PROTOCOL_F_BACKEND_SEND_FD
        | PROTOCOL_F_RESET_DEVICE
        | PROTOCOL_F_SHMEM;
    assert_eq!(offered & needed, needed, "offered {offered:#x}");
    ask(request::SET_PROTOCOL_FEATURES, &needed.to_ne_bytes());
    // One region, with the id 0; all others are absent.
    let config = answer(request::GET_SHMEM_CONFIG);
    assert_eq!(config.payload, shmem_config(1, 0, &[(0, 16 * MIB)]));
}

#[test]
fn configuration_space_is_zero() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
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
        assert_eq!(machine.map(0).mmap().len, region, "{len:?} {args:?}");
        assert_eq!(fs::metadata(&path).unwrap().len(), file_len, "{len:?} {args:?}");
        let notes = backend.stderr().matches("note:").count();
        assert_eq!(notes, usize::from(!note.is_empty()), "{}", backend.stderr());
        assert!(backend.stderr().contains(note), "{}", backend.stderr());
    }
}

// ------------------------------------------------------------------------------------------ the mapping

#[test]
fn maps_for_writing_before_set_mem_table_is_answered() {
    let backend = Backend::on_file("pmem", 4 * MIB, "");
    let path = backend.file();
    let machine = Machine::connect(&backend);

    let answered = machine.set_mem_table();
    let request = machine.channel.receive().unwrap();
    assert_maps(&request, 4 * MIB, 1, &path);
    assert_eq!(request.flags, wire::VERSION_1 | NEED_REPLY);
    request.file().write_all_at(b"by the front-end", 0).unwrap();
    assert!(answered.recv_timeout(Duration::from_millis(200)).is_err(), "answered without its mapping");
    machine.channel.reply(&request, 0);
    answered.recv_timeout(DEADLINE).unwrap();
    assert!(fs::read(&path).unwrap().starts_with(b"by the front-end"));
    assert!(machine.channel.is_silent());
}

#[test]
fn maps_read_only_with_a_descriptor_that_cannot_write() {
    let backend = Backend::on_file("pmem", 4 * MIB, "--read-only");
    let path = backend.file();
    let mut machine = Machine::connect(&backend);
    let request = machine.map(0);
    assert_maps(&request, 4 * MIB, 0, &path);
    let file = request.file();
    file.read_exact_at(&mut [0; 16], 0).unwrap();
    file.write_all_at(b"x", 0).expect_err("the descriptor can write");
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0), "a flush has nothing to do");
}

#[test]
fn without_reply_ack_it_maps_and_waits_for_nothing() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let path = backend.file();
    let mut machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1 | SHMEM_REGION, 0);
    machine.set_mem_table();
    let request = machine.channel.receive().unwrap();
    assert_maps(&request, 2 * MIB, 1, &path);
    assert_eq!(request.flags, wire::VERSION_1);
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
}

#[test]
fn a_refused_mapping_is_said_and_the_device_goes_on() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::connect(&backend);
    machine.map(-i64::from(libc::ENOMEM));
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for(
        "SHMEM_MAP of region 0, offset 0x0, 0x200000 bytes, read-write, failed: the front-end refused",
    );
    machine.reset();
    machine.map(0);
}

/// A front-end of one thread answers SHMEM_MAP only after it has the answer to its own request.
#[test]
fn a_front_end_that_does_not_answer_is_not_waited_for_forever() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::connect(&backend);
    let answered = machine.set_mem_table();
    answered.recv_timeout(DEADLINE).expect("an answer to SET_MEM_TABLE");
    backend.wait_for("no answer to SHMEM_MAP");
    machine.start_queue();
    assert_eq!(machine.request(0), (4, 0));
    let request = machine.channel.receive().unwrap();
    machine.channel.reply(&request, 0);
}

#[test]
fn maps_again_at_each_start() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let path = backend.file();
    let mut machine = Machine::connect(&backend);
    for _ in 0..3 {
        assert_maps(&machine.map(0), 2 * MIB, 1, &path);
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
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let path = backend.file();
    let mut machine = Machine::started(&backend);
    assert_maps(&machine.map(-i64::from(libc::EEXIST)), 2 * MIB, 1, &path);
    assert!(machine.channel.is_silent());
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for("it was mapped before");

    // After a reset it is not mapped before.
    machine.reset();
    machine.map(-i64::from(libc::ENOMEM));
    eventually("a second failure", || backend.stderr().matches("failed").count() == 2);
    assert_eq!(backend.stderr().matches("it was mapped before").count(), 1);
}

#[test]
fn a_driver_without_the_feature_is_named() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let machine = Machine::connect_with(&backend, VIRTIO_F_VERSION_1, PROTOCOL_F_REPLY_ACK);
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
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let path = backend.file();
    let mut machine = Machine::connect(&backend);
    let request = machine.map(0);
    let range = (GuestAddress(0), 2 * MIB as usize, Some(FileOffset::new(request.file(), 0)));
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

/// Also the flushes after the first: the pages that could not be written back count as clean from then on.
#[test]
fn a_flush_that_fails_is_an_error_and_so_are_all_after_it() {
    let dir = directory();
    let Some(backend) = start_after(FAILS_LATER, "pmem", &dir, "--file full/disk/memory.img") else {
        return;
    };
    let mut machine = Machine::connect(&backend);
    let mapped = machine.map(0).file();
    machine.start_queue();
    // As the guest would by its stores; no other file descriptor is told of an error of the write-back.
    assert_eq!(machine.request(0), (4, 0));
    for block in 0..24 {
        mapped.write_all_at(&[0xab; MIB as usize], block * MIB).unwrap();
    }
    for _ in 0..3 {
        assert_eq!(machine.request(0), (4, u32::MAX));
    }
    backend.wait_for("pmem: cannot flush \"full/disk/memory.img\": ");
}

fn is_on_tmpfs(path: &Path) -> bool {
    let output = Command::new("stat").args(["-f", "-c", "%T"]).arg(path).output().unwrap();
    output.stdout.starts_with(b"tmpfs")
}

#[test]
fn an_unknown_request_is_answered_with_minus_one() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::started(&backend);
    assert_eq!(machine.request(7), (4, u32::MAX));
    assert_eq!(machine.request(0), (4, 0));
    backend.wait_for("a request has the unknown type 7");
}

/// VIRTIO 1.2, section 2.7.4: how a request is cut into descriptors means nothing.
#[test]
fn any_framing_and_indirect_tables() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::connect_with(
        &backend,
        VIRTIO_F_VERSION_1 | SHMEM_REGION | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX,
        PROTOCOL_F_REPLY_ACK,
    );
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
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::started(&backend);

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

/// After a broken ring the device works again once it is reset.
#[test]
fn a_broken_ring_is_survived() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::started(&backend);

    // More is available than the queue can hold.
    machine.ram.write_obj(1000u16, GuestAddress(AVAIL + 2)).unwrap();
    machine.kick.write(1).unwrap();
    backend.wait_for("queue 0 is broken");
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
    eventually("a second complaint", || backend.stderr().matches("queue 0 is broken").count() >= 2);
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
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut machine = Machine::started(&backend);
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
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut count = None;
    for _ in 0..4 {
        let mut machine = Machine::started(&backend);
        assert_eq!(machine.request(0), (4, 0));
        // The same point of each session.
        assert_eq!(*count.get_or_insert(backend.descriptors()), backend.descriptors());
    }
    assert!(backend.is_running());
}

#[test]
fn a_front_end_that_talks_nonsense_is_dropped_and_the_next_is_served() {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut socket = backend.connect();
    socket.write_all(&[0xff; 64]).unwrap();
    let _ = socket.read(&mut [0; 1]);
    backend.wait_for("waiting for the next front-end");
    let mut machine = Machine::started(&backend);
    assert_eq!(machine.request(0), (4, 0));
}

#[test]
fn once_ends_after_the_first_front_end() {
    let backend = Backend::on_file("pmem", 2 * MIB, "--once");
    // A connection that sends nothing is not a front-end.
    drop(backend.connect());
    let machine = Machine::connect(&backend);
    machine.map(0);
    assert!(backend.is_running());
    drop(machine);
    assert_eq!(backend.wait().code(), Some(0), "{}", backend.stderr());
    assert!(!backend.socket.exists());
}

/// The guest may still store into the file whose back-end has died, so nobody else may.
#[test]
fn the_file_stays_locked_while_a_front_end_has_it() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    let machine = Machine::connect(&backend);
    let mapped = machine.map(0);
    drop((machine, backend));
    let in_use = "\"memory.img\" is in use: another process has it open for writing";
    assert_refused("pmem", &dir, "--socket t --file memory.img", in_use);
    drop(mapped);
    // A child of another test's has all descriptors of this process until it is another program.
    let path = dir.path().join("memory.img");
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    eventually("the lock's end", || {
        let file = fs::File::options().read(true).write(true).open(&path).unwrap();
        rustix::fs::fcntl_lock(&file, exclusive).is_ok()
    });
    drop(Backend::start("pmem", &dir, ""));
}

#[test]
fn signals_end_it_with_status_zero_and_no_socket() {
    for signal in ["INT", "TERM"] {
        for busy in [false, true] {
            let backend = Backend::on_file("pmem", 2 * MIB, "");
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
fn signals_end_it_although_it_was_started_with_them_blocked() {
    let dir = directory();
    file(&dir, 2 * MIB);
    for signal in ["INT", "TERM", "HUP"] {
        let plain = command("pmem", &dir);
        let mut blocked = Command::new("env");
        blocked.current_dir(dir.path()).arg(format!("--block-signal={signal}"));
        blocked.arg(plain.get_program()).args(plain.get_args()).args(["--file", "memory.img"]);
        let backend = Backend::spawn(blocked, &dir);
        let kill = format!("kill -{signal} {}", backend.pid());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        assert_eq!(backend.wait().code(), Some(0), "SIG{signal}");
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
        ("--socket missing/s --file created --size 2M", "cannot listen on \"missing/s\": No such file"),
    ];
    for (args, sentence) in refused {
        assert_refused("pmem", &dir, args, sentence);
    }
    assert_eq!(fs::metadata(dir.path().join("memory.img")).unwrap().len(), 2 * MIB);
    assert!(!dir.path().join("missing").exists());
    assert!(!dir.path().join("created").exists());
}

/// By the limit of the size of files, which else comes with a deadly signal.
#[test]
fn an_extension_beyond_the_limit_is_refused_in_words() {
    let dir = directory();
    file(&dir, 5000);
    let mut shell = Command::new("sh");
    let script =
        format!("ulimit -f 256; exec {:?} pmem --socket s --file memory.img --size 4M", hotslot_backend());
    let output = child::run(shell.current_dir(dir.path()).args(["-c", &script]));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("error: cannot extend \"memory.img\": File too large"), "{stderr}");
    assert_eq!(fs::metadata(dir.path().join("memory.img")).unwrap().len(), 5000);
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_dead_one_is_taken_over() {
    let dir = directory();
    file(&dir, 2 * MIB);
    let backend = Backend::start("pmem", &dir, "");
    fs::copy(dir.path().join("memory.img"), dir.path().join("other.img")).unwrap();
    assert_refused(
        "pmem",
        &dir,
        "--socket s --file other.img",
        "cannot listen on \"s\": another process is listening there",
    );
    Machine::connect(&backend).map(0);
    drop(backend); // killed: the socket stays
    assert!(dir.path().join("s").exists());
    let backend = Backend::start("pmem", &dir, "");
    Machine::connect(&backend).map(0);
}

#[test]
fn each_thread_of_a_back_end_is_confined_once_it_listens() {
    let confined = Confinement { filter: true, no_new_privs: true };
    for (device, option) in [("pmem", "--file"), ("blk", "--file"), ("fs", "--dir")] {
        let dir = directory();
        let mut command = command(device, &dir);
        command.arg(option).arg(if device == "fs" { dir.path().to_owned() } else { file(&dir, MIB) });
        let backend = Backend::spawn(command, &dir);
        eventually("each thread is confined", || {
            let threads = confinements(backend.pid() as i32);
            threads.contains_key("queue") && threads.values().flatten().all(|thread| *thread == confined)
        });
        assert!(confinements(backend.pid() as i32).contains_key("front-ends"));
    }
}
