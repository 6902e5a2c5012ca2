//! KVM memory slots (KVM_SET_USER_MEMORY_REGION): one for each range of host memory that the guest sees.
//!
//! The one implementation of [`GuestMapper`] outside tests. The set-up maps RAM and the register pages;
//! backend channels add a slot for each mapping while the guest runs, and release it. A released slot is
//! idle: the pages behind it are inaccessible. A mapping of the same range takes it over, and KVM changes
//! no slot.

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::prefault::SpareVcpus;
use crate::counters;
use crate::memory::{Access, GuestMapper, GuestRange, SlotId};

/// The idle slots that a machine may have, and the bytes of their ranges. With more, the oldest go. KVM keeps
/// up to 10 bytes for each page of a slot (where it emulates page tables): 10 MiB for all.
const MOST_IDLE: usize = 1024;
const MOST_IDLE_BYTES: u64 = 4 << 30;

/// After so many changes of slots, page tables are no longer filled ahead. KVM numbers the changes for its
/// entries of holes with 19 bits: an addition takes 2 numbers, a deletion 4. When they wrap it drops all
/// page tables, and before Linux 6.15 KVM_PRE_FAULT_MEMORY then waits without end for a vCPU that does not
/// run.
const MOST_CHANGES_BEFORE_PREFAULT: u64 = 100_000;

counters! {
    /// Changes of slots, each of which is one KVM_SET_USER_MEMORY_REGION.
    SlotCounters {
        /// Slots that were added.
        added,
        /// Slots that were deleted.
        deleted,
        /// Mappings that took over an idle slot: each saved the deletion of a slot and the addition of one.
        taken_over,
    }
}

/// The slots of one virtual machine.
///
/// Fields are dropped in their order here: first the machine with its spare vCPUs, which also hold it,
/// then the memory that permanent slots point to.
pub struct Slots {
    /// The only reference outside tests.
    pub(super) vm: Arc<VmFd>,
    /// The number of slots that the machine can have.
    pub limit: u32,
    pub(super) spare_vcpus: SpareVcpus,
    /// Changes so far.
    pub counters: SlotCounters,
    /// Lock order: innermost. Held while KVM changes a slot, which waits for no other process.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By number; `None` for a number that can be used again.
    slots: Vec<Option<Slot>>,
    free: Vec<u32>,
    idle: Idle,
    /// The owners of the host memory behind permanent slots.
    owners: Vec<Arc<dyn Any + Send + Sync>>,
}

#[derive(Clone, Copy, PartialEq)]
struct Slot {
    guest: GuestRange,
    host: *mut u8,
    access: Access,
}

// SAFETY: nothing here dereferences the address.
unsafe impl Send for Slot {}

/// The idle slots.
#[derive(Default)]
struct Idle {
    /// Age and number, by first guest address. KVM has no two slots at one address.
    by_address: BTreeMap<u64, (u64, u32)>,
    /// Number by age: the oldest is first.
    by_age: BTreeMap<u64, u32>,
    /// The length of all ranges.
    bytes: u64,
    /// Slots that ever were idle: the next one's age.
    count: u64,
}

impl Idle {
    fn insert(&mut self, number: u32, guest: GuestRange) {
        self.by_address.insert(guest.start(), (self.count, number));
        self.by_age.insert(self.count, number);
        self.bytes += guest.len();
        self.count += 1;
    }

    fn remove(&mut self, guest: GuestRange) {
        if let Some((age, _)) = self.by_address.remove(&guest.start()) {
            self.by_age.remove(&age);
            self.bytes -= guest.len();
        }
    }

    fn has(&self, number: u32, guest: GuestRange) -> bool {
        self.by_address.get(&guest.start()).is_some_and(|&(_, idle)| idle == number)
    }

    fn oldest(&self) -> Option<u32> {
        self.by_age.first_key_value().map(|(_, &number)| number)
    }

    /// The oldest where there are too many.
    fn surplus(&self) -> Option<u32> {
        let are_too_many = self.by_age.len() > MOST_IDLE || self.bytes > MOST_IDLE_BYTES;
        self.oldest().filter(|_| are_too_many)
    }
}

