//! A port for test guests: the byte written there becomes the VMM's exit status. Only with `--debug-exit`.

use crate::bus::{BusDevice, MachineEvent};

/// The port. Reads give all-ones.
pub struct DebugExit;

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<MachineEvent> {
        data.first().map(|status| MachineEvent::DebugExit(*status))
    }
}
