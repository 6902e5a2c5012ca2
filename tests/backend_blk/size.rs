//! The file's size changes while it is a disk.

use std::fs::File;
use std::os::unix::net::UnixStream;

use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, directory};
use hotslot_test_support::wire::{self, Wire};
use vhost::vhost_user::VhostUserFrontend;

use super::machine::*;

/// The front-end's end of a backend channel, which never answers.
fn channel(machine: &mut Machine) -> Wire {
    let (ours, theirs) = UnixStream::pair().unwrap();
    machine.0.front_end.set_backend_request_fd(&theirs).unwrap();
    Wire::new(ours)
}

/// The message, by raw bytes: it asks for no answer.
fn assert_told(channel: &Wire, machine: &mut Machine, sectors: u32) {
    let message = channel.receive().unwrap();
    assert_eq!((message.request, message.flags), (backend_request::CONFIG_CHANGE_MSG, wire::VERSION_1));
    assert!(message.payload.is_empty() && message.fds.is_empty());
    assert_eq!(word(&machine.config(), 0), sectors, "capacity");
}

#[test]
fn the_front_end_is_told_when_the_disk_grows_or_shrinks() {
    let dir = directory();
    let (path, bytes) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let file = File::options().write(true).open(&path).unwrap();
    let mut machine = Machine::connect(&backend);
    let first = channel(&mut machine);
    assert_eq!(word(&machine.config(), 0), 2048);
    assert_eq!(machine.request(T_OUT, 2048, &[(DATA, 512)]), (1, IOERR));

    file.set_len(2 * MIB + 100).unwrap();
    assert_told(&first, &mut machine, 4096);
    assert_eq!(machine.request(T_IN, 2047, &[(DATA, 1024)]), (1025, OK));
    assert_eq!(machine.read(DATA, 1024), [&bytes[2047 * 512..], &[0; 512]].concat());
    assert_eq!(machine.request(T_OUT, 4095, &[(DATA, 512)]), (1, OK));
    assert_eq!(machine.request(T_OUT, 4096, &[(DATA, 512)]), (1, IOERR));

    // A second channel takes the place of the first; and a reset changes nothing.
    let second = channel(&mut machine);
    machine.0.reset();
    machine.start();
    file.set_len(MIB / 2).unwrap();
    assert_told(&second, &mut machine, 1024);
    assert_eq!(machine.request(T_IN, 1024, &[(DATA, 512)]), (1, IOERR));
    assert_eq!(machine.request(T_IN, 1023, &[(DATA, 512)]), (513, OK));
    backend.wait_for("\"memory.img\" has 1024 sectors now");
    assert!(second.is_silent());
    first.wait_for_end();
}

/// One that hung up its channel and one without: they and the disk go on, and the next front-end sees what is
/// there then.
#[test]
fn a_front_end_that_cannot_be_told_goes_on() {
    let dir = directory();
    let (path, _) = disk(&dir);
    let backend = Backend::start("blk", &dir, "");
    let file = File::options().write(true).open(&path).unwrap();
    // With no front-end there.
    file.set_len(2 * MIB).unwrap();
    for mib in 2..5 {
        let mut machine = Machine::connect(&backend);
        assert_eq!(word(&machine.config(), 0), mib * 2048);
        if mib == 2 {
            drop(channel(&mut machine));
        }
        file.set_len(u64::from(mib + 1) * MIB).unwrap();
        if mib == 2 {
            backend.wait_for("\"memory.img\" has 6144 sectors now");
        }
        assert_eq!(machine.request(T_IN, 1, &[(DATA, 512)]), (513, OK));
    }
}
