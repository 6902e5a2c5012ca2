//! The back-end: it maps, unmaps and replaces as fast as it can, many requests ahead of their answers, and
//! knows after each answer what must be so. Raw bytes, as the other tests' back-ends.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use hotslot_guest::board::*;
use hotslot_test_support::wire::{MMap, NEED_REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, Wire, message};

use crate::page::Words;

const PAGE: u64 = 4096;
/// Each file has two halves, used in turns: so what a guest still reaches of the old one is seen for longer.
const HALF_WORDS: usize = LONGEST * PAGE_WORDS;
/// The most places that are changed at once.
const MOST_AT_ONCE: u64 = 16;
/// How often the guest is asked for a reset.
const RESET_EVERY: Duration = Duration::from_millis(100);
/// Longer than the guest takes for one on the slowest machine.
const RESET_PATIENCE: Duration = Duration::from_secs(60);

/// What was done.
#[derive(Default)]
pub struct Done {
    pub maps: u64,
    pub unmaps: u64,
    /// Requests that were wrong on purpose, or came while the device was reset.
    pub refused: u64,
    pub resets: u64,
    /// The longest that the answers to some requests at once took.
    pub slowest: Duration,
}

pub struct Churn<'a> {
    board: &'a Words,
    channel: Wire,
    places: Vec<Place>,
    random: u64,
    generation: u64,
    last_reset: Instant,
    pub done: Done,
}

struct Place {
    file: Words,
    half: usize,
    mapping: Option<Mapping>,
}

/// What is mapped at a place; while the guest resets the device, what may be.
#[derive(Clone, Copy)]
struct Mapping {
    half: usize,
    pages: usize,
    writable: bool,
    generation: u64,
    /// How many words each processor had written before.
    writes: [u64; CPUS],
}

/// A request, and the answers that are right.
struct Request {
    id: u32,
    place: usize,
    payload: MMap,
    right: &'static [i32],
}

impl Place {
    fn new() -> Place {
        let file = Words::new(2 * HALF_WORDS);
        (0..2 * HALF_WORDS).for_each(|index| file.set(index, POISON));
        Place { file, half: 0, mapping: None }
    }
}

impl Mapping {
    fn request(&self, id: u32, place: usize, right: &'static [i32]) -> Request {
        let payload = MMap {
            fd_offset: self.half as u64 * LONGEST as u64 * PAGE,
            shm_offset: (place * PLACE_WORDS * 8) as u64,
            len: self.pages as u64 * PAGE,
            flags: self.writable.into(),
            ..MMap::default()
        };
        Request { id, place, payload, right }
    }

    fn state(&self) -> u64 {
        let kind = if self.writable { READ_WRITE } else { READ_ONLY };
        state(kind, self.pages, self.generation)
    }
}

impl<'a> Churn<'a> {
    /// On a backend channel whose region 0 is the window.
    pub fn new(board: &'a Words, channel: Wire) -> Self {
        let mut churn = Churn {
            board,
            channel,
            places: (0..PLACES).map(|_| Place::new()).collect(),
            random: 1,
            generation: 0,
            last_reset: Instant::now(),
            done: Done::default(),
        };
        churn.unmap_all(&[0]);
        churn
    }

