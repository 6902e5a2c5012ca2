//! Answers on the main socket: a device connects, negotiates, starts, stops, resets, all in the orders that a
//! driver can cause, while its back-end answers what the fuzzer says.
//!
//! The input's beginning says what the back-end offers, and what the driver does ([`drive`]); the rest is one
//! [`Deviation`] after the other, one for each request. When there are no more the back-end does the usual,
//! so that no bytes at all are a good back-end. It answers, or hangs up: it is never silent.
//!
//! What must hold, beyond that nothing panics and everything comes to an end: nothing times out; what is
//! learned of a back-end is within the limits (SHM-12 to SHM-16); after a reset nothing is mapped, whatever
//! came on the backend channel meanwhile (SHM-69, SHM-71); at the end no descriptor is left (SHM-78).

#![no_main]

use std::collections::BTreeSet;
use std::error::Error;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::sync::mpsc;

use hotslot::report::with_causes;
use hotslot::virtio::device::{QueueSetup, VirtioDevice};
use hotslot_fuzz::{Input, descriptors, log_to_nobody};
use hotslot_test_support::bench::{self, Answer, Bench, Connection, PAGE, Setup};
use hotslot_test_support::names::*;
use hotslot_test_support::wire::{self, MMap, Message, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    log_to_nobody();
    // A busy machine can keep the back-end from answering for seconds, but not each time.
    assert!((0..3).any(|_| ends_in_time(data)), "nobody was silent, and the device timed out");
});

/// Whether no deadline was reached.
fn ends_in_time(data: &[u8]) -> bool {
    let before = descriptors();
    let mut input = Input::new(data);
    let mut setup = Setup::default();
    setup.kind = input.pick(&["rng", "fs", "pmem", "blk", "200"]);
    offer(&mut setup, &mut input);
    let actions = input.byte() % 8;
    let actions: Vec<_> = (0..actions).map(|_| (input.byte(), input.offset())).collect();

    // The back-end's thread holds it, in its script.
    let (running, ended) = mpsc::channel::<()>();
    let mut deviations = Deviations::new(input);
    let (handshake, backend) = setup
        .script(move |request, peer| {
            let _ = &running;
            deviations.answer(request, peer)
        })
        .connect();
    let in_time = match handshake {
        Ok(handshake) => {
            assert!(handshake.region_sizes.len() <= 256 && handshake.config.len() <= 0xf00);
            assert_eq!(handshake.queue_sizes.len(), 2);
            match backend.device(handshake) {
                Ok(bench) => drive(bench, &actions),
                Err(error) => !is_timeout(&*error),
            }
        }
        Err(error) => {
            // It holds the script, for a back-end that comes back.
            drop(backend);
            !is_timeout(&error)
        }
    };
    assert!(ended.recv().is_err());
    bench::eventually("descriptors are given back", || descriptors() == before);
    in_time
}

/// What the back-end offers: the usual, unless the first byte says otherwise.
fn offer(setup: &mut Setup, input: &mut Input) {
    let what = input.byte();
    let offer = &mut setup.offer;
    // What persistent memory needs.
    offer.features |= 1;
    if setup.kind == "blk" || setup.kind == "fs" || what & 1 != 0 {
        offer.protocol |= PROTOCOL_F_CONFIG;
    }
    if what & 2 != 0 {
        offer.protocol &= !input.quad();
    }
    if what & 4 != 0 {
        offer.features ^= input.quad();
    }
    if what & 8 != 0 {
        offer.queues = input.quad();
    }
    if what & 16 != 0 {
        offer.regions = (0..input.byte() % 8).map(|_| (input.byte(), input.offset())).collect();
    }
}

