//! Every fixed address, I/O port and interrupt of the machine, with its arithmetic.
//!
//! ```text
//!             0  RAM: boot structures below 1 MiB, the kernel at its own address, the initramfs at the top
//!         3 GiB  gap: device registers, IOAPIC, local APICs, KVM's own pages
//!         4 GiB  RAM beyond 3 GiB
//!      1st GiB
//!     after RAM,
//! never < 4 GiB  windows of shared memory regions
//! ```

use std::fmt;
use std::ops::Range;

use crate::memory::PAGE_SIZE;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The global descriptor table: 4 descriptors of 8 bytes. Above the real-mode interrupt table and BIOS data
/// (0x500 bytes), which nothing writes here but a kernel may expect to own.
pub const GDT: u64 = 0x500;
/// The boot parameters ("zero page") of Linux' boot protocol: one page.
pub const BOOT_PARAMS: u64 = 28 * KIB;
/// Page tables for the first instructions: 6 pages, see `regs::page_tables`.
pub const PAGE_TABLES: u64 = 36 * KIB;
/// The kernel command line, with its final NUL.
pub const CMDLINE: u64 = 128 * KIB;
/// The space for it. Linux itself takes 2 KiB.
pub const CMDLINE_SPACE: u64 = 64 * KIB;
/// Where RAM below 1 MiB ends: 1 KiB below 640 KiB, as on a PC with an extended BIOS data area.
pub const LOW_RAM_END: u64 = 639 * KIB;
/// The ACPI tables, root pointer first: in the last 128 KiB below 1 MiB, where a BIOS would have put the root
/// pointer.
pub const ACPI: u64 = 896 * KIB;
/// The space for them. A table for 254 processors takes 2 KiB, a device 64 bytes.
pub const ACPI_SPACE: u64 = RESET_VECTOR - ACPI;
/// Where a processor starts after a reset, and where a kernel jumps to let the BIOS reset the machine: the
/// last 16 bytes below 1 MiB.
pub const RESET_VECTOR: u64 = MIB - RESET_VECTOR_LEN;
/// The space there.
pub const RESET_VECTOR_LEN: u64 = 16;
/// Where RAM goes on, and the lowest place for a kernel.
pub const HIGH_RAM: u64 = MIB;

/// Where RAM below 4 GiB ends at the latest, and the gap without RAM starts.
pub const GAP: u64 = 3 * GIB;
/// Where the gap ends, and RAM goes on.
pub const GAP_END: u64 = 4 * GIB;

/// The first virtio-mmio register block. Each is a page of its own, so that it can be a memory slot.
pub const VIRTIO_REGISTERS: u64 = GAP + 256 * MIB;
/// The IOAPIC's registers; KVM has them there.
pub const IOAPIC: u64 = 0xfec0_0000;
/// The number of its inputs: global system interrupts 0 to 23.
pub const IOAPIC_INPUTS: u32 = 24;
/// The local APICs' registers; reset value of the processors' APIC base.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// Four pages that KVM uses itself on Intel processors, an identity map and three of TSS: below where a BIOS
/// would be mapped (256 KiB below 4 GiB).
pub const KVM_PAGES: u64 = GAP_END - 256 * KIB - 4 * PAGE_SIZE;

/// The first serial port's registers.
pub const COM1: Range<u16> = 0x3f8..0x400;
/// Its interrupt.
pub const COM1_GSI: u32 = 4;
/// The keyboard controller: the data port first, the command port last. Only its reset command works.
pub const I8042: Range<u16> = 0x60..0x65;
/// The debug-exit port: where QEMU's isa-debug-exit usually is, so that test kernels need no change.
pub const DEBUG_EXIT: Range<u16> = 0xf4..0xf5;
/// PCI's configuration address and data: behind them is a host bridge, and no bus.
pub const PCI_CONFIGURATION: Range<u16> = 0xcf8..0xd00;
/// The pvpanic port: where QEMU has it.
pub const PVPANIC: Range<u16> = 0x505..0x506;
/// ACPI's sleep control register, then its sleep status register, then the reset register.
pub const ACPI_POWER: Range<u16> = 0x600..0x603;
/// The last of them: the reset register.
pub const ACPI_RESET: u16 = 0x602;

/// The first interrupt for devices. Those below are the legacy devices' of a PC, COM1's among them; with
/// hardware-reduced ACPI those above are free.
pub const FIRST_DEVICE_GSI: u32 = 5;
/// How many devices can be attached: one interrupt each. 24 - 5 = 19.
pub const MAX_DEVICES: usize = (IOAPIC_INPUTS - FIRST_DEVICE_GSI) as usize;

/// Local APIC ids have 8 bits, and 255 means all processors.
pub const MAX_VCPUS: u32 = 254;

/// The page with the registers of virtio device `index`, and its interrupt; `None` from [`MAX_DEVICES`] on.
pub fn virtio_device(index: usize) -> Option<(u64, u32)> {
    (index < MAX_DEVICES)
        .then(|| (VIRTIO_REGISTERS + index as u64 * PAGE_SIZE, FIRST_DEVICE_GSI + index as u32))
}

