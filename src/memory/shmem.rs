//! The shared memory regions of one device (VIRTIO section 2.10), and what its back-end mapped into them: the checks
//! and the bookkeeping of SHM-25 to SHM-56 that do not depend on the wire format.
//!
//! `vhost_user::backend_channel` maps and unmaps; `vhost_user::device` closes the gate and unmaps everything at a
//! reset; the set-up and the transport ask where regions are.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use thiserror::Error;

use super::alloc::{NoRoom, WindowAllocator};
use super::window::{Aside, Span, Window};
use super::{Access, GuestMapper, GuestRange, PAGE_SIZE, SlotId};

/// The number of region ids (shmid is a byte).
pub const MAX_REGIONS: usize = 256;

/// Why the regions that a back-end announces cannot be had.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// SHM-15.
    #[error(
        "shared memory region {shmid} has {size:#x} bytes, which is not a multiple of the page size {PAGE_SIZE:#x}"
    )]
    NotPages {
        /// The region's id.
        shmid: u8,
        /// Its size in bytes.
        size: u64,
    },
    /// SHM-16.
    #[error("shared memory region {shmid} does not fit into the guest's physical address space")]
    NoGuestAddresses {
        /// The region's id.
        shmid: u8,
        /// What is left, and what it would take.
        source: NoRoom,
    },
    /// The VMM has no addresses for it.
    #[error("cannot reserve {size:#x} bytes of address space for shared memory region {shmid}")]
    NoHostAddresses {
        /// The region's id.
        shmid: u8,
        /// Its size in bytes.
        size: u64,
        /// What mmap(2) said.
        source: io::Error,
    },
}

/// What a back-end asks to have mapped.
#[derive(Debug)]
pub struct MapRequest<'a> {
    /// The region's id.
    pub shmid: u8,
    /// The offset in the region, in bytes.
    pub shm_offset: u64,
    /// The length in bytes.
    pub len: u64,
    /// The file.
    pub file: BorrowedFd<'a>,
    /// The offset in the file, in bytes.
    pub file_offset: u64,
    /// What the guest may do there.
    pub access: Access,
}

