//! One device's shared memory regions (VIRTIO section 2.10) and mappings (SHM-25 to SHM-56, as far as they do
//! not depend on the wire format). Carries out the requests that the ledger allows, and undoes them if a step
//! fails.
//!
//! `vhost_user` maps and unmaps; its device closes the gate and unmaps everything at a reset; the set-up and
//! the transport ask where regions are; `memory::missing` looks after mappings whose file became shorter.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};

use super::alloc::WindowAllocator;
pub use super::error::{LayoutError, ShmemError};
use super::ledger::{self, Key, Ledger};
use super::pages::OwnedPages;
use super::window::{ReserveVma, Span, Window};
use super::{Access, GuestMapper, GuestRange, PAGE_SIZE, SlotId};

/// A back-end's request to map a file. Offsets and lengths are in bytes.
#[derive(Debug)]
#[allow(missing_docs)] // The names say it.
pub struct MapRequest<'a> {
    pub shmid: u8,
    pub shm_offset: u64,
    pub len: u64,
    pub file: BorrowedFd<'a>,
    pub file_offset: u64,
    pub access: Access,
}

/// A live mapping, as SIGUSR1's memory map shows it. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names say it.
pub struct MappingInfo {
    pub shmid: u8,
    pub guest: GuestRange,
    pub file_offset: u64,
    pub access: Access,
    /// How many of its last bytes are zeroes because the file became shorter (SHM-45).
    pub filled: u64,
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
            "zeroes took the place of {bytes:#x} bytes of {mappings} mappings so far (files that became shorter)"
        )
    }
}

/// The shared memory of one device.
pub struct SharedMemory {
    mapper: Arc<dyn GuestMapper>,
    /// Where each region is.
    windows: BTreeMap<u8, Window>,
    /// Lock order: taken under the device's channel lock or the transport's, or alone; `GuestMapper`'s own
    /// lock comes after it. Never held while an answer of a peer is waited for; calls on a back-end's file
    /// can wait (design, "Calls on a back-end's descriptor can wait").
    pub(super) state: Mutex<State>,
    /// Held by `memory::missing` while it probes for missing pages and changes what it found. Probing reads
    /// pages: without this lock our read of a page that another thread has filled temporarily would look like
    /// the guest's (SHM-45).
    ///
    /// Lock order: before `state`. Its holder may wait for the disk, or for the server of a file.
    pub(super) probe_lock: Mutex<()>,
    /// The live mappings once more, by first guest address: last address, and what the guest may do there.
    /// For the guest's accesses that exit; most of them are to holes, and must not wait for a back-end that
    /// maps and unmaps all the time. A mapping is in it a little longer than in the guest.
    ///
    /// Lock order: after `state`, innermost; held for a lookup.
    by_guest_address: RwLock<BTreeMap<u64, (u64, Access)>>,
}

pub(super) struct State {
    pub filled: FilledTotal,
    pub ledger: Ledger<Placed>,
    reserve_vma: ReserveVma,
}

/// A mapping, in the ledger.
pub(super) type Mapping = ledger::Mapping<Placed>;

/// How a mapping was made, and what `memory::missing` did to its end. Lengths are in bytes.
pub(super) struct Placed {
    slot: SlotId,
    /// The length of the permanent zeroes at its end.
    pub filled: u64,
    /// The length of the inaccessible end of what is neither permanent nor temporary zeroes.
    pub guarded: u64,
    /// The length of the temporary zeroes, ahead of the permanent ones; and the file's pages that were there.
    pub saved: Option<(u64, OwnedPages)>,
}

