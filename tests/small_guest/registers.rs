//! The data path: the doorbell, the interrupt and its acknowledgement, none of which the VMM takes part in.

use hotslot_test_support::backend::Backend;
use hotslot_test_support::guest::{Guest, register};
use hotslot_test_support::kvm;

const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
/// The first device's interrupt.
const GSI: u32 = 5;
const VECTOR: u32 = 0x41;

#[test]
fn a_notify_reaches_the_back_ends_kick() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::with(&backend);
    assert!(!backend.was_kicked());
    guest.set_register(register::QUEUE_NOTIFY, 0);
    assert!(backend.was_kicked());
    assert!(!backend.was_kicked());
    // There is no queue 1.
    guest.set_register(register::QUEUE_NOTIFY, 1);
    assert!(!backend.was_kicked());
    guest.exit();
}

#[test]
fn a_call_interrupts_the_guest_and_its_acknowledgement_is_swallowed() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest = Guest::boot(["--vhost-user", &backend.device("device")]);
    // The device's interrupt becomes a vector of the first processor, where it waits: interrupts are off.
    guest.write32(LOCAL_APIC + 0xf0, 0x1ff);
    for (index, value) in [(0x11 + 2 * GSI, 0), (0x10 + 2 * GSI, VECTOR)] {
        guest.write32(IO_APIC, index);
        guest.write32(IO_APIC + 0x10, value);
    }
    let requested = LOCAL_APIC + 0x200 + u64::from(VECTOR / 32) * 0x10;
    let is_pending = |guest: &mut Guest| guest.read32(requested) & 1 << (VECTOR % 32) != 0;

    assert_eq!(guest.register(register::INTERRUPT_STATUS), 0);
    guest.start_device();
    assert_eq!(guest.register(register::INTERRUPT_STATUS), 1);
    assert!(!is_pending(&mut guest));
    backend.call();
    let mut looks = 0;
    while !is_pending(&mut guest) {
        looks += 1;
        assert!(looks < 10_000, "no interrupt");
    }
    guest.set_register(register::INTERRUPT_ACK, 1);
    assert_eq!(guest.register(register::INTERRUPT_STATUS), 1);
    guest.reset_device();
    assert_eq!(guest.register(register::INTERRUPT_STATUS), 0);
    guest.exit();
}
