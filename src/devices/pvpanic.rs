//! pvpanic: a port to which a kernel that panicked says so (docs/specs/pvpanic.rst in QEMU's sources; Linux'
//! driver is the module `pvpanic-mmio`, which finds the port by ACPI).

use crate::bus::{BusDevice, MachineEvent};

/// The event "panicked". Others are not offered.
const PANICKED: u8 = 1 << 0;

/// The port. A read gives the events that are known.
pub struct Pvpanic;

impl BusDevice for Pvpanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<MachineEvent> {
        let panicked = data.first().is_some_and(|events| events & PANICKED != 0);
        panicked.then_some(MachineEvent::Panicked)
    }
}
