//! `probe hammer`: the guest of an endurance test. A thread on each processor reads and writes a device's
//! shared memory through `/dev/mem`, as [`hotslot_guest::board`] says, until the back-end sets STOP. No
//! driver may have the two devices.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::map::{Mapping, PAGE, physical};
use crate::outcome::Outcome;
use crate::sys::run_on;
use hotslot_guest::board::*;

/// Device memory, as words.
struct Physical {
    mapping: Mapping,
    /// Of the first word in the mapping.
    first: usize,
}

impl Physical {
    fn new(address: u64, length: usize) -> Outcome<Physical> {
        let (mapping, first) = physical(address, length)?;
        Ok(Physical { mapping, first })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        self.mapping.atomic_u64(self.first + index * 8)
    }

    // Plain loads and stores, which the processor makes in this order: where nothing is mapped, KVM then
    // emulates exactly one access.
    fn get(&self, index: usize) -> u64 {
        self.word(index).load(Ordering::Acquire)
    }

    fn set(&self, index: usize, value: u64) {
        self.word(index).store(value, Ordering::Release);
    }

    fn register(&self, offset: u32) -> &AtomicU32 {
        self.mapping.atomic_u32(self.first + offset as usize)
    }

    /// Takes a device from reset to DRIVER_OK.
    fn start(&self) {
        for (register, value) in START {
            self.register(register).store(value, Ordering::Release);
        }
    }

    /// Where region 0 of a device that was started is.
    fn region(&self) -> u64 {
        let half = |offset| u64::from(self.register(offset).load(Ordering::Acquire));
        half(SHM_BASE + 4) << 32 | half(SHM_BASE)
    }
}

/// Hammers the window of the device with these registers; the board is in that of the other.
pub fn hammer(window_device: u64, board_device: u64) -> Outcome<String> {
    let device = Physical::new(window_device, PAGE)?;
    let other = Physical::new(board_device, PAGE)?;
    other.start();
    let board = Physical::new(other.region(), PAGE)?;
    while board.get(READY) != 1 {
        std::thread::sleep(REST);
    }
    device.start();
    let window = Physical::new(device.region(), WINDOW_WORDS * 8)?;
    std::thread::scope(|scope| {
        let cpus: Vec<_> = (0..CPUS)
            .map(|cpu| {
                let hammer = Hammer { cpu, device: &device, board: &board, window: &window };
                scope.spawn(move || hammer.run())
            })
            .collect();
        cpus.into_iter().try_for_each(|cpu| cpu.join().map_err(|_| "a thread panicked".to_owned())?)
    })?;
    let sum = |what| (0..CPUS).map(|cpu| board.get(report(cpu) + what)).sum::<u64>();
    Ok(format!("probe hammer: {} accesses, {} wrong", sum(ACCESSES), sum(ERRORS)))
}

/// So many accesses in a row,
const BURST: u64 = 128;
/// and then a rest.
const REST: Duration = Duration::from_millis(1);

/// One processor.
struct Hammer<'a> {
    cpu: usize,
    device: &'a Physical,
    board: &'a Physical,
    window: &'a Physical,
}

