//! pvpanic: a port on which a kernel reports that it panicked (docs/specs/pvpanic.rst in QEMU's sources;
//! Linux' driver is the module `pvpanic-mmio`, which finds the port in the ACPI tables).

use crate::bus::BusDevice;
use crate::exit::Exit;

/// The event "panicked", the only one offered.
const PANICKED: u8 = 1 << 0;

/// The port. A read gives the events that are offered.
pub struct Pvpanic;

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<Exit> {
        let panicked = data.first().is_some_and(|events| events & PANICKED != 0);
        panicked.then_some(Exit::Panicked)
    }
}
