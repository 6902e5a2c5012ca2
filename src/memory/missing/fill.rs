//! What is missing at the end of one device's mappings because their files became shorter (SHM-45): found,
//! made inaccessible, filled with zeroes. `memory::missing` calls it.
//!
//! ```text
//!   a mapping:  [ the file's pages | missing: guarded or not | temporary zeroes | permanent zeroes ]
//!               ├──────────────── in_place() ───────────────┤
//!               ├────────────────────────── file_len() ─────────────────────────┤
//! ```

use std::io;
use std::ops::RangeInclusive;
use std::sync::{MutexGuard, PoisonError};

use crate::memory::GuestRange;
use crate::memory::ledger::Key;
use crate::memory::shmem::{FilledTotal, Mapping, SharedMemory, State};
use crate::memory::window::Span;

/// The keys of all mappings.
const ALL: RangeInclusive<Key> = (0, 0)..=(u8::MAX, u64::MAX);

/// A mapping under whose end there are zeroes now (SHM-45).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Whether it is the first time for this mapping.
    pub is_first: bool,
    /// The region's id.
    pub shmid: u8,
    /// Where the guest sees the mapping.
    pub guest: GuestRange,
    /// How many of its last bytes read 0 permanently.
    pub len: u64,
}

/// A mapping at whose end something may be missing.
struct Candidate<'a> {
    place: Place<'a>,
    number: u64,
    /// What of it is not filled.
    in_place: Span<'a>,
}

/// Where a mapping is, all of it.
#[derive(Clone, Copy)]
struct Place<'a> {
    key: Key,
    whole: Span<'a>,
}

impl Mapping {
    /// What of it is not filled permanently.
    fn file_len(&self) -> u64 {
        self.span_len() - self.kept.filled
    }

    /// What of it is not filled at all.
    fn in_place(&self) -> u64 {
        self.file_len() - self.kept.saved.as_ref().map_or(0, |(len, _)| *len)
    }

    /// Makes what is guarded accessible again. False where nothing is.
    fn unguard(&mut self, place: Place<'_>) -> bool {
        let file = place.whole.first(self.in_place());
        let Some(guarded) = file.and_then(|file| file.last(self.kept.guarded)) else {
            return false;
        };
        note(place, &guarded.protect(Some(self.access)));
        self.kept.guarded = 0;
        true
    }

    /// `len` more bytes are zeroes permanently.
    fn keep_filled(&mut self, len: u64, place: Place<'_>, total: &mut FilledTotal) -> Filled {
        let is_first = self.kept.filled == 0;
        self.kept.filled += len;
        total.mappings += u64::from(is_first);
        total.bytes += len;
        Filled { is_first, shmid: place.key.0, guest: place.whole.guest(), len: self.kept.filled }
    }
}

impl SharedMemory {
    /// Reads what the guest sees at `at`, not over the end of a page. False where it sees nothing, or a
    /// missing page.
    pub fn read(&self, at: u64, data: &mut [u8]) -> bool {
        self.locate(at).is_some_and(|((_, offset), window)| window.whole().read(offset, data))
    }

    /// Puts zero pages under what is missing at the end of a mapping, permanently, if `at` is a guest address
    /// there. Called when the guest accessed it.
    pub fn fill_missing(&self, at: u64) -> Option<Filled> {
        let (start, _) = self.mapping_at(at)?;
        let (key, _) = self.locate(start)?;
        let _probing = self.probe();
        let (candidates, _) = self.candidates(key..=key, true);
        let candidate = candidates.first()?;
        let missing = candidate.in_place.missing().filter(|missing| missing.guest().contains(at))?;
        self.change(candidate, |mapping, total| {
            missing.fill(mapping.access)?;
            // What is behind it is missing as well: there are zeroes already.
            let behind = mapping.kept.saved.take().map_or(0, |(len, _)| len);
            Ok(mapping.keep_filled(missing.guest().len() + behind, candidate.place, total))
        })
    }

