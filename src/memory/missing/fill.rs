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
use std::sync::PoisonError;

use crate::memory::GuestRange;
use crate::memory::ledger::Key;
use crate::memory::shmem::{FilledTotal, Mapping, SharedMemory, State};
use crate::memory::window::Span;

/// The keys of all mappings.
const ALL: RangeInclusive<Key> = (0, 0)..=(u8::MAX, u64::MAX);

/// A mapping whose end is zeroes now (SHM-45).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Filled {
    /// Whether it is the first time for this mapping.
    pub is_first: bool,
    pub shmid: u8,
    pub guest: GuestRange,
    /// How many of its last bytes read 0 permanently.
    pub len: u64,
}

/// Where a mapping is.
#[derive(Clone, Copy)]
struct Place<'a> {
    key: Key,
    number: u64,
    whole: Span<'a>,
    /// The part that was not filled when this was made: something may be missing at its end.
    in_place: Option<Span<'a>>,
}

impl Mapping {
    /// The length of what is not filled permanently.
    fn file_len(&self) -> u64 {
        self.span_len() - self.kept.filled
    }

    /// The length of what is not filled at all.
    fn in_place(&self) -> u64 {
        self.file_len() - self.kept.saved.as_ref().map_or(0, |(len, _)| *len)
    }

    /// Makes what is guarded accessible again. False where nothing is.
    fn unguard(&mut self, place: Place<'_>) -> bool {
        let Some(guarded) = place.in_place.and_then(|file| file.last(self.kept.guarded)) else {
            return false;
        };
        note(place, &guarded.protect(Some(self.access)));
        self.kept.guarded = 0;
        true
    }

    /// Records `len` more bytes of permanent zeroes.
    fn keep_filled(&mut self, len: u64, place: Place<'_>, total: &mut FilledTotal) -> Filled {
        let is_first = self.kept.filled == 0;
        self.kept.filled += len;
        total.mappings += u64::from(is_first);
        total.bytes += len;
        Filled { is_first, shmid: place.key.0, guest: place.whole.guest(), len: self.kept.filled }
    }
}

impl SharedMemory {
    /// Reads what the guest sees at `at`, not over the end of a page. False where nothing is mapped, or a
    /// page is missing.
    pub fn read(&self, at: u64, data: &mut [u8]) -> bool {
        self.locate(at).is_some_and(|((_, offset), window)| window.whole().read(offset, data))
    }

    /// Puts zero pages under what is missing at the end of a mapping, permanently, if `at` is a guest address
    /// there. Called when the guest accessed it.
    pub fn fill_missing(&self, at: u64) -> Option<Filled> {
        let (start, _) = self.mapping_at(at)?;
        let (key, _) = self.locate(start)?;
        let mut filled = None;
        self.change_missing(key..=key, true, |place, missing, mapping, total| {
            if missing.guest().contains(at) {
                missing.fill(Some(mapping.access))?;
                // The temporary zeroes behind it stand for missing pages, too: they become permanent with it.
                let behind = mapping.kept.saved.take().map_or(0, |(len, _)| len);
                filled = Some(mapping.keep_filled(missing.guest().len() + behind, place, total));
            }
            Ok(())
        });
        filled
    }

    /// The guest accessed a missing page, and KVM did not say where. Puts zero pages under all that is
    /// missing, until [`Self::settle`] has seen which were accessed. `None` where nothing is missing; else
    /// the mappings whose earlier temporary zeroes have become permanent.
    pub fn fill_all_temporarily(&self) -> Option<Vec<Filled>> {
        let mut filled = Vec::new();
        let changed = self.change_missing(ALL, true, |place, missing, mapping, total| {
            // More is missing than the temporary zeroes took the place of: settle those first.
            filled.extend(settle(place, mapping, total));
            let len = mapping.file_len() - (missing.guest().start() - place.whole.guest().start());
            let end = place.whole.first(mapping.file_len()).and_then(|file| file.last(len));
            let end = end.unwrap_or(missing);
            mapping.kept.saved = Some((end.guest().len(), end.fill_and_save(mapping.access)?));
            Ok(())
        });
        changed.then_some(filled)
    }