impl SharedMemory {
    /// Places a window for each `(shmid, size in bytes)`, a size of 0 meaning no region. At most `quota`
    /// mappings are allowed at a time, over all regions. The gate is open (SHM-68).
    pub fn new(
        sizes: impl IntoIterator<Item = (u8, u64)>,
        allocator: &mut WindowAllocator,
        mapper: Arc<dyn GuestMapper>,
        quota: usize,
    ) -> Result<SharedMemory, LayoutError> {
        let mut windows = BTreeMap::new();
        for (shmid, size) in sizes.into_iter().filter(|&(_, size)| size > 0) {
            if size % PAGE_SIZE != 0 {
                return Err(LayoutError::NotPages { shmid, size });
            }
            let guest =
                allocator.place(size).map_err(|source| LayoutError::NoGuestAddresses { shmid, source })?;
            let window = Window::reserve(guest);
            let window = window.map_err(|source| LayoutError::NoHostAddresses { shmid, size, source })?;
            windows.insert(shmid, window);
        }
        let sizes = windows.iter().map(|(&shmid, window)| (shmid, window.guest().len()));
        let state = Mutex::new(State {
            filled: FilledTotal::default(),
            ledger: Ledger::new(sizes, quota),
            reserve_vma: ReserveVma::take(),
        });
        let (probe_lock, by_guest_address) = Default::default();
        Ok(SharedMemory { mapper, windows, state, probe_lock, by_guest_address })
    }

    /// Where a region is; `None` for an id that has none.
    pub fn region(&self, shmid: u8) -> Option<GuestRange> {
        self.windows.get(&shmid).map(Window::guest)
    }

    /// Where a region is reserved in this process, which has no other memory of the guest there.
    pub fn host_address(&self, shmid: u8) -> Option<u64> {
        self.windows.get(&shmid).map(|window| window.whole().host() as u64)
    }

    /// All regions, by id.
    pub fn regions(&self) -> Vec<(u8, GuestRange)> {
        self.windows.iter().map(|(&shmid, window)| (shmid, window.guest())).collect()
    }

    /// The live mappings, by region and address.
    pub fn mappings(&self) -> Vec<MappingInfo> {
        let state = self.lock();
        let info = |(&key, mapping): (&Key, &Mapping)| {
            let guest = self.span(key, mapping.span_len())?.guest();
            let Mapping { file_offset, access, .. } = *mapping;
            Some(MappingInfo { shmid: key.0, guest, file_offset, access, filled: mapping.kept.filled })
        };
        state.ledger.mappings.iter().filter_map(info).collect()
    }

    /// Maps a file; the guest sees it when this returns (SHM-60). Gives the mapping, and its address in this
    /// process, which no other memory of the guest has.
    pub fn map(&self, request: &MapRequest<'_>) -> Result<(MappingInfo, u64), ShmemError> {
        let &MapRequest { shmid, shm_offset, len, file, file_offset, access } = request;
        let key = (shmid, shm_offset);
        let State { ledger, reserve_vma, .. } = &mut *self.lock();
        let span_len = ledger.admit(key, len, file_offset)?;
        let span = self.span(key, span_len).ok_or(ShmemError::NoRegion(shmid))?;
        span.place(file, file_offset, access).map_err(ShmemError::Place)?;
        let guest = span.guest();
        // SAFETY: the span stays the window's, mapped or reserved, and only `unmap` and `unmap_all` replace
        // it, after they took the slot away; no Rust reference goes into it, only system calls look there.
        let mapped = unsafe { self.mapper.map(guest, span.host(), access) };
        let slot = mapped.map_err(|error| {
            reserve_again(reserve_vma, Some(span));
            ShmemError::Guest(error)
        })?;
        ledger.insert(key, len, file_offset, access, Placed { slot, filled: 0, guarded: 0, saved: None });
        self.index().insert(guest.start(), (guest.last(), access));
        Ok((MappingInfo { shmid, guest, file_offset, access, filled: 0 }, span.host() as u64))
    }

    /// Takes one whole mapping away; no vCPU can reach the file when this returns (SHM-56).
    pub fn unmap(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        let key = (shmid, shm_offset);
        let State { ledger, reserve_vma, .. } = &mut *self.lock();
        self.hide(key, ledger.named(key, len)?)?;
        ledger.mappings.remove(&key);
        let (hole, len) = ledger.hole(key);
        reserve_again(reserve_vma, self.span(hole, len));
        Ok(())
    }

