//! KVM memory slots (KVM_SET_USER_MEMORY_REGION): one for each range of host memory that the guest sees.
//!
//! The one implementation of [`GuestMapper`] outside tests. The set-up puts RAM and the register pages in; backend
//! channels add and remove a slot for each mapping while the guest runs.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::memory::{Access, GuestMapper, GuestRange, SlotId};

/// The slots of one virtual machine.
pub struct Slots {
    vm: Arc<VmFd>,
    limit: u32,
    /// Lock order: innermost. Held while KVM changes a slot, which waits for no other process.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What each slot number holds; `None` for a number that can be used again.
    slots: Vec<Option<GuestRange>>,
    free: Vec<u32>,
}

impl Slots {
    /// The slots of `vm`, at most `limit` (KVM_CAP_NR_MEMSLOTS) of them.
    pub fn new(vm: Arc<VmFd>, limit: u32) -> Self {
        Slots {
            vm,
            limit,
            state: Mutex::default(),
        }
    }

    fn set(&self, slot: u32, guest: GuestRange, len: u64, host: *mut u8, flags: u32) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest.start(),
            memory_size: len,
            userspace_addr: host as u64,
        };
        // SAFETY: `map`'s caller keeps the range its own as long as the slot lives; a length of 0 ends the slot.
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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = state.free.last().copied();
        let slot = match reused {
            Some(slot) => slot,
            None => u32::try_from(state.slots.len())
                .ok()
                .filter(|&slot| slot < self.limit)
                .ok_or(io::Error::from_raw_os_error(libc::ENOSPC))?,
        };
        self.set(slot, guest, guest.len(), host, flags)?;
        match reused {
            Some(_) => {
                state.free.pop();
                state.slots[slot as usize] = Some(guest);
            }
            None => state.slots.push(Some(guest)),
        }
        Ok(SlotId(slot))
    }

    fn unmap(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let guest = state
            .slots
            .get(slot as usize)
            .copied()
            .flatten()
            .ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
        self.set(slot, guest, 0, std::ptr::null_mut(), 0)?;
        state.slots[slot as usize] = None;
        state.free.push(slot);
        Ok(())
    }
}
