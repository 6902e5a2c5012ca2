//! Pictures: well-formed SVG in which nothing overlaps, whatever is drawn.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::process::{Command, Stdio};

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
fn the_picture_of_the_readme() {
    let readme = include_str!("../README.md");
    assert!(readme.contains("](src/picture/memory.svg)"), "it shows the picture");
    let parts =
        ["RAM, 512 MiB", "registers of share", "share shared memory region 0, 1 GiB", "mapping at +0x200000"];
    has(include_str!("../src/picture/memory.svg"), &parts);
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
    let names = [
        "<&\"'>]]>",
        "\u{0}\u{1b}[31m\u{202e}",
        "\u{fffe}a\u{ffff}",
        &"x".repeat(300),
        &"共享内存".repeat(30),
        "",
    ];
    let parts = names.iter().zip(1..).map(|(name, number)| part(number << 40, 1, Kind::Registers, name));
    let svg = draw(names[0], parts.collect(), Some(1 << 63));
    has(&svg, &["<&\"'>]]>, 1 byte", "\u{fffd}\u{fffd}[31m", "\u{fffd}a\u{fffd}", "xxx…", "共享内存"]);
    let last = part(u64::MAX - 4095, 4096, Kind::Fixed, "last");
    has(&draw("Memory", vec![last], None), &["last, 4 KiB"]);
    picture::texts(&draw("Nothing", Vec::new(), None));
}

/// A trace: lines about a device, each with its time in milliseconds.
#[derive(Default)]
struct Trace(String);

impl Trace {
    fn line(&mut self, ms: u64, device: &str, rest: &str) {
        let (time, took) = (ms * 1_000_000, 5000);
        self.0 += &format!(
            "{{\"time_ns\":{time},\"took_ns\":{took},\"thread\":\"vhost-{device}\",\"device\":\"{device}\",{rest}}}\n"
        );
    }