    /// The guest accessed something that is missing, and KVM did not say where. Puts zero pages under all
    /// that is missing, until [`Self::settle`] has seen what was accessed. `None` where nothing is missing;
    /// else what was temporary until now, and has become permanent.
    pub fn fill_all_temporarily(&self) -> Option<Vec<Filled>> {
        let _probing = self.probe();
        let (candidates, mut changed) = self.candidates(ALL, true);
        let mut filled = Vec::new();
        for candidate in &candidates {
            if let Some(missing) = candidate.in_place.missing() {
                let done = self.change(candidate, |mapping, total| {
                    // More of what was filled temporarily.
                    filled.extend(settle(candidate.place, mapping, total));
                    let file = candidate.place.whole.first(mapping.file_len());
                    let end =
                        file.and_then(|file| file.last(file.guest().last() - missing.guest().start() + 1));
                    let end = end.unwrap_or(missing);
                    let saved = end.fill_and_save(mapping.access)?;
                    mapping.kept.saved = Some((end.guest().len(), saved));
                    Ok(())
                });
                changed |= done.is_some();
            }
        }
        changed.then_some(filled)
    }

    /// What was filled temporarily and accessed becomes permanent; the rest is the file's again, and shows it
    /// when it grows. (A write to the rest between the check and the change is lost, as one beyond a file's
    /// end may be.)
    pub fn settle(&self) -> Vec<Filled> {
        let State { ledger, filled, .. } = &mut *self.lock();
        let mappings = ledger.mappings.iter_mut();
        mappings.filter_map(|(&key, mapping)| settle(self.place(key, mapping)?, mapping, filled)).collect()
    }

    /// What the guest found missing so far.
    pub fn filled(&self) -> FilledTotal {
        self.lock().filled
    }

    /// Makes all that is missing inaccessible, until the guest accesses some of it or [`Self::fill_missing`]
    /// probes: such an access then fails at once instead of waiting for a page that never comes. Nothing else
    /// can be noticed of it.
    pub fn guard_missing(&self) {
        let _probing = self.probe();
        for candidate in &self.candidates(ALL, false).0 {
            if let Some(missing) = candidate.in_place.missing() {
                self.change(candidate, |mapping, _| {
                    let len = missing.guest().len();
                    if len > mapping.kept.guarded {
                        missing.protect(None)?;
                        mapping.kept.guarded = len;
                    }
                    Ok(())
                });
            }
        }
    }

    fn probe(&self) -> MutexGuard<'_, ()> {
        self.probe_lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, key: Key, mapping: &Mapping) -> Option<Place<'_>> {
        Some(Place { key, whole: self.span(key, mapping.span_len())? })
    }

    /// The mappings of these keys that are not filled from end to end. They are probed when the state is
    /// unlocked again: that may wait for the disk, or for the server of the file. `unguard` makes what is
    /// guarded accessible again; the second value says whether anything was.
    fn candidates(&self, keys: RangeInclusive<Key>, unguard: bool) -> (Vec<Candidate<'_>>, bool) {
        let (mut candidates, mut unguarded) = (Vec::new(), false);
        for (&key, mapping) in self.lock().ledger.mappings.range_mut(keys) {
            let Some(place) = self.place(key, mapping) else { continue };
            unguarded |= unguard && mapping.unguard(place);
            if let Some(in_place) = place.whole.first(mapping.in_place()) {
                candidates.push(Candidate { place, number: mapping.number, in_place });
            }
        }
        (candidates, unguarded)
    }

    /// Changes a mapping, if what it has of its file is still what it was when it became a candidate.
    fn change<T>(
        &self,
        candidate: &Candidate<'_>,
        action: impl FnOnce(&mut Mapping, &mut FilledTotal) -> io::Result<T>,
    ) -> Option<T> {
        let State { ledger, filled, .. } = &mut *self.lock();
        let mapping = ledger.mappings.get_mut(&candidate.place.key)?;
        if mapping.number != candidate.number || mapping.in_place() != candidate.in_place.guest().len() {
            return None;
        }
        let done = action(mapping, filled);
        note(candidate.place, &done);
        done.ok()
    }
}

/// Ends what was filled temporarily: accessed or not? Gives what has become permanent.
fn settle(place: Place<'_>, mapping: &mut Mapping, total: &mut FilledTotal) -> Option<Filled> {
    mapping.unguard(place);
    let (len, saved) = mapping.kept.saved.take()?;
    let span = place.whole.first(mapping.file_len())?.last(len)?;
    let kept = match span.is_touched() {
        Ok(false) => span.put_back(saved).map(|()| false),
        touched => touched,
    };
    note(place, &kept);
    kept.unwrap_or(true).then(|| mapping.keep_filled(len, place, total))
}

fn note<T>(place: Place<'_>, result: &io::Result<T>) {
    if let Err(error) = result {
        let (shmid, offset) = place.key;
        log::error!("what is missing of the mapping at {offset:#x} of region {shmid} stays so: {error}");
    }
}

#[cfg(test)]
mod tests;