impl State {
    /// The slot of a number, and whether it is idle.
    fn slot(&self, number: u32) -> Option<(Slot, bool)> {
        let slot = (*self.slots.get(number as usize)?)?;
        Some((slot, self.idle.has(number, slot.guest)))
    }

    /// The last idle slot that shares an address with the range.
    fn idle_in(&self, range: GuestRange) -> Option<(u32, Slot)> {
        let (_, &(_, number)) = self.idle.by_address.range(..=range.last()).next_back()?;
        let (slot, _) = self.slot(number)?;
        slot.guest.overlaps(&range).then_some((number, slot))
    }
}

impl Slots {
    /// The slots of `vm`, at most `limit` (KVM_CAP_NR_MEMSLOTS) of them.
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Self {
        let (spare_vcpus, counters) = Default::default();
        Slots { vm, limit, spare_vcpus, counters, state: Mutex::default() }
    }

    /// Maps like [`GuestMapper::map`], for as long as the machine exists. Keeps `owner` until after that.
    ///
    /// # Safety
    ///
    /// As for [`GuestMapper::map`]; the address range must stay the caller's until `owner` is dropped.
    pub unsafe fn map_permanent(
        &self,
        guest: GuestRange,
        host: *mut u8,
        access: Access,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> io::Result<()> {
        // SAFETY: the range is the caller's until `owner` is dropped, which is after the machine is gone.
        unsafe { self.map(guest, host, access) }?;
        self.lock().owners.push(owner);
        Ok(())
    }

    /// Adds a live slot, at the cost of the oldest idle one where no number is left.
    fn add(&self, state: &mut State, slot: Slot) -> io::Result<SlotId> {
        if state.free.is_empty()
            && state.slots.len() >= self.limit as usize
            && let Some(oldest) = state.idle.oldest()
        {
            self.delete(state, oldest)?;
        }
        let number = state.free.last().copied().unwrap_or(state.slots.len() as u32);
        if number >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let Slot { guest, host, access } = slot;
        let flags = match access {
            Access::ReadOnly => KVM_MEM_READONLY,
            Access::ReadWrite => 0,
        };
        self.set(number, guest, guest.len(), host, flags)?;
        self.counters.added.count();
        if state.free.pop().is_none() {
            state.slots.push(None);
        }
        state.slots[number as usize] = Some(slot);
        Ok(SlotId(number))
    }

    /// Deletes the oldest idle slot where there are too many. Whether it did.
    fn delete_surplus(&self) -> io::Result<bool> {
        let state = &mut *self.lock();
        match state.idle.surplus() {
            Some(oldest) => self.delete(state, oldest).map(|()| true),
            None => Ok(false),
        }
    }

    /// Deletes a slot, idle or live.
    fn delete(&self, state: &mut State, number: u32) -> io::Result<()> {
        let unknown = || io::Error::from_raw_os_error(libc::ENOENT);
        let (Slot { guest, .. }, is_idle) = state.slot(number).ok_or_else(unknown)?;
        self.set(number, guest, 0, std::ptr::null_mut(), 0)?;
        if is_idle {
            state.idle.remove(guest);
        }
        state.slots[number as usize] = None;
        state.free.push(number);
        self.counters.deleted.count();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, slot: u32, guest: GuestRange, len: u64, host: *mut u8, flags: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest.start(),
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: `map`'s caller owns the host range as long as the slot lives; a length of 0 deletes the
        // slot.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl GuestMapper for Slots {
    unsafe fn map(&self, guest: GuestRange, host: *mut u8, access: Access) -> io::Result<SlotId> {
        let slot = Slot { guest, host, access };
        loop {
            // For each idle slot in the way anew, so that other threads get a turn.
            let state = &mut *self.lock();
            match state.idle_in(guest) {
                Some((number, idle)) if idle == slot => {
                    state.idle.remove(guest);
                    self.counters.taken_over.count();
                    return Ok(SlotId(number));
                }
                Some((number, _)) => self.delete(state, number)?,
                None => return self.add(state, slot),
            }
        }
    }

    fn unmap(&self, SlotId(number): SlotId) -> io::Result<()> {
        let state = &mut *self.lock();
        match state.slot(number) {
            Some((_, false)) => self.delete(state, number),
            _ => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }

    fn release(&self, SlotId(number): SlotId) -> io::Result<()> {
        {
            let state = &mut *self.lock();
            let Some((Slot { guest, .. }, false)) = state.slot(number) else {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            };
            state.idle.insert(number, guest);
        }
        // One that KVM does not delete stays idle. The next release tries it again.
        while self.delete_surplus().is_ok_and(|deleted| deleted) {}
        Ok(())
    }

    fn prefault(&self, guest: GuestRange) -> io::Result<()> {
        let changes = self.counters.added.get() + self.counters.deleted.get();
        if changes > MOST_CHANGES_BEFORE_PREFAULT {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.spare_vcpus.prefault(guest)
    }

    fn retire(&self, range: GuestRange, most: usize) -> io::Result<usize> {
        let mut count = 0;
        while count < most {
            // The lock is taken for each slot, so that other threads get a turn.
            let state = &mut *self.lock();
            let Some((number, _)) = state.idle_in(range) else { break };
            self.delete(state, number)?;
            count += 1;
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Weak;
    use std::sync::atomic::{AtomicBool, Ordering};

    use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

    use super::super::vm::{self, Vm};
    use super::*;

    /// Where the guest's code is, and the page that it writes to and then reads from.
    const CODE_AT: u64 = 0x1000;
    const PAGE_AT: u64 = 0x3000;

    /// Real-mode code.
    const CODE: [u8; 9] = [
        0xc6, 0x06, 0x00, 0x30, 0x55, // mov byte [0x3000], 0x55
        0xa0, 0x00, 0x30, //             mov al, [0x3000]
        0xf4, //                         hlt
    ];

    /// A page of ours that can be written to, until the process ends.
    fn page(bytes: &[u8]) -> *mut u8 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses unused addresses.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
        assert_ne!(page, libc::MAP_FAILED);
        // SAFETY: the page is new, and the bytes fit.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), page.cast(), bytes.len()) };
        page.cast()
    }

    fn guest_page(at: u64) -> GuestRange {
        GuestRange::new(at, 4096).unwrap()
    }

    /// A machine with its code in the first of `limit` slots, and its processor; `None` where there is no
    /// KVM.
    fn machine(limit: u32) -> Option<(Slots, VcpuFd)> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) if std::env::var_os("REQUIRE_KVM").is_none() => {
                eprintln!("skipped: /dev/kvm cannot be opened: {error}");
                return None;
            }
            Err(error) => panic!("/dev/kvm: {error}"),
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = Slots::new(Arc::clone(&vm), limit);
        // SAFETY: the page stays.
        unsafe { slots.map(guest_page(CODE_AT), page(&CODE), Access::ReadOnly) }.unwrap();
        Some((slots, vm.create_vcpu(0).unwrap()))
    }

    /// Takes the access of the memory at `host` away from us, and so from the guest.
    fn close(host: *mut u8) {
        // SAFETY: it is a page of ours, which no reference goes into.
        assert_eq!(unsafe { libc::mprotect(host.cast(), 4096, libc::PROT_NONE) }, 0);
    }

    /// Runs the code: whether its write was an exit, whether its read was one, and what it read.
    fn run(processor: &mut VcpuFd) -> (bool, bool, u8) {
        run_where(processor, || panic!("KVM finds no memory"))
    }

    /// The same; calls `fault` where KVM has a slot without memory.
    fn run_where(processor: &mut VcpuFd, mut fault: impl FnMut()) -> (bool, bool, u8) {
        let mut sregs = processor.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        processor.set_sregs(&sregs).unwrap();
        let mut regs = processor.get_regs().unwrap();
        // Bit 1 of RFLAGS is always 1.
        (regs.rip, regs.rflags) = (CODE_AT, 2);
        processor.set_regs(&regs).unwrap();
        let (mut write, mut read) = (false, false);
        loop {
            match processor.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(VcpuExit::MmioWrite(PAGE_AT, [0x55])) => write = true,
                Ok(VcpuExit::MmioRead(PAGE_AT, data)) => {
                    data.fill(0xff);
                    read = true;
                }
                Err(error) if error.errno() == libc::EFAULT => fault(),
                exit => panic!("unexpected: {exit:?}"),
            }
        }
        (write, read, processor.get_regs().unwrap().rax as u8)
    }

    #[test]
    fn what_is_read_only_takes_no_write_even_where_we_could_write() {
        let Some((slots, mut processor)) = machine(8) else {
            return;
        };
        let shown = page(&[7]);
        // SAFETY: the page stays, and only the guest and volatile reads of ours use it.
        let show = |access| unsafe { slots.map(guest_page(PAGE_AT), shown, access) }.unwrap();
        // SAFETY: the page stays.
        let peek = || unsafe { shown.read_volatile() };
        let slot = show(Access::ReadOnly);
        assert_eq!((run(&mut processor), peek()), ((true, false, 7), 7)); // SHM-38
        slots.unmap(slot).unwrap();
        assert_eq!((run(&mut processor), peek()), ((true, true, 0xff), 7)); // SHM-24, SHM-56
        let slot = show(Access::ReadWrite);
        assert_eq!((run(&mut processor), peek()), ((false, false, 0x55), 0x55)); // SHM-40
        slots.unmap(slot).unwrap();
    }

    #[test]
    fn an_idle_slot_shows_a_hole_and_is_taken_over_as_it_is() {
        // SHM-24, SHM-56, SHM-102
        let Some((slots, mut processor)) = machine(8) else {
            return;
        };
        let shown = page(&[7]);
        // SAFETY: the page stays, and only the guest uses it.
        let show = |access| unsafe { slots.map(guest_page(PAGE_AT), shown, access) }.unwrap();
        let slot = show(Access::ReadWrite);
        assert_eq!(run(&mut processor), (false, false, 0x55));
        for _ in 0..3 {
            slots.release(slot).unwrap();
            for refused in [slots.release(slot), slots.unmap(slot)] {
                assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOENT));
            }
            assert_eq!(show(Access::ReadWrite), slot);
        }
        let SlotCounters { added, deleted, taken_over } = &slots.counters;
        assert_eq!((added.get(), deleted.get(), taken_over.get()), (2, 0, 3));
        slots.release(slot).unwrap();
        close(shown);
        let retire = || assert_eq!(slots.retire(guest_page(PAGE_AT), 9).unwrap(), 1);
        assert_eq!(run_where(&mut processor, retire), (true, true, 0xff));
        slots.retire(guest_page(PAGE_AT), 9).unwrap();
        assert_eq!(slots.counters.deleted.get(), 1);
        assert_eq!(run(&mut processor), (true, true, 0xff));
    }

