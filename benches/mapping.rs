//! How long a valid MAP and a valid UNMAP take, from the request to its answer, and a reset: of each
//! hotslot that an argument `NAME=PROGRAM` names, and of a server that makes only the unavoidable system
//! calls (`bare`).
//!
//! One line of output for each figure: `name min median p99 max`, in nanoseconds. The samples are too many
//! for the console of an emulated host. A name is `OPERATION-RANGES-PAGES@NAME`. The ranges are the same
//! ones again and again, or new ones each time. `live` in it: while [`LIVE`] other mappings exist. The last
//! figures are single calls of the bare server.
//!
//! The guest is the tests' monitor. It does nothing meanwhile, not even wait in KVM_RUN: the back-end maps
//! before it answers a message of the device's start, and the vCPU waits for that answer.
//!
//! `scripts/bench.sh mapping` runs it on an emulated host whose clock counts instructions.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hotslot_test_support::backend::{Answer, Backend, Offer};
use hotslot_test_support::files::{MIB, PAGE, memfd};
use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::names::request::{RESET_DEVICE, SET_VRING_ADDR};
use hotslot_test_support::wire::{MMap, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, message};
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use rustix::mm::{self, MapFlags, ProtFlags};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recv, recvmsg, send, sendmsg,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Machines for each program, without and with many mappings.
const ROUNDS: usize = 2;
const LIVE_ROUNDS: usize = 1;
/// Pairs of MAP and UNMAP for each figure and machine, and those before them that do not count. The host's
/// clock ticks in one request of a hundred: with few samples it decides the 99th percentile.
const PAIRS: u64 = 1_000;
const WARM_UP: u64 = 20;
/// The same where each range is new: more than the ranges that hotslot keeps slots for.
const WARM_UP_NEW: u64 = 1_200;
/// The other mappings: a page each, at every second page from the start of the region, of a file of their
/// own, so that the descriptor of each pair is kept from MAP to UNMAP: of a file that is mapped already
/// hotslot closes a second descriptor before it answers the MAP.
const LIVE: u64 = 16_000;

/// The region, and where in it the pairs are: behind the other mappings.
const WINDOW: u64 = 256 * MIB;
const SAME: u64 = 2 * PAGE * LIVE;
const NEW: u64 = SAME + 4 * MIB;
/// Room for a descriptor as a control message.
const ROOM: usize = rustix::cmsg_space!(ScmRights(1));
/// The argument with which this program is the bare server, on its standard input.
const SERVE: &str = "--serve";
/// Times by the name of their figure.
type Samples = BTreeMap<String, Vec<Duration>>;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if arguments.first().is_some_and(|argument| argument == SERVE) {
        return serve();
    }
    // A program takes no more mappings than half of its descriptors. Without the right to raise the limit
    // the requests beyond it fail, with that reason.
    let most = getrlimit(Resource::Nofile).maximum.unwrap_or(0).max(4 * LIVE);
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), maximum: Some(most) });
    let mut samples = Samples::new();
    for round in 0..ROUNDS {
        let live = if round < LIVE_ROUNDS { vec![0, LIVE] } else { vec![0] };
        for live in live {
            samples.append_all(bare_round(live), "bare");
            for argument in &arguments {
                let (name, program) = argument.split_once('=').expect("NAME=PROGRAM");
                samples.append_all(round_of(program, live), name);
            }
        }
    }
    samples.append_all(calls(), "bare");
    for (name, mut times) in samples {
        times.sort_unstable();
        // As in `statistics` of scripts/bench.sh: the least that so many percent of the times do not exceed.
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1].as_nanos();
        println!("{name} {} {} {} {}", at(0), at(50), at(99), at(100));
    }
}

trait AppendAll {
    fn append_all(&mut self, other: Vec<(String, Duration)>, program: &str);
}

impl AppendAll for Samples {
    fn append_all(&mut self, other: Vec<(String, Duration)>, program: &str) {
        for (figure, time) in other {
            self.entry(format!("{figure}@{program}")).or_default().push(time);
        }
    }
}

