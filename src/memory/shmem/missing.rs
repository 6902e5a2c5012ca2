//! What is missing at the end of a mapping because its file became shorter (SHM-45): found, put out of reach,
//! filled with zeroes.
//!
//! `vmm::backends` calls it, on vCPU threads when the guest touched something that is missing, and from the
//! main loop, which looks for processors that wait for such a page without end.

use std::io;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::super::GuestRange;
use super::super::window::{Span, Window};
use super::{Mapping, SharedMemory, State};

/// What was missing at the end of mappings and reads as zeroes since (SHM-45), over the device's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FilledTotal {
    /// How many mappings it happened to.
    pub mappings: u64,
    /// How many bytes of them.
    pub bytes: u64,
}

/// A mapping under whose end there are zeroes now (SHM-45).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// Whether it is the first time for this mapping.
    pub is_first: bool,
    /// The region's id.
    pub shmid: u8,
    /// Where the guest sees the mapping.
    pub guest: GuestRange,
    /// How many of its last bytes read 0 from now on.
    pub len: u64,
}

/// A mapping at whose end something may be missing.
struct Candidate {
    shmid: u8,
    window: Arc<Window>,
    offset: u64,
    number: u64,
    in_place: u64,
}

impl Candidate {
    /// What is missing. It may wait for the disk, or for whoever serves the file: the state is not locked
    /// here.
    fn missing(&self) -> Option<Span<'_>> {
        self.window.span(self.offset, self.in_place)?.missing()
    }
}

/// Where a mapping is.
#[derive(Clone, Copy)]
struct Place<'a> {
    shmid: u8,
    window: &'a Window,
    offset: u64,
}

impl Mapping {
    /// What of it is not filled for good.
    fn file_len(&self) -> u64 {
        self.span_len() - self.filled
    }

    /// What of it is not filled, neither for good nor for now.
    fn in_place(&self) -> u64 {
        self.file_len() - self.aside.as_ref().map_or(0, |(len, _)| *len)
    }

    /// Puts what is guarded within reach again. False where nothing is.
    fn unguard(&mut self, place: Place<'_>) -> bool {
        let file = place.window.span(place.offset, self.in_place());
        let Some(guarded) = file.and_then(|file| file.end(self.guarded)) else {
            return false;
        };
        note(place, &guarded.protect(Some(self.access)));
        self.guarded = 0;
        true
    }

    /// Zeroes stay in the place of `len` more bytes.
    fn keep_filled(&mut self, len: u64, place: Place<'_>, total: &mut FilledTotal) -> Filled {
        let is_first = self.filled == 0;
        self.filled += len;
        total.mappings += u64::from(is_first);
        total.bytes += len;
        let start = place.window.guest().start() + place.offset;
        Filled {
            is_first,
            shmid: place.shmid,
            guest: GuestRange::new(start, self.span_len()).unwrap_or(place.window.guest()),
            len: self.filled,
        }
    }
}

impl SharedMemory {
    /// Reads what the guest sees at `at`, not over the end of a page. False where it sees nothing, or a
    /// missing page.
    pub fn read(&self, at: u64, data: &mut [u8]) -> bool {
        let window = self.lock().regions.values().find_map(|region| {
            let guest = region.window.guest();
            (guest.start()..=guest.last()).contains(&at).then(|| Arc::clone(&region.window))
        });
        window.is_some_and(|window| window.whole().read(at - window.guest().start(), data))
    }

    /// Puts zero pages under what is missing at the end of a mapping, for good, if `at` is a guest address in
    /// it. Called when the guest touched it.
    pub fn fill_missing(&self, at: u64) -> Option<Filled> {
        self.access_at(at)?;
        let _alone = self.look();
        let (candidates, _) = self.candidates(Some(at), true);
        let candidate = candidates.first()?;
        let missing = candidate.missing()?;
        if !(missing.guest().start()..=missing.guest().last()).contains(&at) {
            return None;
        }
        self.change(candidate, |place, mapping, total| {
            missing.fill(mapping.access)?;
            // What is behind it is missing as well: there are zeroes already.
            let behind = mapping.aside.take().map_or(0, |(len, _)| len);
            Ok(mapping.keep_filled(missing.guest().len() + behind, place, total))
        })
    }

    /// The guest touched something that is missing, but nobody knows where. Puts zero pages under all that is
    /// missing, until [`Self::settle`] has seen what was touched. `None` where nothing is missing; else what
    /// was filled before, and stays so.
    pub fn fill_all_for_now(&self) -> Option<Vec<Filled>> {
        let _alone = self.look();
        let (candidates, mut changed) = self.candidates(None, true);
        let mut filled = Vec::new();
        for candidate in &candidates {
            if let Some(missing) = candidate.missing() {
                let done = self.change(candidate, |place, mapping, total| {
                    // More of what was filled for now.
                    filled.extend(settle(place, mapping, total));
                    let start = missing.guest().start() - place.window.guest().start();
                    let rest = (place.offset + mapping.file_len()).saturating_sub(start);
                    let rest = place.window.span(start, rest).unwrap_or(missing);
                    let aside = rest.set_aside(mapping.access)?;
                    mapping.aside = Some((rest.guest().len(), aside));
                    Ok(())
                });
                changed |= done.is_some();
            }
        }
        changed.then_some(filled)
    }

    /// What was filled for now and was touched stays so; the rest is the file's again, and shows it when it
    /// grows. (A write to the rest in the moment between the look and the change is lost, as one beyond a
    /// file's end may be.)
    pub fn settle(&self) -> Vec<Filled> {
        let mut state = self.lock();
        let State { regions, filled, .. } = &mut *state;
        let mut list = Vec::new();
        for (&shmid, region) in regions {
            for (&offset, mapping) in &mut region.mappings {
                let place = Place { shmid, window: &region.window, offset };
                list.extend(settle(place, mapping, filled));
            }
        }
        list
    }