    /// Goes on for so long.
    pub fn run(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            self.change_some();
            if self.last_reset.elapsed() > RESET_EVERY {
                self.reset();
            }
        }
    }

    /// Everything unmapped.
    pub fn rest(&mut self) {
        self.unmap_all(&[0]);
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = random(self.random);
        (self.random >> 33) % below
    }

    fn writes(&self) -> [u64; CPUS] {
        std::array::from_fn(|cpu| self.board.get(report(cpu) + WRITES))
    }

    fn set_state(&self, place: usize, state: u64) {
        self.board.set(STATES + place, state);
    }

    /// Makes the place's other half ready to be mapped.
    fn prepare(&mut self, place: usize) -> Mapping {
        self.generation += 1;
        let mapping = Mapping {
            half: 1 - self.places[place].half,
            pages: 1 + self.random(LONGEST as u64) as usize,
            writable: self.random(3) > 0,
            generation: self.generation,
            writes: self.writes(),
        };
        let Place { file, half, .. } = &mut self.places[place];
        *half = mapping.half;
        for index in 0..HALF_WORDS {
            let at = mapping.half * HALF_WORDS + index;
            // SHM-56: nobody wrote there after the answer to SHMEM_UNMAP.
            assert_eq!(file.get(at), POISON, "place {place}, word {index}: written after SHMEM_UNMAP");
            if index < mapping.pages * PAGE_WORDS {
                let index = place * PLACE_WORDS + index;
                file.set(at, word(mapping.generation, BACKEND, index));
            }
        }
        mapping
    }

    /// Looks at what became of a file that is no longer mapped, and poisons it.
    fn retire(&self, place: usize, mapping: &Mapping) {
        let file = &self.places[place].file;
        let writes = self.writes();
        for index in 0..mapping.pages * PAGE_WORDS {
            let at = mapping.half * HALF_WORDS + index;
            let found = file.get(at);
            file.set(at, POISON);
            let index = place * PLACE_WORDS + index;
            let cpu = index % CPUS;
            let (first, last) = (mapping.writes[cpu], writes[cpu]);
            let by_guest = mapping.writable
                && found == word(count(found), cpu as u64 + 1, index)
                && count(found).wrapping_sub(first) & COUNT_MASK <= last - first;
            assert!(
                by_guest || found == word(mapping.generation, BACKEND, index),
                "place {place}, word {index:#x} of the window: {found:#x}; writable: {}, generation {:#x}, writes of its \
                 processor {first:#x} to {last:#x}",
                mapping.writable,
                mapping.generation
            );
        }
    }

    /// Sends requests ahead of their answers, then reads those.
    fn ask(&mut self, requests: &[Request]) {
        let start = Instant::now();
        for request in requests {
            let bytes = message(request.id, VERSION_1 | NEED_REPLY, &request.payload.bytes());
            let fd = self.places[request.place].file.file().as_raw_fd();
            let fds: &[_] = if request.id == SHMEM_MAP { &[fd] } else { &[] };
            self.channel.send_with(&bytes, fds).unwrap();
        }
        let mut answers = vec![0; requests.len() * 20];
        self.channel.socket().read_exact(&mut answers).unwrap();
        self.done.slowest = self.done.slowest.max(start.elapsed());
        for (request, answer) in requests.iter().zip(answers.chunks(20)) {
            // SHM-57, SHM-61: one each, in order.
            assert_eq!(answer[..12], message(request.id, 5, &[0; 8])[..12]);
            let value = i64::from_ne_bytes(answer[12..].try_into().unwrap());
            let right = request.right.iter().any(|&errno| i64::from(-errno) == value);
            let Request { id, place, payload, .. } = request;
            assert!(right, "request {id} at place {place} ({payload:?}): {value}");
            *match (value, request.id) {
                (0, SHMEM_MAP) => &mut self.done.maps,
                (0, _) => &mut self.done.unmaps,
                _ => &mut self.done.refused,
            } += 1;
        }
    }

    /// Changes some places at once.
    fn change_some(&mut self) {
        let (count, first) = (1 + self.random(MOST_AT_ONCE), self.random(PLACES as u64));
        let step = 1 + 2 * self.random(PLACES as u64 / 2);
        let (mut requests, mut changes) = (Vec::new(), Vec::new());
        for place in (0..count).map(|index| ((first + index * step) % PLACES as u64) as usize) {
            let old = self.places[place].mapping;
            let dice = self.random(16);
            let new = match (&old, dice) {
                // SHM-52: too long. SHM-35: in the way of itself. Nothing changes, so the state stays what it
                // is.
                (Some(old), 0) => {
                    let mut request = old.request(SHMEM_UNMAP, place, &[libc::ENOENT]);
                    request.payload.len += PAGE;
                    requests.push(request);
                    continue;
                }
                (Some(old), 1) => {
                    requests.push(old.request(SHMEM_MAP, place, &[libc::EEXIST]));
                    continue;
                }
                (Some(_), 2..=8) => None,
                _ => Some(self.prepare(place)),
            };
            self.set_state(place, state(CHANGING, 0, self.generation));
            requests.extend(old.iter().map(|old| old.request(SHMEM_UNMAP, place, &[0])));
            requests.extend(new.iter().map(|new| new.request(SHMEM_MAP, place, &[0])));
            changes.push((place, old, new));
        }
        self.ask(&requests);
        for (place, old, new) in changes {
            self.generation += 1;
            let unmapped = state(UNMAPPED, 0, self.generation);
            self.set_state(place, new.map_or(unmapped, |new| new.state()));
            self.places[place].mapping = new;
            if let Some(old) = old {
                self.retire(place, &old);
            }
        }
    }

    /// Has the guest reset the device, and maps and unmaps meanwhile.
    fn reset(&mut self) {
        let number = self.done.resets + 1;
        self.board.set(RESET_WANTED, number);
        let start = Instant::now();
        while self.board.get(RESET_PENDING) != number {
            assert!(start.elapsed() < RESET_PATIENCE, "the guest does not reset the device");
            self.change_some();
        }
        for place in 0..PLACES {
            self.set_state(place, state(CHANGING, 0, self.generation));
            if self.places[place].mapping.is_none() {
                self.places[place].mapping = Some(self.prepare(place));
            }
        }
        self.board.set(RESET_AGREED, number);
        while self.board.get(RESET_DONE) != number {
            assert!(start.elapsed() < RESET_PATIENCE, "the reset does not end");
            let requests: Vec<_> = (0..MOST_AT_ONCE)
                .filter_map(|_| {
                    let place = self.random(PLACES as u64) as usize;
                    let (id, right): (_, &[_]) = match self.random(2) {
                        0 => (SHMEM_MAP, &[0, libc::EBUSY, libc::EEXIST]),
                        _ => (SHMEM_UNMAP, &[0, libc::ENOENT]),
                    };
                    let mapping = self.places[place].mapping.as_ref()?;
                    Some(mapping.request(id, place, right))
                })
                .collect();
            self.ask(&requests);
        }
        self.unmap_all(&[0, libc::ENOENT]);
        self.done.resets = number;
        self.last_reset = Instant::now();
    }

    fn unmap_all(&mut self, right: &'static [i32]) {
        let mapped: Vec<_> =
            (0..PLACES).filter_map(|place| Some((place, self.places[place].mapping.take()?))).collect();
        for place in 0..PLACES {
            self.set_state(place, state(CHANGING, 0, self.generation));
        }
        let requests: Vec<_> =
            mapped.iter().map(|(place, mapping)| mapping.request(SHMEM_UNMAP, *place, right)).collect();
        self.ask(&requests);
        self.generation += 1;
        for place in 0..PLACES {
            self.set_state(place, state(UNMAPPED, 0, self.generation));
        }
        mapped.iter().for_each(|(place, mapping)| self.retire(*place, mapping));
    }
}
