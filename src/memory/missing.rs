//! When a file under a mapping becomes shorter, puts zeroes in place of the missing pages (SHM-45) and logs
//! it, for all devices of a machine.
//!
//! vCPU threads call it when the guest accessed a missing page, and so does the main loop (`vmm::stuck`),
//! which looks for vCPUs that wait for such a page without end. `fill` does it for one device.

mod fill;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use self::fill::Filled;
use super::Access;
use super::shmem::SharedMemory;
use crate::report::MisuseLog;

/// How long a vCPU has to repeat its access after pages were filled for it.
const SETTLE: Duration = Duration::from_millis(500);

/// How often an access is tried, if the file changes each time.
const ATTEMPTS: usize = 8;

/// The shared memory of all devices, to be searched for missing pages.
pub struct MissingPages {
    devices: Vec<Device>,
    /// When something was first filled temporarily.
    ///
    /// Lock order: before `SharedMemory`'s; held by a vCPU while it probes for what is missing.
    filled: Mutex<Option<Instant>>,
}

struct Device {
    name: String,
    shmem: Arc<SharedMemory>,
    log: MisuseLog,
}

impl MissingPages {
    /// For these devices: their names, and their shared memory.
    pub fn new(devices: impl IntoIterator<Item = (String, Arc<SharedMemory>)>) -> Self {
        let device = |(name, shmem): (String, _)| Device { log: MisuseLog::new(&name), name, shmem };
        MissingPages { devices: devices.into_iter().map(device).collect(), filled: Mutex::new(None) }
    }

    /// Whether any of the devices may ever have a mapping.
    pub fn are_possible(&self) -> bool {
        self.devices.iter().any(|device| !device.shmem.regions().is_empty())
    }

    /// Whether any of the devices has a mapping now.
    pub fn are_to_watch(&self) -> bool {
        self.devices.iter().any(|device| device.shmem.has_mappings())
    }

    /// KVM_RUN failed with EFAULT: the host memory behind an access of the guest is gone. Puts zeroes in
    /// place of missing pages: at guest physical address `address` if KVM gave it, else everywhere. True if
    /// any were missing.
    ///
    /// Called by a vCPU thread, outside KVM_RUN, with no lock held, possibly by several at once; so are
    /// [`Self::read`] and [`Self::write`].
    pub fn mend(&self, address: Option<u64>) -> bool {
        if let Some(address) = address {
            return self.devices.iter().any(|device| device.fill(address));
        }
        let mut since = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut any = false;
        for device in &self.devices {
            if let Some(kept) = device.shmem.fill_all_temporarily() {
                device.report(&kept);
                since.get_or_insert_with(Instant::now);
                any = true;
            }
        }
        any
    }

    /// KVM passed on a read: puts into `data` what the guest sees at `address` now, zeroes in place of
    /// missing pages. False where nothing is mapped.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        for _ in 0..ATTEMPTS {
            let here = |device: &&Device| device.shmem.access_at(address).is_some();
            let Some(device) = self.devices.iter().find(here) else {
                return false;
            };
            if device.shmem.read(address, data) {
                return true;
            }
            device.fill(address);
        }
        // The file is made shorter faster than we can probe it.
        data.fill(0);
        true
    }

    /// KVM passed on a write. It is lost, but the missing page is filled: later writes reach it.
    pub fn write(&self, address: u64) {
        for device in &self.devices {
            // To a read-only mapping, KVM passes on every write: none of its pages need be missing.
            if device.shmem.access_at(address) == Some(Access::ReadWrite) {
                device.fill(address);
            }
        }
    }

    /// Makes temporary zeroes that the guest accessed permanent, once `SETTLE` has passed, and takes the
    /// others away. Does nothing before, or while a vCPU is filling: that vCPU would find its page missing
    /// again.
    pub fn settle(&self) {
        let Ok(mut filled) = self.filled.try_lock() else {
            return;
        };
        if filled.is_some_and(|when| when.elapsed() >= SETTLE) {
            *filled = None;
            for device in &self.devices {
                device.report(&device.shmem.settle());
            }
        }
    }

    /// Makes accesses to missing pages fail instead of wait.
    pub fn guard(&self) {
        self.devices.iter().for_each(|device| device.shmem.guard_missing());
    }

    /// Logs, for each device whose mappings were filled, how much was missing in all.
    pub fn log_total(&self) {
        for device in &self.devices {
            let total = device.shmem.filled();
            if total.bytes > 0 {
                log::info!("{}: {total}", device.name);
            }
        }
    }
}

impl Device {
    /// Fills what is missing at a guest address. False where nothing is.
    fn fill(&self, address: u64) -> bool {
        let filled = self.shmem.fill_missing(address);
        self.report(filled.as_slice());
        filled.is_some()
    }

    /// Once for a mapping, however many of its pages are found missing one after the other.
    fn report(&self, filled: &[Filled]) {
        for Filled { guest, shmid, len, .. } in filled.iter().filter(|filled| filled.is_first) {
            self.log.warn(format_args!(
                "the file under the mapping {guest} of region {shmid} became shorter: its last {len:#x} bytes, or more of \
                 them later, read as zeroes from now on"
            ));
        }
    }
}
