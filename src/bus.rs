//! Address ranges to handlers: one [`Bus`] for I/O ports, one for memory-mapped registers.
//!
//! The vCPU threads call [`Bus::read`] and [`Bus::write`] for KVM_EXIT_IO and KVM_EXIT_MMIO. The bus finds
//! the handler, unlocks itself, and only then calls it: a handler may take as long as it needs, and may
//! itself use the bus.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::counter::{Counter, Counts};
use crate::exit::Exit;

/// Something with registers on a bus.
///
/// Both methods are called by a vCPU thread, with no lock of ours held, possibly by several threads at once:
/// a handler has its own lock. `offset` counts from the start of the range; the access never leaves the
/// range. `data` is 1 to 8 bytes, little endian, in the width that the guest chose. Neither method can fail:
/// an access that makes no sense is answered as the device's specification says; where it says nothing, reads
/// give all-ones and writes do nothing.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` at `offset`. `Some` if that ends the machine.
    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit>;
}

/// A range that cannot be put on a bus: it is empty, ends beyond 2^64, or another device has part of it.
#[derive(Debug, PartialEq, Eq)]
pub struct BadRange;

struct Entry {
    len: u64,
    name: String,
    device: Arc<dyn BusDevice>,
    reads: Counter,
    writes: Counter,
}

/// A set of disjoint address ranges, each with its handler.
#[derive(Default)]
pub struct Bus {
    /// Lock order: innermost. Never held while a handler runs.
    ranges: RwLock<BTreeMap<u64, Arc<Entry>>>,
}

impl Bus {
    /// Gives the `len` addresses from `start` on to `device`, whose accesses are counted under `name`.
    pub fn insert(
        &self,
        start: u64,
        len: u64,
        name: &str,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BadRange> {
        let last = len.checked_sub(1).and_then(|len| start.checked_add(len)).ok_or(BadRange)?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((&other, entry)) = ranges.range(..=last).next_back()
            && (other >= start || start - other < entry.len)
        {
            return Err(BadRange);
        }
        let (name, reads, writes) = (name.to_owned(), Counter::default(), Counter::default());
        ranges.insert(start, Arc::new(Entry { len, name, device, reads, writes }));
        Ok(())
    }

    /// For each device: where its range starts, its name, and its accesses.
    pub fn counts(&self) -> Vec<(u64, String, Counts)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let counts = |(&start, entry): (&u64, &Arc<Entry>)| {
            let Entry { name, reads, writes, .. } = &**entry;
            let counts = vec![("reads".to_owned(), reads.get()), ("writes".to_owned(), writes.get())];
            (start, name.clone(), counts)
        };
        ranges.iter().map(counts).collect()
    }

    /// Reads for the guest. False where no device claims all of these addresses: `data` is then all-ones.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, entry)) => {
                entry.reads.count();
                entry.device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes for the guest. `Err` where no device claims all of these addresses: the write is dropped.
    pub fn write(&self, addr: u64, data: &[u8]) -> Result<Option<Exit>, Unclaimed> {
        match self.find(addr, data.len()) {
            Some((offset, entry)) => {
                entry.writes.count();
                Ok(entry.device.write(offset, data))
            }
            None => Err(Unclaimed),
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, Arc<Entry>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, entry) = ranges.range(..=addr).next_back()?;
        let offset = addr - start;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        (end <= entry.len).then(|| (offset, Arc::clone(entry)))
    }
}

/// No device on the bus claims the addresses of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unclaimed;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
            self.0.lock().unwrap().push((offset, data.to_vec()));
            Some(Exit::DebugExit(data[0]))
        }
    }

    #[test]
    fn accesses_reach_the_handler_with_offsets_of_its_range() {
        let (bus, device) = (Bus::default(), Arc::new(Recorder::default()));
        bus.insert(0x1000, 0x100, "device", device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1042, &mut data));
        assert_eq!(data, [0x42; 2]);
        assert_eq!(bus.write(0x10ff, &[7]), Ok(Some(Exit::DebugExit(7))));
        assert_eq!(*device.0.lock().unwrap(), [(0xff, vec![7])]);
    }

    #[test]
    fn accesses_are_counted_under_the_name_of_the_device_that_claims_them() {
        let (bus, device) = (Bus::default(), Arc::new(Recorder::default()));
        bus.insert(0x2000, 0x100, "second", device.clone()).unwrap();
        bus.insert(0x1000, 0x100, "first", device).unwrap();
        for address in [0x1000, 0x10fe, 0x10ff, 0x2010, 0x3000] {
            bus.read(address, &mut [0; 2]);
        }
        let _end = bus.write(0x2000, &[1]);
        let counts = |reads, writes| vec![("reads".to_owned(), reads), ("writes".to_owned(), writes)];
        let expected =
            [(0x1000, "first".to_owned(), counts(2, 0)), (0x2000, "second".to_owned(), counts(1, 1))];
        assert_eq!(bus.counts(), expected);
    }

    #[test]
    fn unclaimed_addresses_read_all_ones() {
        let bus = Bus::default();
        bus.insert(0x1000, 0x100, "device", Arc::new(Recorder::default())).unwrap();
        for addr in [0, 0xfff, 0x1100, 0x10fd, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, [0xff; 4]);
            assert_eq!(bus.write(addr, &[0; 4]), Err(Unclaimed));
        }
    }

    #[test]
    fn overlapping_or_impossible_ranges_are_refused() {
        let bus = Bus::default();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x100, "device", device.clone()).unwrap();
        for (start, len) in [(0x1000, 1), (0xfff, 2), (0x10ff, 1), (0, 0x2000), (0x1010, 0x10)] {
            assert_eq!(
                bus.insert(start, len, "device", device.clone()),
                Err(BadRange),
                "{start:#x} overlaps"
            );
        }
        for (start, len) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, len, "device", device.clone()), Err(BadRange), "{start:#x}");
        }
        bus.insert(0xf00, 0x100, "device", device.clone()).unwrap();
        bus.insert(0x1100, 0x100, "device", device).unwrap();
    }
}
