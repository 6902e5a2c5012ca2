//! `hotslot-backend pmem` and `blk` are killed, and started again with the same command line: the front-end
//! connects anew, and the driver notices nothing.
//!
//! The driver is made by hand, as for `backend_blk`. In `tests/backend_fs/restart.rs` are the tests of `fs`.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, directory, file};
use hotslot_test_support::wait::eventually;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};
use vm_memory::{Bytes, GuestAddress};

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_DISCARD: u32 = 11;
const OK: u8 = 0;
const NO_STATUS: u8 = 0xee;

const F_FLUSH: u64 = 1 << 9;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;

const PROTOCOL: u64 = PROTOCOL_F_MQ
    | PROTOCOL_F_REPLY_ACK
    | PROTOCOL_F_CONFIG
    | PROTOCOL_F_INFLIGHT_SHMFD
    | PROTOCOL_F_RESET_DEVICE
    | PROTOCOL_F_CONFIGURE_MEM_SLOTS;

const DISK: u64 = 4 * MIB;
const SECTOR: u64 = 512;
/// The most bytes of a request.
const MOST: u64 = 16 << 10;

/// What a driver waits for, by the ring descriptor.
#[derive(Clone)]
enum Request {
    Read { at: usize, len: usize },
    Write { at: usize, bytes: Vec<u8> },
    Discard { at: usize, len: usize },
    Flush,
}

impl Request {
    fn range(&self) -> std::ops::Range<usize> {
        match self {
            Request::Read { at, len } | Request::Discard { at, len } => *at..*at + *len,
            Request::Write { at, bytes } => *at..*at + bytes.len(),
            Request::Flush => 0..0,
        }
    }
}

/// Numbers that look random, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// A queue of a disk, and its driver. Each ring descriptor has an indirect table and buffers of its own.
struct Queue {
    driver: Driver,
    waits: [Option<Request>; QUEUE_SIZE as usize],
    seen: u16,
}

impl Queue {
    fn of(driver: Driver) -> Self {
        Queue { driver, waits: Default::default(), seen: 0 }
    }

