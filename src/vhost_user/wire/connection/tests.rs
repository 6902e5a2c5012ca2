use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::*;

const SOON: Duration = Duration::from_secs(10);
const USUAL: usize = 40;

/// Our end, as of a backend channel, and the peer's as a plain socket.
fn pair() -> (Connection, UnixStream) {
    pair_allowing(Descriptors::One)
}

fn pair_allowing(allowed: Descriptors) -> (Connection, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Connection::new(ours, USUAL, allowed), theirs)
}

fn bytes(request: u32, flags: u32, size: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, flags, size].map(u32::to_ne_bytes).concat();
    [&header, payload].concat()
}

fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    bytes(request, 1, payload.len() as u32, payload)
}

/// A file that can be told from others by its inode.
fn file() -> (File, u64) {
    let file = tempfile::tempfile().unwrap();
    let inode = file.metadata().unwrap().ino();
    (file, inode)
}

fn send(socket: &UnixStream, bytes: &[u8], files: &[&File]) {
    let fds: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    assert_eq!(socket.send_with_fds(&[bytes], &fds).unwrap(), bytes.len());
}

fn next(connection: &mut Connection) -> Message {
    connection.try_receive().unwrap().expect("a whole message is there")
}

fn inodes(message: &Message) -> Vec<u64> {
    let inode = |fd: &OwnedFd| File::from(fd.try_clone().unwrap()).metadata().unwrap().ino();
    message.file.iter().map(inode).collect()
}

#[test]
fn a_message_is_whole_however_it_was_cut() {
    // SHM-65
    for len in [0, 8, 40, 41, 2056] {
        let payload: Vec<u8> = (0..len).map(|n| n as u8).collect();
        let whole = message(7, &payload);
        for cut in (1..whole.len()).filter(|cut| whole.len() < 100 || cut % 41 == 1) {
            let (mut ours, mut theirs) = pair();
            theirs.write_all(&whole[..cut]).unwrap();
            assert!(ours.try_receive().unwrap().is_none());
            assert!(ours.position() < ours.end_of_queue().unwrap() && !ours.has_message());
            theirs.write_all(&whole[cut..]).unwrap();
            let message = next(&mut ours);
            assert_eq!((message.header.request, message.payload), (7, payload.clone()));
            assert_eq!(ours.position(), ours.end_of_queue().unwrap());
            assert!(ours.try_receive().unwrap().is_none());
        }
    }
}

#[test]
fn messages_that_come_together_are_taken_one_by_one() {
    // SHM-61
    let (mut ours, mut theirs) = pair();
    let sizes = [0, 40, 3, 0, 0, 100, 40];
    let all: Vec<u8> = (1..).zip(sizes).flat_map(|(id, size)| message(id, &vec![id as u8; size])).collect();
    theirs.write_all(&all).unwrap();
    for (id, size) in (1..).zip(sizes) {
        let message = next(&mut ours);
        assert_eq!((message.header.request, message.payload), (id, vec![id as u8; size]));
    }
    assert!(ours.try_receive().unwrap().is_none());
}

#[test]
fn descriptors_belong_to_the_message_that_they_were_sent_with() {
    // SHM-27: whatever the sizes are, that is, wherever reads end.
    let [(a, a_inode), (b, b_inode)] = [file(), file()];
    for first in [0, 8, 28, 39, 40, 41, 60] {
        for second in [0, 8, 40, 41] {
            let (mut ours, theirs) = pair();
            send(&theirs, &message(1, &vec![0; first]), &[]);
            send(&theirs, &message(2, &vec![0; second]), &[&a]);
            send(&theirs, &message(3, &vec![0; first]), &[&b, &a]);
            send(&theirs, &message(4, &vec![0; second]), &[]);
            let got = [(); 4].map(|()| inodes(&next(&mut ours)));
            let expected = [vec![], vec![a_inode], vec![b_inode], vec![]];
            assert_eq!(got, expected, "{first} and {second} bytes");
        }
    }
}

