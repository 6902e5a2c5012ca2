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
use super::origin::{Origin, Origins};
use super::pages::OwnedPages;
use super::window::{ReserveVma, Span, Window};
use super::{Access, GuestMapper, GuestRange, PAGE_SIZE, SlotId};
use crate::report::MisuseLog;

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

/// What a device's back-end may map.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many mappings at a time, over all regions.
    pub mappings: usize,
    /// How many bytes at a time. KVM keeps about 2.5 MiB for each GiB where it has to emulate page tables.
    pub bytes: u64,
    /// Whether files that need another process or the network are taken, too (SHM-83).
    pub foreign_files: bool,
}

/// The shared memory of one device.
pub struct SharedMemory {
    mapper: Arc<dyn GuestMapper>,
    /// Where each region is.
    windows: BTreeMap<u8, Window>,
    /// Lock order: taken under the transport's, or alone; `GuestMapper`'s own lock comes after it. Never held
    /// while an answer of a peer is waited for, nor across a call on a back-end's file or its mapping, which
    /// can wait (design, "Nothing waits for a back-end's file").
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
    origins: Origins,
    log: MisuseLog,
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
    /// Places a window for each `(shmid, size in bytes)`, a size of 0 meaning no region. The gate is open
    /// (SHM-68).
    pub fn new(
        sizes: impl IntoIterator<Item = (u8, u64)>,
        allocator: &mut WindowAllocator,
        mapper: Arc<dyn GuestMapper>,
        limits: Limits,
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
            ledger: Ledger::new(sizes, limits.mappings, limits.bytes),
            reserve_vma: ReserveVma::take(),
        });
        let (probe_lock, by_guest_address) = Default::default();
        let (origins, log) = (Origins::new(limits.foreign_files), MisuseLog::new("shared memory"));
        Ok(SharedMemory { mapper, windows, state, probe_lock, by_guest_address, origins, log })
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
    ///
    /// `map` and `unmap` are called by one thread, which the calls on the file can hold up.
    pub fn map(&self, request: &MapRequest<'_>) -> Result<(MappingInfo, u64), ShmemError> {
        let &MapRequest { shmid, shm_offset, len, file, file_offset, access } = request;
        let key = (shmid, shm_offset);
        let span_len = self.lock().ledger.admit(key, len, file_offset)?;
        let span = self.span(key, span_len).ok_or(ShmemError::NoRegion(shmid))?;
        if self.origins.of(file)? == Origin::Memory {
            span.check_huge_pages(file, file_offset).map_err(ShmemError::Place)?;
        }
        span.place(file, file_offset, access).map_err(ShmemError::Place)?;
        let shown = self.show(request, span);
        if shown.is_err() {
            self.reserve_again(Some(span));
        }
        Ok((shown?, span.host() as u64))
    }

    /// Lets the guest see a file that was placed.
    fn show(&self, request: &MapRequest<'_>, span: Span<'_>) -> Result<MappingInfo, ShmemError> {
        let &MapRequest { shmid, shm_offset, len, file_offset, access, .. } = request;
        let (key, guest) = ((shmid, shm_offset), span.guest());
        let ledger = &mut self.lock().ledger;
        // Again: a reset may have closed the gate meanwhile, and may not have waited for this thread.
        ledger.admit(key, len, file_offset)?;
        // SAFETY: the span stays the window's, mapped or reserved, and only this thread, and `unmap_all`
        // after it took the slot away, replace it; no Rust reference goes into it, only system calls look
        // there.
        let slot = unsafe { self.mapper.map(guest, span.host(), access) }.map_err(ShmemError::Guest)?;
        ledger.insert(key, len, file_offset, access, Placed { slot, filled: 0, guarded: 0, saved: None });
        self.index().insert(guest.start(), (guest.last(), access));
        Ok(MappingInfo { shmid, guest, file_offset, access, filled: 0 })
    }

    /// Takes one whole mapping away; no vCPU can reach the file when this returns (SHM-56).
    pub fn unmap(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        let key = (shmid, shm_offset);
        let (hole, _saved) = {
            let ledger = &mut self.lock().ledger;
            self.hide(key, ledger.named(key, len)?)?;
            let saved = ledger.remove(key);
            (ledger.hole(key), saved)
        };
        self.reserve_again(self.span(hole.0, hole.1));
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
    /// mapping stays; the first such error is returned, after the others have gone. Tells of each step, since
    /// each can take long.
    pub fn unmap_all(&self, mut progress: impl FnMut()) -> Result<usize, ShmemError> {
        let (hidden, error) = self.take_all(&mut progress);
        let holes: BTreeSet<_> = {
            let ledger = &self.lock().ledger;
            let keys = hidden.iter().map(|(key, _)| *key);
            // Each hole once; of an empty region all of it, with what an UNMAP had to leave.
            let regions = self.windows.keys().map(|&shmid| (shmid, 0));
            keys.chain(regions).map(|key| ledger.hole(key)).collect()
        };
        for (key, len) in holes {
            self.reserve_again(self.span(key, len));
            progress();
        }
        error.map_or(Ok(hidden.len()), Err)
    }

    /// Takes all mappings away from the guest, and leaves the files where they are in this process: the
    /// thread that should unmap them is stuck.
    pub fn hide_all(&self) -> Result<(), ShmemError> {
        let (hidden, error) = self.take_all(&mut || {});
        // Dropping it would unmap.
        std::mem::forget(hidden);
        error.map_or(Ok(()), Err)
    }

    /// Takes all mappings away from the guest.
    fn take_all(&self, progress: &mut impl FnMut()) -> (Vec<(Key, Mapping)>, Option<ShmemError>) {
        let ledger = &mut self.lock().ledger;
        let (mut hidden, mut first_error) = (Vec::new(), None);
        let keys: Vec<Key> = ledger.mappings.keys().copied().collect();
        for key in keys {
            progress();
            let result = ledger.mappings.get(&key).map_or(Ok(()), |mapping| self.hide(key, mapping));
            match result {
                Ok(()) => hidden.extend(ledger.remove(key).map(|mapping| (key, mapping))),
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        (hidden, first_error)
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

    /// Reserves a span again that the guest no longer sees; after an unmapping all of the hole around it, so
    /// that a part that could not be reserved earlier is reserved then. Called with no lock held: what is
    /// there is the mapping of a back-end's file.
    fn reserve_again(&self, hole: Option<Span<'_>>) {
        let Some(hole) = hole else { return };
        let cleared = hole.clear().or_else(|_| {
            // It fails again only if the span is in the middle of what the kernel has merged into one area:
            // that takes two more.
            self.lock().reserve_vma.give_up();
            let cleared = hole.clear();
            self.lock().reserve_vma = ReserveVma::take();
            cleared
        });
        if let Err(error) = cleared {
            self.log.warn(format_args!(
                "an unmapped file stays in the VMM's address space until the hole around it is reserved again: {error}"
            ));
        }
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
        if let Err(error) = self.unmap_all(|| {}) {
            // The guest can still reach the windows: never unmap them.
            log::error!("shared memory stays in the guest: {error}");
            std::mem::forget(std::mem::take(&mut self.windows));
        }
    }
}

#[cfg(test)]
pub(super) mod tests;
