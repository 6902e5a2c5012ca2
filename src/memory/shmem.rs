//! One device's shared memory regions (VIRTIO section 2.10) and mappings (SHM-25 to SHM-56, as far as they do
//! not depend on the wire format). Carries out the requests that the ledger allows, and undoes them if a step
//! fails.
//!
//! `provide` has the part that vCPU threads call, for pages that the guest could not access.
//!
//! `vhost_user` maps and unmaps; its device closes the gate and unmaps everything at a reset; the set-up and
//! the transport ask where regions are; `memory::missing` asks for pages that the guest could not access.

mod provide;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};
use std::time::Instant;

use super::alloc::WindowAllocator;
use super::backing::{BackingFile, BackingFiles, FileInfo};
pub use super::error::{LayoutError, ShmemError};
use super::ledger::{self, Admitted, Key, Ledger};
use super::origin::Origins;
use super::window::{ReserveVma, Span, Window};
use super::{Access, GuestMapper, GuestRange, PAGE_SIZE, SlotId};
use crate::counter::{Counter, Counts};
use crate::report::MisuseLog;
pub use provide::{Filled, FilledTotal, Page, Unavailable};

/// A back-end's request to map a file. Offsets and lengths are in bytes.
#[derive(Debug)]
#[allow(missing_docs)] // The names say it.
pub struct MapRequest<'a> {
    pub shmid: u8,
    pub shm_offset: u64,
    pub len: u64,
    pub file: &'a Arc<OwnedFd>,
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
    /// How many of its last bytes are zeroes because the file ends before them (SHM-45).
    pub filled: u64,
    /// The guest address of a page that the guest waits for because the host cannot provide it (SHM-87).
    pub unavailable: Option<u64>,
}

/// After how many bytes of a mapping to look whether the device was reset: one huge page.
const PREFAULT_STEP: u64 = 2 << 20;

/// What a device's back-end may map.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many mappings at a time, over all regions.
    pub mappings: usize,
    /// How many bytes at a time. KVM keeps about 2.5 MiB for each GiB where it has to emulate page tables.
    pub bytes: u64,
    /// Whether files that need another process or the network are taken, too (SHM-83).
    pub foreign_files: bool,
    /// Whether a mapping's page tables are filled before the back-end is answered (SHM-105).
    pub prefault: bool,
}

/// The shared memory of one device.
pub struct SharedMemory {
    mapper: Arc<dyn GuestMapper>,
    /// Where each region is.
    windows: BTreeMap<u8, Window>,
    /// Lock order: taken under the transport's, or alone; `GuestMapper`'s own lock comes after it. Never held
    /// while an answer of a peer is waited for, nor across a call on a back-end's file or its mapping, which
    /// can wait (design, "Nothing waits for a back-end's file"). The exception is [`Self::fill`], which
    /// replaces a part of a mapping whose file was accepted (SHM-83).
    state: Mutex<State>,
    /// The live mappings once more, by first guest address: last address, and what the guest may do there.
    /// For the guest's accesses that exit; most of them are to holes, and must not wait for a back-end that
    /// maps and unmaps all the time. A mapping is in it a little longer than in the guest.
    ///
    /// Lock order: after `state`, innermost; held for a lookup.
    by_guest_address: RwLock<BTreeMap<u64, (u64, Access)>>,
    /// While a back-end that died may come back: until when.
    ///
    /// Lock order: innermost, held for a look.
    expected_until: Mutex<Option<Instant>>,
    origins: Origins,
    prefault: bool,
    /// Whether an unmapped range keeps its slot. Not with `foreign-files=on`: replacing the pages can wait.
    keeps_slots: bool,
    /// Mappings made and removed: see [`Self::changes`].
    changes: AtomicU64,
    log: MisuseLog,
    /// Accesses to mappings that KVM passed on, and that were carried out for the guest.
    pub carried_out: Counter,
}

struct State {
    filled: FilledTotal,
    ledger: Ledger<Placed>,
    files: BackingFiles,
    reserve_vma: ReserveVma,
    /// Something that was unmapped could not be reserved again. From then on UNMAP reserves the whole hole
    /// around the mapping.
    is_unreserved: bool,
}

/// A mapping, in the ledger.
type Mapping = ledger::Mapping<Placed>;

