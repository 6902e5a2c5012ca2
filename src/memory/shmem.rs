//! The shared memory regions of one device (VIRTIO section 2.10), and what its back-end mapped into them: the
//! checks and the bookkeeping of SHM-25 to SHM-56 that do not depend on the wire format.
//!
//! `vhost_user::backend_channel` maps and unmaps; `vhost_user::device` closes the gate and unmaps everything
//! at a reset; the set-up and the transport ask where regions are.

mod missing;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use thiserror::Error;

pub use self::missing::{Filled, FilledTotal};
use super::alloc::{NoRoom, WindowAllocator};
use super::window::{Aside, Span, Spare, Window};
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
            ShmemError::Place(error) | ShmemError::Guest(error) => {
                error.raw_os_error().filter(|&errno| errno > 0).unwrap_or(libc::EIO)
            }
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
    /// Lock order: taken under the device's channel lock or the transport's, or alone; `GuestMapper`'s own
    /// lock comes after it. Never held while a peer is waited for.
    state: Mutex<State>,
    /// Held from a look for missing pages until what was found is changed. To look is to read: among pages
    /// that another thread filled for now meanwhile, that would pass for the guest's touch (SHM-45).
    ///
    /// Lock order: before `state`. Whoever waits for it needs such a look itself.
    looking: Mutex<()>,
    /// The live mappings once more, by first guest address: last address, and what the guest may do there.
    /// For the accesses of the guest that come to us; most of them are to holes, and must not wait for a
    /// back-end that maps and unmaps all the time. A mapping is in it a little longer than in the guest.
    ///
    /// Lock order: after `state`, innermost; held for a look.
    reach: RwLock<BTreeMap<u64, (u64, Access)>>,
}

struct State {
    filled: FilledTotal,
    accepting: bool,
    live: usize,
    /// Mappings ever made.
    made: u64,
    regions: BTreeMap<u8, Region>,
    spare: Spare,
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
    /// How many bytes of the file's end, ahead of what is filled (for good or for now), are out of reach.
    guarded: u64,
    /// As many bytes of the file's end are filled for now; and what was there.
    aside: Option<(u64, Aside)>,
}

impl Region {
    /// All that is free around an offset at which nothing is mapped.
    fn hole(&self, offset: u64) -> Option<Span<'_>> {
        let before = self.mappings.range(..offset).next_back();
        let start = before.map_or(0, |(&start, mapping)| start + mapping.span_len());
        let after = self.mappings.range(offset..).next();
        let end = after.map_or(self.window.guest().len(), |(&start, _)| start);
        self.window.span(start, end - start)
    }

    fn info(&self, shmid: u8, offset: u64, mapping: &Mapping) -> Option<MappingInfo> {
        let span = self.window.span(offset, mapping.span_len())?;
        Some(MappingInfo {
            shmid,
            guest: span.guest(),
            file_offset: mapping.file_offset,
            access: mapping.access,
            filled: mapping.filled,
        })
    }
}

impl Mapping {
    /// The length of what backs it: `len` in whole pages. It fits: the region is made of whole pages.
    fn span_len(&self) -> u64 {
        self.len.next_multiple_of(PAGE_SIZE)
    }
}