    #[test]
    fn idle_slots_make_way() {
        // SHM-48, SHM-102
        let Some((slots, _processor)) = machine(5) else {
            return;
        };
        let memory = page(&[7]);
        let range = |at, len| GuestRange::new(at, len).unwrap();
        // SAFETY: nothing runs, so that nothing accesses the memory.
        let map = |at, len, access| unsafe { slots.map(range(at, len), memory, access) }.unwrap();
        let deleted = |count| assert_eq!(slots.counters.deleted.get(), count);
        // Another access, and a part of the range.
        slots.release(map(0x10000, 0x4000, Access::ReadOnly)).unwrap();
        slots.release(map(0x10000, 0x4000, Access::ReadWrite)).unwrap();
        deleted(1);
        let part = map(0x13000, 0x3000, Access::ReadWrite);
        deleted(2);
        // More numbers: the oldest one's.
        slots.release(part).unwrap();
        for at in [0x20000, 0x30000, 0x40000] {
            slots.release(map(at, 0x1000, Access::ReadOnly)).unwrap();
        }
        deleted(2);
        map(0x50000, 0x1000, Access::ReadOnly);
        deleted(3);
        assert_eq!(slots.retire(range(0x10000, 0x8000), 9).unwrap(), 0, "it was the oldest");
        assert_eq!(slots.retire(range(0, 0x100000), 2).unwrap(), 2);
        // One of them is left: the first. 4 GiB more are too many bytes.
        slots.release(map(1 << 33, 4 << 30, Access::ReadOnly)).unwrap();
        deleted(6);
        assert_eq!(slots.retire(range(0, 1 << 40), 9).unwrap(), 1);
        assert_eq!(slots.counters.taken_over.get(), 0);
    }