    fn event(&mut self, ms: u64, device: &str, event: &str, rest: &str) {
        self.line(ms, device, &format!(r#""kind":"event","event":"{event}"{rest}"#));
    }

    /// SHMEM_MAP, or UNMAP without flags, for pages of region 0; refused with a reason.
    fn map(&mut self, ms: u64, device: &str, pages: (u64, u64), flags: Option<u64>, refused: Option<&str>) {
        let (name, id) = if flags.is_some() { ("MAP", 9) } else { ("UNMAP", 10) };
        let result = match refused {
            None => r#""result":"done","answer":{"value":0}"#.to_owned(),
            Some(why) => format!(
                r#""result":"refused","answer":{{"value":18446744073709551599}},"errno":"EEXIST","reason":"{why}""#
            ),
        };
        let [start, len] = [pages.0 * 4096, pages.1 * 4096];
        let rest = format!(
            r#""kind":"message","channel":"backend","direction":"from-backend","name":"BACKEND_SHMEM_{name}","id":{id},"needs_reply":true,"fields":{{"shmid":0,"fd_offset":8192,"shm_offset":{start},"len":{len},"flags":{flags}}},{result}"#,
            flags = flags.unwrap_or(0)
        );
        self.line(ms, device, &rest);
    }

    /// What `hotslot trace` makes of it.
    fn drawn(&self, options: &[&str]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &self.0).unwrap();
        // A pipe has no room for a long picture.
        let drawn = tempfile::NamedTempFile::new().unwrap();
        let mut command = Command::new(built::hotslot());
        command.arg("trace").arg(file.path()).args(options).stdout(drawn.reopen().unwrap());
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        assert_eq!(child::wait(&mut child).code(), Some(0));
        std::fs::read_to_string(drawn.path()).unwrap()
    }
}

/// Two devices: a start, mappings, refusals, noise, a death and a return, a reset.
fn story() -> Trace {
    let mut trace = Trace::default();
    trace.event(
        0,
        "share",
        "region",
        r#","fields":{"shmid":0,"guest_address":4294967296,"size":1073741824}"#,
    );
    trace.line(
        100,
        "disk",
        r#""kind":"register","access":"write","register":"Status","offset":112,"width":4,"value":15"#,
    );
    trace.line(
        200,
        "disk",
        r#""kind":"message","channel":"main","direction":"to-backend","name":"SET_STATUS","id":39,"needs_reply":true,"fields":{"status":15},"result":"done","answer":{"value":0}"#,
    );
    trace.map(1000, "share", (0, 512), Some(1), None);
    trace.map(1200, "share", (1, 1), Some(0), Some("0x1000 bytes from 0x1000 on overlap the mapping at 0x0"));
    trace.map(1500, "share", (131_072, 512), Some(0), None);
    trace.map(2000, "share", (0, 512), None, None);
    trace.event(2500, "disk", "gone", r#","fields":{"deadline_seconds":60},"reason":"the back-end hung up""#);
    trace.event(2600, "disk", "back", "");
    trace.line(
        2800,
        "disk",
        r#""kind":"noise","channel":"backend","direction":"from-backend","bytes":"0a0b","reason":"version 2""#,
    );
    trace.event(3000, "share", "reset", r#","fields":{"unmapped":1}"#);
    trace.event(3500, "disk", "", "");
    trace.line(4000, "disk", r#""kind":"left-out","count":7"#);
    trace
}

#[test]
fn a_trace_as_a_sequence_diagram() {
    let svg = story().drawn(&["--sequence", "svg"]);
    let texts = has(
        &svg,
        &[
            "1: the back-end of share",
            "2: the back-end of disk",
            "disk: Status = 0xf",
            "SET_STATUS(status=0xf",
            "refused: -EEXIST: 0x1000 bytes from 0x1000",
            "no message (0a0b): version 2",
            "gone (deadline_seconds=60): the back-end hung up",
            "7 records are missing",
            "1.200005",
        ],
    );
    // What was refused has a mark, whatever its colour.
    assert_eq!(texts.iter().filter(|text| text.starts_with("refused")).count(), 1);
    assert_eq!(svg.matches("l10 10m0 -10l-10 10").count(), 4, "refused, gone, noise, left out");

    let mut crowd = Trace::default();
    for number in 0..19 {
        crowd.map(number, &format!("device{number}"), (0, 1), Some(1), Some(&"a long reason ".repeat(40)));
    }
    has(&crowd.drawn(&["--sequence", "svg"]), &["19: the back-end of device18", "…"]);
}

#[test]
fn a_trace_as_a_time_line_of_mappings() {
    let svg = story().drawn(&["--timeline"]);
    has(
        &svg,
        &[
            "share, region 0: 1 GiB at 0x100000000",
            "+0x0",
            "+0x20000000",
            "rw, file +0x2000",
            "× 1.200005 BACKEND_SHMEM_MAP(",
            "¦ 3.000005 reset (unmapped=1)",
            "4.000005",
        ],
    );
    // 4 s are 634 pixels. A mapping lives from its MAP to its UNMAP or to the reset.
    let [[left, top, right, bottom]] = picture::boxes(&svg, "rw")[..] else { panic!("{svg}") };
    assert_eq!(((left - 150.0) / 634.0 * 4.0).round(), 1.0);
    assert_eq!(((right - 150.0) / 634.0 * 4.0).round(), 2.0);
    let [[left, other, right, _]] = picture::boxes(&svg, "ro")[..] else { panic!("{svg}") };
    assert_eq!(((left - 150.0) / 634.0 * 40.0).round(), 15.0);
    assert_eq!(((right - 150.0) / 634.0 * 4.0).round(), 3.0);
    assert!(top < bottom && bottom < other, "the larger offset is below");
    has(&Trace(story().0.replace("SHMEM", "SHAPE")).drawn(&["--timeline"]), &["nothing was mapped"]);
}

#[test]
fn a_long_trace_is_drawn_in_part() {
    let mut trace = Trace::default();
    for number in 0..5_000 {
        trace.map(number * 2, "share", (number % 100 * 2, 1), Some(1), None);
        trace.map(number * 2 + 1, "share", (number % 100 * 2, 1), None, None);
    }
    let whole = trace.drawn(&["--sequence", "svg"]);
    has(&whole, &["9400 more records are left out: --from 0.600000 shows the next ones."]);
    let part = trace.drawn(&["--sequence", "svg", "--from", "0.6", "--to", "0.6095"]);
    let texts = has(&part, &["0.600000", "0.609000"]);
    assert_eq!(texts.iter().filter(|text| text.starts_with("BACKEND_SHMEM_")).count(), 10);
    let timeline = trace.drawn(&["--timeline"]);
    has(&timeline, &["mappings that reach beyond +0x28000 are left out"]);
    for svg in [whole, timeline] {
        assert!(svg.len() < 2 * MIB as usize, "{}", svg.len());
    }
}

#[test]
fn further_devices_than_a_machine_can_have_share_a_life_line() {
    let mut trace = Trace::default();
    for number in 1..=500 {
        trace.event(number, &format!("device{number}"), "connected", "");
        trace.map(number, &format!("device{number}"), (0, 1), Some(1), None);
    }
    let parts =
        ["1: the back-end of device1", "19: the back-end of device19", "19: the back-end of device300"];
    has(&trace.drawn(&["--sequence", "svg"]), &parts);
}

#[test]
fn a_request_ends_each_mapping_that_it_overlaps() {
    let mut trace = Trace::default();
    for number in 0..4 {
        trace.map(0, "share", (number * 2, 1), Some(1), None);
    }
    trace.map(10, "share", (2, 4), None, None);
    trace.map(20, "share", (20, 1), Some(0), None);
    // Pages 2 and 4 end half way, pages 0, 6 and 20 do not.
    let svg = trace.drawn(&["--timeline"]);
    let widths = svg.lines().filter(|line| line.contains("class=\"rw\"")).map(|line| {
        let (_, width) = line.split_once(" width=\"").unwrap();
        width.split_once('"').unwrap().0.parse::<u32>().unwrap()
    });
    let mut widths: Vec<_> = widths.collect();
    widths.sort_unstable();
    assert_eq!(widths.len(), 4, "{svg}");
    assert!(widths[0] == widths[1] && widths[1] < widths[2] && widths[2] == widths[3], "{widths:?}");
}

#[test]
fn a_part_of_a_trace_that_is_not_there_is_a_sentence() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), story().0).unwrap();
    for (options, sentence) in [
        (
            &["--timeline", "--from", "5"][..],
            "no record in the times of --from and --to: it goes from 0.000000 s to 4.0",
        ),
        (&["--timeline", "--sequence", "svg"], "cannot be used with"),
        (&["--from", "soon"], "it is a number of seconds, as in 1.5"),
        (&["--to", "-1"], "it is a number of seconds, as in 1.5"),
        (&["--sequence", "png"], "svg, mermaid"),
    ] {
        let output = child::run(Command::new(built::hotslot()).arg("trace").arg(file.path()).args(options));
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {said}");
        assert!(said.contains(sentence), "{options:?}: {said}");
    }
}
