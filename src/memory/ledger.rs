//! The ledger of one device's shared memory regions: what is mapped, and whether something may be mapped next
//! (SHM-29 to SHM-36, SHM-48, SHM-51, SHM-52, SHM-75). It changes nothing but itself.
//!
//! `memory::shmem` asks it first, then carries the request out, then records it here.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::error::ShmemError;
use super::{Access, PAGE_SIZE};

/// The name of a mapping: the region's id, and the offset in the region where it starts, in bytes.
pub type Key = (u8, u64);

/// The regions and mappings of one device. The ledger's user keeps a `T` with each mapping.
pub struct Ledger<T> {
    /// In bytes, by region.
    sizes: BTreeMap<u8, u64>,
    /// Those of a region are disjoint. [`Self::insert`] adds to them, [`Self::remove`] removes.
    pub(super) mappings: BTreeMap<Key, Mapping<T>>,
    /// How many mappings there may be at a time, over all regions.
    quota: usize,
    /// How many bytes they may have.
    limit: u64,
    /// How many bytes they have.
    pub(super) mapped: u64,
    /// How many bytes were ever mapped.
    pub(super) mapped_ever: u64,
    /// Mappings ever made.
    made: u64,
    /// Whether anything may be mapped.
    pub(super) gate_open: bool,
}

/// A mapping that may be made.
#[derive(Debug)]
pub struct Admitted {
    /// The length of the whole pages that back it.
    pub span_len: u64,
    /// The mappings that make way for it (SHM-77).
    pub in_the_way: Vec<Key>,
}

/// The record of a live mapping.
pub struct Mapping<T> {
    /// As the back-end gave it: not always whole pages (SHM-34).
    pub(super) len: u64,
    /// Where in its file it begins, in bytes.
    pub(super) file_offset: u64,
    /// What the guest may do there.
    pub(super) access: Access,
    /// No other mapping ever made has it.
    pub(super) number: u64,
    /// Its back-end is gone, and another one is taking its place (SHM-77).
    pub(super) is_old: bool,
    /// What the ledger's user keeps with it.
    pub(super) kept: T,
}

impl<T> Mapping<T> {
    /// The length of the whole pages that back it.
    pub fn span_len(&self) -> u64 {
        // No overflow: `admit` has found these pages inside the region.
        self.len.next_multiple_of(PAGE_SIZE)
    }
}

impl<T> Ledger<T> {
    /// Regions of these sizes, whole pages each, without mappings, of which there may be `quota` with `limit`
    /// bytes; the gate is open.
    pub fn new(sizes: impl IntoIterator<Item = (u8, u64)>, quota: usize, limit: u64) -> Self {
        let (sizes, mappings) = (sizes.into_iter().collect(), BTreeMap::new());
        Ledger { sizes, mappings, quota, limit, mapped: 0, mapped_ever: 0, made: 0, gate_open: true }
    }

    /// Whether `len` bytes of a file, from `file_offset` on, may be mapped at `key`.
    pub fn admit(&self, key: Key, len: u64, file_offset: u64) -> Result<Admitted, ShmemError> {
        let (shmid, shm_offset) = key;
        if !self.gate_open {
            return Err(ShmemError::GateClosed);
        }
        let &size = self.sizes.get(&shmid).ok_or(ShmemError::NoRegion(shmid))?;
        if len == 0 {
            return Err(ShmemError::Empty);
        }
        for (name, offset) in [("offset in the region", shm_offset), ("offset in the file", file_offset)] {
            if offset % PAGE_SIZE != 0 {
                return Err(ShmemError::Unaligned(name, offset));
            }
        }
        let Some(end) = shm_offset.checked_add(len).filter(|&end| end <= size) else {
            return Err(ShmemError::OutOfBounds { shmid, shm_offset, len, size });
        };
        let span_len = len.next_multiple_of(PAGE_SIZE);
        if file_offset.checked_add(span_len).is_none_or(|end| i64::try_from(end).is_err()) {
            return Err(ShmemError::FileRange { file_offset, len });
        }
        let (mut in_the_way, mut mapped, limit) = (Vec::new(), self.mapped, self.limit);
        let before = self.mappings.range((shmid, 0)..(shmid, end)).rev();
        for (&other, mapping) in before.take_while(|((_, at), mapping)| at + mapping.span_len() > shm_offset)
        {
            if !mapping.is_old {
                return Err(ShmemError::Overlap { shmid, shm_offset, len, other: other.1 });
            }
            in_the_way.push(other);
            mapped -= mapping.span_len();
        }
        if self.mappings.len() - in_the_way.len() >= self.quota {
            return Err(ShmemError::Quota(self.quota));
        }
        if span_len > limit.saturating_sub(mapped) {
            return Err(ShmemError::Bytes { len: span_len, mapped, limit });
        }
        Ok(Admitted { span_len, in_the_way })
    }

    /// Whether the mapping at `key` has this place in the guest, and is of a back-end that is gone: one that
    /// is made anew takes over its slot, and the guest sees no hole.
    pub fn is_replaced(&self, key: Key, span_len: u64, access: Access) -> bool {
        let mapping = self.mappings.get(&key);
        mapping.is_some_and(|old| old.is_old && old.span_len() == span_len && old.access == access)
    }

    /// Records a mapping that [`Self::admit`] has allowed.
    pub fn insert(&mut self, key: Key, len: u64, file_offset: u64, access: Access, kept: T) {
        let mapping = Mapping { len, file_offset, access, number: self.made, is_old: false, kept };
        self.mapped += mapping.span_len();
        self.mapped_ever += mapping.span_len();
        self.mappings.insert(key, mapping);
        self.made += 1;
    }

