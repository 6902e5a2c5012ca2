//! Pictures: well-formed SVG in which nothing overlaps, whatever is drawn.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::process::Command;

use hotslot::memory::{Access, GuestRange};
use hotslot::picture::memory::{Kind, Part, draw};
use hotslot_test_support::{built, child, picture};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The texts of a picture; each of `parts` must be in one of them.
fn has(svg: &str, parts: &[&str]) -> Vec<String> {
    let texts = picture::texts(svg);
    for part in parts {
        assert!(texts.iter().any(|text| text.contains(part)), "no {part:?} in {texts:#?}");
    }
    texts
}

fn part(start: u64, len: u64, kind: Kind, name: &str) -> Part {
    Part::new(GuestRange::new(start, len).unwrap(), kind, name)
}

/// A window with mappings at these offsets.
fn window(start: u64, len: u64, name: &str, mappings: impl Iterator<Item = (u64, u64)>) -> Part {
    let mapping = |(offset, len)| {
        let kind = Kind::Mapping(if offset % 3 == 0 { Access::ReadOnly } else { Access::ReadWrite });
        let notes = vec!["read-write".to_owned(), format!("file offset {offset:#x}")];
        Part { notes, ..part(start + offset, len, kind, "mapping") }
    };
    Part { inside: mappings.map(mapping).collect(), ..part(start, len, Kind::Window, name) }
}

/// What `hotslot --print-layout=svg` with these arguments prints.
fn layout(arguments: &[&str]) -> String {
    let mut command = Command::new(built::hotslot());
    let output = child::run(command.arg("--print-layout=svg").args(arguments));
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_layout_of_the_configured_machine() {
    has(&layout(&[]), &["RAM, 512 MiB", "0x000020000000", "ACPI tables", "IOAPIC", "KVM's own pages"]);
    has(&layout(&["-m", "2M"]), &["RAM, 2 MiB"]);
    let two = ["--vhost-user", "a,type=fs,name=one", "--vhost-user", "b,type=blk,name=two"];
    let texts = has(
        &layout(&[&["-m", "8G"], &two[..]].concat()),
        &[
            "RAM, 3 GiB",
            "RAM, 5 GiB",
            "registers of one",
            "registers of two",
            "0x0000d0001000",
            "0x000240000000",
        ],
    );
    assert!(texts.iter().any(|text| text.contains("windows of shared memory regions")));
    let full: Vec<_> = (0..19).map(|number| format!("--vhost-user={number},type=fs")).collect();
    has(&layout(&full.iter().map(String::as_str).collect::<Vec<_>>()), &["registers of 18"]);
    has(&layout(&["-m", "3000T"]), &["RAM, 3 GiB"]);
}

#[test]
fn the_mappings_of_several_windows() {
    let parts = vec![
        // In any order.
        window(5 * GIB, GIB, "share shared memory region 0", [(0, 2 * MIB), (2 * MIB, 4 * KIB)].into_iter()),
        part(0, 512 * MIB, Kind::Ram, "RAM"),
        window(4 * GIB, 64 * MIB, "disk shared memory region 7", [(0, 64 * MIB)].into_iter()),
        window(6 * GIB, 4 * KIB, "empty", std::iter::empty()),
    ];
    let texts = has(
        &draw("Guest physical memory", parts, None),
        &["share shared memory region 0, 1 GiB", "disk shared memory region 7, 64 MiB", "hole, 1046524 KiB"],
    );
    let addresses: Vec<_> = texts.iter().filter(|text| text.starts_with("0x")).collect();
    assert!(addresses.len() > 8 && addresses.is_sorted(), "{addresses:?}");
}

#[test]
fn of_many_mappings_the_first_ones_and_how_many_more() {
    let mappings = (0..200).map(|number| (number * 8 * KIB, 4 * KIB));
    let svg = draw("Memory", vec![window(4 * GIB, GIB, "share", mappings)], None);
    let texts = has(&svg, &["and 176 more"]);
    assert_eq!(texts.iter().filter(|text| text.starts_with("mapping at +")).count(), 24);
    // Nor is the picture without end where there are many windows.
    let crowd = (0..300).map(|number| {
        let mappings = (0..200).map(|number| (number * 4 * KIB, 4 * KIB));
        window((4 + number) * GIB, GIB, &format!("device {number}"), mappings)
    });
    let svg = draw("Memory", crowd.collect(), None);
    has(&svg, &["device 0, 1 GiB", "device 299, 1 GiB", "and 198 more"]);
    assert!(svg.len() < MIB as usize, "{}", svg.len());
}

#[test]
fn names_and_numbers_of_any_kind() {
    let names = ["<&\"'>]]>", "\u{0}\u{1b}[31m\u{202e}", &"x".repeat(300), &"共享内存".repeat(30), ""];
    let parts = names.iter().zip(1..).map(|(name, number)| part(number << 40, 1, Kind::Registers, name));
    let svg = draw(names[0], parts.collect(), Some(1 << 63));
    has(&svg, &["<&\"'>]]>, 1 byte", "\u{fffd}\u{fffd}[31m", "xxx…", "共享内存"]);
    let last = part(u64::MAX - 4095, 4096, Kind::Fixed, "last");
    has(&draw("Memory", vec![last], None), &["last, 4 KiB"]);
    picture::texts(&draw("Nothing", Vec::new(), None));
}