#[test]
fn a_descriptor_may_come_with_any_part_of_its_message() {
    // SHM-65
    let (a, inode) = file();
    let whole = message(9, &[0; 40]);
    for cut in 1..whole.len() {
        for with_first in [true, false] {
            let (mut ours, theirs) = pair();
            let (first, second): (&[&File], &[&File]) = if with_first { (&[&a], &[]) } else { (&[], &[&a]) };
            send(&theirs, &whole[..cut], first);
            if cut % 2 == 0 {
                assert!(ours.try_receive().unwrap().is_none());
            }
            send(&theirs, &whole[cut..], second);
            send(&theirs, &message(10, &[]), &[]);
            assert_eq!(inodes(&next(&mut ours)), [inode], "cut at {cut}");
            assert!(inodes(&next(&mut ours)).is_empty());
        }
    }
}

#[test]
fn one_descriptor_is_taken_and_closes_on_exec_and_others_are_lost() {
    // SHM-27, SHM-28, SHM-84
    let (a, _) = file();
    for count in [0, 1, 2, 3, MAX_FDS] {
        let (mut ours, theirs) = pair();
        send(&theirs, &message(9, &[0; 40]), &vec![&a; count]);
        let message = next(&mut ours);
        assert_eq!((message.file.is_some(), message.files_lost), (count > 0, count > 1), "{count}");
        if let Some(fd) = &message.file {
            // SAFETY: the descriptor is open.
            let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        }
    }
}

#[test]
fn each_byte_with_descriptors_leaves_one_for_its_message_and_one_for_the_next() {
    // SHM-48, SHM-84
    let (mut ours, theirs) = pair();
    let (a, _) = file();
    let (b, inode) = file();
    for byte in message(9, &[]) {
        send(&theirs, &[byte], &[&a; 100]);
    }
    send(&theirs, &message(10, &[]), &[&b]);
    let first = next(&mut ours);
    assert!(first.file.is_some() && first.files_lost);
    let second = next(&mut ours);
    assert_eq!((inodes(&second), second.files_lost), (vec![inode], false));
}

#[test]
fn where_none_is_allowed_what_has_one_is_never_read() {
    // SHM-84: nobody can make a vCPU close a descriptor.
    let (mut ours, theirs) = pair_allowing(Descriptors::None);
    let (a, _) = file();
    send(&theirs, &message(8, &[1; 8]), &[]);
    assert_eq!(next(&mut ours).header.request, 8);
    let whole = message(9, &[0; 8]);
    send(&theirs, &whole, &[&a]);
    for _ in 0..2 {
        assert!(matches!(ours.try_receive(), Err(ConnectionError::Descriptors)));
    }
    assert_eq!(ours.end_of_queue().unwrap() - ours.position(), whole.len() as u64);
}

#[test]
fn a_hang_up_is_clean_between_messages_only() {
    // SHM-64
    let (mut ours, mut theirs) = pair();
    theirs.write_all(&message(1, &[0; 8])).unwrap();
    drop(theirs);
    next(&mut ours);
    assert!(matches!(ours.try_receive(), Err(ConnectionError::HungUp)));
    assert!(matches!(ours.receive(Deadline::after(SOON)), Err(ConnectionError::HungUp)));
    for cut in [1, 11, 12, 19] {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(&message(1, &[0; 8])[..cut]).unwrap();
        drop(theirs);
        let error = ours.receive(Deadline::after(SOON)).unwrap_err();
        assert!(matches!(error, ConnectionError::HungUpInside(count) if count == cut), "{error}");
    }
    // What we sent is unread when the peer closes: the kernel calls that a reset.
    let (mut ours, theirs) = pair();
    ours.send(Header::request(1, 0, false), &[], &[], Deadline::after(SOON)).unwrap();
    drop(theirs);
    assert!(matches!(ours.try_receive(), Err(ConnectionError::HungUp)));
    let sent = ours.send(Header::request(1, 0, false), &[], &[], Deadline::after(SOON));
    assert!(matches!(sent, Err(ConnectionError::HungUp)));
}

