//! What a device does when the process has no more of something (SHM-48). A program of its own: its limits are lowered.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

#[path = "protocol/bench.rs"]
mod bench;
#[path = "protocol/wire.rs"]
mod wire;

use std::os::fd::AsRawFd;

use bench::*;
use wire::{MAP, MMap, NEED_REPLY, VERSION_1, message};

/// Lowers a limit of the process, and puts it back when dropped.
struct Lowered(libc::__rlimit_resource_t, libc::rlimit);

impl Lowered {
    fn to(resource: libc::__rlimit_resource_t, limit: u64) -> Lowered {
        let mut old = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: one structure, on our stack.
        assert_eq!(unsafe { libc::getrlimit(resource, &mut old) }, 0);
        let lowered = Lowered(resource, old);
        lowered.set(libc::rlimit {
            rlim_cur: limit,
            ..old
        });
        lowered
    }

    fn set(&self, limit: libc::rlimit) {
        // SAFETY: one structure, on our stack.
        assert_eq!(unsafe { libc::setrlimit(self.0, &limit) }, 0);
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        self.set(self.1);
    }
}

/// Bytes of address space that the process has.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * PAGE
}

#[test]
fn a_process_without_room_fails_one_request_and_nothing_else() {
    const LARGE: u64 = 256 << 20;
    let mut setup = Setup::new();
    setup.offer.regions = vec![(0, LARGE), (7, REGION)];
    let bench = setup.start();
    assert_eq!(bench.map_page(0, 1), 0);
    let channel = bench.channel();

    // No descriptor left for the one that comes.
    let file = file_of(1, 2);
    let bytes = message(MAP, VERSION_1 | NEED_REPLY, &page_at(1).bytes());
    let highest = std::fs::read_dir("/proc/self/fd").unwrap();
    let highest = highest.map(|entry| {
        entry
            .unwrap()
            .file_name()
            .into_string()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    });
    let limit = Lowered::to(libc::RLIMIT_NOFILE, highest.max().unwrap());
    // Those below the limit that are free are taken, so that none is left.
    let taken: Vec<_> = std::iter::from_fn(|| file.try_clone().ok()).collect();
    channel.send_with(&bytes, &[file.as_raw_fd()]).unwrap();
    assert_eq!(answer(&channel, MAP), -i64::from(libc::EMFILE));
    drop((taken, limit));
    bench.assert_works();

    // No address space left for the mapping.
    let large = MMap {
        shm_offset: 2 * PAGE,
        len: LARGE - 2 * PAGE,
        ..MMap::default()
    };
    let limit = Lowered::to(libc::RLIMIT_AS, address_space() + LARGE / 2);
    assert_eq!(bench.map(large, &file), -i64::from(libc::ENOMEM));
    drop(limit);
    bench.assert_works();
    assert_eq!(bench.map(large, &file), 0); // SHM-49

    assert_eq!((bench.reads(0, 0), bench.reads(0, 2 * PAGE)), (Some(1), Some(2)));
    bench.reset();
    assert_eq!((bench.guest().count(), bench.needs_reset()), (0, false));
}
