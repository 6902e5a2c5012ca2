//! Carries out a back-end's requests: SHMEM_MAP and SHMEM_UNMAP in the device's shared memory, of which it
//! tells the recipients (`share-shmem=on`), and CONFIG_CHANGE_MSG.

use std::error::Error;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::link::Link;
use super::sharing::Participant;
use super::wire::channel::{Channel, Handler};
use super::wire::message::MMap;
use crate::counter::{Counter, Counts, CountsBy};
use crate::memory::Access;
use crate::memory::shmem::{MapRequest, SharedMemory, ShmemError};
use crate::report::{errno_name, with_causes};

/// A device's backend channel.
///
/// Lock order of its inbox: before `SharedMemory`'s and `Sharing`'s. With `share-shmem=on` it is held while
/// other back-ends are told, too: a range is not mapped again before all have let go of it. `sharing` says
/// why that wait ends.
pub type BackendChannel = Channel<ShmemHandler>;

/// A back-end's requests by what came of them.
#[derive(Default)]
pub struct RequestCounters {
    /// SHMEM_MAPs that were carried out.
    maps: Counter,
    /// SHMEM_UNMAPs that were carried out.
    unmaps: Counter,
    /// Refused requests, by errno.
    refused: CountsBy<i32>,
}

impl RequestCounters {
    /// The counters by name.
    pub fn counts(&self) -> Counts {
        let refused = self.refused.get();
        let total = refused.iter().map(|(_, count)| count).sum();
        let all = [("maps", self.maps.get()), ("unmaps", self.unmaps.get()), ("refused", total)];
        let by_errno =
            refused.iter().map(|&(errno, count)| (format!("refused_{}", errno_name(errno)), count));
        all.map(|(name, count)| (name.to_owned(), count)).into_iter().chain(by_errno).collect()
    }
}

/// Maps and unmaps in one device's shared memory.
pub struct ShmemHandler {
    link: Arc<Link>,
    shmem: Arc<SharedMemory>,
    sharing: Option<Participant>,
    requests: Arc<RequestCounters>,
}

impl ShmemHandler {
    /// For the device with this link; `sharing` is what it is to those that see its mappings (SHM-80).
    /// Requests are counted in `requests`.
    pub fn new(
        link: Arc<Link>,
        shmem: Arc<SharedMemory>,
        sharing: Option<Participant>,
        requests: Arc<RequestCounters>,
    ) -> Self {
        ShmemHandler { link, shmem, sharing, requests }
    }
}

impl Handler for ShmemHandler {
    type Error = ShmemError;

    fn map(&self, request: &MMap, file: OwnedFd) -> Result<(), ShmemError> {
        let &MMap { shmid, shm_offset, len, fd_offset: file_offset, flags, .. } = request;
        let access = match flags & MMap::READ_WRITE {
            0 => Access::ReadOnly,
            _ => Access::ReadWrite,
        };
        // Kept as it came: a copy would cost two system calls.
        let file = Arc::new(file);
        let request = MapRequest { shmid, shm_offset, len, file: &file, file_offset, access };
        let (mapping, host) = self.shmem.map(&request)?;
        self.requests.maps.count();
        // Not at a limited rate: a user who asks for debug messages gets each.
        log::debug!(
            "{}: mapped {len:#x} bytes from {shm_offset:#x} on of region {shmid}, {}, from {file_offset:#x} on of a file",
            self.link.name,
            if access == Access::ReadOnly { "read-only" } else { "read-write" },
        );
        // After the guest's mapping, and before the answer: the guest hands no page to a device that does not
        // know it.
        if let Some(sharing) = &self.sharing
            && let Err(error) = sharing.share(&mapping, host, file)
        {
            self.link.log.warn(format_args!("{error}"));
        }
        Ok(())
    }

    fn unmap(&self, request: &MMap) -> Result<(), ShmemError> {
        let &MMap { shmid, shm_offset, len, .. } = request;
        self.shmem.unmap(shmid, shm_offset, len)?;
        self.requests.unmaps.count();
        log::debug!("{}: unmapped {len:#x} bytes from {shm_offset:#x} on of region {shmid}", self.link.name);
        if let (Some(sharing), Some(region)) = (&self.sharing, self.shmem.region(shmid)) {
            sharing.withdraw(region.start() + shm_offset);
        }
        Ok(())
    }

    /// The main socket is for the keeper to ask on: this thread must not wait for it.
    fn config_changed(&self) {
        self.link.read_config();
    }

    fn errno(error: &ShmemError) -> i32 {
        error.errno()
    }

    fn refused(&self, request: fmt::Arguments<'_>, errno: i32, why: &dyn Error) {
        self.requests.refused.count(errno);
        self.link.log.warn(format_args!("{request} is refused: {}", with_causes(why)));
    }
}
