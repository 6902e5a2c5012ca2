//! `hotslot-backend console`, seen by a driver, by the program at the port's other end, and by a user.
//!
//! The front-end is the `vhost` crate's, the driver is made by hand, and the control messages are bytes.

// Clippy's own exception for tests ends at the helpers.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;

use hotslot_test_support::built::hotslot_backend;
use hotslot_test_support::child;
use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, DEADLINE, assert_refused, command, directory};
use hotslot_test_support::wait::eventually;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

const MULTIPORT: u64 = 1 << 1;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL_RECEIVE: usize = 2;
const CONTROL_TRANSMIT: usize = 3;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Where the structures of each queue are, and a buffer for each; behind them is room for data.
const QUEUE: u64 = 0x8000;
const BUFFER: u64 = 0x6000;
const BUFFER_LEN: u32 = 0x1000;
const DATA: u64 = 0x4_0000;

/// The back-end, a driver of each queue, and the port's other end.
struct Machine {
    queues: Vec<Driver>,
    other_end: UnixStream,
    // Last: the front-end hangs up before it is killed.
    backend: Backend,
}

impl Machine {
    fn start() -> Self {
        Self::start_with(VIRTIO_F_VERSION_1 | MULTIPORT)
    }

    fn start_with(features: u64) -> Self {
        let dir = directory();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(DEADLINE)).unwrap();
        ours.set_write_timeout(Some(DEADLINE)).unwrap();
        let mut command = command("console", &dir);
        command.args(["--once", "--port", "test=-"]).stdin(OwnedFd::from(theirs));
        let backend = Backend::spawn(command, &dir);
        let protocol = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG | PROTOCOL_F_RESET_DEVICE;
        let first = Driver::connect(&backend, features, protocol);
        let others: Vec<Driver> =
            (1..4).map(|queue| first.other_queue(queue, QUEUE * queue as u64)).collect();
        let queues = std::iter::once(first).chain(others).collect();
        let mut machine = Machine { queues, other_end: ours, backend };
        machine.start_device();
        machine
    }

    fn start_device(&mut self) {
        let driver = &mut self.queues[0];
        driver.front_end.set_features(driver.features).unwrap();
        driver.front_end.set_mem_table(&[driver.ram_region()]).unwrap();
        self.queues.iter_mut().for_each(Driver::start_queue);
    }

    /// One whose driver has the port open.
    fn opened() -> Self {
        let mut machine = Machine::start();
        machine.open();
        machine
    }

    fn open(&mut self) {
        self.tell(DEVICE_READY, 1);
        assert_eq!(self.told(), control(0, PORT_ADD, 1, b""));
        self.tell(PORT_READY, 1);
        assert_eq!(self.told(), control(0, PORT_NAME, 1, b"test"));
        assert_eq!(self.told(), control(0, PORT_OPEN, 1, b""));
        self.tell(PORT_OPEN, 1);
    }

    fn put(&self, address: u64, bytes: &[u8]) {
        self.queues[0].ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    fn got(&self, address: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.queues[0].ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A request of one buffer, which comes back: how many bytes were written.
    fn request(&mut self, queue: usize, buffer: (u64, u32, u16)) -> u32 {
        self.offer(queue, buffer);
        self.queues[queue].await_used(0)
    }

    fn offer(&mut self, queue: usize, (address, len, flags): (u64, u32, u16)) {
        self.queues[queue].descriptor(0, (address, len, flags, 0));
        self.queues[queue].offer(0);
    }

    /// Something in the only buffer of a receiving queue.
    fn received(&mut self, queue: usize) -> Vec<u8> {
        let address = QUEUE * queue as u64 + BUFFER;
        let written = self.request(queue, (address, BUFFER_LEN, WRITE));
        self.got(address, written)
    }

    /// A control message of the device's.
    fn told(&mut self) -> Vec<u8> {
        self.received(CONTROL_RECEIVE)
    }

    fn tell(&mut self, event: u16, value: u16) {
        self.tell_bytes(&control(0, event, value, b""));
    }

    fn tell_bytes(&mut self, message: &[u8]) {
        let address = QUEUE * CONTROL_TRANSMIT as u64 + BUFFER;
        self.put(address, message);
        assert_eq!(self.request(CONTROL_TRANSMIT, (address, message.len() as u32, 0)), 0);
    }

    fn transmit(&mut self, bytes: &[u8]) {
        self.put(DATA, bytes);
        assert_eq!(self.request(TRANSMIT, (DATA, bytes.len() as u32, 0)), 0);
    }

    fn at_other_end(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.other_end.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The device still does what it is for.
    fn assert_works(&mut self) {
        self.transmit(b"out");
        assert_eq!(self.at_other_end(3), b"out");
        self.other_end.write_all(b"in").unwrap();
        assert_eq!(self.received(RECEIVE), b"in");
    }

    fn reset(&mut self) {
        for queue in 0..4 {
            self.queues[0].front_end.get_vring_base(queue).unwrap();
        }
        self.queues[0].front_end.reset_device().unwrap();
        for queue in &mut self.queues {
            queue.ram.write_slice(&[0; 0x4000], GuestAddress(queue.base + DESCRIPTORS)).unwrap();
            queue.avail = 0;
        }
        self.start_device();
    }
}

/// `struct virtio_console_control`.
fn control(id: u32, event: u16, value: u16, more: &[u8]) -> Vec<u8> {
    [&id.to_le_bytes(), &event.to_le_bytes()[..], &value.to_le_bytes(), more].concat()
}

/// Bytes that are not all the same.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|place| (place % 251) as u8).collect()
}

// -------------------------------------------------------------------------------------- the port

#[test]
fn bytes_pass_both_ways_once_the_port_is_open() {
    let mut machine = Machine::start();
    let front_end = &mut machine.queues[0].front_end;
    let (_, config) = front_end.get_config(0, 12, VhostUserConfigFlags::empty(), &[0; 12]).unwrap();
    assert_eq!(config, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "one port");
    machine.open();
    machine.assert_works();
    // Longer than a piece, and than a buffer.
    let long = bytes(200_000);
    machine.transmit(&long);
    assert_eq!(machine.at_other_end(long.len()), long);
    machine.other_end.write_all(&long).unwrap();
    let mut received = Vec::new();
    while received.len() < long.len() {
        received.extend(machine.received(RECEIVE));
    }
    assert_eq!(received, long);
}

#[test]
fn a_request_may_be_in_many_buffers() {
    let mut machine = Machine::opened();
    machine.put(DATA, b"abc");
    let transmit = &mut machine.queues[TRANSMIT];
    transmit.descriptor(0, (DATA + 2, 1, NEXT, 1));
    transmit.descriptor(1, (DATA, 0, NEXT, 2));
    transmit.descriptor(2, (DATA, 2, 0, 0));
    transmit.offer(0);
    assert_eq!(transmit.await_used(0), 0);
    assert_eq!(machine.at_other_end(3), b"cab");
}

#[test]
fn bytes_wait_until_the_guest_has_opened_the_port() {
    let mut machine = Machine::start();
    machine.other_end.write_all(b"early").unwrap();
    machine.offer(RECEIVE, (DATA, BUFFER_LEN, WRITE));
    machine.open();
    assert_eq!(machine.queues[RECEIVE].await_used(0), 5);
    assert_eq!(machine.got(DATA, 5), b"early");
    // And again while it is closed.
    machine.tell(PORT_OPEN, 0);
    machine.other_end.write_all(b"later").unwrap();
    machine.offer(RECEIVE, (DATA, BUFFER_LEN, WRITE));
    // What is sent after it has arrived, and that has not.
    machine.transmit(b"out");
    assert_eq!(machine.queues[RECEIVE].used_index(), 1);
    machine.tell(PORT_OPEN, 1);
    assert_eq!(machine.queues[RECEIVE].await_used(0), 5);
    assert_eq!(machine.got(DATA, 5), b"later");
}

#[test]
fn a_driver_without_control_queues_has_the_port_open() {
    let mut machine = Machine::start_with(VIRTIO_F_VERSION_1);
    machine.assert_works();
}

#[test]
fn the_driver_is_told_when_the_other_end_has_closed_and_loses_nothing() {
    let mut machine = Machine::opened();
    machine.other_end.write_all(b"last").unwrap();
    machine.other_end.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(machine.received(RECEIVE), b"last");
    machine.offer(RECEIVE, (DATA, BUFFER_LEN, WRITE));
    assert_eq!(machine.told(), control(0, PORT_OPEN, 0, b""));
    // What nobody reads is taken all the same.
    machine.transmit(b"lost");
    // A driver that comes later learns it at once.
    machine.reset();
    machine.tell(PORT_READY, 1);
    assert_eq!(machine.told(), control(0, PORT_NAME, 1, b"test"));
    assert_eq!(machine.told(), control(0, PORT_OPEN, 0, b""));
}

#[test]
fn the_device_stops_while_its_other_end_does_not_read() {
    let mut machine = Machine::opened();
    // The first fits into a socket, the others do not.
    for head in 0..QUEUE_SIZE {
        let len = if head == 0 { 1 } else { (MIB / 2) as u32 };
        machine.queues[TRANSMIT].descriptor(head, (DATA, len, 0, 0));
    }
    machine.queues[TRANSMIT].offer_all(QUEUE_SIZE);
    eventually("the socket is full", || machine.queues[TRANSMIT].used_index() > 0);
    // Without waiting for it; all requests are back then.
    machine.queues[0].front_end.get_vring_base(TRANSMIT).unwrap();
    assert_eq!(machine.queues[TRANSMIT].used_index(), QUEUE_SIZE);
    // And the next driver finds the port as new.
    machine.reset();
    machine.open();
    let mut rest = vec![0; 1 << 20];
    machine.other_end.set_nonblocking(true).unwrap();
    while machine.other_end.read(&mut rest).is_ok() {}
    machine.other_end.set_nonblocking(false).unwrap();
    machine.assert_works();
}

#[test]
fn the_back_end_ends_with_its_front_end() {
    let Machine { queues, backend, other_end } = Machine::opened();
    drop(queues);
    assert!(backend.wait().success());
    let mut nothing = Vec::new();
    (&other_end).read_to_end(&mut nothing).unwrap();
    assert!(nothing.is_empty());
    assert!(!backend.socket.exists());
}

// -------------------------------------------------------------------------------------- hostile drivers

#[test]
fn control_messages_that_make_no_sense_change_nothing() {
    let mut machine = Machine::opened();
    for message in [
        control(7, PORT_READY, 1, b""),
        control(0, CONSOLE_PORT, 1, b""),
        control(0, 0xffff, 0xffff, b""),
        b"short".to_vec(),
        vec![],
    ] {
        machine.tell_bytes(&message);
    }
    machine.assert_works();
    let said = machine.backend.stderr();
    for sentence in ["is about port 7, which does not exist", "is not for a device", "is too short"] {
        assert!(said.contains(sentence), "{sentence}: {said}");
    }
}

#[test]
fn a_driver_that_asks_without_end_is_cut_short() {
    let mut machine = Machine::opened();
    for _ in 0..100 {
        machine.tell(DEVICE_READY, 1);
    }
    assert!(machine.backend.stderr().contains("32 control messages wait for buffers"));
    for _ in 0..32 {
        assert_eq!(machine.told(), control(0, PORT_ADD, 1, b""));
    }
    machine.assert_works();
}

#[test]
fn a_request_that_is_made_available_again_and_again_is_not_kept_without_end() {
    let mut machine = Machine::opened();
    let receive = &mut machine.queues[RECEIVE];
    receive.descriptor(0, (DATA, BUFFER_LEN, WRITE, 0));
    let kick = format!("/proc/self/fdinfo/{}", receive.kick.as_raw_fd());
    for _ in 0..500 {
        // Half a queue at a time: once a kick is read, what came with the one before it has been taken.
        (0..QUEUE_SIZE / 2).for_each(|_| receive.offer(0));
        eventually("the kick is read", || {
            let about = std::fs::read_to_string(&kick).unwrap();
            about.lines().any(|line| line.starts_with("eventfd-count:") && line.ends_with(" 0"))
        });
    }
    eventually("a refusal", || receive.used_index() > 0);
    let said = machine.backend.stderr();
    assert!(said.contains("queue 0 has more than 1024 requests"), "{said}");
    machine.reset();
    machine.open();
    machine.assert_works();
}

#[test]
fn buffers_that_are_of_no_use_come_back_empty() {
    let mut machine = Machine::opened();
    machine.other_end.write_all(b"in").unwrap();
    for buffer in [(DATA, 0, WRITE), (DATA, 100, 0), (RAM, 100, WRITE), (u64::MAX - 10, 100, WRITE)] {
        assert_eq!(machine.request(RECEIVE, buffer), 0, "{buffer:?}");
    }
    assert_eq!(machine.received(RECEIVE), b"in");
    for buffer in [(DATA, 0, 0), (DATA, 100, WRITE), (RAM, 100, 0), (RAM - 10, 100, 0)] {
        assert_eq!(machine.request(TRANSMIT, buffer), 0, "{buffer:?}");
    }
    machine.tell(PORT_READY, 1);
    for buffer in [(DATA, 7, WRITE), (RAM, 100, WRITE)] {
        assert_eq!(machine.request(CONTROL_RECEIVE, buffer), 0, "{buffer:?}");
    }
    assert_eq!(machine.told(), control(0, PORT_NAME, 1, b"test"));
    assert_eq!(machine.told(), control(0, PORT_OPEN, 1, b""));
    machine.assert_works();
}

// -------------------------------------------------------------------------------------- the user

#[test]
fn a_port_is_connected_to_the_socket_of_that_path() {
    let dir = directory();
    // The whole path may be too long for a socket address.
    let place = File::open(dir.path()).unwrap();
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/port", place.as_raw_fd())).unwrap();
    let mut command = command("console", &dir);
    command.args(["--port", "name=port"]);
    let _backend = Backend::spawn(command, &dir);
    listener.accept().unwrap();
}

#[test]
fn wrong_ports_are_refused() {
    let dir = directory();
    for (args, sentence) in [
        ("--socket s --port name", "it is NAME=PATH, neither of them empty"),
        ("--socket s --port =path", "it is NAME=PATH, neither of them empty"),
        ("--socket s --port name=nobody", "the port \"name\" cannot be connected to \"nobody\""),
    ] {
        assert_refused("console", &dir, args, sentence);
    }
    let mut command = Command::new(hotslot_backend());
    command.current_dir(dir.path()).args(["console", "--socket", "s", "--port", "name=-"]);
    let output = child::run(&mut command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("cannot be connected to standard input"), "{said}");
    assert!(said.contains("it is not a socket"), "{said}");
}