    /// Removes a mapping.
    pub fn remove(&mut self, key: Key) -> Option<Mapping<T>> {
        let mapping = self.mappings.remove(&key)?;
        self.mapped -= mapping.span_len();
        Some(mapping)
    }

    /// Why an UNMAP is refused that does not name a whole mapping by the offset and the length of its MAP.
    pub fn not_found(&self, (shmid, shm_offset): Key, len: u64) -> ShmemError {
        match self.sizes.contains_key(&shmid) {
            true => ShmemError::NoMapping { shmid, shm_offset, len },
            false => ShmemError::NoRegion(shmid),
        }
    }

    /// What is free around a place: where that starts, and its length in bytes. It is 0 for a place at the
    /// start of a region where something is mapped.
    pub fn hole(&self, key: Key) -> (Key, u64) {
        match self.mappings.contains_key(&key) {
            true => (key, 0),
            false => self.hole_without(key),
        }
    }

    /// The same without the mapping that starts there.
    pub fn hole_without(&self, (shmid, offset): Key) -> (Key, u64) {
        let before = self.mappings.range((shmid, 0)..(shmid, offset)).next_back();
        let start = before.map_or(0, |(&(_, start), mapping)| start + mapping.span_len());
        let behind = (Bound::Excluded((shmid, offset)), Bound::Included((shmid, u64::MAX)));
        let end = match self.mappings.range(behind).next() {
            Some((&(_, start), _)) => start,
            None => self.sizes.get(&shmid).copied().unwrap_or(0),
        };
        ((shmid, start), end - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_SIZE;

    /// A region of 16 pages, with two pages from 2 on and one page at 9 mapped.
    fn ledger() -> Ledger<()> {
        let mut ledger = Ledger::new([(0, 16 * PAGE), (7, PAGE)], 3, u64::MAX);
        for (offset, len) in [(2 * PAGE, PAGE + 1), (9 * PAGE, PAGE)] {
            assert_eq!(ledger.admit((0, offset), len, 0).unwrap().span_len, len.next_multiple_of(PAGE));
            ledger.insert((0, offset), len, 0, Access::ReadOnly, ());
        }
        ledger
    }

    #[test]
    fn a_hole_reaches_from_one_mapping_to_the_next() {
        let mut ledger = ledger();
        for (at, hole) in [(0, (0, 2)), (1, (0, 2)), (4, (4, 5)), (8, (4, 5)), (10, (10, 6)), (15, (10, 6))] {
            assert_eq!(ledger.hole((0, at * PAGE)), ((0, hole.0 * PAGE), hole.1 * PAGE), "{at}");
        }
        ledger.remove((0, 2 * PAGE)).unwrap();
        assert_eq!(ledger.hole((0, 2 * PAGE)), ((0, 0), 9 * PAGE));
        assert_eq!((ledger.hole((7, 0)), ledger.hole((3, 0))), (((7, 0), PAGE), ((3, 0), 0)));
    }

    #[test]
    fn a_refusal_records_nothing_and_no_number_is_given_twice() {
        let mut ledger = ledger();
        ledger.admit((0, 3 * PAGE), PAGE, 0).unwrap_err();
        ledger.admit((7, PAGE), PAGE, 0).unwrap_err();
        assert_eq!((ledger.mappings.len(), ledger.mappings[&(0, 9 * PAGE)].number), (2, 1));
        ledger.remove((0, 9 * PAGE)).unwrap();
        ledger.insert((0, 9 * PAGE), PAGE, 0, Access::ReadOnly, ());
        assert_eq!(ledger.mappings[&(0, 9 * PAGE)].number, 2);
    }

    #[test]
    fn bytes_beyond_the_limit_are_refused_until_others_go() {
        // SHM-85
        let mut ledger = Ledger::new([(0, u64::MAX / PAGE * PAGE)], usize::MAX, 8 * PAGE);
        // One byte takes a page.
        ledger.insert((0, 0), 1, 0, Access::ReadOnly, ());
        ledger.insert((0, PAGE), 4 * PAGE, 0, Access::ReadOnly, ());
        let next = (0, 16 * PAGE);
        assert_eq!(ledger.admit(next, 3 * PAGE, 0).unwrap().span_len, 3 * PAGE);
        for len in [3 * PAGE + 1, 4 * PAGE, 1 << 60] {
            let refused = ledger.admit(next, len, 0);
            assert!(
                matches!(refused, Err(ShmemError::Bytes { mapped: 0x5000, limit: 0x8000, .. })),
                "{len:#x}"
            );
        }
        ledger.remove((0, PAGE)).unwrap();
        ledger.admit(next, 7 * PAGE, 0).unwrap();
    }

    #[test]
    fn what_was_not_refused_is_inside_its_region_and_overlaps_nothing() {
        // SHM-31, SHM-35, SHM-50: all numbers around the edges, with a ledger that is never changed.
        let ledger = ledger();
        let edges = [0, 1, 2, 3, 4, 8, 9, 10, 15, 16, 17, u64::MAX / PAGE];
        let numbers =
            || edges.iter().flat_map(|edge| [edge * PAGE, edge * PAGE + 1, (edge * PAGE).wrapping_sub(1)]);
        let taken = [2, 3, 9];
        for (offset, len) in numbers().flat_map(|offset| numbers().map(move |len| (offset, len))) {
            let end = u128::from(offset) + u128::from(len);
            let pages = || offset / PAGE..u64::try_from(end.div_ceil(PAGE.into())).unwrap();
            let right = len > 0
                && offset % PAGE == 0
                && end <= u128::from(16 * PAGE)
                && pages().all(|page| !taken.contains(&page));
            assert_eq!(ledger.admit((0, offset), len, 0).is_ok(), right, "{offset:#x} {len:#x}");
        }
    }
}
