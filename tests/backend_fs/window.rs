//! Requests whose buffers lie in the window, or in what other devices have mapped.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;

use crate::machine::memfd;
use hotslot_test_support::program::Backend;

use crate::fuse::{self, setupmapping};
use crate::machine::{ANSWER, ANSWER_LEN, MIB, Machine, Place, REQUEST, SHMEM_MAP, WRITE, start};

const UNIT: u64 = 2 * MIB;
/// Where the guest has the window, its size, and where it has another device's mapping.
const WINDOW: u64 = 64 << 30;
const SIZE: u64 = 64 * MIB;
const SHARED: u64 = 32 << 30;

/// A guest whose front-end says where the window is, in which `f` is mapped at 0, from its beginning on.
fn machine(place: &Place, content: &[u8], writes: u64, expected: u64) -> (Backend, Machine, u64) {
    place.write("f", content);
    let backend = start(place, "--window 64M");
    let mut machine = Machine::told(&backend, (WINDOW, SIZE));
    let node = machine.lookup("f");
    map(&mut machine, node, 0, 0, writes, expected);
    (backend, machine, node)
}

fn map(machine: &mut Machine, node: u64, file_offset: u64, at: u64, writes: u64, expected: u64) {
    let body = setupmapping(file_offset, UNIT, writes, at);
    machine.asking(fuse::SETUPMAPPING, node, &body, &[(SHMEM_MAP, at, UNIT, file_offset, expected)]);
}

/// FUSE_WRITE at 0 of a file, its data in these buffers. Returns the error, and how much was written.
fn write(machine: &mut Machine, (node, handle): (u64, u64), buffers: &[(u64, u32)]) -> (i32, u32) {
    let size: u32 = buffers.iter().map(|buffer| buffer.1).sum();
    let mut request =
        fuse::request(fuse::WRITE, node, (0, 0), &fuse::write(handle, 0, &vec![0; size as usize]));
    request.truncate(request.len() - size as usize);
    machine.fill(1, &request);
    let mut chain = vec![(machine.address(1, REQUEST), request.len() as u32, 0)];
    chain.extend(buffers.iter().map(|&(address, len)| (address, len, 0)));
    chain.push((machine.address(1, ANSWER), ANSWER_LEN, WRITE));
    machine.offer_chain(1, &chain);
    let (error, answer) = machine.finish();
    (error, if error == 0 { fuse::u32_at(&answer, 0) } else { 0 })
}

/// FUSE_READ at 0 of a file, its data into these buffers. Returns the error, and how much was read.
fn read(machine: &mut Machine, (node, handle): (u64, u64), buffers: &[(u64, u32)]) -> (i32, u32) {
    let size = buffers.iter().map(|buffer| buffer.1).sum();
    let request = fuse::request(fuse::READ, node, (0, 0), &fuse::read(handle, 0, size));
    machine.fill(1, &request);
    let mut chain =
        vec![(machine.address(1, REQUEST), request.len() as u32, 0), (machine.address(1, ANSWER), 16, WRITE)];
    chain.extend(buffers.iter().map(|&(address, len)| (address, len, WRITE)));
    machine.offer_chain(1, &chain);
    let (_, written) = machine.await_used(1);
    let header = machine.bytes::<16>(machine.address(1, ANSWER));
    assert_eq!(fuse::u32_at(&header, 0), written);
    (-(fuse::u32_at(&header, 4) as i32), written - 16)
}

/// Bytes of which no two neighbouring pages are the same.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8).collect()
}

fn file_with(bytes: &[u8]) -> File {
    let file = memfd(bytes.len() as u64);
    file.write_all_at(bytes, 0).unwrap();
    file
}

#[test]
fn bytes_are_written_out_of_a_mapping() {
    let place = Place::new();
    let content = pattern(3 * UNIT as usize);
    let (_backend, mut machine, node) = machine(&place, &content, 0, 1);
    // The second half of the file, in front of the first and behind it.
    map(&mut machine, node, UNIT, UNIT, 0, 1);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    let ram = machine.address(1, REQUEST + 0x8000);
    machine.put(ram, b"ram");
    let unit = UNIT as usize;
    for (buffers, expected) in [
        (vec![(WINDOW, 4096)], content[..4096].to_vec()),
        (vec![(WINDOW + 4099, 7)], content[4099..4106].to_vec()),
        (vec![(WINDOW + UNIT - 5000, 9999)], content[unit - 5000..unit + 4999].to_vec()),
        (
            vec![(WINDOW + 10, 2), (ram, 3), (WINDOW + 11, 4)],
            [&content[10..12], b"ram", &content[11..15]].concat(),
        ),
        (vec![(WINDOW + UNIT, 1 << 20)], content[unit..unit + (1 << 20)].to_vec()),
    ] {
        File::create(place.path("to")).unwrap();
        assert_eq!(write(&mut machine, to, &buffers), (0, expected.len() as u32), "{buffers:x?}");
        assert!(place.read("to") == expected, "{buffers:x?}");
    }
}

