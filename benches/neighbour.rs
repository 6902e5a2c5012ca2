//! How long a request to one device takes while the back-end of another misbehaves (SHM-66).
//!
//! The guest is the tests' monitor on this machine's `/dev/kvm`, both back-ends are `hotslot-backend
//! torture`. A request is a buffer that the first device fills; the guest takes the time from the kick
//! until the used ring shows it, by its time-stamp counter. Meanwhile the second device does nothing, or
//! what the case says. Rounds of all cases take turns. For each case there is a line: its name, and
//! minimum, median, 99th percentile and maximum, in ticks.
//!
//! A flood that is carried out changes memory slots without end, and each change costs the guest's processors
//! what they knew of its memory: most where KVM is software. That, and not a wait for anybody, is what its
//! ratio shows; `shmem-rate` limits it.
//!
//! On `/dev/kvm` and not on the emulated host, although that has the steadier clock: it has one processor,
//! and what would be measured is how its scheduler shares it out.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use hotslot_test_support::guest::Guest;
use hotslot_test_support::kvm;
use hotslot_test_support::torture::Torture;

const ROUNDS: usize = 5;
const REQUESTS: usize = 1000;
/// Requests before those that count.
const WARM_UP: usize = 50;

/// What the neighbour does from its start on, as the subject of a figure and as options, and what else its
/// device is given.
const CASES: [(&str, &[&str], &str); 5] = [
    ("quiet", &[], ""),
    ("stall", &["--do", "stall"], ""),
    ("flood", &["--do", "flood=forever"], ""),
    ("flood-rate-50", &["--do", "flood=forever"], ",shmem-rate=50"),
    ("flood-unread", &["--do", "flood-unread=forever"], ""),
];

fn main() {
    if !kvm::is_here() {
        std::process::exit(1);
    }
    let mut samples = CASES.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for ((_, options, limit), samples) in CASES.iter().zip(&mut samples) {
            samples.extend(round(options, limit));
        }
    }
    for ((name, ..), samples) in CASES.iter().zip(&mut samples) {
        samples.sort_unstable();
        let at = |percent: usize| samples[(samples.len() * percent / 100).min(samples.len() - 1)];
        println!("neighbour@{name} {} {} {} {}", at(0), at(50), at(99), at(100));
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
