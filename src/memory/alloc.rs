//! Where the windows of shared memory regions go in guest physical memory: above RAM, one after another
//! (SHM-23).

use thiserror::Error;

use super::GuestRange;

/// The least alignment of a window: Linux' DAX maps 2 MiB at a time.
const SMALL: u64 = 2 << 20;
/// The alignment of windows of at least this size, so that the largest pages fit.
const LARGE: u64 = 1 << 30;

/// There is no room for a window.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "no room for {len:#x} bytes: {free:#x} bytes are left below the guest's physical address limit {limit:#x}"
)]
pub struct NoRoom {
    len: u64,
    free: u64,
    limit: u64,
}

/// Hands out guest physical addresses from below to above. Nothing is ever given back: windows last as long
/// as the machine.
#[derive(Clone, Debug)]
pub struct WindowAllocator {
    next: u64,
    limit: u64,
}

impl WindowAllocator {
    /// Hands out addresses from `first` (what is below is taken) to just below `limit`.
    pub fn new(first: u64, limit: u64) -> Self {
        WindowAllocator { next: first, limit }
    }

    /// A range for a window of `len` bytes, at least 2 MiB aligned, disjoint from all others.
    pub fn place(&mut self, len: u64) -> Result<GuestRange, NoRoom> {
        let no_room = NoRoom { len, free: self.limit.saturating_sub(self.next), limit: self.limit };
        let alignment = if len < LARGE { SMALL } else { LARGE };
        let start = self.next.checked_next_multiple_of(alignment).ok_or(no_room)?;
        let range = GuestRange::new(start, len).filter(|range| range.last() < self.limit).ok_or(no_room)?;
        self.next = range.last() + 1;
        Ok(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_aligned_and_disjoint() {
        // SHM-23
        let mut alloc = WindowAllocator::new(0x1_0000_1000, 1 << 40);
        let mut taken: Vec<GuestRange> = Vec::new();
        for len in [0x1000, 0x20_0000, 0x4000_0000, 0x1000, 3 << 30] {
            let range = alloc.place(len).unwrap();
            assert_eq!(range.len(), len);
            assert_eq!(range.start() % if len < 1 << 30 { 2 << 20 } else { 1 << 30 }, 0);
            assert!(range.start() >= 0x1_0000_1000 && range.last() < 1 << 40);
            assert!(taken.iter().all(|other| !other.overlaps(&range)));
            taken.push(range);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_and_costs_nothing() {
        // SHM-16
        let mut alloc = WindowAllocator::new(0x1_0000_0000, 0x1_4000_0000);
        for len in [0, 0x4000_1000, u64::MAX, u64::MAX - 0xfff, 1 << 63] {
            alloc.place(len).unwrap_err();
        }
        alloc.place(0x4000_0000).unwrap();
        alloc.place(0x1000).unwrap_err();
        let mut top = WindowAllocator::new(u64::MAX - 0xfff, u64::MAX);
        top.place(0x1000).unwrap_err();
    }
}
