//! The ACPI tables: how a kernel learns about processors, interrupts and devices, which are on no bus that it
//! could scan.
//!
//! Hardware-reduced ACPI (ACPI 6.5, section 4.1): no power-management timer, no system control interrupt, no
//! legacy registers; only a sleep control register, a sleep status register and a reset register. The tables
//! also say which legacy devices are absent, because a kernel would wait for a clock chip or a keyboard
//! controller.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::layout;
use crate::memory::PAGE_SIZE;

const OEM_ID: [u8; 6] = *b"HOTSLT";
const OEM_TABLE_ID: [u8; 8] = *b"HOTSLOT ";
const OEM_REVISION: u32 = 1;

/// The sleep type of S5, soft off, which the guest finds in `\_S5` and writes to switch itself off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// The value that the guest writes to the reset register.
pub const RESET_VALUE: u8 = 1;

/// FADT, IAPC_BOOT_ARCH: do not look for a VGA adapter.
const NO_VGA: u16 = 1 << 2;
/// FADT, IAPC_BOOT_ARCH: there is no CMOS clock. Without this bit Linux waits a second for one.
const NO_CMOS_RTC: u16 = 1 << 5;

/// The tables in one piece, for the guest address `base`; the root pointer comes first. They fit into
/// [`layout::ACPI_SPACE`] with at most [`layout::MAX_VCPUS`] processors and [`layout::MAX_DEVICES`] devices.
pub fn tables(base: u64, vcpus: u32, devices: usize) -> Vec<u8> {
    // The root pointer is filled in last, because it holds the address of the XSDT.
    let mut bytes = vec![0; Rsdp::len()];
    // Appends a table on a 16-byte boundary. Gives its guest address.
    let mut add = |table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let address = base + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        address
    };
    let dsdt = add(&dsdt(devices));
    let fadt = add(&fadt(dsdt));
    let madt = add(&madt(vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = add(&xsdt);
    bytes[..Rsdp::len()].copy_from_slice(&to_bytes(&Rsdp::new(OEM_ID, xsdt)));
    bytes
}

fn to_bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    aml.to_aml_bytes(&mut bytes);
    bytes
}

/// The fixed description: which legacy devices are absent, and where the power registers are.
fn fadt(dsdt: u64) -> impl Aml {
    let register = |number: u16| {
        let port = layout::ACPI_POWER.start + number;
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        // Without these flags the machine would have fixed power and sleep buttons.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.sleep_control_reg = register(0);
    fadt.sleep_status_reg = register(1);
    fadt.reset_reg = register(2);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// The interrupt controllers: a local APIC for each processor, and the IOAPIC.
fn madt(vcpus: u32) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC as u32),
    );
    for id in 0..vcpus.min(layout::MAX_VCPUS) as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    // The id may be a local APIC's, too: only on the APIC bus of old processors it had to differ.
    madt.add_structure(IoApic::new(0, layout::IOAPIC as u32, 0));
    madt
}

/// The devices.
fn dsdt(devices: usize) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut children = [serial_port(), pvpanic()].concat();
    for (number, (address, gsi)) in (0..devices).map_while(layout::virtio_device).enumerate() {
        children.extend(virtio_device(number, address, gsi));
    }
    dsdt.append_slice(&Scope::raw("\\_SB_".into(), children));
    // The sleep type for "off", for both of ACPI's sleep control registers.
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    dsdt.append_slice(&to_bytes(&Name::new("_S5_".into(), &s5)));
    dsdt
}

/// The kind of interrupt that all devices here have: edge-triggered, active high, not shared.
fn interrupt(gsi: u32) -> Interrupt {
    let (consumer, edge, active_low, shared) = (true, true, false, false);
    Interrupt::new(consumer, edge, active_low, shared, gsi)
}

fn serial_port() -> Vec<u8> {
    let ports = IO::new(layout::COM1.start, layout::COM1.start, 1, layout::COM1.len() as u8);
    to_bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &interrupt(layout::COM1_GSI)])),
        ],
    ))
}

/// As QEMU describes its pvpanic device, for which Linux has the driver.
fn pvpanic() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC.start, layout::PVPANIC.start, 1, 1);
    to_bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    ))
}