#[test]
fn bytes_are_read_into_a_mapping() {
    let place = Place::new();
    let mut content = vec![b'.'; 3 * UNIT as usize];
    let (_backend, mut machine, node) = machine(&place, &content, 1, 1);
    map(&mut machine, node, UNIT, UNIT, 1, 1);
    let source = pattern(100_000);
    place.write("from", &source);
    let from = machine.lookup("from");
    let handle = machine.open(from, libc::O_RDONLY);
    let ram = machine.address(1, REQUEST + 0x8000);
    for (buffers, read_len) in [
        (vec![(0, 4096)], 4096),
        (vec![(4097, 5)], 5),
        (vec![(UNIT - 100, 5000)], 5000),
        // More than there is.
        (vec![(UNIT, 200_000)], 100_000),
    ] {
        let buffers: Vec<(u64, u32)> = buffers.into_iter().map(|(at, len)| (WINDOW + at, len)).collect();
        assert_eq!(read(&mut machine, (from, handle), &buffers), (0, read_len as u32), "{buffers:x?}");
        let at = (buffers[0].0 - WINDOW) as usize;
        content[at..at + read_len].copy_from_slice(&source[..read_len]);
        assert!(place.read("f") == content, "{buffers:x?}");
    }
    // A part in RAM, and between two parts.
    let buffers = [(WINDOW + 3, 2), (ram, 4), (WINDOW + 9, 2)];
    assert_eq!(read(&mut machine, (from, handle), &buffers), (0, 8));
    content[3..5].copy_from_slice(&source[..2]);
    content[9..11].copy_from_slice(&source[6..8]);
    assert_eq!(machine.bytes::<4>(ram), source[2..6]);
    assert!(place.read("f") == content);
}

/// The header, the arguments and the place of the answer, too.
#[test]
fn all_of_a_request_may_lie_in_a_mapping() {
    let place = Place::new();
    let request = fuse::request(fuse::GETATTR, fuse::ROOT, (0, 0), &fuse::quads([0, 0]));
    let mut content = vec![0; 8192];
    content[..request.len()].copy_from_slice(&request);
    let (_backend, mut machine, _) = machine(&place, &content, 1, 1);
    machine.offer_chain(1, &[(WINDOW, request.len() as u32, 0), (WINDOW + 4096, 4096, WRITE)]);
    let (_, written) = machine.await_used(1);
    let answer = place.read("f").split_off(4096);
    assert_eq!((fuse::u32_at(&answer, 0), fuse::u32_at(&answer, 4)), (written, 0));
    assert_eq!(fuse::u64_at(&answer, 8), fuse::UNIQUE);
}

#[test]
fn what_is_not_mapped_or_read_only_is_an_error() {
    let place = Place::new();
    // A program that nobody has open for writing is mapped for reading only.
    place.write("f", "data");
    fs::set_permissions(place.path("f"), fs::Permissions::from_mode(0o755)).unwrap();
    let (_backend, mut machine, node) = machine(&place, &pattern(9000), 0, 0);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    for buffers in [
        vec![(WINDOW + UNIT, 1)],
        vec![(WINDOW + UNIT - 1, 2)],
        vec![(WINDOW, 8), (WINDOW + 8 * MIB, 4096)],
        vec![(WINDOW + SIZE - 1, 1)],
        vec![(WINDOW + SIZE - 1, 2)],
        vec![(WINDOW + SIZE, 1)],
    ] {
        assert_eq!(write(&mut machine, to, &buffers), (libc::EFAULT, 0), "{buffers:x?}");
    }
    assert_eq!(place.read("to"), b"");
    let handle = machine.open(node, libc::O_RDONLY);
    for buffers in [vec![(WINDOW, 10)], vec![(WINDOW + UNIT, 10)]] {
        assert_eq!(read(&mut machine, (node, handle), &buffers).0, libc::EFAULT, "{buffers:x?}");
    }
    assert_eq!(place.read("f"), pattern(9000));
    // As before.
    assert_eq!(write(&mut machine, to, &[(WINDOW + 1, 8)]), (0, 8));
    assert_eq!(place.read("to"), pattern(9000)[1..9]);
}

