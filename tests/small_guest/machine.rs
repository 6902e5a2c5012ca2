//! The machine without devices.

use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;

#[test]
fn the_guest_reads_and_writes_its_ram_and_ends_with_its_status() {
    if !kvm::is_here() {
        return;
    }
    let mut guest = Guest::boot::<&str>([]);
    guest.write64(0x180_0000, 0x1122_3344_5566_7788);
    assert_eq!(guest.read64(0x180_0000), 0x1122_3344_5566_7788);
    assert_eq!(guest.read8(0x180_0001), 0x77);
    guest.exit();
}

#[test]
fn a_hole_reads_all_ones_and_drops_writes() {
    if !kvm::is_here() {
        return;
    }
    let mut guest = Guest::boot::<&str>([]);
    for address in [0xc000_0000, 0x1_0000_0000, 0xf_0000_0000] {
        guest.write64(address, 0);
        assert_eq!(guest.read64(address), u64::MAX);
        assert_eq!(guest.read8(address + 3), 0xff);
    }
    guest.exit();
}