/// LNRO0005 is the id of virtio-mmio devices in Linux and QEMU.
fn virtio_device(number: usize, address: u64, gsi: u32) -> Vec<u8> {
    let registers = Memory32Fixed::new(true, address as u32, PAGE_SIZE as u32);
    to_bytes(&Device::new(
        Path::new(&format!("V{number:03}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &number),
            // Its accesses to memory are coherent with the processors' caches.
            &Name::new("_CCA".into(), &ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &interrupt(gsi)])),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = layout::ACPI;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest address, after the checks that a kernel makes.
    fn table(bytes: &[u8], address: u64) -> &[u8] {
        let table = &bytes[(address - BASE) as usize..];
        let table = &table[..u32_at(table, 4) as usize];
        assert_eq!(sum(table), 0, "{:?}", std::str::from_utf8(&table[..4]));
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// FADT, MADT and DSDT, found as a kernel finds them.
    fn walk(bytes: &[u8]) -> [&[u8]; 3] {
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
        let xsdt = table(bytes, u64_at(bytes, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (&b"XSDT"[..], 36 + 2 * 8));
        let fadt = table(bytes, u64_at(xsdt, 36));
        let madt = table(bytes, u64_at(xsdt, 44));
        let dsdt = table(bytes, u64_at(fadt, 140));
        assert_eq!([&fadt[..4], &madt[..4], &dsdt[..4]], [b"FACP", b"APIC", b"DSDT"]);
        [fadt, madt, dsdt]
    }

    #[test]
    fn a_kernel_finds_each_table_and_its_checksum() {
        for (vcpus, count) in [(1, 0), (4, 1), (layout::MAX_VCPUS, layout::MAX_DEVICES)] {
            let bytes = tables(BASE, vcpus, count);
            walk(&bytes);
            assert!(bytes.len() as u64 <= layout::ACPI_SPACE);
        }
    }

    #[test]
    fn the_fadt_says_what_is_not_there() {
        let bytes = tables(BASE, 1, 0);
        let [fadt, ..] = walk(&bytes);
        // ACPI 6.5, table 5.9: IAPC_BOOT_ARCH at 109, Flags at 112, RESET_REG at 116, SLEEP_CONTROL_REG at
        // 244.
        assert_eq!(u16::from_le_bytes([fadt[109], fadt[110]]), 0b10_0100);
        let flags = u32_at(fadt, 112);
        assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
        assert_ne!(flags & 1 << 10, 0, "reset register");
        let io_port = |at: usize| (fadt[at], u64_at(fadt, at + 4));
        assert_eq!((io_port(116), fadt[128]), ((1, 0x602), RESET_VALUE));
        assert_eq!((io_port(244), io_port(256)), ((1, 0x600), (1, 0x601)));
    }

    #[test]
    fn the_madt_has_a_local_apic_for_each_processor() {
        let bytes = tables(BASE, 3, 0);
        let [_, madt, _] = walk(&bytes);
        assert_eq!(u32_at(madt, 36), 0xfee0_0000);
        let apics: Vec<_> = madt[44..44 + 3 * 8]
            .chunks(8)
            .map(|apic| (apic[0], apic[1], apic[2], apic[3], apic[4]))
            .collect();
        assert_eq!(apics, [(0, 8, 0, 0, 1), (0, 8, 1, 1, 1), (0, 8, 2, 2, 1)]);
        let ioapic = &madt[68..];
        assert_eq!((ioapic[0], ioapic[1], u32_at(ioapic, 4), u32_at(ioapic, 8)), (1, 12, 0xfec0_0000, 0));
    }

    #[test]
    fn the_dsdt_describes_each_device_with_its_registers_and_interrupt() {
        let bytes = tables(BASE, 1, 2);
        let [_, _, dsdt] = walk(&bytes);
        let find = |what: &[u8]| dsdt.windows(what.len()).filter(|window| *window == what).count();
        assert_eq!(find(b"LNRO0005\0"), 2);
        assert_eq!(find(b"QEMU0001\0"), 1);
        assert_eq!(find(b"_S5_"), 1);
        for (name, registers, gsi) in [("V000", 0xd000_0000_u32, 5_u32), ("V001", 0xd000_1000, 6)] {
            assert_eq!(find(name.as_bytes()), 1);
            // A 32-bit fixed memory descriptor (6.4.3.4), writable; an extended interrupt descriptor
            // (6.4.3.6): consumer, edge.
            let memory = [&[0x86, 9, 0, 1][..], &registers.to_le_bytes(), &0x1000_u32.to_le_bytes()].concat();
            let interrupt = [&[0x89, 6, 0, 0b0011, 1][..], &gsi.to_le_bytes()].concat();
            assert_eq!(find(&[memory, interrupt].concat()), 1);
        }
    }
}
