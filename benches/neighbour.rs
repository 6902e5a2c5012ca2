//! How long a request to one device takes while the back-end of another misbehaves (SHM-66).
//!
//! The guest is the tests' monitor on this machine's `/dev/kvm`, both back-ends are `hotslot-backend
//! torture`. A request is a buffer that the first device fills; the guest takes the time from the kick
//! until the used ring shows it, by its time-stamp counter. Meanwhile the second device does nothing, or
//! what the case says. In the case `spin` it does nothing, and a thread of this program computes: that is
//! what any busy process of the host costs. Rounds of all cases take turns. For each request there is a line
//! of output, `neighbour@CASE: TICKS`.
//!
//! In a flood, hotslot carries out maps and unmaps without end. Each change of a slot makes KVM drop cached
//! translations of the vCPUs, most on a software KVM. No thread waits for the neighbour. `shmem-rate` limits
//! a flood.
//!
//! On `/dev/kvm` and not on the emulated host, although that has the steadier clock: it has one processor,
//! and what would be measured is how its scheduler shares it out.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use std::sync::atomic::{AtomicBool, Ordering};

use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::torture::Torture;

const ROUNDS: usize = 5;
const REQUESTS: usize = 1000;
/// Requests before those that count.
const WARM_UP: usize = 50;

/// The case in which the host is busy, and not the neighbour.
const SPIN: &str = "spin";

/// For each case: its name in the figures, the options of the neighbour's back-end, and further keys of its
/// device.
const CASES: [(&str, &[&str], &str); 6] = [
    ("quiet", &[], ""),
    (SPIN, &[], ""),
    ("stall", &["--do", "stall"], ""),
    ("flood", &["--do", "flood=forever"], ""),
    ("flood-rate-50", &["--do", "flood=forever"], ",shmem-rate=50"),
    ("flood-unread", &["--do", "flood-unread=forever"], ""),
];

fn main() {
    if !kvm::is_here() {
        std::process::exit(1);
    }
    for _ in 0..ROUNDS {
        for (name, options, limit) in CASES {
            let times =
                if name == SPIN { beside_spinning(|| round(options, limit)) } else { round(options, limit) };
            for ticks in times {
                println!("neighbour@{name}: {ticks}");
            }
        }
    }
}

/// One machine: how long its requests took.
fn round(options: &[&str], limit: &str) -> Vec<u64> {
    let (device, neighbour) = (Torture::start(&[]), Torture::start(options));
    let devices = [device.device("measured"), neighbour.device("neighbour") + limit];
    let mut guest = Guest::boot(["--vhost-user", &devices[0], "--vhost-user", &devices[1]]);
    for index in [1, 0] {
        guest.select(index);
        guest.start_device();
    }
    let mut request = || guest.time_to_fill(0x180_0000, 64);
    for _ in 0..WARM_UP {
        request();
    }
    let times = (0..REQUESTS).map(|_| request()).collect();
    guest.exit();
    times
}

/// Calls `measure` while another thread spins.
fn beside_spinning<T>(measure: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let measured = measure();
        done.store(true, Ordering::Relaxed);
        measured
    })
}