/// How a mapping was made, and what became of its pages. Lengths are in bytes.
struct Placed {
    /// `None` once it is released: the mapping is being removed.
    slot: Option<SlotId>,
    file: Arc<BackingFile>,
    /// The length of the zeroes at its end.
    filled: u64,
    /// The offset in the mapping of a page that the guest waits for.
    unavailable: Option<u64>,
    /// A new mapping's file is taking the place of its own (SHM-77): no zeroes go there.
    is_exchanged: bool,
}

impl SharedMemory {
    /// Places a window for each `(shmid, size in bytes)`, a size of 0 meaning no region. The gate is open
    /// (SHM-68). `name` is the device's, for messages.
    pub fn new(
        name: &str,
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
            files: BackingFiles::default(),
            reserve_vma: ReserveVma::take(),
            is_unreserved: false,
        });
        let (by_guest_address, expected_until) = (RwLock::default(), Mutex::default());
        let (origins, keeps_slots) = (Origins::new(limits.foreign_files), !limits.foreign_files);
        let (changes, log) = (AtomicU64::new(0), MisuseLog::new(name));
        Ok(SharedMemory {
            mapper,
            windows,
            state,
            by_guest_address,
            expected_until,
            origins,
            prefault: limits.prefault,
            keeps_slots,
            changes,
            log,
            carried_out: Counter::default(),
        })
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
            let Mapping { file_offset, access, kept: Placed { filled, unavailable, .. }, .. } = *mapping;
            let unavailable = unavailable.map(|offset| guest.start() + offset);
            Some(MappingInfo { shmid: key.0, guest, file_offset, access, filled, unavailable })
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
        let Admitted { span_len, in_the_way } = self.lock().ledger.admit(key, len, file_offset)?;
        let span = self.span(key, span_len).ok_or(ShmemError::NoRegion(shmid))?;
        let fd = file.as_fd();
        let info = FileInfo::of(fd, self.origins.of(fd)?).map_err(ShmemError::Place)?;
        let replaces = self.make_way(in_the_way, key, span_len, access)?;
        if replaces {
            let exchanged = span.exchange(fd, info, file_offset, access, || self.set_exchanged(key, true));
            if let Err(error) = exchanged {
                self.set_exchanged(key, false);
                return Err(ShmemError::of_mmap(error, access));
            }
        } else if let Err(error) = span.place(fd, info, file_offset, access) {
            self.clear(span, span)?;
            return Err(ShmemError::of_mmap(error, access));
        }
        let kept = self.lock().files.keep(file, info);
        let shown = self.show(request, span, kept, replaces);
        // An old mapping that was to be replaced still has its slot: its pages must not become a reservation.
        if shown.is_err() && !replaces {
            self.clear(span, span)?;
        }
        let shown = shown?;
        if self.prefault {
            self.fill_page_tables(key, span_len);
        }
        Ok((shown, span.host() as u64))
    }

    /// Fills the page tables of a new mapping, the host's and those between guest and host (SHM-105): reads
    /// its pages in, and writes none. Ends early at a reset, at the end of the file, and where the host has
    /// no memory: then the guest's accesses do the rest.
    fn fill_page_tables(&self, key: Key, span_len: u64) {
        for offset in (0..span_len).step_by(PREFAULT_STEP as usize) {
            if !self.lock().ledger.gate_open {
                return;
            }
            let part = self.span((key.0, key.1 + offset), PREFAULT_STEP.min(span_len - offset));
            let filled = part.map(|part| {
                part.populate(Access::ReadOnly)?;
                // Again: reading the pages in can take long, and a reset does not wait for it.
                let is_open = self.lock().ledger.gate_open;
                if is_open { self.mapper.prefault(part.guest()) } else { Ok(()) }
            });
            match filled {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    return log::debug!("the page tables of a mapping are filled up to {offset:#x}: {error}");
                }
                None => return,
            }
        }
    }

    /// Takes away the old mappings in the place of a mapping that is to be made (SHM-77). Whether one of them
    /// stays there, whose slot the new mapping takes over.
    fn make_way(
        &self,
        in_the_way: Vec<Key>,
        key: Key,
        span_len: u64,
        access: Access,
    ) -> Result<bool, ShmemError> {
        if !in_the_way.is_empty() && self.lock().ledger.is_replaced(key, span_len, access) {
            return Ok(true);
        }
        for old in in_the_way {
            self.take_away(old, |mapping| mapping.is_old)?;
        }
        Ok(false)
    }

    /// Records whether a new mapping's file is taking the place of this old mapping's pages: then no zeroes
    /// go there.
    fn set_exchanged(&self, key: Key, is_exchanged: bool) {
        if let Some(mapping) = self.lock().ledger.mappings.get_mut(&key) {
            mapping.kept.is_exchanged = is_exchanged;
        }
    }

    /// Lets the guest see a file that was placed, or `replaces` the pages of an old mapping.
    fn show(
        &self,
        request: &MapRequest<'_>,
        span: Span<'_>,
        file: Arc<BackingFile>,
        replaces: bool,
    ) -> Result<MappingInfo, ShmemError> {
        let &MapRequest { shmid, shm_offset, len, file_offset, access, .. } = request;
        let (key, guest) = ((shmid, shm_offset), span.guest());
        let mut state = self.lock();
        let ledger = &mut state.ledger;
        // A reset may have closed it since `admit`, without waiting for this thread. What else `admit`
        // checked still holds: only this thread adds mappings.
        if !ledger.gate_open {
            return Err(ShmemError::GateClosed);
        }
        let replaced = if replaces { ledger.remove(key) } else { None };
        // SAFETY: the span stays the window's, mapped or reserved, for as long as the slot exists, live or
        // idle: other pages take the place of its own in one call, and `drop` keeps the window where a slot
        // is left. No Rust reference goes into it; only system calls access it.
        let map = || unsafe { self.mapper.map(guest, span.host(), access) }.map_err(ShmemError::Guest);
        let slot = replaced.as_ref().and_then(|old| old.kept.slot).map_or_else(map, Ok)?;
        let placed = Placed { slot: Some(slot), file, filled: 0, unavailable: None, is_exchanged: false };
        ledger.insert(key, len, file_offset, access, placed);
        self.index().insert(guest.start(), (guest.last(), access));
        self.changes.fetch_add(1, Ordering::Relaxed);
        drop(state);
        // Closing the old file may block, so no lock is held.
        drop(replaced);
        Ok(MappingInfo { shmid, guest, file_offset, access, filled: 0, unavailable: None })
    }

    /// Takes one whole mapping away; no vCPU can reach the file when this returns (SHM-56).
    pub fn unmap(&self, shmid: u8, shm_offset: u64, len: u64) -> Result<(), ShmemError> {
        let key = (shmid, shm_offset);
        match self.take_away(key, |mapping| mapping.len == len)? {
            true => Ok(()),
            false => Err(self.lock().ledger.not_found(key, len)),
        }
    }

    /// Takes a mapping away, if it is one of `which`. Its slot stays, idle, where it may. Whether there was
    /// one.
    fn take_away(&self, key: Key, which: impl Fn(&Mapping) -> bool) -> Result<bool, ShmemError> {
        let (span, hole) = {
            let State { ledger, is_unreserved, .. } = &mut *self.lock();
            let Some(mapping) = ledger.mappings.get_mut(&key).filter(|mapping| which(mapping)) else {
                return Ok(false);
            };
            let span = self.span(key, mapping.span_len()).ok_or(ShmemError::NoRegion(key.0))?;
            // Release the slot before the pages are replaced: a vCPU that gets EFAULT looks for an idle one.
            self.hide(span, &mut mapping.kept, self.keeps_slots)?;
            let hole = is_unreserved.then(|| ledger.hole_without(key));
            (span, hole.and_then(|(key, len)| self.span(key, len)).unwrap_or(span))
        };
        self.clear(span, hole)?;
        // What is removed is dropped after the lock: closing a file can wait.
        let removed = self.lock().ledger.remove(key);
        drop(removed);
        Ok(true)
    }

    /// Takes away up to `most` slots that unmapped ranges have kept, and gives their number.
    pub fn retire(&self, most: usize) -> Result<usize, ShmemError> {
        let mut count = 0;
        for window in self.windows.values() {
            let retired = self.mapper.retire(window.guest(), most - count);
            count += retired.map_err(ShmemError::Guest)?;
        }
        Ok(count)
    }

    /// The guest cannot access the page at `at`. Whether an unmapped range has kept its slot there: then it
    /// is gone now, and the next access is one to a hole (SHM-24).
    pub fn retire_at(&self, at: u64) -> bool {
        let page = GuestRange::new(at / PAGE_SIZE * PAGE_SIZE, PAGE_SIZE);
        let page = page.filter(|_| self.locate(at).is_some());
        page.is_some_and(|page| self.mapper.retire(page, 1).is_ok_and(|count| count > 0))
    }

    /// A number that changes with each mapping that is made or removed; `None` where `at` is in no region. An
    /// access that failed may have met what is no longer there.
    pub fn changes(&self, at: u64) -> Option<u64> {
        self.locate(at).map(|_| self.changes.load(Ordering::Relaxed))
    }

    /// Refuses every further `map` (SHM-71, SHM-75), until [`Self::open_gate`].
    pub fn close_gate(&self) {
        self.lock().ledger.gate_open = false;
    }

    /// Accepts `map` again.
    pub fn open_gate(&self) {
        self.lock().ledger.gate_open = true;
    }

    /// Another back-end takes the place of the one that made the mappings (SHM-77): from now on they make way
    /// for those of the new one.
    pub fn make_old(&self) {
        self.lock().ledger.mappings.values_mut().for_each(|mapping| mapping.is_old = true);
    }

    /// Takes away what the new back-end has not replaced. Otherwise as [`Self::unmap_all`].
    pub fn unmap_old(&self, progress: impl FnMut()) -> Result<usize, ShmemError> {
        self.unmap_each(|mapping| mapping.is_old, progress)
    }

    /// Takes all mappings away (SHM-69), and gives their number; and the slots that were kept. Where
    /// [`GuestMapper::unmap`] fails the mapping stays; the first such error is returned, after the others
    /// have gone. Calls `progress` at each step, since a step can take long.
    pub fn unmap_all(&self, mut progress: impl FnMut()) -> Result<usize, ShmemError> {
        let unmapped = self.unmap_each(|_| true, &mut progress);
        while self.retire(1)? > 0 {
            progress();
        }
        unmapped
    }

    fn unmap_each(
        &self,
        which: impl Fn(&Mapping) -> bool,
        mut progress: impl FnMut(),
    ) -> Result<usize, ShmemError> {
        let (hidden, error) = self.take(which, &mut progress);
        let holes: BTreeSet<_> = {
            let ledger = &self.lock().ledger;
            let keys = hidden.iter().map(|(key, _)| *key);
            // Each hole once; of an empty region all of it, with what an UNMAP had to leave.
            let regions = self.windows.keys().map(|&shmid| (shmid, 0));
            keys.chain(regions).map(|key| ledger.hole(key)).collect()
        };
        for hole in holes.into_iter().filter_map(|(key, len)| self.span(key, len)) {
            self.reserve_again(hole);
            progress();
        }
        error.map_or(Ok(hidden.len()), Err)
    }

    /// Takes all mappings away from the guest, and leaves the files where they are in this process: the
    /// thread that should unmap them is stuck.
    pub fn hide_all(&self) -> Result<(), ShmemError> {
        let (hidden, error) = self.take(|_| true, &mut || {});
        // Dropping it would close files.
        std::mem::forget(hidden);
        let retired = self.retire(usize::MAX).map(drop);
        error.map_or(retired, Err)
    }

    /// Takes mappings away from the guest.
    fn take(
        &self,
        which: impl Fn(&Mapping) -> bool,
        progress: &mut impl FnMut(),
    ) -> (Vec<(Key, Mapping)>, Option<ShmemError>) {
        let ledger = &mut self.lock().ledger;
        let (mut hidden, mut first_error) = (Vec::new(), None);
        let chosen = ledger.mappings.iter().filter(|(_, mapping)| which(mapping));
        let keys: Vec<Key> = chosen.map(|(&key, _)| key).collect();
        for key in keys {
            progress();
            let result = ledger.mappings.get_mut(&key).map_or(Ok(()), |mapping| {
                let span = self.span(key, mapping.span_len()).ok_or(ShmemError::NoRegion(key.0))?;
                self.hide(span, &mut mapping.kept, false)
            });
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
    fn mapping_at(&self, at: u64) -> Option<(u64, Access)> {
        let index = self.by_guest_address.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, &(last, access)) = index.range(..=at).next_back()?;
        (at <= last).then_some((start, access))
    }

    /// The back-end is gone, and may be back and started by `until`: until then an access to a hole waits
    /// (SHM-77).
    pub fn expect_mappings(&self, until: Instant) {
        *self.expected() = Some(until);
    }

    /// The back-end is back, or lost: accesses to holes no longer wait. The caller may take them up again.
    pub fn expect_nothing(&self) {
        *self.expected() = None;
    }

    /// Whether what is a hole at `at` may soon be a mapping.
    pub fn expects_mapping(&self, at: u64) -> bool {
        self.is_expecting() && self.locate(at).is_some() && self.access_at(at).is_none()
    }

    /// Whether mappings may come back.
    pub fn is_expecting(&self) -> bool {
        self.expected().is_some_and(|until| Instant::now() < until)
    }

    fn expected(&self) -> MutexGuard<'_, Option<Instant>> {
        self.expected_until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether anything is mapped. Waits for no request of the back-end.
    pub fn has_mappings(&self) -> bool {
        !self.by_guest_address.read().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Reads what the guest sees at `at`, not over the end of a page. False where nothing is mapped, or the
    /// page cannot be had.
    pub fn read(&self, at: u64, data: &mut [u8]) -> bool {
        self.locate(at).is_some_and(|((_, offset), window)| window.whole().read(offset, data))
    }

    /// Writes what the guest wrote at `at`. Otherwise as [`Self::read`]; false also for a read-only mapping.
    pub fn write(&self, at: u64, data: &[u8]) -> bool {
        self.locate(at).is_some_and(|((_, offset), window)| window.whole().write(offset, data))
    }

    /// What happened so far, and how many bytes are mapped now.
    pub fn counts(&self) -> Counts {
        let (mapped, mapped_ever, zeroed) = {
            let State { ledger, filled, .. } = &*self.lock();
            (ledger.mapped, ledger.mapped_ever, filled.bytes)
        };
        let counts = [
            ("mapped_bytes", mapped),
            ("mapped_bytes_ever", mapped_ever),
            ("zeroed_bytes", zeroed),
            ("carried_out", self.carried_out.get()),
        ];
        counts.map(|(name, count)| (name.to_owned(), count)).into()
    }

    /// The region and the offset in it that a guest address is at, and the region's window.
    fn locate(&self, at: u64) -> Option<(Key, &Window)> {
        let (&shmid, window) = self.windows.iter().find(|(_, window)| window.guest().contains(at))?;
        Some(((shmid, at - window.guest().start()), window))
    }

    /// `len` bytes, whole pages, from an offset of a region on.
    fn span(&self, (shmid, offset): Key, len: u64) -> Option<Span<'_>> {
        self.windows.get(&shmid)?.span(offset, len)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, (u64, Access)>> {
        self.by_guest_address.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `hole`, with `span` in it, inaccessible. Where that fails, the guest sees nothing in `span` all
    /// the same. Called with no lock held: what is there is the mapping of a back-end's file.
    fn clear(&self, span: Span<'_>, hole: Span<'_>) -> Result<(), ShmemError> {
        if self.reserve_again(hole) {
            return Ok(());
        }
        self.mapper.retire(span.guest(), usize::MAX).map(drop).map_err(ShmemError::Guest)
    }

    /// Reserves a span again. False, with a message, where that fails.
    fn reserve_again(&self, hole: Span<'_>) -> bool {
        let cleared = hole.clear().or_else(|_| {
            // It fails again only if the span is in the middle of what the kernel has merged into one area:
            // that takes two more.
            self.lock().reserve_vma.give_up();
            let cleared = hole.clear();
            self.lock().reserve_vma = ReserveVma::take();
            cleared
        });
        if let Err(error) = &cleared {
            self.lock().is_unreserved = true;
            self.log.warn(format_args!(
                "an unmapped file stays in the VMM's address space until the hole around it is reserved again: {error}"
            ));
        }
        cleared.is_ok()
    }

    /// Takes a mapping away from the guest; its pages stay where they are. `keeps_slot`: the guest sees them
    /// until the caller has cleared the span.
    fn hide(&self, span: Span<'_>, placed: &mut Placed, keeps_slot: bool) -> Result<(), ShmemError> {
        let hidden = match placed.slot {
            Some(slot) if keeps_slot => self.mapper.release(slot),
            Some(slot) => self.mapper.unmap(slot),
            // Released, and not cleared yet: its slot is deleted if it is still idle.
            None => self.mapper.retire(span.guest(), usize::MAX).map(drop),
        };
        hidden.map_err(ShmemError::Guest)?;
        placed.slot = None;
        self.index().remove(&span.guest().start());
        self.changes.fetch_add(1, Ordering::Relaxed);
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
