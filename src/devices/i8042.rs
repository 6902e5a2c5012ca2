//! The keyboard controller's reset command, which old kernels and `reboot=k` use. Nothing else of it is
//! there.

use crate::bus::BusDevice;
use crate::exit::Exit;

/// The command port, counted from the data port.
const COMMAND: u64 = 4;
/// "Pulse output line 0": the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The controller's ports, from the data port on. All reads give 0: as status, that means "ready for a
/// command, no data".
pub struct I8042;

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        (offset == COMMAND && data == [PULSE_RESET]).then_some(Exit::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_does_something() {
        assert_eq!(I8042.write(COMMAND, &[PULSE_RESET]), Some(Exit::Reset));
        for (offset, data) in [(0, &[PULSE_RESET][..]), (COMMAND, &[0xd1]), (COMMAND, &[]), (3, &[0, 0xfe])] {
            assert_eq!(I8042.write(offset, data), None);
        }
        let mut status = [0xff];
        I8042.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
