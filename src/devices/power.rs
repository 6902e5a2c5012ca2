//! The power registers of hardware-reduced ACPI: sleep control, sleep status, reset (ACPI 6.5, sections
//! 4.8.3.7 and 4.8.3.6).

use crate::bus::BusDevice;
use crate::exit::Exit;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;

/// SLEEP_CONTROL: enter the sleep state now.
const SLP_EN: u8 = 1 << 5;

/// The sleep type in a value of SLEEP_CONTROL: bits 4:2.
fn slp_typ(value: u8) -> u8 {
    value >> 2 & 0x7
}

/// The three registers, one byte each. All reads give 0: the machine never woke from a sleep state.
pub struct PowerControl {
    /// The sleep type that switches off, as in the ACPI tables.
    pub sleep_type_off: u8,
    /// The value that resets, as in the ACPI tables.
    pub reset_value: u8,
}

impl BusDevice for PowerControl {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        match (offset, data) {
            (SLEEP_CONTROL, &[value]) if value & SLP_EN != 0 && slp_typ(value) == self.sleep_type_off => {
                Some(Exit::PowerOff)
            }
            (RESET, &[value]) if value == self.reset_value => Some(Exit::Reset),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_complete_requests_count() {
        let power = PowerControl { sleep_type_off: 5, reset_value: 1 };
        assert_eq!(power.write(0, &[5 << 2 | SLP_EN]), Some(Exit::PowerOff));
        assert_eq!(power.write(2, &[1]), Some(Exit::Reset));
        // Without SLP_EN, another type, the status register, another value, another width.
        for (offset, data) in [
            (0, &[5 << 2][..]),
            (0, &[3 << 2 | SLP_EN]),
            (1, &[5 << 2 | SLP_EN]),
            (2, &[0]),
            (0, &[5 << 2 | SLP_EN, 0]),
            (2, &[]),
        ] {
            assert_eq!(power.write(offset, data), None, "{offset} {data:?}");
        }
    }
}
