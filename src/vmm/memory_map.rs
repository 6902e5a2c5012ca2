//! The guest physical memory map: RAM, and each device's registers, shared memory regions and mappings at
//! that moment. SIGUSR1 prints it; `picture` draws its parts.

use std::fmt;
use std::sync::Arc;

use crate::arch::x86_64::layout::{self, Place};
use crate::memory::shmem::{MappingInfo, SharedMemory};
use crate::memory::{Access, GuestRange};
use crate::picture::memory::{Kind, Part};
use crate::vhost_user::sharing::Participant;
use crate::vhost_user::shmem_handler::RequestCounters;
use crate::virtio::mmio::MmioTransport;

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
    /// What came of its back-end's requests.
    pub requests: Arc<RequestCounters>,
    /// For what it has counted.
    pub transport: Arc<MmioTransport>,
    /// For whether a mapping is shared with other devices; `None` where none is (SHM-80).
    pub participant: Option<Participant>,
}

impl fmt::Display for MemoryMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |part: &Part| format!("  {}  {}", part.range, part.text());
        let mut lines: Vec<_> = self.ram().iter().map(line).collect();
        for device in &self.devices {
            for part in device.parts() {
                lines.push(line(&part));
                lines.extend(part.inside.iter().map(|mapping| format!("  {}", line(mapping))));
            }
            let total = device.shmem.filled();
            if total.bytes > 0 {
                lines.push(format!("  {}: {total}", device.name));
            }
        }
        f.write_str(&lines.join("\n"))
    }
}

impl MemoryMap {
    /// All parts: RAM, the fixed pages, and those of the devices.
    pub fn parts(&self) -> Vec<Part> {
        let devices = self.devices.iter().flat_map(DeviceMemory::parts);
        self.ram().into_iter().chain(places(&layout::FIXED, Kind::Fixed)).chain(devices).collect()
    }

    fn ram(&self) -> Vec<Part> {
        self.ram.iter().map(|&range| Part::new(range, Kind::Ram, "RAM")).collect()
    }
}

impl DeviceMemory {
    fn parts(&self) -> Vec<Part> {
        let mut parts = vec![registers(self.registers, &self.name)];
        let mappings = self.shmem.mappings();
        for (shmid, range) in self.shmem.regions() {
            let mut region =
                Part::new(range, Kind::Window, format!("{} shared memory region {shmid}", self.name));
            let inside = mappings.iter().filter(|mapping| mapping.shmid == shmid);
            region.inside = inside.map(|mapping| self.mapping(mapping)).collect();
            parts.push(region);
        }
        parts
    }

    fn mapping(&self, mapping: &MappingInfo) -> Part {
        let mut notes = vec![match mapping.access {
            Access::ReadOnly => "read-only".to_owned(),
            Access::ReadWrite => "read-write".to_owned(),
        }];
        if self.participant.as_ref().is_some_and(|device| device.is_shared(mapping.guest.start())) {
            notes.push("shared".to_owned());
        }
        notes.push(format!("file offset {:#x}", mapping.file_offset));
        if mapping.filled > 0 {
            let filled = mapping.filled;
            notes.push(format!("the last {filled:#x} bytes are zeroes (the file ends before them)"));
        }
        if let Some(page) = mapping.unavailable {
            notes.push(format!("the guest waits for the page at {page:#x}, which the host cannot provide"));
        }
        Part { notes, ..Part::new(mapping.guest, Kind::Mapping(mapping.access), "mapping") }
    }
}

/// Places of the layout, as parts.
pub(super) fn places(places: &[Place], kind: Kind) -> impl Iterator<Item = Part> {
    let range = |start, len| GuestRange::new(start, len);
    places.iter().filter_map(move |&(name, start, len)| Some(Part::new(range(start, len)?, kind, name)))
}

/// The registers of a device.
pub(super) fn registers(range: GuestRange, device: &str) -> Part {
    Part::new(range, Kind::Registers, format!("registers of {device}"))
}