    /// Refuses every further `map` (SHM-71, SHM-75), until [`Self::open_gate`].
    pub fn close_gate(&self) {
        self.lock().ledger.gate_open = false;
    }

    /// Accepts `map` again.
    pub fn open_gate(&self) {
        self.lock().ledger.gate_open = true;
    }

    /// Takes all mappings away (SHM-69), and gives their number. Where [`GuestMapper::unmap`] fails the
    /// mapping stays; the first such error is returned, after the others have gone.
    pub fn unmap_all(&self) -> Result<usize, ShmemError> {
        let State { ledger, reserve_vma, .. } = &mut *self.lock();
        let (mut freed, mut first_error) = (Vec::new(), None);
        ledger.mappings.retain(|&key, mapping| match self.hide(key, mapping) {
            Ok(()) => {
                freed.push(key);
                false
            }
            Err(error) => {
                first_error.get_or_insert(error);
                true
            }
        });
        let gone = freed.len();
        // Each hole once; of an empty region all of it, with what an UNMAP had to leave.
        freed.extend(self.windows.keys().map(|&shmid| (shmid, 0)));
        let holes: BTreeSet<_> = freed.into_iter().map(|key| ledger.hole(key)).collect();
        for (key, len) in holes {
            reserve_again(reserve_vma, self.span(key, len));
        }
        first_error.map_or(Ok(gone), Err)
    }

    /// What the guest may do at `at`; `None` where nothing is mapped. Waits for no request of the back-end.
    pub fn access_at(&self, at: u64) -> Option<Access> {
        self.mapping_at(at).map(|(_, access)| access)
    }

    /// The same, and where the mapping starts.
    pub(super) fn mapping_at(&self, at: u64) -> Option<(u64, Access)> {
        let index = self.by_guest_address.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, &(last, access)) = index.range(..=at).next_back()?;
        (at <= last).then_some((start, access))
    }

    /// Whether anything is mapped. Waits for no request of the back-end.
    pub fn has_mappings(&self) -> bool {
        !self.by_guest_address.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// The region and the offset in it that a guest address is at, and the region's window.
    pub(super) fn locate(&self, at: u64) -> Option<(Key, &Window)> {
        let (&shmid, window) = self.windows.iter().find(|(_, window)| window.guest().contains(at))?;
        Some(((shmid, at - window.guest().start()), window))
    }

    /// `len` bytes, whole pages, from an offset of a region on.
    pub(super) fn span(&self, (shmid, offset): Key, len: u64) -> Option<Span<'_>> {
        self.windows.get(&shmid)?.span(offset, len)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, (u64, Access)>> {
        self.by_guest_address.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a mapping away from the guest; its pages stay where they are.
    fn hide(&self, key: Key, mapping: &Mapping) -> Result<(), ShmemError> {
        self.mapper.unmap(mapping.kept.slot).map_err(ShmemError::Guest)?;
        if let Some(span) = self.span(key, mapping.span_len()) {
            self.index().remove(&span.guest().start());
        }
        Ok(())
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        if let Err(error) = self.unmap_all() {
            // The guest can still reach the windows: never unmap them.
            log::error!("shared memory stays in the guest: {error}");
            std::mem::forget(std::mem::take(&mut self.windows));
        }
    }
}

/// Reserves a span again that the guest no longer sees; after an unmapping all of the hole around it, so that
/// a part that could not be reserved earlier is reserved then.
fn reserve_again(reserve_vma: &mut ReserveVma, hole: Option<Span<'_>>) {
    if let Some(Err(error)) = hole.map(|hole| reserve_vma.clear(&hole)) {
        log::warn!(
            "an unmapped file stays in the VMM's address space until the hole around it is reserved again: {error}"
        );
    }
}

#[cfg(test)]
pub(super) mod tests;