/// Why a request was refused. Nothing was changed then.
#[derive(Debug, Error)]
pub enum ShmemError {
    /// SHM-75: the device was reset and not started since.
    #[error("the device is reset: mappings are refused until it is started again")]
    GateClosed,
    /// SHM-29.
    #[error("there is no shared memory region {0}")]
    NoRegion(u8),
    /// SHM-30.
    #[error("the length is 0")]
    Empty,
    /// SHM-33.
    #[error("the {0} {1:#x} is not a multiple of the page size {PAGE_SIZE:#x}")]
    Unaligned(&'static str, u64),
    /// SHM-31.
    #[error("{len:#x} bytes from {shm_offset:#x} on leave region {shmid}, which has {size:#x} bytes")]
    OutOfBounds {
        /// The region's id.
        shmid: u8,
        /// The offset asked for, in bytes.
        shm_offset: u64,
        /// The length asked for, in bytes.
        len: u64,
        /// The region's size in bytes.
        size: u64,
    },
    /// SHM-32.
    #[error("{len:#x} bytes from {file_offset:#x} on are beyond what a file can have")]
    FileRange {
        /// The offset in the file, in bytes.
        file_offset: u64,
        /// The length in bytes.
        len: u64,
    },
    /// SHM-35.
    #[error("{len:#x} bytes from {shm_offset:#x} on overlap the mapping at {other:#x} of region {shmid}")]
    Overlap {
        /// The region's id.
        shmid: u8,
        /// The offset asked for, in bytes.
        shm_offset: u64,
        /// The length asked for, in bytes.
        len: u64,
        /// Where the mapping that is in the way starts.
        other: u64,
    },
    /// SHM-48.
    #[error("the device has {0} mappings, and may not have more")]
    Quota(usize),
    /// SHM-51, SHM-52.
    #[error("no mapping of region {shmid} is exactly {len:#x} bytes from {shm_offset:#x} on")]
    NoMapping {
        /// The region's id.
        shmid: u8,
        /// The offset named, in bytes.
        shm_offset: u64,
        /// The length named, in bytes.
        len: u64,
    },
    /// SHM-41, SHM-47, SHM-48: the file cannot be mapped, or the addresses for it cannot be had.
    #[error("the file cannot be mapped")]
    Place(#[source] io::Error),
    /// SHM-48: the guest's physical memory could not be changed.
    #[error("the guest's memory cannot be changed")]
    Guest(#[source] io::Error),
}

impl ShmemError {
    /// The errno value that a back-end is told (SHM-58): positive, never 0.
    pub fn errno(&self) -> i32 {
        match self {
            ShmemError::GateClosed => libc::EBUSY,
            ShmemError::NoRegion(_) | ShmemError::NoMapping { .. } => libc::ENOENT,
            ShmemError::Empty | ShmemError::Unaligned(..) => libc::EINVAL,
            ShmemError::OutOfBounds { .. } => libc::ERANGE,
            ShmemError::FileRange { .. } => libc::EOVERFLOW,
            ShmemError::Overlap { .. } => libc::EEXIST,
            ShmemError::Quota(_) => libc::ENOSPC,
            ShmemError::Place(error) | ShmemError::Guest(error) => error
                .raw_os_error()
                .filter(|&errno| errno > 0)
                .unwrap_or(libc::EIO),
        }
    }
}

/// A live mapping, as SIGUSR1's memory map shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingInfo {
    /// The region's id.
    pub shmid: u8,
    /// Where the guest sees it.
    pub guest: GuestRange,
    /// The offset in the file, in bytes.
    pub file_offset: u64,
    /// What the guest may do there.
    pub access: Access,
    /// How many of its last bytes are zeroes because the file became shorter (SHM-45).
    pub filled: u64,
}

/// The shared memory of one device.
pub struct SharedMemory {
    mapper: Arc<dyn GuestMapper>,
    quota: usize,
    /// Lock order: taken under the device's channel lock or the transport's, or alone; `GuestMapper`'s own lock comes
    /// after it. Never held while a peer is waited for.
    state: Mutex<State>,
}

struct State {
    accepting: bool,
    live: usize,
    /// Mappings ever made.
    made: u64,
    regions: BTreeMap<u8, Region>,
}

struct Region {
    window: Arc<Window>,
    /// By offset in the region. Their spans are disjoint.
    mappings: BTreeMap<u64, Mapping>,
}

struct Mapping {
    /// As the back-end gave it: not always whole pages (SHM-34).
    len: u64,
    file_offset: u64,
    access: Access,
    slot: SlotId,
    /// Of all mappings ever made: no other has it.
    number: u64,
    filled: u64,
    /// How many bytes of the file's end, ahead of what is filled, are out of reach.
    guarded: u64,
    /// As many bytes of the file's end are filled for now; and what was there.
    aside: Option<(u64, Aside)>,
}

/// A mapping under whose end there are zeroes now (SHM-45).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
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
    file_len: u64,
}

impl Candidate {
    /// What is missing. It may wait for the disk, or for whoever serves the file: no lock is held here.
    fn missing(&self) -> Option<Span<'_>> {
        self.window.span(self.offset, self.file_len)?.missing()
    }
}

impl Mapping {
    /// The length of what backs it: `len` in whole pages. It fits: the region is made of whole pages.
    fn span_len(&self) -> u64 {
        self.len.next_multiple_of(PAGE_SIZE)
    }

    /// What of it is not filled for good.
    fn file_len(&self) -> u64 {
        self.span_len() - self.filled
    }

    fn report(&self, shmid: u8, window: &Window, offset: u64) -> Filled {
        let start = window.guest().start() + offset;
        Filled {
            shmid,
            guest: GuestRange::new(start, self.span_len()).unwrap_or(window.guest()),
            len: self.filled,
        }
    }
}

