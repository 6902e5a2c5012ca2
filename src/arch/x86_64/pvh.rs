//! The PVH boot protocol, for ELF kernels that are not Linux: a note in the file names a 32-bit entry point,
//! and a structure in memory says what a boot loader knows.
//!
//! "x86/HVM direct boot ABI" in the documentation of Xen. [`super::boot`] writes [`Information`] in place of
//! Linux' boot parameters; `regs` has the processor's first state.

use linux_loader::loader::bootparam::boot_e820_entry;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::layout;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// With a memory map.
const VERSION: u32 = 1;

/// What is written, in this order, at [`layout::BOOT_PARAMS`].
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Information {
    start: hvm_start_info,
    module: hvm_modlist_entry,
    map: [hvm_memmap_table_entry; 8],
}

// SAFETY: these are structures of integers without padding, one after the other.
unsafe impl ByteValued for Information {}

/// For a kernel with this memory map, whose command line is at [`layout::CMDLINE`] and whose initramfs, if it
/// has one, is at this address and of this length.
pub fn information(map: &[boot_e820_entry], initramfs: Option<(u64, u64)>) -> Vec<u8> {
    let at = |offset: usize| layout::BOOT_PARAMS + offset as u64;
    let mut information = Information {
        start: hvm_start_info {
            magic: MAGIC,
            version: VERSION,
            nr_modules: initramfs.is_some().into(),
            modlist_paddr: at(std::mem::offset_of!(Information, module)),
            cmdline_paddr: layout::CMDLINE,
            rsdp_paddr: layout::ACPI,
            memmap_paddr: at(std::mem::offset_of!(Information, map)),
            memmap_entries: map.len() as u32,
            ..Default::default()
        },
        ..Default::default()
    };
    if let Some((paddr, size)) = initramfs {
        information.module = hvm_modlist_entry { paddr, size, ..Default::default() };
    }
    for (entry, range) in information.map.iter_mut().zip(map) {
        // The types are those of the E820 memory map.
        let &boot_e820_entry { addr, size, r#type: type_ } = range;
        *entry = hvm_memmap_table_entry { addr, size, type_, reserved: 0 };
    }
    information.as_slice().to_vec()
}
