//! A machine that records what its guest can see. The integration tests have their own, in `tests/support`.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Access, GuestMapper, GuestRange, SlotId};

/// What the guest can see.
#[derive(Default)]
pub struct Guest {
    live: Mutex<Live>,
    /// Refuses every mapping.
    pub no_slots: AtomicBool,
    /// Fails to delete a slot.
    pub deletes_no_slot: AtomicBool,
    /// What happens when a range is prefaulted.
    pub at_prefault: Mutex<Option<AtPrefault>>,
}

pub type AtPrefault = Box<dyn FnMut(GuestRange) + Send>;

#[derive(Default)]
struct Live {
    /// By guest address.
    mappings: BTreeMap<u64, Mapping>,
    /// The guest address of each slot.
    slots: BTreeMap<SlotNumber, u64>,
    free: Vec<SlotNumber>,
    /// The ranges of idle slots.
    idle: Vec<GuestRange>,
}

type SlotNumber = u32;

struct Mapping {
    guest: GuestRange,
    host: usize,
    access: Access,
}

impl Live {
    fn at(&self, address: u64) -> Option<&Mapping> {
        let (_, mapping) = self.mappings.range(..=address).next_back()?;
        (address <= mapping.guest.last()).then_some(mapping)
    }

    fn retire(&mut self, range: GuestRange, most: usize, deletes_no_slot: bool) -> io::Result<usize> {
        let before = self.idle.len();
        let mut left = if deletes_no_slot { 0 } else { most };
        self.idle.retain(|idle| {
            let goes = left > 0 && idle.overlaps(&range);
            left -= usize::from(goes);
            !goes
        });
        match deletes_no_slot && self.idle.iter().any(|idle| idle.overlaps(&range)) {
            true => Err(io::Error::from_raw_os_error(libc::EIO)),
            false => Ok(before - self.idle.len()),
        }
    }
}

impl GuestMapper for Guest {
    unsafe fn map(&self, guest: GuestRange, host: *mut u8, access: Access) -> io::Result<SlotId> {
        let mut live = self.lock();
        if self.no_slots.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let before = live.mappings.range(..=guest.last()).next_back();
        assert!(before.is_none_or(|(_, other)| !other.guest.overlaps(&guest)));
        let slot = live.free.pop().unwrap_or(live.slots.len() as SlotNumber);
        live.idle.retain(|idle| !idle.overlaps(&guest));
        live.slots.insert(slot, guest.start());
        let host = host as usize;
        live.mappings.insert(guest.start(), Mapping { guest, host, access });
        Ok(SlotId(slot))
    }

    fn unmap(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut live = self.lock();
        if self.deletes_no_slot.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let unknown = || io::Error::from_raw_os_error(libc::ENOENT);
        let start = live.slots.remove(&slot).ok_or_else(unknown)?;
        live.free.push(slot);
        live.mappings.remove(&start).map(drop).ok_or_else(unknown)
    }

    fn prefault(&self, guest: GuestRange) -> io::Result<()> {
        if let Some(at_prefault) = &mut *self.at_prefault.lock().unwrap() {
            at_prefault(guest);
        }
        Ok(())
    }

    fn release(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut live = self.lock();
        let unknown = || io::Error::from_raw_os_error(libc::ENOENT);
        let start = live.slots.remove(&slot).ok_or_else(unknown)?;
        let mapping = live.mappings.remove(&start).ok_or_else(unknown)?;
        live.free.push(slot);
        live.idle.push(mapping.guest);
        Ok(())
    }

    fn retire(&self, range: GuestRange, most: usize) -> io::Result<usize> {
        self.lock().retire(range, most, self.deletes_no_slot.load(Ordering::Relaxed))
    }
}

impl Guest {
    /// How many slots are idle.
    pub fn idle(&self) -> usize {
        self.lock().idle.len()
    }

    /// After a failed assertion, too: what is mapped is then taken away all the same.
    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many mappings there are.
    pub fn count(&self) -> usize {
        self.lock().mappings.len()
    }

    /// What the guest sees of a region: offset, length, access.
    pub fn sees(&self, region: GuestRange) -> Vec<(u64, u64, Access)> {
        let live = self.lock();
        live.mappings
            .range(region.start()..=region.last())
            .map(|(start, mapping)| (start - region.start(), mapping.guest.len(), mapping.access))
            .collect()
    }

    /// The byte that the guest reads at an address; `None` where it sees nothing that can be read.
    pub fn read(&self, address: u64) -> Option<u8> {
        let live = self.lock();
        let mapping = live.at(address)?;
        let mut byte = 0u8;
        let (local, remote) = (vector((&raw mut byte) as usize), mapping.host_vector(address));
        // SAFETY: one byte on our stack; a bad address is an error, not a fault.
        let count =
            unsafe { libc::process_vm_readv(std::process::id() as libc::pid_t, &local, 1, &remote, 1, 0) };
        (count == 1).then_some(byte)
    }
}

impl Mapping {
    fn host_vector(&self, address: u64) -> libc::iovec {
        vector(self.host + (address - self.guest.start()) as usize)
    }
}

fn vector(address: usize) -> libc::iovec {
    libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 }
}
