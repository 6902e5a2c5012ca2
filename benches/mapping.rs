//! How long MAP and UNMAP take that are well, from the request to its answer: of each hotslot that an
//! argument names, in turns, so that two of them can be compared.
//!
//! The guest is the tests' monitor. It does nothing meanwhile, not even wait in KVM_RUN: the back-end maps
//! before it answers a message of the device's start, and the vCPU waits for that answer.
//!
//! `scripts/bench.sh mapping` runs it on an emulated host whose clock counts instructions.

#![allow(clippy::unwrap_used, clippy::panic)] // As in tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::process::Command;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{PAGE, memfd};
use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::names::request::SET_VRING_ADDR;
use hotslot_test_support::wire::page_at;

const ROUNDS: usize = 5;
const PAIRS: usize = 200;
/// Pairs before those that count.
const WARM_UP: usize = 20;

/// What is mapped: a file in memory, and one of a file system.
const FILES: [&str; 2] = ["memfd", "file"];

fn main() {
    let programs: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let mut samples: BTreeMap<_, (Vec<Duration>, Vec<Duration>)> = BTreeMap::new();
    for _ in 0..ROUNDS {
        for program in &programs {
            for file in FILES {
                let (maps, unmaps) = samples.entry((file, program)).or_default();
                for (map, unmap) in round(program, file) {
                    maps.push(map);
                    unmaps.push(unmap);
                }
            }
        }
    }
    println!("nanoseconds from request to answer, medians of {}", ROUNDS * PAIRS);
    println!("{:>8}{:>8}  of", "MAP", "UNMAP");
    for ((file, program), (mut maps, mut unmaps)) in samples {
        let median = |times: &mut Vec<Duration>| {
            times.sort_unstable();
            times[times.len() / 2].as_nanos()
        };
        println!("{:8}{:8}  a {file}, {program}", median(&mut maps), median(&mut unmaps));
    }
}

/// One machine: how long its pairs took. `program` may have options of hotslot behind it.
fn round(program: &str, file: &str) -> Vec<(Duration, Duration)> {
    let file = match file {
        "memfd" => memfd(PAGE),
        _ => {
            let file: File = tempfile::tempfile().unwrap();
            file.set_len(PAGE).unwrap();
            file
        }
    };
    let (results, times) = mpsc::channel();
    let backend = Backend::acting(SET_VRING_ADDR, move |connection| {
        for _ in 0..WARM_UP + PAIRS {
            let begin = Instant::now();
            assert_eq!(connection.map(page_at(0), &file), 0);
            let mapped = Instant::now();
            assert_eq!(connection.unmap(page_at(0)), 0);
            results.send((mapped - begin, mapped.elapsed())).unwrap();
        }
    });
    let kernel = guest::kernel();
    let mut words = program.split(' ');
    let mut command = Command::new(words.next().unwrap());
    command.args(words).args(["-m", "64M", "--debug-exit", "--vhost-user", &backend.device("device"), "-k"]);
    command.arg(kernel.path());
    let mut guest = Guest::spawn(command, None);
    guest.start_device();
    guest.exit();
    // All were sent before the start's last answer. The sender itself lives as long as the back-end.
    times.try_iter().skip(WARM_UP).collect()
}
