//! The keyboard controller, as far as resetting the machine goes: `reboot=k` and old kernels write there.

use crate::bus::{BusDevice, MachineEvent};

/// The command port, counted from the data port.
const COMMAND: u64 = 4;
/// "Pulse output line 0", which was the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The controller's ports, from the data port on. All reads give 0: the status then says that it is ready for
/// a command and has no data.
pub struct I8042;

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<MachineEvent> {
        (offset == COMMAND && data == [PULSE_RESET]).then_some(MachineEvent::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_does_something() {
        assert_eq!(I8042.write(COMMAND, &[PULSE_RESET]), Some(MachineEvent::Reset));
        for (offset, data) in [(0, &[PULSE_RESET][..]), (COMMAND, &[0xd1]), (COMMAND, &[]), (3, &[0, 0xfe])] {
            assert_eq!(I8042.write(offset, data), None);
        }
        let mut status = [0xff];
        I8042.read(COMMAND, &mut status);
        assert_eq!(status, [0]);
    }
}
