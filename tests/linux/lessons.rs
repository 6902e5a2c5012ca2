//! The lessons (`src/lessons.md`), with Linux: what they have their guests do, in one guest, to save
//! time. What the tests need no Linux for is in `tests/lessons.rs`.

use std::process::{Command, Stdio};

use hotslot_test_support::built;

use crate::host::{HOTSLOT, in_turn};
use crate::run::run_sh;

const LESSONS: &str = include_str!("../../src/lessons.md");

/// The lines that the lessons have one type, from here on.
fn typed(from: &str) -> impl Iterator<Item = &'static str> {
    let blocks = LESSONS.split("```sh\n").skip(1).filter_map(|block| block.split("```").next());
    let wanted = from.to_owned();
    blocks.flat_map(str::lines).filter(move |line| line.starts_with(&wanted))
}

/// What the guest runs in the lessons with the device of `counter`, one after the other; and what the
/// back-end is told in each.
fn of_the_counter() -> (Vec<&'static str>, Vec<&'static str>) {
    let runs = typed("scripts/run.sh").filter_map(|line| line.split_once("examples/counter {socket}"));
    let parts = runs.filter_map(|(_, rest)| {
        let (offsets, rest) = rest.split_once('\'')?;
        Some((rest.split_once(" -- ")?.1, offsets.trim()))
    });
    parts.unzip()
}

#[test]
fn what_the_lessons_do_in_their_guests() {
    let (mut commands, offsets) = of_the_counter();
    assert_eq!(commands.len(), 5, "{commands:?}");
    // Lesson 1: the first command, and the solution, whose status is the guest's.
    let first = typed("scripts/run.sh -- ").next().unwrap().trim_start_matches("scripts/run.sh -- ");
    let solution = typed("echo 20 22 | ").next().unwrap();
    let (input, solution) =
        solution.strip_prefix("echo ").unwrap().split_once(" | scripts/run.sh -- ").unwrap();
    commands.insert(0, first);
    commands.push(solution);

    let temporary = tempfile::tempdir().unwrap();
    let [trace, numbers] = ["trace", "numbers"].map(|name| temporary.path().join(name));
    std::fs::write(&numbers, format!("{input}\n")).unwrap();
    let back_end = format!("{} {{socket}} {}", built::example("counter").display(), offsets.join(" "));
    let output = in_turn(|| {
        let mut command = run_sh(&temporary);
        command.arg("--trace-vhost-user").arg(&trace);
        command.args(["--backend", &back_end, "--type", "63,name=counter", "--", "sh", "-c"]);
        command.arg(commands.join("\n")).stdin(std::fs::File::open(&numbers).unwrap());
        command.output().unwrap()
    });
    let [out, said] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(42), "{out}{said}");
    assert!(out.lines().next().unwrap().ends_with("amd64"), "{out}");

    let found =
        |name: &str| -> Vec<&str> { out.lines().filter_map(|line| line.strip_prefix(name)).collect() };
    assert_eq!(found("probe counter: ").len(), 6, "{out}{said}");
    // At 0 and at 0x3000. The exercise with the latter has a hole at 0, but here the page is there, too.
    let counts: Vec<u64> = found("count: ").iter().map(|count| count.parse().unwrap()).collect();
    assert!(counts.len() == 15 && counts.is_sorted() && counts[0] < counts[14], "{out}");
    assert_eq!(found("reset: "), ["all ones"]);
    let [before, after] = ["started: ", "started again: "].map(|name| found(name)[0].parse::<u64>().unwrap());
    assert!(before <= after, "{out}");

    // The solutions that look at the trace.
    let printed = Command::new(HOTSLOT).arg("trace").arg(&trace).stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8(printed.stdout).unwrap();
    for error in ["-EEXIST: ", "-EINVAL: ", "-ERANGE: "] {
        assert!(text.contains(&format!(" = {error}")), "{text}");
    }
}
