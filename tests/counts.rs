//! What a device takes of the process, it gives back (SHM-78). A program of its own: nothing else opens files here.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

#[path = "protocol/bench.rs"]
mod bench;
#[path = "support/process.rs"]
mod process;
#[path = "protocol/wire.rs"]
mod wire;

use bench::*;
use process::*;

#[test]
fn descriptors_mappings_and_threads_are_given_back() {
    let counts = || (descriptors(), areas("self").len());
    // The first device may make what stays, such as a thread's stack in the allocator's hands.
    drop(Setup::new().start().end());
    eventually("the back-end's thread ends", || threads() == 2);
    let nothing = counts();
    for _ in 0..3 {
        let bench = Setup::new().start();
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
        assert_eq!(descriptors(), idle.0); // SHM-46
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
}