    #[test]
    fn no_more_slots_are_idle_than_that() {
        // SHM-102
        let Some((slots, _processor)) = machine(2 + MOST_IDLE as u32) else {
            return;
        };
        let memory = page(&[7]);
        for number in 0..MOST_IDLE as u64 + 3 {
            // SAFETY: nothing runs, so that nothing accesses the memory.
            let slot = unsafe { slots.map(guest_page(0x10000 + number * 0x2000), memory, Access::ReadOnly) };
            slots.release(slot.unwrap()).unwrap();
        }
        assert_eq!(slots.counters.deleted.get(), 3);
    }

    #[test]
    fn page_tables_are_filled_ahead_until_the_numbers_of_changes_may_wrap() {
        // SHM-105
        let Some((slots, _processor)) = machine(2) else {
            return;
        };
        slots.counters.added.add(MOST_CHANGES_BEFORE_PREFAULT - 1);
        slots.prefault(guest_page(CODE_AT)).unwrap();
        slots.counters.deleted.count();
        let refused = slots.prefault(guest_page(CODE_AT)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
    }

    /// The owner of a permanent slot's memory, which looks at the machine when it is dropped.
    struct Owner {
        vm: Weak<VmFd>,
        machine_was_gone: Arc<AtomicBool>,
    }

    impl Drop for Owner {
        fn drop(&mut self) {
            self.machine_was_gone.store(self.vm.upgrade().is_none(), Ordering::SeqCst);
        }
    }

    #[test]
    fn memory_of_permanent_slots_outlives_the_machine_and_its_processors() {
        if machine(8).is_none() {
            return;
        }
        let vm = Vm::new(&vm::Kvm::open().unwrap(), 0xfffb_c000).unwrap();
        let machine_was_gone = Arc::new(AtomicBool::new(false));
        let owner =
            Owner { vm: Arc::downgrade(&vm.slots.vm), machine_was_gone: Arc::clone(&machine_was_gone) };
        let (slots, owner) = (Arc::clone(&vm.slots), Arc::new(owner));
        // SAFETY: the page stays, and only the guest uses it.
        unsafe { slots.map_permanent(guest_page(PAGE_AT), page(&[7]), Access::ReadWrite, owner) }.unwrap();
        let processor = vm.create_vcpu(0).unwrap();
        drop((vm, slots));
        assert!(!machine_was_gone.load(Ordering::SeqCst), "a processor needs memory");
        drop(processor);
        assert!(machine_was_gone.load(Ordering::SeqCst));
    }

    #[test]
    fn numbers_are_used_again_and_never_more_than_the_limit() {
        // SHM-48, SHM-49
        let Some((slots, _processor)) = machine(3) else {
            return;
        };
        let shown = page(&[7]);
        // SAFETY: the page stays, and only the guest uses it.
        let map = |at| unsafe { slots.map(guest_page(at), shown, Access::ReadOnly) };
        let errno = |result: io::Result<SlotId>| result.unwrap_err().raw_os_error();
        let live: Vec<_> = [0x3000, 0x5000].map(|at| map(at).unwrap()).into();
        for _ in 0..3 {
            assert_eq!(errno(map(0x7000)), Some(libc::ENOSPC));
        }
        for &slot in &live {
            slots.unmap(slot).unwrap();
            let again = slots.unmap(slot).unwrap_err();
            assert_eq!(again.raw_os_error(), Some(libc::ENOENT));
        }
        // A refusal costs no number, also of those that were used before.
        for _ in 0..3 {
            assert_eq!(errno(map(CODE_AT)), Some(libc::EEXIST));
        }
        for at in [0x3000, 0x5000] {
            assert!(live.contains(&map(at).unwrap()));
        }
        assert_eq!(errno(map(0x7000)), Some(libc::ENOSPC));
        let unknown = slots.unmap(SlotId(3)).unwrap_err();
        assert_eq!(unknown.raw_os_error(), Some(libc::ENOENT));
    }
}