impl SharedMemory {
    /// Places a window for each `(shmid, size in bytes)`, a size of 0 meaning no region. At most `quota`
    /// mappings are allowed at a time, over all regions. The gate is open (SHM-68).
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
            let guest =
                windows.place(size).map_err(|source| LayoutError::NoGuestAddresses { shmid, source })?;
            let window = Window::reserve(guest).map_err(|source| LayoutError::NoHostAddresses {
                shmid,
                size,
                source,
            })?;
            regions.insert(shmid, Region { window: Arc::new(window), mappings: BTreeMap::new() });
        }
        let state = Mutex::new(State {
            filled: FilledTotal::default(),
            accepting: true,
            live: 0,
            made: 0,
            regions,
            spare: Spare::take(),
        });
        Ok(SharedMemory { mapper, quota, state, looking: Mutex::default(), reach: RwLock::default() })
    }

    /// Where a region is; `None` for an id that has none.
    pub fn region(&self, shmid: u8) -> Option<GuestRange> {
        self.lock().regions.get(&shmid).map(|region| region.window.guest())
    }

    /// All regions, by id.
    pub fn regions(&self) -> Vec<(u8, GuestRange)> {
        self.lock().regions.iter().map(|(&shmid, region)| (shmid, region.window.guest())).collect()
    }

    /// The live mappings, by region and address.
    pub fn mappings(&self) -> Vec<MappingInfo> {
        let mut list = Vec::new();
        for (&shmid, region) in &self.lock().regions {
            for (&offset, mapping) in &region.mappings {
                list.extend(region.info(shmid, offset, mapping));
            }
        }
        list
    }

    /// The live mapping that starts at an offset of a region, and its address in this process, which no other
    /// memory of the guest has.
    pub fn mapping(&self, shmid: u8, shm_offset: u64) -> Option<(MappingInfo, u64)> {
        let state = self.lock();
        let region = state.regions.get(&shmid)?;
        let mapping = region.mappings.get(&shm_offset)?;
        let host = region.window.span(shm_offset, mapping.span_len())?.host();
        Some((region.info(shmid, shm_offset, mapping)?, host as u64))
    }

    /// Maps a file; the guest sees it when this returns (SHM-60).
    pub fn map(&self, request: &MapRequest<'_>) -> Result<(), ShmemError> {
        let &MapRequest { shmid, shm_offset, len, file, file_offset, access } = request;
        let mut state = self.lock();
        let state = &mut *state;
        if !state.accepting {
            return Err(ShmemError::GateClosed);
        }
        let (live, number) = (state.live, state.made);
        let region = state.regions.get_mut(&shmid).ok_or(ShmemError::NoRegion(shmid))?;
        let size = region.window.guest().len();
        if len == 0 {
            return Err(ShmemError::Empty);
        }
        for (name, offset) in [("offset in the region", shm_offset), ("offset in the file", file_offset)] {
            if offset % PAGE_SIZE != 0 {
                return Err(ShmemError::Unaligned(name, offset));
            }
        }
        let out_of_bounds = ShmemError::OutOfBounds { shmid, shm_offset, len, size };
        let Some(end) = shm_offset.checked_add(len).filter(|&end| end <= size) else {
            return Err(out_of_bounds);
        };
        let span_len = len.next_multiple_of(PAGE_SIZE);
        let file_end = file_offset.checked_add(span_len).and_then(|end| i64::try_from(end).ok());
        if file_end.is_none() {
            return Err(ShmemError::FileRange { file_offset, len });
        }
        if let Some((&other, before)) = region.mappings.range(..end).next_back()
            && other + before.span_len() > shm_offset
        {
            return Err(ShmemError::Overlap { shmid, shm_offset, len, other });
        }
        if live >= self.quota {
            return Err(ShmemError::Quota(live));
        }

        let span = region.window.span(shm_offset, span_len).ok_or(out_of_bounds)?;
        span.place(file, file_offset, access).map_err(ShmemError::Place)?;
        // SAFETY: the span stays the window's, mapped or reserved, and only `unmap` and `unmap_all` change
        // it, after they took the slot away; nobody on our side looks into it but through system calls.
        let slot = match unsafe { self.mapper.map(span.guest(), span.host(), access) } {
            Ok(slot) => slot,
            Err(error) => {
                release(&mut state.spare, &span);
                return Err(ShmemError::Guest(error));
            }
        };
        region.mappings.insert(
            shm_offset,
            Mapping { len, file_offset, access, slot, number, filled: 0, guarded: 0, aside: None },
        );
        let guest = span.guest();
        self.reach_mut().insert(guest.start(), (guest.last(), access));
        state.live += 1;
        state.made += 1;
        Ok(())
    }

    /// Takes one whole mapping away; no vCPU can reach the file when this returns (SHM-56).
    pub fn unmap(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        let mut state = self.lock();
        let state = &mut *state;
        let region = state.regions.get_mut(&shmid).ok_or(ShmemError::NoRegion(shmid))?;
        let mapping = region
            .mappings
            .get(&shm_offset)
            .filter(|mapping| mapping.len == len)
            .ok_or(ShmemError::NoMapping { shmid, shm_offset, len })?;
        self.mapper.unmap(mapping.slot).map_err(ShmemError::Guest)?;
        self.reach_mut().remove(&(region.window.guest().start() + shm_offset));
        region.mappings.remove(&shm_offset);
        if let Some(hole) = region.hole(shm_offset) {
            release(&mut state.spare, &hole);
        }
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

    /// Takes all mappings away (SHM-69), and tells how many there were. A slot that the machine does not give
    /// back keeps its mapping; the error is the first such.
    pub fn unmap_all(&self) -> Result<usize, ShmemError> {
        let mut state = self.lock();
        let state = &mut *state;
        let before = state.live;
        let mut result = Ok(());
        for region in state.regions.values_mut() {
            let mut freed = Vec::new();
            region.mappings.retain(|&offset, mapping| match self.mapper.unmap(mapping.slot) {
                Ok(()) => {
                    self.reach_mut().remove(&(region.window.guest().start() + offset));
                    freed.push(offset);
                    false
                }
                Err(error) => {
                    result = Err(ShmemError::Guest(error));
                    true
                }
            });
            if region.mappings.is_empty() {
                // At once, and with it what an UNMAP had to leave.
                release(&mut state.spare, &region.window.whole());
                continue;
            }
            for hole in freed.into_iter().filter_map(|offset| region.hole(offset)) {
                release(&mut state.spare, &hole);
            }
        }
        state.live = state.regions.values().map(|region| region.mappings.len()).sum();
        let gone = before - state.live;
        result.map(|()| gone)
    }

    /// What the guest may do at `at`; `None` where nothing is mapped. Waits for nobody.
    pub fn access_at(&self, at: u64) -> Option<Access> {
        let reach = self.reach.read().unwrap_or_else(PoisonError::into_inner);
        let (_, &(last, access)) = reach.range(..=at).next_back()?;
        (at <= last).then_some(access)
    }

    fn reach_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, (u64, Access)>> {
        self.reach.write().unwrap_or_else(PoisonError::into_inner)
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

/// Reserves again what the guest no longer sees. All of the hole around it: what could not be, earlier, is
/// then.
fn release(spare: &mut Spare, hole: &Span<'_>) {
    if let Err(error) = spare.clear(hole) {
        log::warn!("an unmapped file stays in the VMM's address space for now: {error}");
    }
}

#[cfg(test)]
mod tests;