    /// Table, header, status and data of a request.
    fn place(&self, head: u16) -> (u64, u64, u64, u64) {
        let base = self.driver.base + 0x4000 + u64::from(head) * 0x100;
        let data = self.driver.base + 0x8000 + u64::from(head) * MOST;
        (base, base + 0x80, base + 0xa0, data)
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.driver.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn free(&self) -> Option<u16> {
        self.waits.iter().position(Option::is_none).map(|head| head as u16)
    }

    fn offer(&mut self, head: u16, request: Request) {
        let (table, header, status, data) = self.place(head);
        let (kind, flags, len) = match &request {
            Request::Read { len, .. } => (T_IN, WRITE, *len),
            Request::Write { bytes, .. } => {
                self.write(data, bytes);
                (T_OUT, 0, bytes.len())
            }
            Request::Discard { at, len } => {
                let sectors = (*len as u64 / SECTOR) as u32;
                let range = [&(*at as u64 / SECTOR).to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]];
                self.write(data, &range.concat());
                (T_DISCARD, 0, 16)
            }
            Request::Flush => (T_FLUSH, 0, 0),
        };
        let sector = if kind == T_DISCARD { 0 } else { request.range().start as u64 / SECTOR };
        self.write(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        self.write(status, &[NO_STATUS]);
        let mut chain = vec![(header, 16, 0)];
        if len > 0 {
            chain.push((data, len as u32, flags));
        }
        chain.push((status, 1, WRITE));
        let last = chain.len() as u16 - 1;
        for (index, (address, len, flags)) in (0..).zip(chain) {
            let next = if index < last { NEXT } else { 0 };
            self.driver.descriptor_at(table, index, (address, len, flags | next, (index + 1) * next));
        }
        self.driver.descriptor(head, (table, 16 * (u32::from(last) + 1), TABLE, 0));
        self.waits[usize::from(head)] = Some(request);
        self.driver.offer(head);
    }

    /// Looks at what came back: each was waited for, and has its status.
    fn collect(&mut self, disk: &mut [u8]) {
        while self.seen != self.driver.used_index() {
            let head = self.driver.used(self.seen) as u16;
            self.seen = self.seen.wrapping_add(1);
            let request = self.waits[usize::from(head)].take();
            let request = request.unwrap_or_else(|| panic!("{head} came back and was not waited for"));
            let (_, _, status, data) = self.place(head);
            assert_eq!(self.read(status, 1), [OK], "{:?}", request.range());
            let range = request.range();
            match request {
                Request::Read { len, .. } => assert!(self.read(data, len) == disk[range]),
                Request::Write { bytes, .. } => disk[range].copy_from_slice(&bytes),
                Request::Discard { .. } => disk[range].fill(0),
                Request::Flush => {}
            }
        }
    }
}

/// A request that touches nothing that another one does.
fn any_request(numbers: &mut Numbers, queues: &[Queue]) -> Request {
    let waits = || queues.iter().flat_map(|queue| &queue.waits).flatten();
    loop {
        let len = ((1 + numbers.next(MOST / SECTOR)) * SECTOR) as usize;
        let at = (numbers.next((DISK - MOST) / SECTOR) * SECTOR) as usize;
        let request = match numbers.next(10) {
            0 => Request::Flush,
            1 => Request::Discard { at, len },
            2..=5 => Request::Read { at, len },
            _ => Request::Write { at, bytes: (0..len).map(|_| numbers.next(256) as u8).collect() },
        };
        let range = request.range();
        if waits().all(|other| other.range().end <= range.start || range.end <= other.range().start) {
            return request;
        }
    }
}

fn set_inflight(driver: &mut Driver, inflight: &(VhostUserInflight, File)) {
    driver.front_end.set_inflight_fd(&inflight.0, inflight.1.as_raw_fd()).unwrap();
}

/// Killed twenty times, at any moment, under two queues of random requests that are answered out of their
/// order: each comes back once, and the disk has what was written.
#[test]
fn a_killed_disk_goes_on_where_it_was() {
    let dir = directory();
    let path = file(&dir, DISK);
    let mut disk = vec![0; DISK as usize];
    let mut numbers = Numbers(0x1234_5678_9abc_def1);
    let mut backend = Backend::start("blk", &dir, "--queues 2");
    let features =
        VIRTIO_F_VERSION_1 | VIRTIO_F_INDIRECT_DESC | VIRTIO_F_EVENT_IDX | F_FLUSH | F_MQ | F_DISCARD;
    let first = Driver::connect(&backend, features, PROTOCOL);
    let second = first.other_queue(1, 0x6_0000);
    let mut queues = [Queue::of(first), Queue::of(second)];
    let driver = &mut queues[0].driver;
    driver.front_end.set_features(driver.features).unwrap();
    driver.front_end.set_mem_table(&[driver.ram_region()]).unwrap();
    let inflight = driver.inflight(2);
    set_inflight(driver, &inflight);
    queues.iter_mut().for_each(|queue| queue.driver.start_queue());

    for _ in 0..20 {
        for _ in 0..20 + numbers.next(50) {
            let which = numbers.next(2) as usize;
            if let Some(head) = queues[which].free() {
                let request = any_request(&mut numbers, &queues);
                queues[which].offer(head, request);
            }
            queues[which].collect(&mut disk);
        }
        thread::sleep(Duration::from_micros(numbers.next(300)));
        drop(backend);
        backend = Backend::start("blk", &dir, "--queues 2");
        // What the killed one has answered after the last look.
        queues.iter_mut().for_each(|queue| queue.collect(&mut disk));
        let driver = &mut queues[0].driver;
        driver.reconnect(&backend);
        set_inflight(driver, &inflight);
        queues[1].driver.front_end = queues[0].driver.front_end.clone();
        for queue in &mut queues {
            let base = queue.driver.used_index();
            queue.driver.start_queue_from(base);
        }
    }
    for queue in &mut queues {
        eventually("all came back", || {
            queue.collect(&mut disk);
            queue.waits.iter().all(Option::is_none)
        });
        assert_eq!(queue.seen, queue.driver.avail);
    }
    assert!(fs::read(path).unwrap() == disk);
}

/// The memory for requests in flight, by its bytes: queue 0 of eight ring descriptors.
struct Recorded(File);

impl Recorded {
    fn header(&self, last_batch_head: u16, used_idx: u16) {
        self.0.write_all_at(&last_batch_head.to_le_bytes(), 12).unwrap();
        self.0.write_all_at(&used_idx.to_le_bytes(), 14).unwrap();
    }

