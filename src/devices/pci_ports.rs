//! The ports of PCI's first configuration mechanism (PCI 3.0, section 3.2.2.3.2), with a host bridge on them
//! and nothing else: there is no PCI bus. A kernel that finds no mechanism at all, Linux for one, complains
//! at each boot.

use std::sync::Mutex;
use std::sync::PoisonError;

use crate::bus::BusDevice;
use crate::exit::Exit;

/// CONFIG_ADDRESS and CONFIG_DATA, counted from the first port.
const ADDRESS: u64 = 0;
const DATA: u64 = 4;
/// CONFIG_ADDRESS: the mechanism is used.
const ENABLE: u32 = 1 << 31;
/// The registers of the host bridge that are not all-ones or 0: vendor and device (QEMU's generic host
/// bridge), class code.
const IDS: u32 = 0x0008_1b36;
const CLASS: u32 = 0x0600_0000;

/// The ports.
#[derive(Default)]
pub struct PciPorts {
    /// CONFIG_ADDRESS. Lock order: innermost.
    address: Mutex<u32>,
}

impl PciPorts {
    /// The register that CONFIG_ADDRESS names.
    fn register(&self) -> u32 {
        let address = *self.address.lock().unwrap_or_else(PoisonError::into_inner);
        match address.checked_sub(ENABLE).map(|place| (place >> 8, place & 0xfc)) {
            Some((0, 0)) => IDS,
            Some((0, 8)) => CLASS,
            Some((0, _)) => 0,
            _ => u32::MAX,
        }
    }
}

impl BusDevice for PciPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = match offset {
            ADDRESS..DATA => self.address.lock().unwrap_or_else(PoisonError::into_inner).to_le_bytes(),
            _ => self.register().to_le_bytes(),
        };
        for (at, byte) in (offset as usize % 4..).zip(data) {
            *byte = bytes.get(at).copied().unwrap_or(u8::MAX);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        // Narrower writes are to other registers of a PC.
        if let (ADDRESS, Ok(address)) = (offset, data.try_into()) {
            *self.address.lock().unwrap_or_else(PoisonError::into_inner) = u32::from_le_bytes(address);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_finds_the_mechanism_and_one_host_bridge() {
        let ports = PciPorts::default();
        let read = |address: u32, offset: u64, len: usize| {
            ports.write(ADDRESS, &address.to_le_bytes());
            let mut data = [0; 8];
            ports.read(offset, &mut data[..len]);
            u64::from_le_bytes(data)
        };
        // As Linux looks for it.
        assert_eq!(read(ENABLE, ADDRESS, 4), u64::from(ENABLE));
        assert_eq!(read(ENABLE | 8, DATA + 2, 2), 0x0600);
        assert_eq!((read(ENABLE, DATA, 2), read(ENABLE, DATA + 2, 2)), (0x1b36, 0x0008));
        assert_eq!((read(ENABLE | 0xc, DATA, 4), read(ENABLE | 0x2c, DATA, 4)), (0, 0));
        for absent in [ENABLE | 1 << 8, ENABLE | 1 << 11, ENABLE | 1 << 16, 0] {
            assert_eq!(read(absent, DATA, 4), u64::from(u32::MAX), "{absent:#x}");
        }
        ports.write(ADDRESS, &[1]);
        assert_eq!(read(ENABLE, ADDRESS, 8), 0xffff_ffff_8000_0000, "any width is answered");
    }
}
