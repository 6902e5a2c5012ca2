//! What is mapped into the window, as the front-end is asked for it.

use std::fs::{self, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use hotslot_test_support::program::Backend;

use crate::fuse::{self, quads, removemapping, setupmapping};
use crate::machine::{MIB, Machine, Message, Place, SHMEM_MAP, SHMEM_UNMAP, fields, start};

const UNIT: u64 = 2 * MIB;
const READ: u64 = 0;
const WRITE: u64 = 1;

fn machine(place: &Place) -> (Backend, Machine, u64) {
    place.write("f", "data");
    let backend = start(place, "--window 64M");
    let mut machine = Machine::mounted(&backend);
    let node = machine.lookup("f");
    (backend, machine, node)
}

/// The beginning of what a SHMEM_MAP's descriptor maps, read or written as a front-end's guest does.
fn through_mapping(asked: &Message, write: Option<&[u8]>) -> Vec<u8> {
    let file = asked.file();
    let prot = match write {
        Some(_) => libc::PROT_READ | libc::PROT_WRITE,
        None => libc::PROT_READ,
    };
    let (len, offset) = (UNIT as usize, asked.mmap().fd_offset as i64);
    // SAFETY: without MAP_FIXED nothing that is there already is touched.
    let at =
        unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, file.as_raw_fd(), offset) };
    assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    if let Some(data) = write {
        // SAFETY: the first page of the mapping is in the file; it is ours until it is unmapped below.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), at.cast(), data.len()) };
    }
    // SAFETY: as above.
    let seen = unsafe { at.cast::<[u8; 8]>().read_volatile() };
    // SAFETY: the mapping made above, which nobody uses any more.
    assert_eq!(unsafe { libc::munmap(at, len) }, 0);
    seen.to_vec()
}

/// The file is shorter than the mapping, and stays so.
#[test]
fn a_mapping_is_of_the_file_at_the_place_asked_for() {
    let place = Place::new();
    place.write("long", [vec![b'a'; UNIT as usize], b"second part".to_vec()].concat());
    let (_backend, mut machine, node) = machine(&place);
    let asked = machine.asking(
        fuse::SETUPMAPPING,
        node,
        &setupmapping(0, UNIT, READ, 6 * MIB),
        &[(SHMEM_MAP, 6 * MIB, UNIT, 0, 1)],
    );
    assert_eq!(through_mapping(&asked[0], None), b"data\0\0\0\0");

    let long = machine.lookup("long");
    let asked = machine.asking(
        fuse::SETUPMAPPING,
        long,
        &setupmapping(UNIT, UNIT, WRITE, 62 * MIB),
        &[(SHMEM_MAP, 62 * MIB, UNIT, UNIT, 1)],
    );
    assert_eq!(through_mapping(&asked[0], Some(b"SECOND")), b"SECOND p");
    assert!(place.read("long").ends_with(b"SECOND part"));

    // Wholly past the end.
    machine.asking(
        fuse::SETUPMAPPING,
        node,
        &setupmapping(4 * MIB, UNIT, WRITE, 0),
        &[(SHMEM_MAP, 0, UNIT, 4 * MIB, 1)],
    );
    assert_eq!(fs::metadata(place.path("f")).unwrap().len(), 4);
}

/// As Linux does: first for reading, then the same for writing. There is no moment at which those who read
/// find nothing.
#[test]
fn what_can_be_written_is_mapped_for_that_at_once() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    let read = setupmapping(0, UNIT, READ, UNIT);
    let asked = machine.asking(fuse::SETUPMAPPING, node, &read, &[(SHMEM_MAP, UNIT, UNIT, 0, 1)]);
    machine.asking(fuse::SETUPMAPPING, node, &setupmapping(0, UNIT, WRITE, UNIT), &[]);
    machine.asking(fuse::SETUPMAPPING, node, &read, &[]);
    through_mapping(&asked[0], Some(b"DATA"));
    assert_eq!(place.read("f"), b"DATA");

    // Another part of the file at the same place is another mapping.
    machine.asking(
        fuse::SETUPMAPPING,
        node,
        &setupmapping(UNIT, UNIT, WRITE, UNIT),
        &[(SHMEM_UNMAP, UNIT, UNIT, 0, 0), (SHMEM_MAP, UNIT, UNIT, UNIT, 1)],
    );
}