    fn entry(&self, head: u64, inflight: u8, counter: u64) {
        let bytes = [&[inflight][..], &[0; 7], &counter.to_le_bytes()].concat();
        self.0.write_all_at(&bytes, 16 + 16 * head).unwrap();
    }

    /// last_batch_head and used_idx.
    fn last(&self) -> (u16, u16) {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, 12).unwrap();
        let [head_low, head_high, used_low, used_high] = bytes;
        (u16::from_le_bytes([head_low, head_high]), u16::from_le_bytes([used_low, used_high]))
    }

    fn inflight(&self) -> Vec<u16> {
        let is_in_flight = |head: &u16| {
            let mut byte = [0];
            self.0.read_exact_at(&mut byte, 16 + 16 * u64::from(*head)).unwrap();
            byte[0] != 0
        };
        (0..QUEUE_SIZE).filter(is_in_flight).collect()
    }
}

/// A device that flushes, whose last back-end took the first five requests of seven, in this order: 4, 0, 1,
/// 2, 3; then come 5 and 6. It has handed back 4, 2 and 3.
fn with_seven_requests() -> (Backend, Driver) {
    let (backend, driver) = with_seven_requests_and_no_memory();
    driver.front_end.set_mem_table(&[driver.ram_region()]).unwrap();
    (backend, driver)
}

/// The same, before the back-end is told of the memory.
fn with_seven_requests_and_no_memory() -> (Backend, Driver) {
    let backend = Backend::on_file("pmem", 2 * MIB, "");
    let mut driver = Driver::connect(&backend, VIRTIO_F_VERSION_1, PROTOCOL);
    driver.front_end.set_features(driver.features).unwrap();
    for head in 0..7 {
        // A request of type 0, and room for its answer, in a table.
        let table = INDIRECT + u64::from(head) * 0x100;
        driver.descriptor_at(table, 0, (table + 0x80, 4, NEXT, 1));
        driver.descriptor_at(table, 1, (table + 0x90, 4, WRITE, 0));
        driver.descriptor(head, (table, 32, TABLE, 0));
    }
    let ram = &driver.ram;
    for (place, head) in (0..).zip([4u16, 0, 1, 2, 3, 5, 6]) {
        ram.write_obj(head, GuestAddress(AVAIL + 4 + 2 * place)).unwrap();
    }
    ram.write_obj(7u16, GuestAddress(AVAIL + 2)).unwrap();
    for (place, head) in (0..).zip([4u32, 2, 3]) {
        ram.write_obj(head, GuestAddress(USED + 4 + 8 * place)).unwrap();
    }
    ram.write_obj(3u16, GuestAddress(USED + 2)).unwrap();
    driver.avail = 7;
    (backend, driver)
}

fn used_from(driver: &Driver, place: u16) -> Vec<u32> {
    eventually("all are used", || driver.used_index() == 7);
    (place..7).map(|place| driver.used(place)).collect()
}

/// vhost-user, "Inflight I/O tracking", split virtqueues: requests that were taken and not handed back are
/// taken first, in their order; and the last one that was handed back may look as if it were not.
#[test]
fn recorded_requests_are_taken_first_and_in_their_order() {
    // The back-end died before it recorded that 3 was handed back, and after.
    for (used_idx, entry_of_3, is_table) in [(2, 1, true), (2, 0, true), (3, 0, true), (3, 0, false)] {
        let (_backend, mut driver) = with_seven_requests_and_no_memory();
        let ram = driver.ram_region();
        let _base = match is_table {
            true => driver.front_end.set_mem_table(&[ram]).unwrap().map(|_| 0),
            false => driver.front_end.add_mem_region(&ram).unwrap(),
        };
        let inflight = driver.inflight(1);
        let recorded = Recorded(inflight.1.try_clone().unwrap());
        recorded.header(3, used_idx);
        for (head, inflight, counter) in [(0, 1, 11), (1, 1, 12), (2, 0, 13), (3, entry_of_3, 14), (4, 0, 10)]
        {
            recorded.entry(head, inflight, counter);
        }
        set_inflight(&mut driver, &inflight);
        driver.start_queue_from(0);
        assert_eq!(used_from(&driver, 3), [0, 1, 5, 6], "used_idx {used_idx}");
        eventually("nothing is in flight", || recorded.inflight().is_empty());
        assert_eq!(driver.front_end.get_vring_base(0).unwrap(), 7);
        assert_eq!(recorded.last(), (6, 7), "last_batch_head and used_idx");
    }
}

