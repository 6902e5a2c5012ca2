//! The pages that a vCPU could not access: there after all, replaced by zeroes because the file ends before
//! them (SHM-45), or unavailable at the moment (SHM-87).
//!
//! Called by [`crate::memory::missing`]. Other threads may map and unmap at the same place meanwhile.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::{Mapping, SharedMemory, State};
use crate::memory::ledger::Key;
use crate::memory::{Access, GuestRange, PAGE_SIZE};

/// What became of a page that the guest could not access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// It is there now. Always so where the access is not allowed: it was not the page that was missing.
    Present,
    /// The same, after [`Page::Unavailable`].
    Recovered,
    /// The file ends before it: zeroes took its place (SHM-45).
    Filled(Filled),
    /// The file has it, and the host cannot provide it at the moment (SHM-87).
    Unavailable(Unavailable),
}

/// A mapping with a page that the host cannot provide at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Unavailable {
    /// Whether no page of this mapping was known to be unavailable before.
    pub is_first: bool,
    pub shmid: u8,
    pub guest: GuestRange,
    /// The likely reason.
    pub reason: &'static str,
}

/// A mapping whose end is zeroes now (SHM-45).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Filled {
    /// Whether it is the first time for this mapping.
    pub is_first: bool,
    pub shmid: u8,
    pub guest: GuestRange,
    /// How many of its last bytes read 0.
    pub len: u64,
}

/// What was missing at the end of mappings and reads as zeroes since (SHM-45), over the device's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FilledTotal {
    pub mappings: u64,
    pub bytes: u64,
}

impl fmt::Display for FilledTotal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FilledTotal { mappings, bytes } = self;
        write!(
            f,
            "zeroes took the place of {bytes:#x} bytes of {mappings} mappings so far (the files end before them)"
        )
    }
}

impl SharedMemory {
    /// Provides the page at guest address `at`, which the guest could not access so: waits for the disk, and
    /// puts zeroes where the file ends (SHM-45). `None` where nothing is mapped. Called by vCPU threads, with
    /// no lock held.
    pub fn provide(&self, at: u64, access: Access) -> Option<Page> {
        let (start, allowed) = self.mapping_at(at)?;
        let (key, window) = self.locate(start)?;
        let offset = (at - start) / PAGE_SIZE * PAGE_SIZE;
        if access == Access::ReadWrite && allowed == Access::ReadOnly {
            // KVM passes on every write to it; the guest did not miss a page.
            return Some(Page::Present);
        }
        let error = match window.span(key.1 + offset, PAGE_SIZE)?.populate(access) {
            Ok(()) => {
                let state = &mut *self.lock();
                let unavailable = &mut state.ledger.mappings.get_mut(&key)?.kept.unavailable;
                return Some(match unavailable.take_if(|page| *page == offset) {
                    Some(_) => Page::Recovered,
                    None => Page::Present,
                });
            }
            Err(error) => error,
        };
        // EINVAL: it was unmapped meanwhile. EAGAIN: something else is in the way, for a moment.
        match error.raw_os_error() {
            Some(libc::EINVAL | libc::EAGAIN) => Some(Page::Present),
            _ => self.replace_missing(key, offset, &error),
        }
    }

    /// The page at this offset of a mapping could not be had: puts zeroes there if the file ends before it,
    /// else records it as unavailable.
    pub(super) fn replace_missing(&self, key: Key, offset: u64, error: &io::Error) -> Option<Page> {
        let (number, file_offset, file) = {
            let state = self.lock();
            let mapping = state.ledger.mappings.get(&key)?;
            (mapping.number, mapping.file_offset, Arc::clone(&mapping.kept.file))
        };
        // Where the file ends in the mapping, if that is ahead of the page.
        let end = file.end().ok().map(|end| end.saturating_sub(file_offset)).filter(|&end| end <= offset);
        let reason = match error.raw_os_error() {
            Some(libc::EHWPOISON) => "a memory error of the host",
            Some(libc::ENOMEM) => "the host has no memory for it",
            _ if end.is_some() => "the host has no memory for zeroes",
            _ => file.likely_reason(),
        };
        let State { ledger, filled, .. } = &mut *self.lock();
        // Another mapping may be there meanwhile, or is being placed: the guest's next access shows whether
        // it lacks a page, too. One without a slot is being removed, and no page may come back there.
        let is_still_there = |mapping: &&mut Mapping| mapping.number == number && mapping.kept.slot.is_some();
        let mapping = ledger.mappings.get_mut(&key).filter(is_still_there)?;
        if mapping.kept.is_exchanged {
            return Some(Page::Present);
        }
        if offset >= mapping.span_len() - mapping.kept.filled {
            // Another vCPU was faster.
            return Some(Page::Present);
        }
        if let Some(zeroed) = end.and_then(|end| self.fill(key, mapping, end, filled)) {
            return Some(zeroed);
        }
        let is_first = mapping.kept.unavailable.is_none();
        mapping.kept.unavailable.get_or_insert(offset);
        let guest = self.span(key, mapping.span_len())?.guest();
        Some(Page::Unavailable(Unavailable { is_first, shmid: key.0, guest, reason }))
    }

    /// Puts zeroes into a mapping, from the offset on where its file ends. `None` where that fails.
    fn fill(&self, key: Key, mapping: &mut Mapping, from: u64, total: &mut FilledTotal) -> Option<Page> {
        let len = (mapping.span_len() - mapping.kept.filled).checked_sub(from)?;
        let zeroes = self.span((key.0, key.1 + from), len)?;
        zeroes.fill(Some(mapping.access)).ok()?;
        let is_first = mapping.kept.filled == 0;
        mapping.kept.filled += len;
        total.mappings += u64::from(is_first);
        total.bytes += len;
        let guest = self.span(key, mapping.span_len())?.guest();
        Some(Page::Filled(Filled { is_first, shmid: key.0, guest, len: mapping.kept.filled }))
    }

    /// How much the guest found missing so far.
    pub fn filled(&self) -> FilledTotal {
        self.lock().filled
    }
}
