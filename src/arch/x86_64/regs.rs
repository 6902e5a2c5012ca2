//! The first processor's state at the kernel's 64-bit entry point, as data.
//!
//! Documentation/arch/x86/boot.rst in the Linux sources, "64-bit Boot Protocol": long mode with an identity
//! map of kernel, boot parameters and command line; flat segments; interrupts off; RSI at the boot
//! parameters.

use kvm_bindings::{kvm_fpu, kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{BOOT_PARAMS, GAP_END, GDT, PAGE_TABLES, RESET_VECTOR_LEN};
use crate::memory::PAGE_SIZE;

/// The selector of the code segment: `__BOOT_CS`.
const CODE: u16 = 0x10;
/// The selector of all data segments: `__BOOT_DS`.
const DATA: u16 = 0x18;

/// A segment descriptor's type: code, may be read, accessed.
const TYPE_CODE: u8 = 0b1011;
/// A segment descriptor's type: data, may be written, accessed.
const TYPE_DATA: u8 = 0b0011;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

const PTE_PRESENT: u64 = 1 << 0;
const PTE_WRITABLE: u64 = 1 << 1;
/// In a page directory: a page of 2 MiB instead of a table.
const PTE_HUGE: u64 = 1 << 7;

/// Where a kernel starts, and by which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Linux' 64-bit boot protocol.
    Linux(u64),
    /// PVH (`pvh.rs`): 32-bit protected mode.
    Pvh(u64),
}

/// General registers: at the entry, with RSI, or EBX for PVH, at the boot parameters.
pub fn general(entry: Entry) -> kvm_regs {
    let (rip, rsi, rbx) = match entry {
        Entry::Linux(address) => (address, BOOT_PARAMS, 0),
        Entry::Pvh(address) => (address, 0, BOOT_PARAMS),
    };
    kvm_regs { rip, rsi, rbx, rflags: RFLAGS_RESERVED, ..Default::default() }
}

/// Long mode with the tables of [`page_tables`] and [`gdt`], or 32-bit protected mode without paging; all
/// else stays as in `reset`, the processor's state at reset.
pub fn system(entry: Entry, reset: kvm_sregs) -> kvm_sregs {
    let mut sregs = reset;
    sregs.cs = segment(CODE, TYPE_CODE);
    let data = segment(DATA, TYPE_DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = GDT;
    sregs.gdt.limit = (size_of_val(&gdt()) - 1) as u16;
    // The kernel makes its own table before it enables interrupts.
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    if let Entry::Pvh(_) = entry {
        (sregs.cs.l, sregs.cs.db) = (0, 1);
        (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE | CR0_ET, 0, 0);
        return sregs;
    }
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    sregs
}

/// Floating point at its reset defaults, with all exceptions masked.
pub fn floating_point() -> kvm_fpu {
    kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() }
}

/// A flat segment of 4 GiB, present, for privilege level 0.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    let code = selector == CODE;
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: (!code).into(),
        s: 1,
        l: code.into(),
        g: 1,
        ..Default::default()
    }
}

/// The segment descriptor for the table in memory (Intel SDM, volume 3, section 3.4.5), which the processor
/// loads when the kernel loads the selector again. The base and the privilege level are 0.
fn segment_descriptor(segment: &kvm_segment) -> u64 {
    // The limit counts pages, because g is set: its highest 20 bits remain.
    let limit = u64::from(segment.limit >> 12);
    let flags = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.present) << 7
        | u64::from(segment.l) << 13
        | u64::from(segment.db) << 14
        | u64::from(segment.g) << 15;
    (limit & 0xffff) | flags << 40 | (limit >> 16) << 48
}

/// The global descriptor table, for [`GDT`]: two empty entries, code, data.
pub fn gdt() -> [u64; 4] {
    let [code, data] = [segment(CODE, TYPE_CODE), segment(DATA, TYPE_DATA)];
    [0, 0, segment_descriptor(&code), segment_descriptor(&data)]
}

/// The page tables for [`PAGE_TABLES`], one after the other: the first 4 GiB at their own addresses in pages
/// of 2 MiB (some processors have none of 1 GiB). One root, one table of GiBs, four of 2 MiB pages: 6 pages.
pub fn page_tables() -> Vec<u64> {
    const ENTRIES: usize = (PAGE_SIZE / 8) as usize;
    let page = |number: u64| PAGE_TABLES + number * PAGE_SIZE;
    let table = |address: u64| address | PTE_PRESENT | PTE_WRITABLE;
    let gibs = GAP_END >> 30;
    let mut entries = vec![0; 2 * ENTRIES];
    entries[0] = table(page(1));
    for gib in 0..gibs {
        entries[ENTRIES + gib as usize] = table(page(2 + gib));
    }
    let huge_pages = (0..GAP_END).step_by(2 << 20);
    entries.extend(huge_pages.map(|address| table(address) | PTE_HUGE));
    entries
}

/// Real-mode code for [`super::layout::RESET_VECTOR`] that writes `value` to the reset register at `port`.
/// Linux with hardware-reduced ACPI and without EFI jumps there for a reboot, although there is a reset
/// register, unless its command line says `reboot=acpi`.
pub fn reset_vector(port: u16, value: u8) -> [u8; RESET_VECTOR_LEN as usize] {
    const HLT: u8 = 0xf4;
    let mut code = [HLT; RESET_VECTOR_LEN as usize];
    let [low, high] = port.to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; then hlt, which is never reached.
    code[..6].copy_from_slice(&[0xba, low, high, 0xb0, value, 0xee]);
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_every_boot_loader_writes() {
        assert_eq!(gdt(), [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    }

    /// Walks the tables as the processor does.
    fn translate(tables: &[u64], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| tables[((table - PAGE_TABLES) / 8 + index) as usize];
        let present = |entry: u64| (entry & PTE_PRESENT != 0).then_some(entry & !(PAGE_SIZE - 1));
        let gib_table = present(entry(PAGE_TABLES, address >> 39 & 511))?;
        let page_table = present(entry(gib_table, address >> 30 & 511))?;
        let leaf = entry(page_table, address >> 21 & 511);
        assert_ne!(leaf & PTE_HUGE, 0);
        Some(present(leaf)? + (address & ((2 << 20) - 1)))
    }

    #[test]
    fn the_first_4_gib_are_mapped_to_themselves() {
        let tables = page_tables();
        assert_eq!(tables.len() as u64 * 8, 6 * PAGE_SIZE);
        for address in [0, 0x7000, 0x100_0000, 0xc000_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, address), Some(address));
        }
        assert_eq!(translate(&tables, GAP_END), None);
    }

    #[test]
    fn long_mode_keeps_what_it_does_not_concern() {
        let reset = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        let sregs = system(Entry::Linux(0), reset);
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ds.db), (1, 0, 1));
        assert_eq!((sregs.efer, sregs.cr3), (0x500, PAGE_TABLES));
        let sregs = system(Entry::Pvh(0), reset);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.ds.db), (0, 1, 1));
        assert_eq!((sregs.cr0, sregs.cr4, sregs.efer), (0x11, 0, 0));
    }
}
