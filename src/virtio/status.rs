//! The device status field: which bits a driver may set when (VIRTIO 1.3, sections 2.1 and 3.1.1).
//!
//! ```text
//!        ACKNOWLEDGE     DRIVER         FEATURES_OK                        DRIVER_OK
//!  ┌───┐          ┌───┐          ┌───┐  subset of what is offered,  ┌────┐           ┌────┐
//!  │ 0 │ ───────▶ │ 1 │ ───────▶ │ 3 │ ───── VERSION_1 in it ─────▶ │ 11 │ ────────▶ │ 15 │
//!  └───┘          └───┘          └───┘                              └────┘           └────┘
//!    ▲              │              │ ▲ └─ else: stays, the driver      │               │
//!    │              │              │ └─── sees it when it reads again  │               │
//!    │              ▼              ▼                                   ▼               ▼
//!    └── 0 ── any state, with or without FAILED (the driver's) and DEVICE_NEEDS_RESET (the device's)
//! ```

use std::fmt;

use thiserror::Error;
use virtio_bindings::virtio_config::*;

pub(super) const ACKNOWLEDGE: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE;
pub(super) const DRIVER: u32 = VIRTIO_CONFIG_S_DRIVER;
pub(super) const FEATURES_OK: u32 = VIRTIO_CONFIG_S_FEATURES_OK;
pub(super) const DRIVER_OK: u32 = VIRTIO_CONFIG_S_DRIVER_OK;
pub(super) const FAILED: u32 = VIRTIO_CONFIG_S_FAILED;
/// The one bit that is the device's own.
pub(super) const DEVICE_NEEDS_RESET: u32 = VIRTIO_CONFIG_S_NEEDS_RESET;

/// A bit that the driver may set, and the bits that it must have set before.
struct Step {
    bit: u32,
    name: &'static str,
    needs: u32,
}

/// The driver's bits, in the order of the initialization sequence.
const STEPS: [Step; 5] = [
    Step { bit: ACKNOWLEDGE, name: "ACKNOWLEDGE", needs: 0 },
    Step { bit: DRIVER, name: "DRIVER", needs: ACKNOWLEDGE },
    Step { bit: FEATURES_OK, name: "FEATURES_OK", needs: ACKNOWLEDGE | DRIVER },
    Step { bit: DRIVER_OK, name: "DRIVER_OK", needs: ACKNOWLEDGE | DRIVER | FEATURES_OK },
    Step { bit: FAILED, name: "FAILED", needs: 0 },
];
const DRIVERS_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// Why a write to Status changes nothing.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Refused {
    #[error("the status bits {0:#x} are not defined")]
    Undefined(u32),
    #[error("{0} cannot be cleared, except all together by a reset")]
    Clears(Bits),
    #[error("{0} cannot be set before {1}")]
    TooEarly(Bits, Bits),
    #[error("{0} cannot be set after FAILED, only a reset goes on from there")]
    AfterFailed(Bits),
}

/// The bits that a driver which sees `current` sets by writing `written`, which is not 0 (a reset). They are
/// in the order of [`STEPS`]; none, if all are set already. The whole write is fine, or none of it.
///
/// DEVICE_NEEDS_RESET in `written` is ignored: drivers write back what they read, maybe before it was set.
pub(super) fn added(current: u32, written: u32) -> Result<Vec<u32>, Refused> {
    let undefined = written & !(DRIVERS_BITS | DEVICE_NEEDS_RESET);
    if undefined != 0 {
        return Err(Refused::Undefined(undefined));
    }
    let cleared = current & !written & DRIVERS_BITS;
    if cleared != 0 {
        return Err(Refused::Clears(Bits(cleared)));
    }
    let added = written & !current & DRIVERS_BITS;
    if added != 0 && current & FAILED != 0 {
        return Err(Refused::AfterFailed(Bits(added)));
    }
    let mut reached = current;
    let mut bits = Vec::new();
    for step in STEPS.iter().filter(|step| added & step.bit != 0) {
        let missing = step.needs & !reached;
        if missing != 0 {
            return Err(Refused::TooEarly(Bits(step.bit), Bits(missing)));
        }
        reached |= step.bit;
        bits.push(step.bit);
    }
    Ok(bits)
}

/// Status bits of the driver's, shown by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bits(pub(super) u32);

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let set = STEPS.iter().filter(|step| self.0 & step.bit != 0);
        let set: Vec<_> = set.map(|step| step.name).collect();
        f.write_str(&set.join(" and "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(current: u32, written: u32) -> Result<Vec<u32>, String> {
        added(current, written).map_err(|refused| refused.to_string())
    }

    #[test]
    fn the_sequence_of_the_specification_step_by_step_or_at_once() {
        assert_eq!(bits(0, 1), Ok(vec![ACKNOWLEDGE]));
        assert_eq!(bits(1, 3), Ok(vec![DRIVER]));
        assert_eq!(bits(3, 11), Ok(vec![FEATURES_OK]));
        assert_eq!(bits(11, 15), Ok(vec![DRIVER_OK]));
        assert_eq!(bits(0, 15), Ok(vec![ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK]));
        assert_eq!(bits(3, 3), Ok(vec![]));
        for status in [0, 1, 3, 11, 15] {
            assert_eq!(bits(status, status | FAILED), Ok(vec![FAILED]));
        }
    }

    #[test]
    fn the_devices_own_bit_is_neither_set_nor_cleared_by_the_driver() {
        assert_eq!(bits(3, 3 | DEVICE_NEEDS_RESET), Ok(vec![]));
        assert_eq!(bits(3 | DEVICE_NEEDS_RESET, 3), Ok(vec![]));
        assert_eq!(bits(3 | DEVICE_NEEDS_RESET, 11), Ok(vec![FEATURES_OK]));
    }

    #[test]
    fn everything_else_is_refused_with_its_reason() {
        let refused = [
            (0, DRIVER, "DRIVER cannot be set before ACKNOWLEDGE"),
            (3, 7, "DRIVER_OK cannot be set before FEATURES_OK"),
            (1, 9, "FEATURES_OK cannot be set before DRIVER"),
            (15, 11, "DRIVER_OK cannot be cleared, except all together by a reset"),
            (3, 8, "ACKNOWLEDGE and DRIVER cannot be cleared, except all together by a reset"),
            (
                15,
                DEVICE_NEEDS_RESET,
                "ACKNOWLEDGE and DRIVER and FEATURES_OK and DRIVER_OK cannot be cleared, ",
            ),
            (0, 0x31, "the status bits 0x30 are not defined"),
            (3, 0xffff_ff0b, "the status bits 0xffffff00 are not defined"),
            (3 | FAILED, 11 | FAILED, "FEATURES_OK cannot be set after FAILED"),
        ];
        for (current, written, reason) in refused {
            let error = bits(current, written).unwrap_err();
            assert!(error.starts_with(reason), "{current:#x} -> {written:#x}: {error}");
        }
    }

    #[test]
    fn no_write_of_8_bits_leads_to_a_state_outside_the_diagram() {
        let states: Vec<u32> = [0, 1, 3, 11, 15]
            .into_iter()
            .flat_map(|state| [state, state | FAILED])
            .flat_map(|state| [state, state | DEVICE_NEEDS_RESET])
            .collect();
        for &current in &states {
            for written in 1..=0xff {
                if let Ok(bits) = added(current, written) {
                    let next = bits.iter().fold(current, |status, bit| status | bit);
                    assert!(states.contains(&next), "{current:#x} -> {written:#x}: {next:#x}");
                }
            }
        }
    }
}
