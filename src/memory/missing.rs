//! Provides pages of mappings that the guest could not access, for all devices of a machine, and logs that.
//!
//! Three things can have happened. The page is there by now. Or the file ends before it: zeroes take its
//! place (SHM-45). Or the file has it and the host cannot provide it (a full disk, an I/O error): then the
//! vCPU waits and tries again (SHM-87). Called by vCPU threads (`kvm::vcpu`), outside KVM_RUN, with no lock
//! held, possibly by several at once.

use std::sync::Arc;

use super::Access;
use super::shmem::{Filled, Page, SharedMemory, Unavailable};
use crate::report::{MisuseLog, with_causes};

/// The most slots without a mapping that an unexplained EFAULT takes of each device: as many as a machine
/// keeps. A back-end that makes more meanwhile holds up no vCPU.
const MOST_RETIRED: usize = 1024;

/// How often an access is tried before the vCPU pauses, if the file changes each time.
const ATTEMPTS: usize = 8;

/// The shared memory of all devices.
#[derive(Default)]
pub struct MissingPages {
    devices: Vec<Device>,
    /// Whether a page that the host cannot provide ends the machine, instead of making a vCPU wait.
    pub end_the_machine: bool,
}

struct Device {
    name: String,
    shmem: Arc<SharedMemory>,
    log: MisuseLog,
}

/// What an access of the guest meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Met {
    /// No mapping.
    Nothing,
    /// A page that is there.
    Page,
    /// A page that was missing until now: zeroes took its place.
    Zeroes,
    /// No mapping, but until now a slot with inaccessible pages (SHM-102).
    Retired,
    /// No mapping, but the device's back-end may come back and make one (SHM-77).
    Expected,
    /// A page that the host cannot provide, for this reason, which names device and mapping.
    Unavailable(String),
}

impl MissingPages {
    /// For these devices: their names, and their shared memory.
    pub fn new(
        devices: impl IntoIterator<Item = (String, Arc<SharedMemory>)>,
        end_the_machine: bool,
    ) -> Self {
        let device = |(name, shmem): (String, _)| Device { log: MisuseLog::new(&name), name, shmem };
        MissingPages { devices: devices.into_iter().map(device).collect(), end_the_machine }
    }

    /// Whether any of the devices may ever have a mapping.
    pub fn are_possible(&self) -> bool {
        self.devices.iter().any(|device| !device.shmem.regions().is_empty())
    }

    /// Whether any of the devices has a mapping now.
    pub fn are_to_watch(&self) -> bool {
        self.devices.iter().any(|device| device.shmem.has_mappings())
    }

    /// Whether a back-end that died may come back and make mappings in holes (SHM-77).
    pub fn are_expected(&self) -> bool {
        self.devices.iter().any(|device| device.shmem.is_expecting())
    }

    /// The guest could not access the page at `address` so: provides it.
    pub fn provide(&self, address: u64, access: Access) -> Met {
        let mut devices = self.devices.iter();
        let found = devices.find_map(|device| Some((device, device.shmem.provide(address, access)?)));
        let Some((Device { name, log, .. }, page)) = found else {
            let is_retired = self.devices.iter().any(|device| device.shmem.retire_at(address));
            return if is_retired { Met::Retired } else { Met::Nothing };
        };
        match page {
            Page::Present => {}
            Page::Recovered => {
                log.warn(format_args!("the page at {address:#x} can be had again: the guest goes on"))
            }
            Page::Filled(Filled { is_first, shmid, guest, len }) => {
                // Once for a mapping, however often its file becomes shorter.
                if is_first {
                    log.warn(format_args!(
                        "the file under the mapping {guest} of region {shmid} ends before the mapping: the last {len:#x} \
                         bytes, or more of them later, read as zeroes from now on"
                    ));
                }
                return Met::Zeroes;
            }
            Page::Unavailable(Unavailable { is_first, shmid, guest, reason }) => {
                let what = format!(
                    "the host cannot provide the page at {address:#x}, in the mapping {guest} of region {shmid} ({reason})"
                );
                if is_first && !self.end_the_machine {
                    log.warn(format_args!("{what}: the vCPU that needs it waits"));
                }
                return Met::Unavailable(format!("{name}: {what}"));
            }
        }
        Met::Page
    }

