//! A device's own shared memory regions, as its back-end is told where they are (SHM-82).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, ftruncate, memfd_create};

use super::link::Link;
use super::wire::frontend::{Conversation, FrontendError};
use super::wire::message::MemoryRegion;
use crate::memory::shmem::SharedMemory;

/// Each region, by id, and the file that stands for it: of its size, empty, and without permissions, by
/// which a back-end tells it from memory.
#[derive(Default)]
pub struct OwnRegions(Vec<(MemoryRegion, OwnedFd)>);

impl OwnRegions {
    /// All regions of a device.
    pub fn new(shmem: &SharedMemory) -> io::Result<OwnRegions> {
        let mut regions = Vec::new();
        for (shmid, guest) in shmem.regions() {
            let Some(user_addr) = shmem.host_address(shmid) else { continue };
            let file = memfd_create("hotslot-region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&file, guest.len())?;
            fchmod(&file, Mode::empty())?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            let region =
                MemoryRegion { guest_addr: guest.start(), size: guest.len(), user_addr, mmap_offset: 0 };
            regions.push((region, file));
        }
        Ok(OwnRegions(regions))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells the back-end of all, which SET_MEM_TABLE made it forget. One that it refuses is left out, and
    /// the log says so.
    pub fn tell(&self, to: &mut Conversation<'_>, link: &Link) -> Result<(), FrontendError> {
        for (region, file) in &self.0 {
            match to.change_memory(region, Some(file.as_fd())) {
                Err(error @ FrontendError::Refused { .. }) => {
                    let address = region.guest_addr;
                    link.log.warn(format_args!("{error}: it is not told of its own region at {address:#x}"));
                }
                told => told?,
            }
        }
        Ok(())
    }
}