/// One machine of a program, which may have options behind it.
fn round_of(program: &str, live: u64) -> Vec<(String, Duration)> {
    let (results, times) = mpsc::channel();
    let offer = Offer { regions: vec![(0, WINDOW)], ..Offer::default() };
    let backend = Backend::scripted(
        offer,
        Box::new(move |request, connection| {
            if request.request == SET_VRING_ADDR {
                pairs(&Client(connection.channel().socket()), live, &results);
            }
            Answer::Usual
        }),
    );
    let kernel = guest::kernel();
    let mut words = program.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["-m", "64M", "--debug-exit", "--vhost-user", &backend.device("device"), "-k"]);
    command.arg(kernel.path());
    let mut guest = Guest::spawn(command, None);
    guest.start_device();
    // All were sent before the start's last answer. The sender itself lives as long as the back-end.
    let mut times: Vec<_> = times.try_iter().collect();
    let begin = Instant::now();
    guest.reset_device();
    times.extend((live > 0).then(|| ("reset-live".to_string(), begin.elapsed())));
    guest.exit();
    times
}

/// The same requests to a bare server.
fn bare_round(live: u64) -> Vec<(String, Duration)> {
    let (mut child, socket) = bare_server();
    let (results, times) = mpsc::channel();
    let client = Client(&socket);
    pairs(&client, live, &results);
    if live > 0 {
        let time = client.ask(RESET_DEVICE, MMap::default(), None);
        results.send(("reset-live".to_string(), time)).unwrap();
    }
    drop(socket);
    child.wait().unwrap();
    times.try_iter().collect()
}

fn bare_server() -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    (command.arg(SERVE).stdin(OwnedFd::from(theirs)).spawn().unwrap(), ours)
}

/// Maps and unmaps; sends each figure's times.
fn pairs(client: &Client<'_>, live: u64, results: &mpsc::Sender<(String, Duration)>) {
    let (others, file) = (memfd(PAGE), memfd(2 * MIB));
    for place in 0..live {
        client.map(2 * PAGE * place, PAGE, &others);
    }
    let on_disk: File = tempfile::tempfile().unwrap();
    on_disk.set_len(PAGE).unwrap();
    let behind = if live > 0 { "-live" } else { "" };
    let pair = |figure: &str, place: u64, len: u64, file: &File, counts: bool| {
        let times = [("map", client.map(place, len, file)), ("unmap", client.unmap(place, len))];
        for (operation, time) in times.into_iter().filter(|_| counts) {
            results.send((format!("{operation}-{figure}{behind}"), time)).unwrap();
        }
    };
    for (figure, len, file) in
        [("same-4k", PAGE, &file), ("same-2m", 2 * MIB, &file), ("file-4k", PAGE, &on_disk)]
    {
        (0..WARM_UP + PAIRS).for_each(|number| pair(figure, SAME, len, file, number >= WARM_UP));
    }
    for number in 0..WARM_UP_NEW + PAIRS {
        pair("new-4k", NEW + 2 * PAGE * number, PAGE, &file, number >= WARM_UP_NEW);
    }
}

/// Sends a request and waits for the answer. Gives the time from the first system call to the second, the
/// last: what a debug build makes of the rest would be as much as hotslot's own time.
struct Client<'a>(&'a UnixStream);

impl Client<'_> {
    fn map(&self, shm_offset: u64, len: u64, file: &File) -> Duration {
        self.ask(SHMEM_MAP, MMap { shm_offset, len, ..MMap::default() }, Some(file.as_fd()))
    }

    fn unmap(&self, shm_offset: u64, len: u64) -> Duration {
        self.ask(SHMEM_UNMAP, MMap { shm_offset, len, ..MMap::default() }, None)
    }

    fn ask(&self, id: u32, request: MMap, file: Option<BorrowedFd<'_>>) -> Duration {
        let bytes = message(id, VERSION_1 | NEED_REPLY, &request.bytes());
        let (parts, mut answer) = ([IoSlice::new(&bytes)], [0; 20]);
        let mut space = [MaybeUninit::uninit(); ROOM];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(file.is_none() || control.push(SendAncillaryMessage::ScmRights(file.as_slice())));
        let begin = Instant::now();
        let sent = sendmsg(self.0, &parts, &mut control, SendFlags::empty());
        let received = recv(self.0, &mut answer[..], RecvFlags::WAITALL);
        let time = begin.elapsed();
        assert_eq!((sent, received.unwrap().1), (Ok(bytes.len()), answer.len()));
        assert_eq!(answer[..], message(id, VERSION_1 | REPLY, &[0; 8])[..], "it is refused");
        time
    }
}

/// Only the calls that no front-end with a slot for each mapping can avoid.
struct Bare {
    vm: VmFd,
    /// KVM takes other ways for a machine that has none.
    _vcpu: VcpuFd,
    window: *mut u8,
}

/// Where the guest sees the window of the bare server.
const GUEST: u64 = 4 << 30;

