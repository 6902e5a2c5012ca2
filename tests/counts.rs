//! What a device takes of the process, it gives back (SHM-78). A program of its own: nothing else opens files
//! here.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use hotslot::memory::alloc::WindowAllocator;
use hotslot::vhost_user::sharing::Sharing;
use hotslot_test_support::bench::*;
use hotslot_test_support::process::*;

#[test]
fn descriptors_mappings_and_threads_are_given_back() {
    // SHM-80, at the end
    let counts = || (descriptors(), areas("self").len());
    // The first device may make what stays, such as a thread's stack in the allocator's hands.
    drop(Setup::default().start().end());
    eventually("the back-end's thread ends", || threads() == 2);
    let nothing = counts();
    for _ in 0..3 {
        let bench = Setup::default().start();
        bench.start().unwrap();
        let file = file_of(1, 1);
        let idle = counts();
        for round in 0..100 {
            let page = page_at(round % 60);
            assert_eq!(bench.map(page, &file), 0);
            assert!(bench.map(page, &file) < 0);
            assert_eq!(bench.unmap(page), 0);
            assert!(bench.unmap(page) < 0);
        }
        assert_eq!(counts(), idle);
        for page in 0..60 {
            assert_eq!(bench.map_page(page, 1), 0);
        }
        assert_eq!(descriptors(), idle.0 + 60); // SHM-46: 60 files
        bench.reset();
        assert_eq!(counts(), idle); // SHM-69
        bench.start().unwrap();
        for page in 0..60 {
            assert_eq!(bench.map_page(page, 1), 0);
        }
        drop(file);
        drop(bench.end());
        eventually("the back-end's thread ends", || threads() == 2);
        assert_eq!(counts(), nothing);
    }
    what_is_shared_is_given_back(&counts);
    eventually("the back-ends' threads end", || threads() == 2);
    assert_eq!(counts(), nothing);
}

/// SHM-46, SHM-78, SHM-80: a descriptor for each file that others see, as long as they do.
fn what_is_shared_is_given_back(counts: &dyn Fn() -> (usize, usize)) {
    let sharing = Sharing::new(64);
    let (mut owner, mut other) = (Setup::default(), Setup::default());
    owner.shares = true;
    owner.member = Some(sharing.join());
    other.member = Some(sharing.join());
    other.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    other.windows = WindowAllocator::new(1 << 36, 1 << 40);
    let (owner, other) = (owner.start(), other.start());
    owner.start().unwrap();
    other.start().unwrap();
    let files = [file_of(1, 1), file_of(1, 2)];
    let idle = counts();
    // The other back-end closes what it is told of a little later than it answers.
    let descriptors_are = |count: usize| eventually("descriptors", || descriptors() == count);
    for round in 0..3 {
        for page in 0..30 {
            assert_eq!(owner.map(writable(page_at(2 * page)), &files[0]), 0);
            assert_eq!(owner.map(writable(page_at(2 * page + 1)), &files[1]), 0);
        }
        // One of each file: to send to others, and to know where it ends.
        descriptors_are(idle.0 + 2);
        match round {
            0 => {
                for page in 0..60 {
                    assert_eq!(owner.unmap(page_at(page)), 0);
                }
            }
            1 => owner.reset(),
            _ => {
                other.hang_up();
                owner.reset();
            }
        }
        if round < 2 {
            descriptors_are(idle.0);
            assert_eq!(counts(), idle);
            owner.start().unwrap();
        }
    }
}
