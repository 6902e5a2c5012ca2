//! The sandbox of a running machine, as the host's kernel shows it. What it refuses is tested in
//! `src/sandbox/tests.rs`.

use std::collections::BTreeMap;
use std::fs;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::names::PROTOCOL_F_CONFIGURE_MEM_SLOTS;

/// Of each thread: its name, whether it has a filter, and whether it can get new privileges.
fn threads(guest: &Guest) -> BTreeMap<String, (bool, bool)> {
    let field = |status: &str, name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit('\t').next().unwrap().parse::<u8>().unwrap()
    };
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{}/task", guest.pid())).unwrap() {
        let task = task.unwrap().path();
        let name = fs::read_to_string(task.join("comm")).unwrap().trim().to_owned();
        let status = fs::read_to_string(task.join("status")).unwrap();
        // KVM's own, in the kernel.
        if !name.starts_with("kvm-") {
            threads.insert(name, (field(&status, "Seccomp:") == 2, field(&status, "NoNewPrivs:") == 0));
        }
    }
    threads
}

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
    let threads = threads(&guest);
    for name in ["hotslot", "vcpu0", "vcpu1", "vhost-a", "vhost-b", "share-a"] {
        assert!(threads.contains_key(name), "{threads:?}");
    }
    assert!(threads.values().all(|thread| *thread == (true, false)), "{threads:?}");
    guest.exit();
}

#[test]
fn the_sandbox_can_be_switched_off() {
    if !kvm::is_here() {
        return;
    }
    let (guest, _backends) = boot(&["--sandbox", "off"]);
    let threads = threads(&guest);
    assert!(threads.values().all(|thread| *thread == (false, true)), "{threads:?}");
    guest.exit();
}
