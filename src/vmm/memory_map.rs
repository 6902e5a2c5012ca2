//! The guest physical memory map, which SIGUSR1 prints: RAM, and each device's registers, shared memory
//! regions and mappings at that moment.

use std::fmt;
use std::sync::Arc;

use crate::memory::shmem::SharedMemory;
use crate::memory::{Access, GuestRange};
use crate::vhost_user::sharing::Participant;

/// The parts of the map. It displays as one line for each.
pub(super) struct MemoryMap {
    pub ram: Vec<GuestRange>,
    pub devices: Vec<DeviceMemory>,
}

/// A device's part of guest physical memory.
pub(super) struct DeviceMemory {
    pub name: String,
    pub registers: GuestRange,
    pub shmem: Arc<SharedMemory>,
    /// For whether a mapping is shared with other devices; `None` where none is (SHM-80).
    pub participant: Option<Participant>,
}

impl fmt::Display for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ram = self.ram.iter().map(|range| format!("{range}  RAM"));
        let devices = self.devices.iter().flat_map(DeviceMemory::lines);
        let lines: Vec<_> = ram.chain(devices).map(|line| format!("  {line}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

impl DeviceMemory {
    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("{}  registers of {}", self.registers, self.name)];
        let mappings = self.shmem.mappings();
        for (shmid, region) in self.shmem.regions() {
            lines.push(format!("{region}  {} shared memory region {shmid}", self.name));
            for mapping in mappings.iter().filter(|mapping| mapping.shmid == shmid) {
                let access = match mapping.access {
                    Access::ReadOnly => "read-only",
                    Access::ReadWrite => "read-write",
                };
                let filled = match mapping.filled {
                    0 => String::new(),
                    bytes => format!(", the last {bytes:#x} bytes are zeroes (the file ends before them)"),
                };
                let unavailable = mapping.unavailable.map_or(String::new(), |page| {
                    format!(", the guest waits for the page at {page:#x}, which the host cannot provide")
                });
                let is_shared = |participant: &Participant| participant.is_shared(mapping.guest.start());
                let shared = if self.participant.as_ref().is_some_and(is_shared) { ", shared" } else { "" };
                lines.push(format!(
                    "  {}  mapping, {access}{shared}, file offset {:#x}{filled}{unavailable}",
                    mapping.guest, mapping.file_offset
                ));
            }
        }
        let total = self.shmem.filled();
        if total.bytes > 0 {
            lines.push(format!("{}: {total}", self.name));
        }
        lines
    }
}