impl Hammer<'_> {
    fn run(&self) -> Outcome<()> {
        run_on(self.cpu)?;
        let (mut chance, mut writes) = (self.cpu as u64 + 1, 0);
        for accesses in 1.. {
            if self.board.get(STOP) != 0 {
                break;
            }
            // On a host with one processor the back-end and hotslot need their turn.
            if accesses % BURST == 0 {
                std::thread::sleep(REST);
            }
            self.board.set(report(self.cpu) + ACCESSES, accesses);
            chance = random(chance);
            let mut index = (chance >> INDEX_SHIFT) as usize;
            let mut written = None;
            if chance & WRITE_BITS == 0 {
                index = index / CPUS * CPUS + self.cpu;
                writes += 1;
                self.board.set(report(self.cpu) + WRITES, writes);
                written = Some(word(writes, self.cpu as u64 + 1, index));
            }
            self.access(index, written);
            let wanted = self.board.get(RESET_WANTED);
            if self.cpu == 0 && wanted != self.board.get(RESET_DONE) {
                self.reset(wanted);
            }
        }
        Ok(())
    }

    fn access(&self, index: usize, written: Option<u64>) {
        let place = STATES + index / PLACE_WORDS;
        let before = self.board.get(place);
        if let Some(word) = written {
            self.window.set(index, word);
        }
        let read = self.window.get(index);
        let after = self.board.get(place);
        if read == 0 {
            self.count(ZEROES);
        }
        if !is_right(index, written, read, before, after) {
            self.wrong([index as u64, read, before, written.unwrap_or(0)]);
        }
    }

    fn reset(&self, number: u64) {
        self.board.set(RESET_PENDING, number);
        while self.board.get(RESET_AGREED) != number {
            std::thread::sleep(REST);
        }
        self.device.register(STATUS).store(0, Ordering::Release);
        // Nothing is left when the write has completed.
        for index in (0..WINDOW_WORDS).step_by(PLACE_WORDS) {
            let read = self.window.get(index);
            if read != HOLE {
                self.wrong([index as u64, read, 0, 0]);
            }
        }
        self.device.start();
        self.board.set(RESET_DONE, number);
    }

    fn count(&self, what: usize) {
        let counter = report(self.cpu) + what;
        self.board.set(counter, self.board.get(counter) + 1);
    }

    fn wrong(&self, what: [u64; 4]) {
        for (offset, value) in what.into_iter().enumerate() {
            self.board.set(report(self.cpu) + WRONG + offset, value);
        }
        self.count(ERRORS);
    }
}

/// Whether a read may give this, between two looks at the place's state.
fn is_right(index: usize, written: Option<u64>, read: u64, before: u64, after: u64) -> bool {
    let (kind, pages, generation) = (before & 0xff, before >> 8 & 0xff, before >> 32);
    let is_known = before == after && kind != CHANGING;
    let is_inside = ((index % PLACE_WORDS / PAGE_WORDS) as u64) < pages;
    if read == HOLE {
        return !is_known || kind == UNMAPPED || !is_inside;
    }
    if read == 0 {
        return kind == MAY_BE_CUT;
    }
    let by_backend = read == word(count(read), BACKEND, index);
    let by_guest = read == word(count(read), (index % CPUS) as u64 + 1, index);
    if !is_known || kind == MAY_BE_CUT {
        return by_backend || by_guest;
    }
    let is_old = by_backend && count(read) == generation & COUNT_MASK;
    is_inside
        && match (kind, written) {
            (READ_ONLY, _) => is_old,
            (READ_WRITE, None) => is_old || by_guest,
            (READ_WRITE, Some(written)) => read == written,
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_right_depends_on_what_is_mapped() {
        let index = PLACE_WORDS + PAGE_WORDS + 2;
        let old = word(5, BACKEND, index);
        let guests = word(77, 3, index);
        let all = [
            state(CHANGING, 0, 5),
            state(UNMAPPED, 0, 5),
            state(READ_ONLY, 4, 5),
            state(READ_WRITE, 4, 5),
            state(READ_WRITE, 1, 5),
            state(READ_WRITE, 4, 6),
            state(MAY_BE_CUT, 4, 5),
        ];
        let right = |written, read| all.map(|state| u8::from(is_right(index, written, read, state, state)));
        assert_eq!(right(None, HOLE), [1, 1, 0, 0, 1, 0, 0]);
        assert_eq!(right(None, old), [1, 0, 1, 1, 0, 0, 1]);
        assert_eq!(right(None, guests), [1, 0, 0, 1, 0, 1, 1]);
        assert_eq!(right(Some(guests), guests), [1, 0, 0, 1, 0, 1, 1]);
        assert_eq!(right(Some(guests), old), [1, 0, 1, 0, 0, 0, 1]);
        assert_eq!(right(None, 0), [0, 0, 0, 0, 0, 0, 1]);
        for wrong in [POISON, word(5, BACKEND, index + 1), word(5, 4, index)] {
            assert_eq!(right(None, wrong), [0; 7], "{wrong:#x}");
        }
        // While it changes, all that is ever right.
        assert!(is_right(index, None, HOLE, all[2], all[1]));
        assert!(is_right(index, None, old, all[1], all[2]));
    }
}