/// A program is mapped so that the host can run it meanwhile, until somebody has it open for writing.
#[test]
fn a_program_is_mapped_read_only_until_it_is_written() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    fs::set_permissions(place.path("f"), Permissions::from_mode(0o755)).unwrap();
    let read = setupmapping(0, UNIT, READ, 0);
    let asked = machine.asking(fuse::SETUPMAPPING, node, &read, &[(SHMEM_MAP, 0, UNIT, 0, 0)]);
    assert_eq!(crate::access_of(&asked[0]), libc::O_RDONLY);
    let asked = machine.asking(
        fuse::SETUPMAPPING,
        node,
        &setupmapping(0, UNIT, WRITE, 0),
        &[(SHMEM_UNMAP, 0, UNIT, 0, 0), (SHMEM_MAP, 0, UNIT, 0, 1)],
    );
    through_mapping(&asked[1], Some(b"DATA"));
    assert_eq!(place.read("f"), b"DATA");

    machine.open(node, libc::O_WRONLY);
    let read = setupmapping(0, UNIT, READ, UNIT);
    machine.asking(fuse::SETUPMAPPING, node, &read, &[(SHMEM_MAP, UNIT, UNIT, 0, 1)]);
}

#[test]
fn mappings_are_removed_one_by_one_together_and_all_at_once() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    for index in 0..6 {
        let at = index * UNIT;
        machine.asking(
            fuse::SETUPMAPPING,
            node,
            &setupmapping(0, UNIT, READ, at),
            &[(SHMEM_MAP, at, UNIT, 0, 1)],
        );
    }
    let gone = |index: u64| (SHMEM_UNMAP, index * UNIT, UNIT, 0, 0);
    let mut remove = |ranges: &[(u64, u64)], expected: &[_]| {
        machine.asking(fuse::REMOVEMAPPING, node, &removemapping(ranges), expected);
    };
    remove(&[(UNIT, UNIT)], &[gone(1)]);
    remove(&[(UNIT, UNIT)], &[]);
    remove(&[(5 * UNIT, UNIT), (0, UNIT), (40 * MIB, UNIT)], &[gone(5), gone(0)]);
    remove(&[], &[]);
    remove(&[(UNIT, 2 * UNIT)], &[gone(2)]);
    remove(&[(0, u64::MAX)], &[gone(3), gone(4)]);
    remove(&[(u64::MAX, u64::MAX), (1 << 40, UNIT)], &[]);
}

/// One mapping over several, and what would cut one in two.
#[test]
fn a_mapping_takes_the_place_of_whole_others() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    for at in [0, UNIT, 4 * UNIT] {
        machine.asking(
            fuse::SETUPMAPPING,
            node,
            &setupmapping(0, UNIT, READ, at),
            &[(SHMEM_MAP, at, UNIT, 0, 1)],
        );
    }
    machine.asking(
        fuse::SETUPMAPPING,
        node,
        &setupmapping(0, 3 * UNIT, READ, 0),
        &[(SHMEM_UNMAP, 0, UNIT, 0, 0), (SHMEM_UNMAP, UNIT, UNIT, 0, 0), (SHMEM_MAP, 0, 3 * UNIT, 0, 1)],
    );
    for (at, len) in [(UNIT, UNIT), (2 * UNIT, 2 * UNIT), (0, 4096), (3 * UNIT, UNIT + 4096)] {
        assert_eq!(machine.error(fuse::SETUPMAPPING, node, &setupmapping(0, len, READ, at)), libc::EINVAL);
        assert_eq!(machine.error(fuse::REMOVEMAPPING, node, &removemapping(&[(at, len)])), libc::EINVAL);
    }
    assert!(machine.channel.is_silent());
    machine.asking(
        fuse::REMOVEMAPPING,
        node,
        &removemapping(&[(0, 64 * MIB)]),
        &[(SHMEM_UNMAP, 0, 3 * UNIT, 0, 0), (SHMEM_UNMAP, 4 * UNIT, UNIT, 0, 0)],
    );
}

