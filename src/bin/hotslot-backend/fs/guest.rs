//! The guest's memory, as the front-end has told of it: RAM, the window, and what other devices have mapped.
//!
//! RAM is what SET_MEM_TABLE says. A front-end that knows SHMEM_ADDRESSES (SHM-82) adds the window by the
//! first ADD_MEM_REG behind it, and by later ones what other devices map (SHM-80). Only RAM is mapped here: a
//! file that another process can shorten would end this one by SIGBUS. Of other front-ends all memory is RAM,
//! however they tell of it. Called by [`super`].

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use fuse_vm_memory::GuestMemory as _;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::queue::{self, Memory};

/// The guest's memory at one time.
pub struct Guest {
    pub ram: Memory,
    /// The window's guest address, if it is known.
    pub window: Option<u64>,
    pub shared: Vec<Shared>,
}

/// A range that another device has mapped.
#[derive(Clone)]
pub struct Shared {
    pub address: u64,
    pub len: u64,
    pub file: Arc<File>,
    pub file_offset: u64,
}

/// What the front-end has told of so far.
#[derive(Default)]
pub struct Known {
    told: GuestMemoryMmap,
    guest: Option<Arc<Guest>>,
}

impl Known {
    /// As it is now; `None` before the first SET_MEM_TABLE.
    pub fn guest(&self) -> Option<Arc<Guest>> {
        self.guest.clone()
    }

    /// The front-end has told of all memory, or of one range that comes or goes.
    ///
    /// # Errors
    ///
    /// A region that cannot be mapped.
    pub fn change(&mut self, memory: &GuestMemoryMmap, window_len: Option<u64>) -> io::Result<()> {
        // A region that stays is the same value; SET_MEM_TABLE makes all anew.
        let was_told = |region: &GuestRegionMmap| {
            self.told.find_region(region.start_addr()).is_some_and(|old| std::ptr::eq(old, region))
        };
        let before = self.guest.as_deref().filter(|_| memory.iter().any(was_told));
        // Once it is known, what another device maps cannot take its place.
        let is_window = |region: &&GuestRegionMmap| match before.map(|guest| guest.window) {
            Some(Some(address)) => region.start_addr().raw_value() == address,
            Some(None) => Some(region.len()) == window_len && is_mark(region),
            None => false,
        };
        let window = memory.iter().find(is_window).map(|region| region.start_addr().raw_value());
        let mut shared = Vec::new();
        let mut ram = Vec::new();
        for region in memory.iter() {
            let address = region.start_addr().raw_value();
            let was_shared =
                || before.is_some_and(|guest| guest.shared.iter().any(|old| old.address == address));
            if Some(address) == window {
                continue;
            }
            match region.file_offset() {
                Some(file) if window.is_some() && (!was_told(region) || was_shared()) => {
                    shared.push(Shared {
                        address,
                        len: region.len(),
                        file: Arc::clone(file.arc()),
                        file_offset: file.start(),
                    })
                }
                _ => ram.push(region),
            }
        }
        let same = |guest: &&Guest| {
            ram.len() == guest.ram.num_regions() && ram.iter().all(|region| was_told(region))
        };
        let ram = match before.filter(same) {
            Some(before) => Arc::clone(&before.ram),
            None => queue::map(ram)?,
        };
        self.guest = Some(Arc::new(Guest { ram, window, shared }));
        self.told = memory.clone();
        Ok(())
    }
}

/// Whether a region is one of shared memory, of which only the place matters: its file has no permissions.
fn is_mark(region: &GuestRegionMmap) -> bool {
    let metadata = region.file_offset().map(|file| file.file().metadata());
    metadata.is_some_and(|metadata| metadata.is_ok_and(|metadata| metadata.mode() & 0o7777 == 0))
}