    /// What the guest found missing so far.
    pub fn filled(&self) -> FilledTotal {
        self.lock().filled
    }

    /// Puts all that is missing out of reach, until the guest touches some of it or [`Self::fill_missing`]
    /// looks: such an access fails at once instead of waiting for a page that never comes. Nothing else can
    /// be noticed of it.
    pub fn guard_missing(&self) {
        let _alone = self.look();
        for candidate in &self.candidates(None, false).0 {
            if let Some(missing) = candidate.missing() {
                self.change(candidate, |_, mapping, _| {
                    let len = missing.guest().len();
                    if len > mapping.guarded {
                        missing.protect(None)?;
                        mapping.guarded = len;
                    }
                    Ok(())
                });
            }
        }
    }

    fn look(&self) -> MutexGuard<'_, ()> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All mappings, or the one with guest address `at`. `unguard` puts what is guarded within reach again;
    /// whether there was any is told.
    fn candidates(&self, at: Option<u64>, unguard: bool) -> (Vec<Candidate>, bool) {
        let (mut candidates, mut unguarded) = (Vec::new(), false);
        for (&shmid, region) in &mut self.lock().regions {
            let window = &region.window;
            let offsets = match at {
                None => 0..=u64::MAX,
                Some(at) => {
                    let in_region = at.checked_sub(window.guest().start());
                    let before = in_region.and_then(|at| region.mappings.range(..=at).next_back());
                    match before {
                        Some((&offset, mapping))
                            if window
                                .span(offset, mapping.span_len())
                                .is_some_and(|span| at <= span.guest().last()) =>
                        {
                            offset..=offset
                        }
                        _ => continue,
                    }
                }
            };
            for (&offset, mapping) in region.mappings.range_mut(offsets) {
                let place = Place { shmid, window, offset };
                unguarded |= unguard && mapping.unguard(place);
                candidates.push(Candidate {
                    shmid,
                    window: Arc::clone(window),
                    offset,
                    number: mapping.number,
                    in_place: mapping.in_place(),
                });
            }
        }
        (candidates, unguarded)
    }

    /// Changes a mapping, if what it has of its file is still what it was when it became a candidate.
    fn change<T>(
        &self,
        candidate: &Candidate,
        action: impl FnOnce(Place<'_>, &mut Mapping, &mut FilledTotal) -> io::Result<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        let State { regions, filled, .. } = &mut *state;
        let region = regions.get_mut(&candidate.shmid)?;
        let mapping = region.mappings.get_mut(&candidate.offset)?;
        if mapping.number != candidate.number || mapping.in_place() != candidate.in_place {
            return None;
        }
        let place = Place { shmid: candidate.shmid, window: &region.window, offset: candidate.offset };
        let done = action(place, mapping, filled);
        note(place, &done);
        done.ok()
    }
}

/// Ends what was filled for now: touched or not? Gives what stays filled.
fn settle(place: Place<'_>, mapping: &mut Mapping, total: &mut FilledTotal) -> Option<Filled> {
    mapping.unguard(place);
    let (len, mut aside) = mapping.aside.take()?;
    let whole = place.window.span(place.offset, mapping.file_len())?;
    let span = whole.end(len)?;
    let kept = match span.is_touched() {
        Ok(false) => span.put_back(&mut aside).map(|()| false),
        touched => touched,
    };
    note(place, &kept);
    kept.unwrap_or(true).then(|| mapping.keep_filled(len, place, total))
}

fn note<T>(place: Place<'_>, result: &io::Result<T>) {
    if let Err(error) = result {
        let Place { shmid, offset, .. } = place;
        log::error!("what is missing of the mapping at {offset:#x} of region {shmid} stays so: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::bench;
    use super::*;
    use crate::memory::PAGE_SIZE;

    #[test]
    fn what_was_found_missing_of_a_mapping_is_not_done_to_what_it_became_meanwhile() {
        // SHM-45: who looks for what is missing has not locked the mappings, and the back-end goes on.
        const PAGES: u64 = 8;
        let bench = bench();
        let shmem = &bench.shmem;
        let request = || bench.request(0, 0, PAGES * PAGE_SIZE, 0);
        let found = || shmem.candidates(None, true).0.remove(0);
        let is_changed = |candidate: &Candidate| shmem.change(candidate, |_, _, _| Ok(())).is_some();

        shmem.map(&request()).unwrap();
        let candidate = found();
        assert!(is_changed(&candidate));
        // Another mapping at the same place.
        shmem.unmap(0, 0, PAGES * PAGE_SIZE).unwrap();
        assert!(!is_changed(&candidate));
        shmem.map(&request()).unwrap();
        assert!(!is_changed(&candidate));

        // The same, with zeroes at its end: for good, or for now.
        let candidate = found();
        bench.file.set_len(7 * PAGE_SIZE).unwrap();
        let last_page = shmem.region(0).unwrap().start() + 7 * PAGE_SIZE;
        assert!(shmem.fill_missing(last_page).is_some());
        assert!(!is_changed(&candidate));
        let candidate = found();
        bench.file.set_len(6 * PAGE_SIZE).unwrap();
        assert_eq!(shmem.fill_all_for_now(), Some(vec![]));
        assert!(!is_changed(&candidate));
        assert_eq!((shmem.settle(), bench.reads(0, 0)), (vec![], Some(1)));
        assert!(is_changed(&candidate), "it is what it was");
    }
}
