//! `init lab --script`: a script starts the machine, and what comes over the link is passed on.
//!
//! The machine here is the script itself: it writes the link's frames as bytes.

#![allow(clippy::unwrap_used)] // All of it is tests.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

const DEADLINE: Duration = Duration::from_secs(30);

/// Up; "out" on standard output, "err" on standard error; ended with 7.
const FRAMES: &str = r"printf 'H\0\0\0\0O\3\0\0\0outE\3\0\0\0errX\1\0\0\0\7' >&0";

/// A script, in a directory of its own; at its end it removes `files` there, and ends what it started.
fn script(name: &str, machine: &str) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("script-{name}"));
    let _nothing_was_there = fs::remove_dir_all(&directory);
    fs::create_dir_all(directory.join("files")).unwrap();
    let path = directory.join("script.sh");
    let text = format!("cd {directory:?}\n{machine}\ncat <&1 >/dev/null\nrm -r files\nkill -KILL 0\n");
    fs::write(&path, text).unwrap();
    path
}

fn lab(script: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_init"));
    command.args(["lab", "--timeout", "30", "--script"]).arg(script).args(["--", "command", "word"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.process_group(0).spawn().unwrap()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < end, "not so: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn files(script: &Path) -> PathBuf {
    script.with_file_name("files")
}

#[test]
fn streams_and_status_are_those_of_the_link() {
    let script = script("status", FRAMES);
    let output = lab(&script).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert_eq!(output.stdout, b"out");
    assert_eq!(output.stderr, b"err");
    // The script has done its part when `init lab` ends.
    assert!(!files(&script).exists());
}

#[test]
fn the_command_and_the_input_go_to_the_link() {
    // The command's words are fields of the first frame; then comes the input, with an empty frame at its end.
    let machine = format!(r"(dd bs=1 count=5 >header; head -c 17 >start) 2>log; {FRAMES}");
    let script = script("input", &machine);
    let mut child = lab(&script);
    child.stdin.take().unwrap().write_all(b"in").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(7));
    assert_eq!(fs::read(script.with_file_name("header")).unwrap()[0], b'S');
    assert_eq!(fs::read(script.with_file_name("start")).unwrap(), b"ccommand\0cword\0d/");
}

#[test]
fn a_machine_that_ends_too_early_is_reported_with_its_last_words() {
    let script = script("early", "echo last words; exec </dev/null");
    let output = lab(&script).wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("the guest ended before its command did"), "{said}");
    assert!(said.contains("last words"), "{said}");
}

#[test]
fn nothing_is_left_after_a_signal() {
    for (signal, name) in [(libc::SIGTERM, "term"), (libc::SIGKILL, "kill")] {
        // A process that would never end; its number is the first output.
        let machine = r"sleep 1000 & printf 'H\0\0\0\0O\10\0\0\0%7d\n' $! >&0";
        let script = script(name, machine);
        let mut child = lab(&script);
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let sleeps = format!("/proc/{}/cmdline", line.trim());
        let sleeps = || fs::read_to_string(&sleeps).is_ok_and(|line| line.starts_with("sleep"));
        eventually("it sleeps", sleeps);
        let group = rustix::process::Pid::from_child(&child);
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process_group(group, signal).unwrap();
        child.wait().unwrap();
        eventually("the process is gone", || !sleeps());
        eventually("the files are gone", || !files(&script).exists());
        let mut rest = String::new();
        child.stderr.take().unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
    }
}