#[test]
fn what_cannot_be_mapped_is_not_asked_for() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    for (file_offset, len, at) in [
        (0, 0, 0),
        (0, UNIT, 64 * MIB),
        (0, UNIT, 63 * MIB),
        (0, u64::MAX, 0),
        (0, UNIT, u64::MAX - 4095),
        (0, UNIT, 17),
        (1, UNIT, 0),
        (0, 17, 0),
        (u64::MAX - 4095, UNIT, 0),
        (i64::MAX as u64 - 4095, UNIT, 0),
    ] {
        let body = setupmapping(file_offset, len, READ, at);
        assert_eq!(machine.error(fuse::SETUPMAPPING, node, &body), libc::EINVAL, "{len:#x} at {at:#x}");
    }
    let body = setupmapping(0, UNIT, READ, 0);
    assert_eq!(machine.error(fuse::SETUPMAPPING, fuse::ROOT, &body), libc::EINVAL);
    assert_eq!(machine.error(fuse::SETUPMAPPING, 99, &body), libc::ESTALE);
    assert!(machine.channel.is_silent());
}

/// The guest learns of it, and the next attempt is asked for as if there had been none.
#[test]
fn a_refusal_is_the_guests_error_and_leaves_no_mapping() {
    let place = Place::new();
    let (backend, mut machine, node) = machine(&place);
    let map = (SHMEM_MAP, 0, UNIT, 0, 1);
    let body = setupmapping(0, UNIT, READ, 0);
    machine.send(1, fuse::SETUPMAPPING, node, &body);
    machine.serve(-i64::from(libc::ENOMEM));
    assert_eq!(machine.finish().0, libc::EIO);
    backend.wait_for(
        "SHMEM_MAP of region 0, offset 0x0, 0x200000 bytes, read-write, failed: the front-end refused",
    );
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);

    // A replacement that is refused leaves nothing there.
    machine.send(1, fuse::SETUPMAPPING, node, &setupmapping(UNIT, UNIT, WRITE, 0));
    assert_eq!(machine.serve(0).request, SHMEM_UNMAP);
    assert_eq!(machine.serve(-i64::from(libc::ENOMEM)).request, SHMEM_MAP);
    assert_eq!(machine.finish().0, libc::EIO);
    machine.asking(fuse::REMOVEMAPPING, node, &removemapping(&[(0, UNIT)]), &[]);
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);

    // What the front-end says is not mapped is not.
    machine.send(1, fuse::REMOVEMAPPING, node, &removemapping(&[(0, UNIT)]));
    machine.serve(-i64::from(libc::ENOENT));
    assert_eq!(machine.finish().0, 0);
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);
}

/// SHM-69: a reset has removed all, so nothing is asked to be unmapped. FUSE_DESTROY and FUSE_INIT remove all
/// themselves.
#[test]
fn nothing_stays_mapped_at_a_reset_or_the_end_of_the_file_system() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place);
    let body = setupmapping(0, UNIT, READ, UNIT);
    let (map, unmap) = ((SHMEM_MAP, UNIT, UNIT, 0, 1), (SHMEM_UNMAP, UNIT, UNIT, 0, 0));
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);
    machine.reset();
    machine.start();
    machine.asking(fuse::INIT, 0, &fuse::init(), &[]);
    let node = machine.lookup("f");
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);

    machine.send(1, fuse::DESTROY, 0, &[]);
    assert_eq!(fields(&machine.serve(0)), unmap);
    machine.await_used(1);
    machine.asking(fuse::INIT, 0, &fuse::init(), &[]);
    let node = machine.lookup("f");
    machine.asking(fuse::SETUPMAPPING, node, &body, &[map]);
    machine.asking(fuse::INIT, 0, &fuse::init(), &[unmap]);
    assert_eq!(machine.error(fuse::GETATTR, node, &quads([0, 0])), libc::ESTALE);
}