    /// Temporary zeroes that were accessed become permanent; where the others were, the file shows again when
    /// it grows. (A write to them between the check and the change is lost, as one beyond a file's end may
    /// be.)
    pub fn settle(&self) -> Vec<Filled> {
        let State { ledger, filled, .. } = &mut *self.lock();
        let mappings = ledger.mappings.iter_mut();
        mappings.filter_map(|(&key, mapping)| settle(self.place(key, mapping)?, mapping, filled)).collect()
    }

    /// How much the guest found missing so far.
    pub fn filled(&self) -> FilledTotal {
        self.lock().filled
    }

    /// Makes all that is missing inaccessible, until a fill probes it: the guest's access then fails at once
    /// instead of waiting for a page that never comes. It has no other effect.
    pub fn guard_missing(&self) {
        self.change_missing(ALL, false, |_, missing, mapping, _| {
            let len = missing.guest().len();
            if len > mapping.kept.guarded {
                missing.protect(None)?;
                mapping.kept.guarded = len;
            }
            Ok(())
        });
    }

    /// Probes the mappings of these keys, and changes those at whose end something is missing. `unguard` as
    /// for [`Self::candidates`]. Whether anything was changed.
    fn change_missing(
        &self,
        keys: RangeInclusive<Key>,
        unguard: bool,
        mut action: impl FnMut(Place<'_>, Span<'_>, &mut Mapping, &mut FilledTotal) -> io::Result<()>,
    ) -> bool {
        let _probing = self.probe_lock.lock().unwrap_or_else(PoisonError::into_inner);
        let (candidates, mut changed) = self.candidates(keys, unguard);
        for place in candidates {
            if let Some(missing) = place.in_place.and_then(|file| file.missing()) {
                changed |= self.change(place, |mapping, total| action(place, missing, mapping, total));
            }
        }
        changed
    }

    fn place(&self, key: Key, mapping: &Mapping) -> Option<Place<'_>> {
        let whole = self.span(key, mapping.span_len())?;
        Some(Place { key, number: mapping.number, whole, in_place: whole.first(mapping.in_place()) })
    }

    /// The mappings of these keys. They are probed when the state is
    /// unlocked again: that may wait for the disk, or for the server of the file. `unguard` makes what is
    /// guarded accessible again; the second value says whether anything was.
    fn candidates(&self, keys: RangeInclusive<Key>, unguard: bool) -> (Vec<Place<'_>>, bool) {
        let (mut candidates, mut unguarded) = (Vec::new(), false);
        for (&key, mapping) in self.lock().ledger.mappings.range_mut(keys) {
            let Some(place) = self.place(key, mapping) else { continue };
            unguarded |= unguard && mapping.unguard(place);
            candidates.push(place);
        }
        (candidates, unguarded)
    }

    /// Changes a mapping, unless it was replaced or filled since it became a candidate.
    fn change(
        &self,
        place: Place<'_>,
        action: impl FnOnce(&mut Mapping, &mut FilledTotal) -> io::Result<()>,
    ) -> bool {
        let State { ledger, filled, .. } = &mut *self.lock();
        let len = place.in_place.map_or(0, |file| file.guest().len());
        match ledger.mappings.get_mut(&place.key) {
            Some(mapping) if mapping.number == place.number && mapping.in_place() == len => {
                note(place, &action(mapping, filled))
            }
            _ => false,
        }
    }
}

/// Makes temporary zeroes permanent if one of them was accessed, else puts the file's pages back.
fn settle(place: Place<'_>, mapping: &mut Mapping, total: &mut FilledTotal) -> Option<Filled> {
    mapping.unguard(place);
    let (len, saved) = mapping.kept.saved.take()?;
    let span = place.whole.first(mapping.file_len())?.last(len)?;
    let kept = match span.is_touched() {
        Ok(false) => span.replace_with(saved).map(|()| false),
        touched => touched,
    };
    note(place, &kept);
    kept.unwrap_or(true).then(|| mapping.keep_filled(len, place, total))
}

/// Logs an error. Whether there was none.
fn note<T>(place: Place<'_>, result: &io::Result<T>) -> bool {
    if let Err(error) = result {
        let (shmid, offset) = place.key;
        log::error!("what is missing of the mapping at {offset:#x} of region {shmid} stays so: {error}");
    }
    result.is_ok()
}

#[cfg(test)]
mod tests;
