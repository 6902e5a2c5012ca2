//! KVM memory slots: a stand-in that adds and never reuses.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::memory::{Access, GuestMapper, GuestRange, SlotId};

/// The slots of one machine.
pub struct Slots {
    vm: Arc<VmFd>,
    max: u32,
    live: Mutex<BTreeMap<u32, kvm_userspace_memory_region>>,
}

impl Slots {
    /// Slots of `vm`, at most `max` of them.
    pub fn new(vm: Arc<VmFd>, max: u32) -> Self {
        Slots {
            vm,
            max,
            live: Mutex::default(),
        }
    }
}

impl GuestMapper for Slots {
    unsafe fn map(&self, guest: GuestRange, host: *mut u8, access: Access) -> io::Result<SlotId> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = live.keys().next_back().map_or(0, |last| last + 1);
        if slot >= self.max {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let region = kvm_userspace_memory_region {
            slot,
            flags: if access == Access::ReadOnly {
                KVM_MEM_READONLY
            } else {
                0
            },
            guest_phys_addr: guest.start(),
            memory_size: guest.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the caller keeps the host range until `unmap`.
        unsafe { self.vm.set_user_memory_region(region) }?;
        live.insert(slot, region);
        Ok(SlotId(slot))
    }

    fn unmap(&self, slot: SlotId) -> io::Result<()> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let mut region = *live
            .get(&slot.0)
            .ok_or(io::Error::from_raw_os_error(libc::ENOENT))?;
        region.memory_size = 0;
        // SAFETY: a size of 0 removes the slot.
        unsafe { self.vm.set_user_memory_region(region) }?;
        live.remove(&slot.0);
        Ok(())
    }
}