/// A device that answers in order needs no such memory: the index of the used ring says which is the next.
#[test]
fn the_used_index_is_enough_for_a_device_that_answers_in_order() {
    let (_backend, mut driver) = with_seven_requests();
    driver.start_queue_from(3);
    assert_eq!(used_from(&driver, 3), [2, 3, 5, 6]);
}

/// The threads of a session that has ended may have answered after the front-end looked.
#[test]
fn what_was_used_is_not_executed_again() {
    let (_backend, mut driver) = with_seven_requests();
    driver.start_queue_from(2);
    assert_eq!(used_from(&driver, 3), [2, 3, 5, 6]);
}

/// It may have died between the used ring and the interrupt; and the notification that it read is not sent
/// again.
#[test]
fn the_driver_is_told_of_what_the_dead_back_end_used() {
    let (_backend, mut driver) = with_seven_requests();
    driver.ram.write_obj(3u16, GuestAddress(AVAIL + 2)).unwrap();
    // VIRTQ_AVAIL_F_NO_INTERRUPT: there is no other reason for one.
    driver.ram.write_obj(1u16, GuestAddress(AVAIL)).unwrap();
    driver.start_queue_from(3);
    eventually("a call", || driver.call.read().is_ok());
}

/// RESET_DEVICE ends what was in flight: the driver has its buffers back.
#[test]
fn a_reset_forgets_what_was_in_flight() {
    let (_backend, mut driver) = with_seven_requests();
    let inflight = driver.inflight(1);
    let recorded = Recorded(inflight.1.try_clone().unwrap());
    recorded.entry(0, 1, 11);
    set_inflight(&mut driver, &inflight);
    driver.front_end.reset_device().unwrap();
    assert_eq!(recorded.inflight(), [0; 0]);
}

#[test]
fn memory_that_cannot_be_a_record_is_refused() {
    let (backend, mut driver) = with_seven_requests();
    let (told, file) = driver.inflight(2);
    let version = [2, 0];
    file.write_all_at(&version, 8).unwrap();
    driver.front_end.set_inflight_fd(&told, file.as_raw_fd()).unwrap_err();
    driver.reconnect(&backend);
    let (told, file) = driver.inflight(2);
    let larger = VhostUserInflight { num_queues: 3, ..told };
    driver.front_end.set_inflight_fd(&larger, file.as_raw_fd()).unwrap_err();
    driver.reconnect(&backend);
    let far = VhostUserInflight { mmap_offset: u64::MAX - 4095, ..told };
    driver.front_end.set_inflight_fd(&far, file.as_raw_fd()).unwrap_err();
    assert!(backend.is_running());
}

/// A driver that has switched the cache off sends no flushes.
#[test]
fn the_field_writeback_stays_as_the_driver_wrote_it() {
    const WRITEBACK: u32 = 32;
    const F_CONFIG_WCE: u64 = 1 << 11;
    let dir = directory();
    file(&dir, DISK);
    let mut backend = Backend::start("blk", &dir, "");
    let mut driver = Driver::connect(&backend, VIRTIO_F_VERSION_1 | F_FLUSH | F_CONFIG_WCE, PROTOCOL);
    driver.front_end.set_features(driver.features).unwrap();
    let inflight = driver.inflight(1);
    for value in [0, 1, 0] {
        set_inflight(&mut driver, &inflight);
        driver.front_end.set_config(WRITEBACK, VhostUserConfigFlags::WRITABLE, &[value]).unwrap();
        drop(backend);
        backend = Backend::start("blk", &dir, "");
        driver.reconnect(&backend);
        set_inflight(&mut driver, &inflight);
        let read = driver.front_end.get_config(WRITEBACK, 1, VhostUserConfigFlags::empty(), &[9]);
        assert_eq!(read.unwrap().1, [value]);
    }
}