impl SharedMemory {
    /// Places a window for each `(shmid, size in bytes)`, a size of 0 meaning no region. At most `quota` mappings are
    /// allowed at a time, over all regions. The gate is open (SHM-68).
    pub fn new(
        sizes: impl IntoIterator<Item = (u8, u64)>,
        windows: &mut WindowAllocator,
        mapper: Arc<dyn GuestMapper>,
        quota: usize,
    ) -> Result<SharedMemory, LayoutError> {
        let mut regions = BTreeMap::new();
        for (shmid, size) in sizes.into_iter().filter(|&(_, size)| size > 0) {
            if size % PAGE_SIZE != 0 {
                return Err(LayoutError::NotPages { shmid, size });
            }
            let guest = windows
                .place(size)
                .map_err(|source| LayoutError::NoGuestAddresses { shmid, source })?;
            let window = Window::reserve(guest).map_err(|source| LayoutError::NoHostAddresses {
                shmid,
                size,
                source,
            })?;
            regions.insert(
                shmid,
                Region {
                    window: Arc::new(window),
                    mappings: BTreeMap::new(),
                },
            );
        }
        let state = Mutex::new(State {
            accepting: true,
            live: 0,
            made: 0,
            regions,
        });
        Ok(SharedMemory { mapper, quota, state })
    }

    /// Where a region is; `None` for an id that has none.
    pub fn region(&self, shmid: u8) -> Option<GuestRange> {
        self.lock()
            .regions
            .get(&shmid)
            .map(|region| region.window.guest())
    }

    /// All regions, by id.
    pub fn regions(&self) -> Vec<(u8, GuestRange)> {
        self.lock()
            .regions
            .iter()
            .map(|(&shmid, region)| (shmid, region.window.guest()))
            .collect()
    }

    /// The live mappings, by region and address.
    pub fn mappings(&self) -> Vec<MappingInfo> {
        let mut list = Vec::new();
        for (&shmid, region) in &self.lock().regions {
            for (&offset, mapping) in &region.mappings {
                let Some(span) = region.window.span(offset, mapping.span_len()) else {
                    continue;
                };
                list.push(MappingInfo {
                    shmid,
                    guest: span.guest(),
                    file_offset: mapping.file_offset,
                    access: mapping.access,
                    filled: mapping.filled,
                });
            }
        }
        list
    }

    /// Maps a file; the guest sees it when this returns (SHM-60).
    pub fn map(&self, request: &MapRequest<'_>) -> Result<(), ShmemError> {
        let &MapRequest {
            shmid,
            shm_offset,
            len,
            file,
            file_offset,
            access,
        } = request;
        let mut state = self.lock();
        if !state.accepting {
            return Err(ShmemError::GateClosed);
        }
        let (live, number) = (state.live, state.made);
        let region = state.regions.get_mut(&shmid).ok_or(ShmemError::NoRegion(shmid))?;
        let size = region.window.guest().len();
        if len == 0 {
            return Err(ShmemError::Empty);
        }
        for (name, offset) in [
            ("offset in the region", shm_offset),
            ("offset in the file", file_offset),
        ] {
            if offset % PAGE_SIZE != 0 {
                return Err(ShmemError::Unaligned(name, offset));
            }
        }
        let out_of_bounds = ShmemError::OutOfBounds {
            shmid,
            shm_offset,
            len,
            size,
        };
        let Some(end) = shm_offset.checked_add(len).filter(|&end| end <= size) else {
            return Err(out_of_bounds);
        };
        let span_len = len.next_multiple_of(PAGE_SIZE);
        let file_end = file_offset
            .checked_add(span_len)
            .and_then(|end| i64::try_from(end).ok());
        if file_end.is_none() {
            return Err(ShmemError::FileRange { file_offset, len });
        }
        if let Some((&other, before)) = region.mappings.range(..end).next_back() {
            if other + before.span_len() > shm_offset {
                return Err(ShmemError::Overlap {
                    shmid,
                    shm_offset,
                    len,
                    other,
                });
            }
        }
        if live >= self.quota {
            return Err(ShmemError::Quota(live));
        }

        let span = region.window.span(shm_offset, span_len).ok_or(out_of_bounds)?;
        span.place(file, file_offset, access).map_err(ShmemError::Place)?;
        // SAFETY: the span stays the window's, mapped or reserved, and only `unmap` and `unmap_all` change it, after
        // they took the slot away; nobody on our side looks into it but through system calls.
        let slot = match unsafe { self.mapper.map(span.guest(), span.host(), access) } {
            Ok(slot) => slot,
            Err(error) => {
                release(&span.clear());
                return Err(ShmemError::Guest(error));
            }
        };
        region.mappings.insert(
            shm_offset,
            Mapping {
                len,
                file_offset,
                access,
                slot,
                number,
                filled: 0,
                guarded: 0,
                aside: None,
            },
        );
        state.live += 1;
        state.made += 1;
        Ok(())
    }

