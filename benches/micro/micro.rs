//! What hotslot's own part of a MAP costs, without KVM: the codec, the ledger, and the backend channel
//! beside the bare system calls of the same exchange.
//!
//! `scripts/bench.sh micro` runs it, and makes figures `GROUP@FUNCTION` of what `criterion` leaves.

#![allow(clippy::unwrap_used)] // As in tests.

use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::fs::File;
use std::hint::black_box;
use std::io::{IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use criterion::{Criterion, criterion_group, criterion_main};
use hotslot::memory::ledger::Ledger;
use hotslot::memory::{Access, PAGE_SIZE};
use hotslot::vhost_user::wire::channel::{Channel, Handler};
use hotslot::vhost_user::wire::message::{BackendRequest, Header, Layout, MMap, protocol_features};
use hotslot::vhost_user::wire::negotiate::Agreement;
use hotslot_test_support::files::memfd;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, send, sendmsg,
};

const MAP: MMap = MMap { shmid: 0, padding: [0; 7], fd_offset: 0, shm_offset: 0, len: PAGE_SIZE, flags: 1 };
const REQUEST: usize = Header::LEN + MMap::LEN;
const ANSWER: usize = Header::LEN + u64::LEN;

criterion_group!(benches, codec, ledger, channel);
criterion_main!(benches);

/// A SHMEM_MAP with NEED_REPLY.
fn request() -> Vec<u8> {
    [Header::request(BackendRequest::ShmemMap as u32, MMap::LEN, true).encode(), MAP.encode()].concat()
}

fn codec(criterion: &mut Criterion) {
    criterion.benchmark_group("micro-encode").bench_function("hotslot", |bench| bench.iter(request));
    let bytes = request();
    criterion.benchmark_group("micro-decode").bench_function("hotslot", |bench| {
        bench.iter(|| {
            let mut bytes = black_box(&bytes[..]);
            (Header::take(&mut bytes).unwrap(), MMap::decode(bytes).unwrap())
        });
    });
}

/// A mapping is admitted, recorded and removed, with so many others beside it.
fn ledger(criterion: &mut Criterion) {
    for (name, others) in [("micro-ledger", 0), ("micro-ledger-16000", 16_000)] {
        let mut ledger = Ledger::new([(0, 1 << 40)], usize::MAX, u64::MAX);
        for index in 0..others {
            ledger.insert((0, index * 2 * PAGE_SIZE), PAGE_SIZE, 0, Access::ReadOnly, ());
        }
        let key = (0, (others + 1) * PAGE_SIZE);
        criterion.benchmark_group(name).bench_function("hotslot", |bench| {
            bench.iter(|| {
                ledger.admit(black_box(key), PAGE_SIZE, 0).unwrap();
                ledger.insert(key, PAGE_SIZE, 0, Access::ReadOnly, ());
                ledger.remove(key)
            });
        });
    }
}

/// Closes the file, and does nothing else.
struct Nothing;

impl Handler for Nothing {
    type Error = Infallible;

    fn map(&self, _: &MMap, _: OwnedFd) -> Result<(), Infallible> {
        Ok(())
    }

    fn unmap(&self, _: &MMap) -> Result<(), Infallible> {
        Ok(())
    }

    fn config_changed(&self) {}

    fn errno(error: &Infallible) -> i32 {
        match *error {}
    }

    fn refused(&self, _: fmt::Arguments<'_>, _: i32, _: &dyn Error) {}
}

/// A MAP with its descriptor and the answer, over a socket pair, both ends on one thread: by a
/// [`Channel`], and by the system calls alone.
fn channel(criterion: &mut Criterion) {
    let (bytes, file) = (request(), memfd(PAGE_SIZE));
    let mut group = criterion.benchmark_group("micro-channel");
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let agreement = Agreement {
        protocol_features: Some(protocol_features::REPLY_ACK),
        shmem: true,
        ..Agreement::default()
    };
    let channel = Channel::new(&agreement, ours, Nothing, None);
    group.bench_function("hotslot", |bench| {
        bench.iter(|| {
            send_with(&theirs, &bytes, &file);
            channel.serve().unwrap();
            receive_answer(&mut theirs)
        });
    });
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    group.bench_function("bare", |bench| {
        bench.iter(|| {
            send_with(&theirs, &bytes, &file);
            drop(receive_with(&ours));
            send(&ours, &[0; ANSWER], SendFlags::NOSIGNAL).unwrap();
            receive_answer(&mut theirs)
        });
    });
}

fn send_with(socket: &UnixStream, bytes: &[u8], file: &File) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, REQUEST);
}

fn receive_with(socket: &UnixStream) -> OwnedFd {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [0; REQUEST];
    let flags = RecvFlags::CMSG_CLOEXEC;
    recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).unwrap();
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    files.flatten().next().unwrap()
}

fn receive_answer(socket: &mut UnixStream) -> [u8; ANSWER] {
    let mut answer = [0; ANSWER];
    socket.read_exact(&mut answer).unwrap();
    answer
}
