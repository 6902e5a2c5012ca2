//! Writes `seeds/`: for each fuzz target a few inputs that get it deep at once. To be run when the meaning of
//! a target's bytes, which each target says in its own file, has changed:
//!
//! ```text
//! cargo run --manifest-path fuzz/Cargo.toml --example seeds
//! ```

use std::fs;
use std::path::Path;

use hotslot::virtio::register_page::Register::{self, *};

fn main() {
    write("backend_channel", &backend_channel());
    write("main_socket", &main_socket());
    write("registers", &registers());
    write("device_strings", &device_strings());
}

type Seed = (&'static str, Vec<u8>);

fn write(target: &str, seeds: &[Seed]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    fs::create_dir_all(&dir).unwrap();
    for (name, bytes) in seeds {
        fs::write(dir.join(name), bytes).unwrap();
    }
}

fn backend_channel() -> Vec<Seed> {
    const ALL: [u8; 2] = [0, 0];
    const QUOTA_OF_1: [u8; 2] = [1, 0];
    const WITHOUT_ANSWERS: [u8; 2] = [0, 1];
    const WITHOUT_SHMEM: [u8; 2] = [0, 2];
    const LATER: u8 = 0x80;
    const RESET: u8 = 7;
    const START: u8 = 8;
    const CUT_TO_NOTHING: [u8; 3] = [9, 0, 0];
    const TOUCH: [u8; 4] = [10, 0, 0, 1];
    const WRITE: [u8; 4] = [10, 0, 1, 2];
    let [refuse, hang_up] = [11, 12];
    // What; form; region, file, offset and length in pages; flags; descriptors; where it is split.
    let map = |page, pages| [0, 0, 0, 0, page, pages, 1, 0x10, 0];
    let unmap = |page, pages| [0, 1, 0, 0, page, pages, 0, 0, 0];
    let other_region = |mut request: [u8; 9], region| {
        request[2] = region;
        request
    };
    let later = |mut request: [u8; 9]| {
        request[0] |= LATER;
        request
    };
    let in_two = |request: [u8; 9], at, how| [&request[..8], &[at, how]].concat();
    vec![
        (
            "maps_and_unmaps",
            [&ALL[..], &map(0, 2), &map(2, 14), &unmap(0, 2), &map(1, 1), &unmap(2, 14)].concat(),
        ),
        (
            "refused",
            [&ALL[..], &map(4, 4), &map(7, 1), &map(16, 1), &map(0, 0), &unmap(4, 3), &unmap(5, 1)].concat(),
        ),
        (
            "regions",
            [
                &ALL[..],
                &other_region(map(0, 64), 1),
                &other_region(map(0, 1), 2),
                &other_region(map(0, 1), 3),
                &other_region(unmap(0, 64), 1),
            ]
            .concat(),
        ),
        ("resets", [&ALL[..], &map(0, 4), &[RESET], &map(0, 4), &[START], &map(0, 4), &unmap(0, 4)].concat()),
        (
            "reset_twice_after_noise",
            [
                &ALL[..],
                // A reply, where only requests belong; what comes after it was sent before anybody looked.
                &[LATER, 0xf0, 5, 0, 0, 0, 0, 0, 0, 1, 1, 0x10, 0],
                &later(map(0, 4)),
                &[RESET],
                &[RESET],
            ]
            .concat(),
        ),
        (
            "reset_inside_a_message",
            [
                &ALL[..],
                &map(3, 1),
                // The beginning of a MAP by itself.
                &[6, 12, 9, 0, 0, 0, 9, 0, 0, 0, 40, 0, 0, 0, 0x10],
                &[RESET, START],
                &[6, 40],
                &[0; 40],
                &[0],
                &map(3, 1),
            ]
            .concat(),
        ),
        (
            "split",
            [
                &ALL[..],
                &in_two(map(0, 1), 5, 0),
                &in_two(map(1, 1), 20, 1),
                &in_two(map(2, 1), 12, 2),
                &in_two(unmap(1, 1), 50, 3),
            ]
            .concat(),
        ),
        (
            "pipelined",
            [&ALL[..], &later(map(0, 1)), &later(map(1, 1)), &later(unmap(0, 1)), &map(0, 1), &unmap(1, 1)]
                .concat(),
        ),
        (
            "cut_short",
            [&ALL[..], &map(0, 4), &CUT_TO_NOTHING, &TOUCH, &map(8, 4), &WRITE, &unmap(0, 4), &unmap(8, 4)]
                .concat(),
        ),
        (
            "no_slot",
            [&ALL[..], &[refuse], &map(0, 1), &map(0, 1), &[refuse], &unmap(0, 1), &unmap(0, 1)].concat(),
        ),
        ("quota", [&QUOTA_OF_1[..], &map(0, 1), &map(1, 1), &unmap(0, 1), &map(1, 1)].concat()),
        ("silent", [&WITHOUT_ANSWERS[..], &map(0, 1), &map(0, 1), &unmap(0, 1), &[RESET]].concat()),
        ("no_shmem", [&WITHOUT_SHMEM[..], &map(0, 1), &unmap(0, 1)].concat()),
        ("hang_up", [&ALL[..], &map(0, 1), &later(map(1, 1)), &[hang_up], &[RESET]].concat()),
    ]
}

fn main_socket() -> Vec<Seed> {
    let [rng, fs, pmem, blk, number] = [0, 1, 2, 3, 4];
    let [start, reset, stop_queue, start_queue, config] = [0, 2, 4, 5, 6];
    let [usual, value, payload, regions, header, hang_up, channel] = [0, 3, 4, 5, 7, 9, 10];
    // Kind, offer, and what the driver does beyond a start at the beginning and a reset at the end.
    let device = |kind: u8, offer: u8, actions: &[u8]| {
        let actions: Vec<_> = actions.iter().flat_map(|&what| [what, 0]).collect();
        [&[kind, offer, (actions.len() / 2) as u8], &actions[..]].concat()
    };
    let usuals = |count: usize| vec![usual; count];
    vec![
        ("rng", device(rng, 0, &[stop_queue, start_queue, reset, start])),
        ("fs", device(fs, 0, &[config, reset, start])),
        ("pmem", device(pmem, 0, &[])),
        ("blk", device(blk, 0, &[config])),
        ("number", device(number, 1, &[config])),
        ("few_regions", [device(rng, 16, &[]), vec![2, 3, 2, 255, 4]].concat()),
        ("no_reply_ack", [device(rng, 2, &[reset, start]), vec![8, 0, 0, 0, 0, 0, 0, 0]].concat()),
        ("refuses", [device(rng, 0, &[]), usuals(6), vec![value, 1, 0, 0, 0, 0, 0, 0, 0]].concat()),
        ("wrong_size", [device(rng, 0, &[]), usuals(1), vec![payload, 4, 1]].concat()),
        ("wrong_regions", [device(rng, 0, &[]), usuals(5), vec![regions, 1, 7, 3, 2]].concat()),
        ("half_an_answer", [device(rng, 0, &[]), usuals(8), vec![header, 0, 0, 0, 3, 1, 2, 3]].concat()),
        ("hangs_up", [device(rng, 0, &[]), usuals(10), vec![hang_up]].concat()),
        (
            "maps_while_starting",
            [device(rng, 0, &[reset, start]), usuals(7), vec![channel, 0, 1, channel, 2, 2, usual]].concat(),
        ),
        (
            "maps_during_each_request",
            [device(rng, 0, &[reset]), usuals(6), [channel, 0, 1, usual].repeat(24)].concat(),
        ),
    ]
}

fn registers() -> Vec<Seed> {
    let [fail, needs_reset, config_changed, queues, region] = [11, 12, 13, 14, 15];
    // A value below 0xc0 is itself, 0xc0 and on are powers of two from 0x100 on, 0xff precedes any.
    let set = |register: Register, value: u8| {
        let index = Register::ALL.iter().position(|&other| other == register).unwrap();
        vec![0, index as u8, value]
    };
    let accept = |high: u32| {
        let any = [set(DriverFeatures, 0xff), high.to_le_bytes().to_vec()].concat();
        [set(Status, 1), set(Status, 3), set(DriverFeaturesSel, 1), any, set(Status, 11)].concat()
    };
    let version_1 = accept(1);
    let ring_reset = accept(1 | 1 << 8);
    let packed = accept(1 | 1 << 2);
    let queue = |index, size| {
        [
            set(QueueSel, index),
            set(QueueSize, size),
            set(QueueDescLow, 0xc4),
            set(QueueDriverLow, 0xc5),
            set(QueueDeviceLow, 0xc6),
            set(QueueReady, 1),
        ]
        .concat()
    };
    let live = |accepted: &[u8]| [accepted, &queue(0, 0xc0), &queue(2, 64), &set(Status, 15)].concat();
    let regions: Vec<_> = (0..6).flat_map(|which| [region, which]).collect();
    vec![
        ("starts", [live(&version_1), set(QueueNotify, 2), set(InterruptACK, 1), set(Status, 0)].concat()),
        ("twice", [live(&version_1), set(Status, 0), live(&ring_reset)].concat()),
        (
            "queue_reset",
            [live(&ring_reset), set(QueueReset, 1), queue(2, 32), set(QueueReady, 0), vec![queues]].concat(),
        ),
        ("packed", [packed, queue(0, 96), set(Status, 15)].concat()),
        (
            "bad_queues",
            [version_1.clone(), queue(0, 0xc1), queue(1, 8), queue(2, 0), queue(3, 8), vec![queues]].concat(),
        ),
        ("not_offered", [accept(1 | 1 << 6), set(Status, 3)].concat()),
        ("regions", regions),
        (
            "configuration",
            [version_1.clone(), vec![config_changed, 3, 7, 8, 9, 10, 0, 1, 0, 0, 1, 5, 6, config_changed, 0]]
                .concat(),
        ),
        ("fails", [vec![], version_1, queue(0, 8), vec![fail], set(Status, 15), set(Status, 0)].concat()),
        (
            "needs_reset",
            [live(&ring_reset), vec![needs_reset], set(QueueReset, 1), set(InterruptACK, 2), set(Status, 0)]
                .concat(),
        ),
        ("gives_up", [live(&ring_reset), set(Status, 0x8f), set(Status, 15), set(Status, 0)].concat()),
    ]
}

fn device_strings() -> Vec<Seed> {
    let text = |which: u8, text: &str| [&[which], text.as_bytes()].concat();
    vec![
        ("device", text(0, "/run/fs.sock,type=fs")),
        ("device_in_full", text(0, "a=b,queues=3,type=26,queue-size=128,shmem-bit=20,name=share")),
        ("device_keys", text(0, "a,type=fs,tag=x,config=00ff,config-size=300,shmem=0:1M")),
        ("device_mac", text(0, "a,type=net,mac=52:54:00:12:34:56")),
        ("device_not_yet", text(0, "a,type=pmem,reconnect=5")),
        ("device_that_shares", text(0, "a,type=pmem,share-shmem=on")),
        ("memory", text(1, "16777215T")),
        ("bytes", text(1, "0018446744073709551615")),
        ("time_span", text(2, "500ms")),
        ("serial_stdio", text(3, "stdio")),
        ("serial_file", text(3, "file=/tmp/console=0")),
        (
            "command_line",
            text(
                4,
                "-k\nvmlinux\n-m\n1G\n--cpus\n4\n--vhost-user\na,type=blk\n--serial\noff\n-c\nquiet\n-vv",
            ),
        ),
    ]
}
