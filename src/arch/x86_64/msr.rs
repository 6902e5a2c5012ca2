//! The model-specific registers that a BIOS would have set before it starts the kernel.

use kvm_bindings::{Msrs, kvm_msr_entry};

/// IA32_MTRR_DEF_TYPE, the memory type outside all range registers (Intel SDM, volume 3, section 12.11.2.1).
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// Its bit that switches the memory type range registers on.
const MTRR_ENABLE: u64 = 1 << 11;
/// Its memory type write-back. Without it a kernel would map the windows of shared memory regions uncached,
/// and access files in the host's page cache slowly.
const MTRR_WRITE_BACK: u64 = 6;

/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1a0;
/// Its bit for fast string instructions.
const FAST_STRINGS: u64 = 1 << 0;

/// The registers to set, the same on every processor.
pub fn initial() -> Msrs {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[
        entry(MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK),
        entry(MISC_ENABLE, FAST_STRINGS),
    ])
    .expect("invariant: two entries are within the limit")
}
