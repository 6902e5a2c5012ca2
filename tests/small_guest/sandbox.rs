//! The sandbox of a running machine, as the host's kernel shows it. What it refuses is tested in
//! `src/sandbox/tests.rs`.

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::names::PROTOCOL_F_CONFIGURE_MEM_SLOTS;
use hotslot_test_support::process::{Confinement, confinements};

fn boot(options: &[&str]) -> (Guest, [Backend; 2]) {
    let mut offer = Offer::default();
    offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    let backends = [Backend::offering(offer), Backend::start()];
    let devices = [backends[0].device("a"), backends[1].device("b") + ",share-shmem=on"];
    let devices = devices.iter().flat_map(|device| ["--vhost-user", device]);
    let mut guest = Guest::boot(devices.chain(options.iter().copied()));
    // An answer of the guest: all threads are there.
    guest.start_device();
    (guest, backends)
}

#[test]
fn each_thread_is_confined_once_the_guest_runs() {
    if !kvm::is_here() {
        return;
    }
    let (guest, _backends) = boot(&["--cpus", "2"]);
    let threads = confinements(guest.pid());
    for name in ["hotslot", "vcpu0", "vcpu1", "vhost-a", "vhost-b", "keep-a", "keep-b"] {
        assert!(threads.contains_key(name), "{threads:?}");
    }
    let confined = Confinement { filter: true, no_new_privs: true };
    assert!(threads.values().flatten().all(|thread| *thread == confined), "{threads:?}");
    guest.exit();
}

#[test]
fn the_sandbox_can_be_switched_off() {
    if !kvm::is_here() {
        return;
    }
    let (guest, _backends) = boot(&["--sandbox", "off"]);
    let threads = confinements(guest.pid());
    assert!(threads.values().flatten().all(|thread| !thread.filter), "{threads:?}");
    guest.exit();
}
