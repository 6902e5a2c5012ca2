//! A machine that records what its guest can see.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hotslot::memory::{Access, GuestMapper, GuestRange, SlotId};

/// What the guest can see, and the machine that shows it, if there is one.
#[derive(Default)]
pub struct Guest {
    live: Mutex<Live>,
    machine: Option<Arc<dyn GuestMapper>>,
    /// Refuses every mapping.
    pub no_slots: AtomicBool,
    /// Fails to delete a slot.
    pub deletes_no_slot: AtomicBool,
}

#[derive(Default)]
struct Live {
    /// By guest address.
    mappings: BTreeMap<u64, Mapping>,
    /// The guest address of each slot.
    slots: BTreeMap<SlotNumber, u64>,
    free: Vec<SlotNumber>,
    /// The ranges of idle slots; where a machine shows what is mapped, it knows them.
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
        let slot = match &self.machine {
            // SAFETY: the caller's promise.
            Some(machine) => unsafe { machine.map(guest, host, access) }?.0,
            None => live.free.pop().unwrap_or(live.slots.len() as SlotNumber),
        };
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
        match &self.machine {
            Some(machine) => machine.unmap(SlotId(slot))?,
            None => live.free.push(slot),
        }
        live.mappings.remove(&start).map(drop).ok_or_else(unknown)
    }

    fn release(&self, SlotId(slot): SlotId) -> io::Result<()> {
        let mut live = self.lock();
        let unknown = || io::Error::from_raw_os_error(libc::ENOENT);
        let start = live.slots.remove(&slot).ok_or_else(unknown)?;
        let mapping = live.mappings.remove(&start).ok_or_else(unknown)?;
        match &self.machine {
            Some(machine) => machine.release(SlotId(slot))?,
            None => {
                live.free.push(slot);
                live.idle.push(mapping.guest);
            }
        }
        Ok(())
    }

    fn retire(&self, range: GuestRange, most: usize) -> io::Result<usize> {
        match &self.machine {
            Some(machine) => machine.retire(range, most),
            None => self.lock().retire(range, most, self.deletes_no_slot.load(Ordering::Relaxed)),
        }
    }
}

impl Guest {
    /// The guest of a machine that shows it what is mapped.
    pub fn of(machine: Arc<dyn GuestMapper>) -> Guest {
        Guest { machine: Some(machine), ..Guest::default() }
    }

    /// After a failed assertion, too: what is mapped is then taken away all the same.
    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many mappings there are.
    pub fn count(&self) -> usize {
        self.lock().mappings.len()
    }

    /// How many slots are idle, without a machine.
    pub fn idle(&self) -> usize {
        self.lock().idle.len()
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
        let count = unsafe { libc::process_vm_readv(own_pid(), &local, 1, &remote, 1, 0) };
        (count == 1).then_some(byte)
    }

    /// The guest writes a byte; false where it cannot.
    pub fn write(&self, address: u64, byte: u8) -> bool {
        let live = self.lock();
        let Some(mapping) = live.at(address).filter(|mapping| mapping.access == Access::ReadWrite) else {
            return false;
        };
        let (local, remote) = (vector((&raw const byte) as usize), mapping.host_vector(address));
        // SAFETY: only a live mapping of the guest's is written to; a bad address is an error, not a fault.
        unsafe { libc::process_vm_writev(own_pid(), &local, 1, &remote, 1, 0) == 1 }
    }
}

impl Mapping {
    fn host_vector(&self, address: u64) -> libc::iovec {
        vector(self.host + (address - self.guest.start()) as usize)
    }
}

fn own_pid() -> libc::pid_t {
    std::process::id() as libc::pid_t
}

fn vector(address: usize) -> libc::iovec {
    libc::iovec { iov_base: address as *mut libc::c_void, iov_len: 1 }
}
