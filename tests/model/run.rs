//! Carries operations out on a device behind real sockets, and on the model, and compares: answers, slots,
//! bookkeeping, every byte that the guest looks at; after each reset what the process has of the host.

use std::fs::File;
use std::ops::AddAssign;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use hotslot::memory::Access;
use hotslot::memory::alloc::WindowAllocator;
use hotslot::memory::shmem::{Filled, MappingInfo, Page};
use hotslot_test_support::bench::*;
use hotslot_test_support::machine::{Machine, WINDOWS};
use hotslot_test_support::process::{areas, descriptors, threads};
use hotslot_test_support::wire::{MMap, NEED_REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, message};

use crate::model::{Found, Key, Model};
use crate::operation::*;

/// How often something happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub operations: usize,
    pub sequences: usize,
    pub mapped: usize,
    pub unmapped: usize,
    pub refused: usize,
    pub read: usize,
    pub written: usize,
    pub filled: usize,
    pub resets: usize,
    pub deaths: usize,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.operations += other.operations;
        self.sequences += other.sequences;
        self.mapped += other.mapped;
        self.unmapped += other.unmapped;
        self.refused += other.refused;
        self.read += other.read;
        self.written += other.written;
        self.filled += other.filled;
        self.resets += other.resets;
        self.deaths += other.deaths;
    }
}

/// What the process has of the host.
#[derive(Debug, PartialEq)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    areas: Vec<String>,
}

impl Holdings {
    fn now() -> Holdings {
        Holdings { descriptors: descriptors(), threads: threads(), areas: areas("self") }
    }
}

struct Run<'a> {
    machine: &'a mut Machine,
    bench: Bench,
    /// With the device, while nothing is mapped.
    idle: Holdings,
    model: Model,
    /// Open for writing, and only for reading.
    files: Vec<(File, File)>,
    /// No regular file.
    device: File,
    counts: Counts,
}

/// Carries a sequence out.
pub fn run(machine: &mut Machine, operations: &[Operation]) -> Counts {
    let files: Vec<_> = (0..FILES).map(|_| store()).collect();
    let zeroes = File::open("/dev/zero").unwrap();
    let before = Holdings::now();
    let bench = device(machine);
    let idle = Holdings::now();
    let mut run = Run {
        machine,
        bench,
        idle,
        model: Model::default(),
        files,
        device: zeroes,
        counts: Counts { sequences: 1, ..Counts::default() },
    };
    for (file, size) in [0, LONGEST / 2, LONGEST].into_iter().enumerate() {
        run.resize(file, size);
        for page in 0..size / PAGE {
            run.store(file, page * PAGE + 7 * page, (16 * file as u64 + page + 1) as u8);
        }
    }
    for operation in operations {
        run.counts.operations += operation.count();
        run.carry_out(operation);
        run.compare();
    }
    run.look_everywhere();
    run.reset();
    let Run { bench, counts, .. } = run;
    drop(bench.end());
    eventually("the back-end's thread ends", || threads() == before.threads);
    assert_eq!(Holdings::now(), before, "what is left at the end"); // SHM-78
    counts
}

/// An empty file in memory, open for writing and only for reading.
fn store() -> (File, File) {
    let file = memfd(0);
    let reader = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    (file, reader)
}

fn device(machine: &Machine) -> Bench {
    let mut setup = Setup::default();
    setup.offer.regions = REGIONS.to_vec();
    setup.quota = QUOTA;
    setup.guest = Arc::new(machine.guest());
    setup.windows = WindowAllocator::new(WINDOWS.0, WINDOWS.1);
    setup.start()
}