fn is_timeout(error: &(dyn Error + 'static)) -> bool {
    with_causes(error).contains("did not answer within")
}

/// What a driver can make the transport do, in the states in which it can (see `VirtioDevice`). Whether no
/// deadline was reached.
fn drive(bench: Bench, actions: &[(u8, u64)]) -> bool {
    let mut state = Driver { bench, started: None, failed: false, in_time: true };
    // However short the input is.
    state.act(0, 0);
    for &(what, value) in actions {
        if state.in_time {
            state.act(what, value);
        }
    }
    state.reset();
    state.bench.end();
    state.in_time
}

struct Driver {
    bench: Bench,
    /// The queues that run, once the device does.
    started: Option<BTreeSet<u16>>,
    /// Only a reset goes on from here.
    failed: bool,
    in_time: bool,
}

impl Driver {
    fn act(&mut self, what: u8, value: u64) {
        let index = u16::from(what >> 7);
        let has_queue = self.started.as_ref().map(|queues| queues.contains(&index));
        let result = match (what % 8, has_queue) {
            (0..2, None) => {
                let count = 2 - u16::from(what >> 6 & 1);
                self.started = Some((0..count).collect());
                let queues = [self.bench.queue(0), displaced(self.bench.queue(1), value)];
                let features = VIRTIO_F_VERSION_1 | value;
                self.bench.device().start(features, &queues[..count.into()])
            }
            (2..4, _) => return self.reset(),
            (4, Some(true)) if !self.failed => {
                self.queues().remove(&index);
                self.bench.device().stop_queue(index)
            }
            (5, Some(false)) if !self.failed => {
                self.queues().insert(index);
                let queue = displaced(self.bench.queue(index), value);
                self.bench.device().start_queue(queue)
            }
            (6, _) => {
                let len = usize::from(what >> 5) + 1;
                let data = &value.to_le_bytes()[..len];
                self.bench.device().write_config(value % 300, data)
            }
            _ => return,
        };
        if let Err(error) = result {
            self.in_time &= !is_timeout(&*error);
            self.failed = true;
        }
    }

    fn queues(&mut self) -> &mut BTreeSet<u16> {
        self.started.get_or_insert_default()
    }

    fn reset(&mut self) {
        self.bench.reset();
        assert_eq!(self.bench.guest().count(), 0, "a mapping outlived the reset");
        (self.started, self.failed) = (None, false);
    }
}

/// A queue some way from where it is well placed, maybe outside RAM. The transport has checked the alignment.
fn displaced(queue: QueueSetup, by: u64) -> QueueSetup {
    let by = by & !0xf;
    QueueSetup {
        descriptors: queue.descriptors.wrapping_add(by),
        driver_area: queue.driver_area.wrapping_add(by),
        device_area: queue.device_area.wrapping_add(by.rotate_left(8) & !0xf),
        ..queue
    }
}

/// What the back-end does instead of the usual.
struct Deviations {
    input: Input,
    has_channel: bool,
}

impl Deviations {
    fn new(input: Input) -> Deviations {
        Deviations { input, has_channel: false }
    }

    fn answer(&mut self, request: &Message, peer: &Connection) -> Answer {
        self.has_channel |= request.request == request::SET_BACKEND_REQ_FD;
        let reply = |payload: &[u8]| wire::message(request.request, VERSION_1 | REPLY, payload);
        while self.input.has_more() {
            match self.input.byte() % 12 {
                0..3 => return Answer::Usual,
                // Well formed, and not what was meant.
                3 => {
                    let value = self.input.quad();
                    return Answer::Bytes(reply(&wire::quads([value])), None);
                }
                4 => {
                    let len = usize::from(self.input.byte()) * usize::from(self.input.byte() % 18);
                    let mut payload = self.input.bytes(len.min(64));
                    payload.resize(len.min(4096), 0);
                    return Answer::Bytes(reply(&payload), None);
                }
                5 => {
                    let regions: Vec<_> = (0..self.input.byte() % 8)
                        .map(|_| (self.input.byte(), self.input.offset()))
                        .collect();
                    let payload = wire::shmem_config(self.input.word(), self.input.word(), &regions);
                    return Answer::Bytes(reply(&payload), None);
                }
                6 => return Answer::Bytes(reply(&request.payload), Some(bench::memfd(0))),
                // Anything, and then the end: who waits for the rest must not.
                7 => {
                    let [id, flags, size] = [request.request, VERSION_1 | REPLY, 8];
                    let other = [self.input.byte(), self.input.byte(), self.input.byte()].map(u32::from);
                    let header = wire::words([id ^ other[0], flags ^ other[1], size ^ other[2]]);
                    let len = usize::from(self.input.byte());
                    let bytes = [header, self.input.bytes(len)].concat();
                    return last_words(peer, &bytes);
                }
                8 => {
                    let len = usize::from(self.input.byte());
                    return last_words(peer, &self.input.bytes(len));
                }
                9 => return Answer::HangUp,
                // First, something on the backend channel.
                _ if self.has_channel => self.use_channel(peer),
                _ => {}
            }
        }
        Answer::Usual
    }

    /// A request on the backend channel, mostly one that does something. Nobody waits for its answer.
    fn use_channel(&mut self, peer: &Connection) {
        let what = self.input.byte();
        let request = MMap {
            shm_offset: self.input.offset(),
            len: PAGE,
            flags: u64::from(what >> 1 & 1),
            ..MMap::default()
        };
        let (id, file) = match what % 4 {
            3 => (SHMEM_UNMAP, None),
            _ => (SHMEM_MAP, Some(bench::memfd(PAGE))),
        };
        let need_reply = if what & 0x10 == 0 { NEED_REPLY } else { 0 };
        let mut bytes = wire::message(id, VERSION_1 | need_reply, &request.bytes());
        if what & 0xc0 == 0xc0 {
            // Only its beginning.
            bytes.truncate(usize::from(self.input.byte() % 51) + 1);
        }
        let fds: Vec<_> = file.iter().map(AsRawFd::as_raw_fd).collect();
        // The device may have hung up.
        let _ = peer.channel().send_with(&bytes, &fds);
    }
}

/// Sends bytes, and hangs up behind them.
fn last_words(peer: &Connection, bytes: &[u8]) -> Answer {
    let _ = peer.main().send_with(bytes, &[]);
    let _ = peer.main().socket().shutdown(Shutdown::Write);
    Answer::Silence
}