    /// Takes one whole mapping away; no vCPU can reach the file when this returns (SHM-56).
    pub fn unmap(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        let mut state = self.lock();
        let region = state.regions.get_mut(&shmid).ok_or(ShmemError::NoRegion(shmid))?;
        let mapping = region
            .mappings
            .get(&shm_offset)
            .filter(|mapping| mapping.len == len)
            .ok_or(ShmemError::NoMapping {
                shmid,
                shm_offset,
                len,
            })?;
        self.mapper.unmap(mapping.slot).map_err(ShmemError::Guest)?;
        if let Some(span) = region.window.span(shm_offset, mapping.span_len()) {
            release(&span.clear());
        }
        region.mappings.remove(&shm_offset);
        state.live -= 1;
        Ok(())
    }

    /// Refuses every further `map` (SHM-71, SHM-75), until [`Self::open_gate`].
    pub fn close_gate(&self) {
        self.lock().accepting = false;
    }

    /// Accepts `map` again.
    pub fn open_gate(&self) {
        self.lock().accepting = true;
    }

    /// Takes all mappings away (SHM-69), and tells how many there were. A slot that the machine does not give back
    /// keeps its mapping; the error is the first such.
    pub fn unmap_all(&self) -> Result<usize, ShmemError> {
        let mut state = self.lock();
        let before = state.live;
        let mut result = Ok(());
        for region in state.regions.values_mut() {
            region
                .mappings
                .retain(|&offset, mapping| match self.mapper.unmap(mapping.slot) {
                    Ok(()) => {
                        if let Some(span) = region.window.span(offset, mapping.span_len()) {
                            release(&span.clear());
                        }
                        false
                    }
                    Err(error) => {
                        result = Err(ShmemError::Guest(error));
                        true
                    }
                });
        }
        state.live = state.regions.values().map(|region| region.mappings.len()).sum();
        let gone = before - state.live;
        result.map(|()| gone)
    }

    /// Puts zero pages under what is missing at the end of a mapping, for good, if `at` is a guest address in it. Called
    /// when the guest touched it.
    pub fn fill_missing(&self, at: u64) -> Option<Filled> {
        let (candidates, _) = self.candidates(Some(at), true);
        let candidate = candidates.first()?;
        let missing = candidate.missing()?;
        if !(missing.guest().start()..=missing.guest().last()).contains(&at) {
            return None;
        }
        self.change(candidate, |window, mapping| {
            missing.fill(mapping.access)?;
            mapping.filled += missing.guest().len();
            Ok(mapping.report(candidate.shmid, window, candidate.offset))
        })
    }

    /// The guest touched something that is missing, but nobody knows where. Puts zero pages under all that is missing,
    /// until [`Self::settle`] has seen what was touched. False where nothing is missing.
    pub fn fill_all_for_now(&self) -> bool {
        let (candidates, mut changed) = self.candidates(None, true);
        for candidate in &candidates {
            if let Some(missing) = candidate.missing() {
                let done = self.change(candidate, |_, mapping| {
                    let aside = missing.set_aside(mapping.access)?;
                    mapping.aside = Some((missing.guest().len(), aside));
                    Ok(())
                });
                changed |= done.is_some();
            }
        }
        changed
    }

