//! KVM memory slots (KVM_SET_USER_MEMORY_REGION): one for each range of host memory that the guest sees.
//!
//! The one implementation of [`GuestMapper`] outside tests. The set-up maps RAM and the register pages;
//! backend channels add and remove a slot for each mapping while the guest runs.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use super::prefault::SpareVcpus;
use crate::memory::{Access, GuestMapper, GuestRange, SlotId};

/// The slots of one virtual machine.
///
/// Fields are dropped in their order here: first the machine, then the memory that permanent slots point to.
pub struct Slots {
    /// The only reference outside tests.
    pub(super) vm: Arc<VmFd>,
    /// The number of slots that the machine can have.
    pub limit: u32,
    pub(super) spare_vcpus: SpareVcpus,
    /// Lock order: innermost. Held while KVM changes a slot, which waits for no other process.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The range of each slot number; `None` for a number that can be used again.
    slots: Vec<Option<GuestRange>>,
    free: Vec<u32>,
    /// The owners of the host memory behind permanent slots.
    owners: Vec<Arc<dyn Any + Send + Sync>>,
}

impl Slots {
    /// The slots of `vm`, at most `limit` (KVM_CAP_NR_MEMSLOTS) of them.
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Self {
        Slots { vm, limit, spare_vcpus: SpareVcpus::default(), state: Mutex::default() }
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
        let flags = match access {
            Access::ReadOnly => KVM_MEM_READONLY,
            Access::ReadWrite => 0,
        };
        let mut state = self.lock();
        let slot = state.free.last().copied().unwrap_or(state.slots.len() as u32);
        if slot >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.set(slot, guest, guest.len(), host, flags)?;
        if state.free.pop().is_none() {
            state.slots.push(None);
        }
        state.slots[slot as usize] = Some(guest);
        Ok(SlotId(slot))
    }

    fn unmap(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut state = self.lock();
        let Some(&Some(guest)) = state.slots.get(slot as usize) else {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        self.set(slot, guest, 0, std::ptr::null_mut(), 0)?;
        state.slots[slot as usize] = None;
        state.free.push(slot);
        Ok(())
    }

    fn prefault(&self, guest: GuestRange) -> io::Result<()> {
        self.spare_vcpus.prefault(guest)
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

    /// Runs the code: whether its write was an exit, whether its read was one, and what it read.
    fn run(processor: &mut VcpuFd) -> (bool, bool, u8) {
        let mut sregs = processor.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        processor.set_sregs(&sregs).unwrap();
        let mut regs = processor.get_regs().unwrap();
        // Bit 1 of RFLAGS is always 1.
        (regs.rip, regs.rflags) = (CODE_AT, 2);
        processor.set_regs(&regs).unwrap();
        let (mut write, mut read) = (false, false);
        loop {
            match processor.run().unwrap() {
                VcpuExit::Hlt => break,
                VcpuExit::MmioWrite(PAGE_AT, [0x55]) => write = true,
                VcpuExit::MmioRead(PAGE_AT, data) => {
                    data.fill(0xff);
                    read = true;
                }
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
