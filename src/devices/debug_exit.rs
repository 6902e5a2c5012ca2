//! The debug-exit port, with `--debug-exit` only: a byte that the guest writes becomes the VMM's exit status.

use crate::bus::BusDevice;
use crate::exit::Exit;

/// The port. Reads give all-ones.
pub struct DebugExit;

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Option<Exit> {
        data.first().map(|status| Exit::DebugExit(*status))
    }
}