    /// What was filled for now and was touched stays so; the rest is the file's again, and shows it when it grows.
    /// (A write to the rest in the moment between the look and the change is lost, as one beyond a file's end may be.)
    pub fn settle(&self) -> Vec<Filled> {
        let mut filled = Vec::new();
        self.each(|shmid, window, offset, mapping| {
            let Some((len, mut aside)) = mapping.aside.take() else {
                return;
            };
            let whole = window.span(offset, mapping.file_len());
            let Some(span) = whole.and_then(|span| span.end(len)) else {
                return;
            };
            let kept = match span.is_touched() {
                Ok(false) => span.put_back(&mut aside).map(|()| false),
                touched => touched,
            };
            note(shmid, offset, &kept);
            if kept.unwrap_or(true) {
                mapping.filled += len;
                filled.push(mapping.report(shmid, window, offset));
            }
        });
        filled
    }

    /// Puts all that is missing out of reach, until the guest touches some of it or [`Self::fill_missing`] looks: such
    /// an access fails at once instead of waiting for a page that never comes. Nothing else can be noticed of it.
    pub fn guard_missing(&self) {
        for candidate in &self.candidates(None, false).0 {
            if let Some(missing) = candidate.missing() {
                self.change(candidate, |_, mapping| {
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

    /// All mappings, or the one with guest address `at`, except those that are filled for now. `unguard` puts what is
    /// guarded within reach again; whether there was any is told.
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
                let Some(file) = window.span(offset, mapping.file_len()) else {
                    continue;
                };
                if let Some(guarded) = file.end(mapping.guarded).filter(|_| unguard) {
                    note(shmid, offset, &guarded.protect(Some(mapping.access)));
                    mapping.guarded = 0;
                    unguarded = true;
                }
                if mapping.aside.is_none() {
                    candidates.push(Candidate {
                        shmid,
                        window: Arc::clone(window),
                        offset,
                        number: mapping.number,
                        file_len: mapping.file_len(),
                    });
                }
            }
        }
        (candidates, unguarded)
    }

    /// Changes a mapping, if it is still what it was when it became a candidate.
    fn change<T>(
        &self,
        candidate: &Candidate,
        action: impl FnOnce(&Window, &mut Mapping) -> io::Result<T>,
    ) -> Option<T> {
        let mut state = self.lock();
        let region = state.regions.get_mut(&candidate.shmid)?;
        let mapping = region.mappings.get_mut(&candidate.offset)?;
        let unchanged = mapping.number == candidate.number
            && mapping.file_len() == candidate.file_len
            && mapping.aside.is_none();
        if !unchanged {
            return None;
        }
        let done = action(&region.window, mapping);
        note(candidate.shmid, candidate.offset, &done);
        done.ok()
    }

    fn each(&self, mut action: impl FnMut(u8, &Window, u64, &mut Mapping)) {
        for (&shmid, region) in &mut self.lock().regions {
            for (&offset, mapping) in &mut region.mappings {
                action(shmid, &region.window, offset, mapping);
            }
        }
    }

    /// Whether anything is mapped.
    pub fn has_mappings(&self) -> bool {
        self.lock().live > 0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if let Err(error) = self.unmap_all() {
            // The windows must then outlive us: the guest can still reach them.
            log::error!("shared memory stays in the guest: {error}");
            std::mem::forget(std::mem::take(&mut self.lock().regions));
        }
    }
}

fn note<T>(shmid: u8, offset: u64, result: &io::Result<T>) {
    if let Err(error) = result {
        log::error!("what is missing of the mapping at {offset:#x} of region {shmid} stays so: {error}");
    }
}

/// The guest no longer sees the span; that its file stays in our own address space until the next use hurts nobody.
fn release(cleared: &io::Result<()>) {
    if let Err(error) = cleared {
        log::warn!("an unmapped file stays in the VMM's address space for now: {error}");
    }
}

#[cfg(test)]
mod tests;