    /// KVM passed on a read: puts what the guest sees at `address` now into `data`.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Met {
        self.carry_out(address, Access::ReadOnly, |shmem| shmem.read(address, data))
    }

    /// KVM passed on a write, which it could not carry out: carries it out. [`Met::Nothing`] for a read-only
    /// mapping, whose writes KVM passes on, too.
    pub fn write(&self, address: u64, data: &[u8]) -> Met {
        self.carry_out(address, Access::ReadWrite, |shmem| shmem.write(address, data))
    }

    /// Reads instruction bytes: what is there, without providing anything. False where something is missing.
    pub fn peek(&self, address: u64, data: &mut [u8]) -> bool {
        self.devices.iter().any(|device| device.shmem.read(address, data))
    }

    fn carry_out(&self, address: u64, access: Access, mut action: impl FnMut(&SharedMemory) -> bool) -> Met {
        let is_here = |device: &&Device| {
            let allowed = device.shmem.access_at(address);
            allowed.is_some_and(|allowed| allowed == Access::ReadWrite || access == Access::ReadOnly)
        };
        let Some(device) = self.devices.iter().find(is_here) else {
            let is_expected = self.devices.iter().any(|device| device.shmem.expects_mapping(address));
            return if is_expected { Met::Expected } else { Met::Nothing };
        };
        for _ in 0..ATTEMPTS {
            if action(&device.shmem) {
                device.shmem.carried_out.count();
                return Met::Page;
            }
            match self.provide(address, access) {
                Met::Page | Met::Zeroes => {}
                Met::Retired => return Met::Nothing,
                met => return met,
            }
        }
        Met::Unavailable(format!("{}: the page at {address:#x} comes and goes", device.name))
    }

    /// See [`SharedMemory::changes`].
    pub fn changes(&self, address: u64) -> Option<u64> {
        self.devices.iter().find_map(|device| device.shmem.changes(address))
    }

    /// Takes away all slots that unmapped ranges have kept, as far as KVM does it.
    pub fn retire_all(&self) {
        for device in &self.devices {
            if let Err(error) = device.shmem.retire(MOST_RETIRED) {
                device.log.warn(format_args!("{}", with_causes(&error)));
            }
        }
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

#[cfg(test)]
mod tests {
    use super::super::PAGE_SIZE as PAGE;
    use super::super::shmem::tests::bench;
    use super::*;

    #[test]
    fn a_hole_that_kvm_cannot_access_is_one_that_it_knows_afterwards() {
        // SHM-24, SHM-102
        let bench = bench();
        let (start, guest) = (bench.region(0).start(), Arc::clone(&bench.guest));
        for (shmid, page) in [(0, 0), (0, 2), (7, 0)] {
            bench.map(shmid, page * PAGE, PAGE).unwrap();
            bench.shmem.unmap(shmid, page * PAGE, PAGE).unwrap();
        }
        bench.map(0, PAGE, PAGE).unwrap();
        let pages = MissingPages::new([("device".to_string(), Arc::new(bench.shmem))], false);
        assert_eq!((pages.provide(start + PAGE, Access::ReadOnly), guest.idle()), (Met::Page, 3));
        assert_eq!((pages.provide(start + 8, Access::ReadOnly), guest.idle()), (Met::Retired, 2));
        assert_eq!((pages.provide(start + 8, Access::ReadOnly), guest.idle()), (Met::Nothing, 2));
        // One that KVM passed on is one to a hole already.
        assert_eq!(pages.read(start + 2 * PAGE, &mut [0]), Met::Nothing);
        assert!(pages.changes(start).is_some() && pages.changes(start - 1).is_none());
        pages.retire_all();
        assert_eq!(guest.idle(), 0);
    }
}