impl Run<'_> {
    fn carry_out(&mut self, operation: &Operation) {
        match operation {
            Operation::Requests { requests, slots } => self.request(requests, *slots),
            Operation::Reset { late, start } => {
                let answers = self.send(late, true, |request| request.answer);
                self.reset();
                let channel = self.bench.channel();
                for (id, _) in answers {
                    // SHM-71: each is answered, one way or the other.
                    channel.answer(id);
                }
                if *start {
                    self.start();
                }
            }
            Operation::Start => self.start(),
            Operation::Resize { file, len } => self.resize(*file, *len),
            Operation::Store { file, at, byte } => self.store(*file, *at, *byte),
            Operation::Read(place) => self.read(self.model.place(*place)),
            Operation::Write(place, byte) => self.write(self.model.place(*place), *byte),
            Operation::Death { late } => self.die(late),
        }
    }

    /// Sends requests and applies them to the model, in order; gives the id of each that is to be answered,
    /// and which answers are right.
    fn send(
        &mut self,
        requests: &[Request],
        slots: bool,
        is_asking: impl Fn(&Request) -> bool,
    ) -> Vec<(u32, Vec<i32>)> {
        let channel = self.bench.channel();
        let mut expected = Vec::new();
        for request in requests {
            let (id, payload, fds, reasons) = match &request.what {
                &What::Map { shmid, shm_offset, len, fd_offset, flags, fds } => {
                    let payload = MMap { shmid, padding: [shmid; 7], fd_offset, shm_offset, len, flags };
                    let reasons = self.model.map(&payload, fds, slots);
                    self.counts.mapped += usize::from(reasons.is_empty());
                    (SHMEM_MAP, payload, self.descriptors(fds), reasons)
                }
                What::Unmap { target, fd } => {
                    let payload = self.model.target(target);
                    let reasons = self.model.unmap(&payload, *fd);
                    self.counts.unmapped += usize::from(reasons.is_empty());
                    let fds = if *fd { vec![self.device.as_raw_fd()] } else { vec![] };
                    (SHMEM_UNMAP, payload, fds, reasons)
                }
            };
            self.counts.refused += usize::from(!reasons.is_empty());
            let ask = if is_asking(request) { NEED_REPLY } else { 0 };
            let bytes = message(id, VERSION_1 | ask, &payload.bytes());
            channel.send_with(&bytes, &fds).unwrap();
            if ask != 0 {
                expected.push((id, reasons));
            }
        }
        expected
    }

    fn descriptors(&self, fds: Fds) -> Vec<RawFd> {
        match fds {
            Fds::File { file, read_only } => {
                let (writer, reader) = &self.files[file];
                vec![if read_only { reader } else { writer }.as_raw_fd()]
            }
            Fds::Device => vec![self.device.as_raw_fd()],
            Fds::None => vec![],
            Fds::Two => vec![self.files[0].0.as_raw_fd(); 2],
        }
    }

    fn request(&mut self, requests: &[Request], slots: bool) {
        self.bench.guest().no_slots.store(!slots, Ordering::Relaxed);
        let before = (areas("self"), self.counts.mapped + self.counts.unmapped);
        let expected = self.send(requests, slots, |request| request.answer);
        let channel = self.bench.channel();
        for (id, reasons) in expected {
            let result = channel.answer(id);
            let right = match reasons.is_empty() {
                true => result == 0,
                false => reasons.iter().any(|&errno| result == -i64::from(errno)),
            };
            assert!(right, "request {id} is answered {result}; {reasons:?} are the reasons to refuse it");
        }
        // What was not to be answered is done when this is.
        let nothing = MMap { len: 1, ..MMap::default() };
        assert_eq!(channel.unmap(nothing), -i64::from(libc::ENOENT));
        assert!(channel.is_silent());
        drop(channel);
        // SHM-27, SHM-46
        let kept = descriptors() - self.idle.descriptors;
        assert_eq!(kept, self.model.mapped_files(), "descriptors that are kept");
        if self.counts.mapped + self.counts.unmapped == before.1 {
            assert_eq!(areas("self"), before.0, "refused requests left something"); // SHM-49
        }
        self.bench.guest().no_slots.store(false, Ordering::Relaxed);
    }

    fn start(&mut self) {
        if self.model.is_reset || self.counts.resets == 0 {
            self.bench.start().unwrap();
            self.model.is_reset = false;
        }
    }

    /// The guest resets the device; everything is then as it was before the first request.
    fn reset(&mut self) {
        self.counts.resets += 1;
        self.bench.reset();
        self.model.reset();
        self.compare();
        assert_eq!(self.bench.guest().count(), 0);
        for (shmid, _) in REGIONS {
            self.machine.assert_empty(self.bench.shmem().region(shmid).unwrap());
        }
        assert_eq!(Holdings::now(), self.idle, "what is left after a reset");
    }

    fn die(&mut self, late: &[Request]) {
        self.counts.deaths += 1;
        // Nobody would read answers.
        self.send(late, true, |_| false);
        self.bench.hang_up();
        self.bench.wait_until_failed();
        // SHM-76: all of it is there until the reset.
        self.compare();
        self.look_everywhere();
        self.bench.reset();
        self.model.reset();
        self.compare();
        self.bench.start().unwrap_err();
        self.bench.reset();
        self.compare();

        let next = device(self.machine);
        drop(std::mem::replace(&mut self.bench, next).end());
        eventually("the old back-end's thread ends", || threads() == self.idle.threads);
        self.model.is_reset = false;
        // The windows may be elsewhere now.
        let idle = Holdings::now();
        assert_eq!((idle.descriptors, idle.areas.len()), (self.idle.descriptors, self.idle.areas.len()));
        self.idle = idle;
    }

    fn resize(&mut self, file: usize, len: u64) {
        self.files[file].0.set_len(len).unwrap();
        self.model.resize(file, len);
    }

    fn store(&mut self, file: usize, at: u64, byte: u8) {
        if let Some(old) = self.model.files[file].get_mut(at as usize) {
            *old = byte;
            self.files[file].0.write_all_at(&[byte], at).unwrap();
        }
    }

    fn address(&self, (shmid, offset): Key) -> u64 {
        self.bench.shmem().region(shmid).unwrap().start() + offset
    }

    fn guest_reads(&mut self, place: Key) -> Option<u8> {
        let address = self.address(place);
        self.machine.read(self.bench.guest(), address)
    }

    fn guest_writes(&mut self, place: Key, byte: u8) -> bool {
        let address = self.address(place);
        self.machine.write(self.bench.guest(), address, byte)
    }

    fn read(&mut self, place: Key) {
        self.counts.read += 1;
        let expected = match self.model.find(place) {
            Found::Hole => None,
            Found::Byte(byte) => Some(byte),
            Found::Tail => Some(0),
            Found::Missing(_) => {
                assert_eq!(self.guest_reads(place), None, "{place:x?} is missing");
                self.mend(place, Access::ReadOnly);
                return self.read(place);
            }
        };
        assert_eq!(self.guest_reads(place), expected, "{place:x?}");
    }

    fn write(&mut self, place: Key, byte: u8) {
        self.counts.written += 1;
        match (self.model.find(place), self.may_write(place)) {
            (Found::Hole, _) | (_, false) => {
                assert!(!self.guest_writes(place, byte), "{place:x?}"); // SHM-24, SHM-38
                self.read(place);
            }
            (Found::Byte(_), true) => {
                assert!(self.guest_writes(place, byte), "{place:x?}");
                self.model.write(place, byte);
                self.read(place);
            }
            // What is written beyond the end of a file is nobody's.
            (Found::Tail, true) => {}
            (Found::Missing(_), true) => {
                assert!(!self.guest_writes(place, byte), "{place:x?} is missing");
                self.mend(place, Access::ReadWrite);
                self.write(place, byte);
            }
        }
    }

    fn may_write(&self, (shmid, offset): Key) -> bool {
        let mut seen = self.bench.sees(shmid).into_iter();
        seen.any(|(start, len, access)| (start..start + len).contains(&offset) && access == Access::ReadWrite)
    }

    /// What the virtual machine does when its guest found nothing at a place (SHM-45).
    fn mend(&mut self, place: Key, access: Access) {
        let provided = self.bench.shmem().provide(self.address(place), access);
        let Found::Missing(key) = self.model.find(place) else {
            panic!("{place:x?} is not missing");
        };
        self.counts.filled += 1;
        assert_eq!(provided, Some(Page::Filled(self.fill(key))), "{place:x?}");
    }

    fn fill(&mut self, key: Key) -> Filled {
        let is_first = self.model.live[&key].filled == 0;
        let len = self.model.fill(key);
        Filled { is_first, shmid: key.0, guest: self.guest_range(key), len }
    }

    fn guest_range(&self, key: Key) -> hotslot::memory::GuestRange {
        hotslot::memory::GuestRange::new(self.address(key), self.model.live[&key].span()).unwrap()
    }

    /// The first and last byte of each page, in every region; and all of each file.
    fn look_everywhere(&mut self) {
        for (shmid, size) in REGIONS {
            for page in (0..size).step_by(PAGE as usize) {
                self.read((shmid, page));
                self.read((shmid, page + PAGE - 1));
            }
        }
        for ((file, _), expected) in self.files.iter().zip(&self.model.files) {
            // SHM-44: neither longer nor shorter.
            let mut bytes = vec![0; LONGEST as usize + 1];
            let len = file.read_at(&mut bytes, 0).unwrap();
            assert!(bytes[..len] == expected[..], "a file is not what was written to it");
        }
    }

    /// What the guest sees and what is written down is what the model says.
    fn compare(&self) {
        for (shmid, _) in REGIONS {
            let seen = self.bench.sees(shmid);
            let live = self.model.live.range((shmid, 0)..=(shmid, u64::MAX));
            let expected: Vec<_> =
                live.map(|(&(_, offset), mapping)| (offset, mapping.span(), mapping.access)).collect();
            assert_eq!(seen, expected, "region {shmid}");
        }
        let live = self.model.live.iter();
        let expected: Vec<_> = live
            .map(|(&key, mapping)| MappingInfo {
                shmid: key.0,
                guest: self.guest_range(key),
                file_offset: mapping.file_offset,
                access: mapping.access,
                filled: mapping.filled,
                unavailable: None,
            })
            .collect();
        assert_eq!(self.bench.shmem().mappings(), expected);
    }
}