#[test]
fn what_is_no_message_is_an_error_as_soon_as_its_header_is_there() {
    // SHM-64
    let read = |bytes: &[u8]| {
        let (mut ours, mut theirs) = pair();
        theirs.write_all(bytes).unwrap();
        ours.try_receive().unwrap_err()
    };
    for version in [0, 2, 3] {
        let error = read(&bytes(5, version, 0, &[]));
        assert!(matches!(error, ConnectionError::Version { request: 5, version: v } if v == version));
    }
    for size in [MAX_PAYLOAD as u32 + 1, 1 << 31, u32::MAX] {
        let error = read(&bytes(5, 1, size, &[]));
        assert!(matches!(error, ConnectionError::Oversized { request: 5, size: s } if s == size));
    }
    // Once seen it stays: the stream is out of step.
    let (mut ours, mut theirs) = pair();
    theirs.write_all(&bytes(5, 2, 0, &[])).unwrap();
    for _ in 0..2 {
        assert!(ours.try_receive().is_err() && ours.has_message());
    }
}

#[test]
fn waiting_ends_at_the_deadline() {
    let (mut ours, mut theirs) = pair();
    let soon = || Deadline::after(Duration::from_millis(20));
    let error = ours.receive(soon()).unwrap_err();
    assert!(matches!(error, ConnectionError::TimedOut(limit) if limit.as_millis() == 20));
    theirs.write_all(&message(1, &[0; 8])[..15]).unwrap();
    assert!(matches!(ours.receive(soon()), Err(ConnectionError::TimedOut(_))));
    // Nobody takes what we send.
    let header = Header::request(1, MAX_PAYLOAD, false);
    let sent = (0..10_000).find_map(|_| ours.send(header, &[0; MAX_PAYLOAD], &[], soon()).err());
    assert!(matches!(sent, Some(ConnectionError::TimedOut(_))));
}

#[test]
fn what_is_sent_is_the_header_the_payload_and_the_descriptors() {
    let (ours, theirs) = pair();
    let (a, inode) = file();
    let (header, payload) = (Header::request(21, 3, true), [7, 8, 9]);
    ours.send(header, &payload, &[a.as_fd()], Deadline::after(SOON)).unwrap();
    let mut buffer = [0; 64];
    let (count, received) = theirs.recv_with_fd(&mut buffer[..]).unwrap();
    assert_eq!(buffer[..count], bytes(21, 0x9, 3, &payload));
    assert_eq!(received.unwrap().metadata().unwrap().ino(), inode);
    let too_many = vec![a.as_fd(); MAX_FDS + 1];
    let error = ours.send(header, &payload, &too_many, Deadline::after(SOON));
    assert!(matches!(error, Err(ConnectionError::Io(_))));
}

#[test]
fn what_has_no_room_at_once_is_sent_in_pieces_with_its_descriptors_once() {
    // SHM-65: a socket that takes less than the message.
    let (ours, theirs) = pair();
    let payload: Vec<u8> = (0..1 << 20).map(|n: u32| (n >> 8) as u8).collect();
    let header = Header::request(21, payload.len(), false);
    let (a, _) = file();
    let (mut read, mut fds) = (Vec::<u8>::new(), 0);
    std::thread::scope(|scope| {
        let sent = scope.spawn(|| ours.send(header, &payload, &[a.as_fd()], Deadline::after(SOON)));
        let whole = Header::LEN + payload.len();
        while read.len() < whole {
            wait(theirs.as_fd(), PollFlags::IN, Deadline::after(SOON)).unwrap();
            let mut piece = [0; 1 << 16];
            let (count, received, _) = receive_some(&theirs, &mut piece, true).unwrap();
            read.extend(&piece[..count]);
            fds += received.iter().count();
        }
        sent.join().unwrap().unwrap();
    });
    assert!(read == message(21, &payload), "other bytes than were sent");
    assert_eq!(fds, 1);
}