impl Bare {
    fn new() -> Bare {
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let mut quirk = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
        quirk.args[0] = u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL);
        // As hotslot: where KVM can do that.
        let _ = vm.enable_cap(&quirk);
        let vcpu = vm.create_vcpu(0).unwrap();
        let bare = Bare { vm, _vcpu: vcpu, window: std::ptr::null_mut() };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: without MAP_FIXED the kernel chooses unused addresses.
        let window =
            unsafe { mm::mmap_anonymous(bare.window.cast(), WINDOW as usize, ProtFlags::empty(), flags) };
        Bare { window: window.unwrap().cast(), ..bare }
    }

    fn slot(&self, slot: u32, offset: u64, len: u64) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: GUEST + offset,
            memory_size: len,
            userspace_addr: self.window as u64 + offset,
            ..Default::default()
        };
        // SAFETY: the range is in the window, which stays.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    fn map(&self, offset: u64, len: u64, file: &OwnedFd) {
        let (at, flags) = (self.window.wrapping_add(offset as usize), MapFlags::SHARED | MapFlags::FIXED);
        // SAFETY: the range is in the window, into which no reference goes.
        unsafe { mm::mmap(at.cast(), len as usize, ProtFlags::READ, flags, file, 0) }.unwrap();
    }

    fn reserve(&self, offset: u64, len: u64) {
        let at = self.window.wrapping_add(offset as usize);
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: as above.
        unsafe { mm::mmap_anonymous(at.cast(), len as usize, ProtFlags::empty(), flags) }.unwrap();
    }
}

/// Serves MAP, UNMAP and RESET_DEVICE on standard input until the other end is closed; answers all else.
/// A place has its own slot, so that there is nothing to look up.
fn serve() {
    let (bare, socket) = (Bare::new(), std::io::stdin());
    let slot_at = |offset: u64| (offset / (2 * PAGE)) as u32;
    let mut lengths = vec![0; slot_at(WINDOW) as usize];
    let (mut request, mut answer) = ([0; 52], [0; 20]);
    loop {
        let mut space = [MaybeUninit::uninit(); ROOM];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let parts = &mut [IoSliceMut::new(&mut request)];
        let received = recvmsg(&socket, parts, &mut control, RecvFlags::empty()).unwrap();
        if received.bytes == 0 {
            return;
        }
        assert_eq!(received.bytes, request.len(), "requests come whole");
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        let field = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let id = u32::from_ne_bytes(request[..4].try_into().unwrap());
        let (offset, len) = (field(28), field(36));
        let slot = slot_at(offset);
        match id {
            SHMEM_MAP => {
                bare.map(offset, len, &file.unwrap());
                bare.slot(slot, offset, len);
                lengths[slot as usize] = len;
            }
            SHMEM_UNMAP => {
                bare.slot(slot, offset, 0);
                bare.reserve(offset, len);
                lengths[slot as usize] = 0;
            }
            RESET_DEVICE => {
                for slot in (0..).zip(&lengths).filter(|(_, len)| **len > 0).map(|(slot, _)| slot) {
                    bare.slot(slot, u64::from(slot) * 2 * PAGE, 0);
                }
                bare.reserve(0, WINDOW);
            }
            _ => {}
        }
        answer[..12].copy_from_slice(&request[..12]);
        answer[4..12].copy_from_slice(&(u64::from(VERSION_1 | REPLY) | 8 << 32).to_ne_bytes());
        assert_eq!(send(&socket, &answer, SendFlags::empty()), Ok(answer.len()));
    }
}

/// The bare server's calls one by one, and a request that does nothing.
fn calls() -> Vec<(String, Duration)> {
    let mut times = Vec::new();
    let (bare, file) = (Bare::new(), OwnedFd::from(memfd(PAGE)));
    let (mut child, socket) = bare_server();
    let client = Client(&socket);
    for number in 0..WARM_UP + PAIRS {
        let calls = [
            ("mmap", time(|| bare.map(SAME, PAGE, &file))),
            ("add-slot", time(|| bare.slot(0, SAME, PAGE))),
            ("delete-slot", time(|| bare.slot(0, SAME, 0))),
            ("reserve", time(|| bare.reserve(SAME, PAGE))),
            ("round-trip", client.ask(0, MMap::default(), Some(file.as_fd()))),
        ];
        let counted = calls.into_iter().filter(|_| number >= WARM_UP);
        times.extend(counted.map(|(figure, time)| (format!("call-{figure}"), time)));
    }
    drop(socket);
    child.wait().unwrap();
    times
}

fn time(call: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    call();
    begin.elapsed()
}