#[test]
fn behind_the_end_of_a_file_are_zeroes_that_stay() {
    let place = Place::new();
    let (_backend, mut machine, _) = machine(&place, b"data", 1, 1);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    assert_eq!(write(&mut machine, to, &[(WINDOW + 2, 4), (WINDOW + 8192, 2)]), (0, 6));
    assert_eq!(place.read("to"), b"ta\0\0\0\0");
    place.write("from", "0123456789");
    let from = machine.lookup("from");
    let handle = machine.open(from, libc::O_RDONLY);
    assert_eq!(read(&mut machine, (from, handle), &[(WINDOW + 3, 5), (WINDOW + 8192, 5)]), (0, 10));
    assert_eq!(place.read("f"), b"dat0");
}

/// A program that has a file mapped has it open, too: the mapping lives on when the host has removed the
/// file. A guest that forgets a file has unmapped it before.
#[test]
fn a_mapping_is_found_without_its_name_but_not_without_its_node() {
    let place = Place::new();
    let (_backend, mut machine, node) = machine(&place, b"data", 1, 1);
    machine.open(node, libc::O_RDONLY);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    fs::remove_file(place.path("f")).unwrap();
    assert_eq!(write(&mut machine, to, &[(WINDOW, 4)]), (0, 4));
    assert_eq!(place.read("to"), b"data");

    place.write("g", "other");
    let node = machine.lookup("g");
    map(&mut machine, node, 0, UNIT, 0, 1);
    machine.send(0, fuse::FORGET, node, &fuse::quads([1]));
    machine.await_used(0);
    assert_eq!(machine.error(fuse::GETATTR, node, &fuse::quads([0, 0])), libc::ESTALE);
    assert_eq!(write(&mut machine, to, &[(WINDOW + UNIT, 4)]).0, libc::EFAULT);
}

/// SHM-80: ADD_MEM_REG behind that of the window is another device's, whose file may become shorter.
#[test]
fn what_other_devices_map_is_reached_by_its_file() {
    let place = Place::new();
    let (_backend, mut machine, _) = machine(&place, b"data", 0, 1);
    let file = file_with(&pattern(3 * 4096));
    machine.add_memory((SHARED, 8192), &file, 4096);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    let expected = [&pattern(3 * 4096)[4096 + 10..4096 + 20], b"da"].concat();
    assert_eq!(write(&mut machine, to, &[(SHARED + 10, 10), (WINDOW, 2)]), (0, 12));
    assert_eq!(place.read("to"), expected);
    assert_eq!(read(&mut machine, to, &[(SHARED + 4096, 12)]), (0, 12));
    let mut seen = vec![0; 12];
    file.read_exact_at(&mut seen, 8192).unwrap();
    assert_eq!(seen, expected);
    // Not a signal that ends it.
    file.set_len(4096).unwrap();
    assert_eq!(write(&mut machine, to, &[(SHARED, 12)]), (0, 12));
    assert_eq!(place.read("to"), [0; 12]);
    assert_eq!(read(&mut machine, to, &[(SHARED, 12)]), (0, 12));
    assert_eq!(file.metadata().unwrap().len(), 4096);
    machine.remove_memory((SHARED, 8192), &file, 4096);
    assert_eq!(write(&mut machine, to, &[(SHARED, 12)]).0, libc::EFAULT);
    assert_eq!(write(&mut machine, to, &[(WINDOW, 4)]), (0, 4));
}

/// A front-end that does not know the extension may tell of RAM so.
#[test]
fn without_the_windows_address_what_is_added_is_ram() {
    let place = Place::new();
    let backend = start(&place, "--window 64M");
    let mut machine = Machine::mounted(&backend);
    let file = file_with(&pattern(SIZE as usize));
    machine.add_memory((SHARED, SIZE), &file, 0);
    let to = machine.create("to", libc::O_RDWR, 0o600);
    assert_eq!(write(&mut machine, to, &[(SHARED + 5, 10)]), (0, 10));
    assert_eq!(place.read("to"), pattern(15)[5..]);
    assert_eq!(write(&mut machine, to, &[(WINDOW, 10)]).0, libc::EFAULT);
}