/// Where the windows of shared memory regions can start, for RAM that ends at `ram_end`: the next GiB, and
/// never below 4 GiB, so that huge pages of every size fit.
pub fn windows_start(ram_end: u64) -> u64 {
    ram_end.max(GAP_END).next_multiple_of(GIB)
}

/// The fixed part of the machine, for `--print-layout`.
pub struct Layout;

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "guest physical memory:")?;
        for (name, start, len) in memory() {
            let end = if len == 0 { String::new() } else { format!("{:#011x}", start + len) };
            writeln!(f, "  {start:#011x}..{end:11}  {name}")?;
        }
        writeln!(f, "I/O ports:")?;
        for (name, Range { start, end }) in PORTS {
            writeln!(f, "  {start:#05x}..{end:#05x}  {name}")?;
        }
        writeln!(f, "interrupts:")?;
        writeln!(f, "  {COM1_GSI}       serial port COM1")?;
        write!(
            f,
            "  {FIRST_DEVICE_GSI} to {}  virtio devices, in the order of the command line",
            IOAPIC_INPUTS - 1
        )
    }
}

/// A name, the first address, the length in bytes (0 where it depends on the machine).
pub type Place = (&'static str, u64, u64);

/// What is in RAM before the guest's first instruction, besides the kernel and the initramfs.
pub const BOOT: [Place; 6] = [
    ("global descriptor table", GDT, 32),
    ("boot parameters", BOOT_PARAMS, PAGE_SIZE),
    ("page tables of the first instructions", PAGE_TABLES, 6 * PAGE_SIZE),
    ("kernel command line", CMDLINE, CMDLINE_SPACE),
    ("ACPI tables", ACPI, ACPI_SPACE),
    ("reset vector", RESET_VECTOR, RESET_VECTOR_LEN),
];

/// What is in the gap of each machine.
pub const FIXED: [Place; 3] = [
    ("IOAPIC", IOAPIC, PAGE_SIZE),
    ("local APICs", LOCAL_APIC, PAGE_SIZE),
    ("KVM's own pages", KVM_PAGES, 4 * PAGE_SIZE),
];

const RAM: Place = ("RAM, with the kernel and the initramfs", HIGH_RAM, GAP - HIGH_RAM);
const REGISTERS: Place =
    ("virtio devices' registers, a page each", VIRTIO_REGISTERS, MAX_DEVICES as u64 * PAGE_SIZE);

const ABOVE: [Place; 2] = [
    ("RAM beyond 3 GiB, as far as there is", GAP_END, 0),
    ("then, from the next GiB on: windows of shared memory regions", GAP_END, 0),
];

/// All of it, by rising address.
fn memory() -> impl Iterator<Item = Place> {
    BOOT.into_iter().chain([RAM, REGISTERS]).chain(FIXED).chain(ABOVE)
}

const PORTS: [(&str, Range<u16>); 7] = [
    ("keyboard controller, reset only", I8042),
    ("debug exit, with --debug-exit", DEBUG_EXIT),
    ("serial port COM1", COM1),
    ("pvpanic", PVPANIC),
    ("ACPI sleep control and status", ACPI_POWER.start..ACPI_RESET),
    ("ACPI reset", ACPI_RESET..ACPI_POWER.end),
    ("PCI configuration, of a host bridge alone", PCI_CONFIGURATION),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_disjoint(ranges: &[(&str, u64, u64)]) {
        for (number, (name, start, len)) in ranges.iter().enumerate() {
            for (other, other_start, other_len) in &ranges[number + 1..] {
                assert!(
                    start + len <= *other_start || other_start + other_len <= *start,
                    "{name} and {other} overlap"
                );
            }
        }
    }

    #[test]
    fn nothing_overlaps() {
        assert_disjoint(&memory().collect::<Vec<_>>());
        assert_disjoint(&PORTS.map(|(name, ports)| (name, ports.start.into(), ports.len() as u64)));
    }

    #[test]
    fn boot_structures_are_in_low_ram_and_registers_in_the_gap() {
        for (name, start, len) in &BOOT[..4] {
            assert!(start + len <= LOW_RAM_END, "{name}");
        }
        for (name, start, len) in [&[REGISTERS][..], &FIXED].concat() {
            assert!(GAP <= start && start + len <= GAP_END, "{name}");
            assert_eq!(start % PAGE_SIZE, 0, "{name}");
        }
        const { assert!(LOW_RAM_END <= ACPI && RESET_VECTOR + RESET_VECTOR_LEN <= HIGH_RAM) };
    }

    #[test]
    fn each_device_has_a_page_and_an_interrupt_of_its_own() {
        let devices: Vec<_> = (0..).map_while(virtio_device).collect();
        assert_eq!(devices.len(), 19);
        for (number, (address, gsi)) in devices.iter().enumerate() {
            assert!(*gsi != COM1_GSI && *gsi < IOAPIC_INPUTS);
            assert!(devices[..number].iter().all(|(other, taken)| other != address && taken != gsi));
        }
    }

    #[test]
    fn windows_start_above_all_ram() {
        assert_eq!(windows_start(128 * MIB), 4 * GIB);
        assert_eq!(windows_start(GAP), 4 * GIB);
        assert_eq!(windows_start(4 * GIB + 4096), 5 * GIB);
        assert_eq!(windows_start(7 * GIB), 7 * GIB);
    }
}
