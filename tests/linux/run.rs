//! `scripts/run.sh` with a COMMAND, as a script and its caller see it.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::host::{HOTSLOT, PROJECT, in_turn};

/// How long a guest may take, with its host, beside another one.
const SECONDS: &str = "580";

/// How long the last of its processes may take to end, and to remove its files.
const END_TIME: Duration = Duration::from_secs(30);

/// `run.sh`, whose temporary files go to `temporary`.
pub fn run_sh(temporary: &TempDir) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--foreground", SECONDS, &format!("{PROJECT}/scripts/run.sh")]);
    command.env("HOTSLOT_PROGRAMS", Path::new(HOTSLOT).parent().unwrap()).env("TMPDIR", temporary.path());
    command.env_remove("KERNEL").env_remove("MODULES");
    command
}

/// Processes with that directory for their temporary files.
fn processes(temporary: &TempDir) -> Vec<String> {
    let variable = format!("TMPDIR={}", temporary.path().display());
    let all = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let ours = all.filter(|process| {
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        environment.split(|byte| *byte == 0).any(|one| one == variable.as_bytes())
    });
    ours.map(|process| fs::read_to_string(process.join("cmdline")).unwrap_or_default()).collect()
}

fn assert_nothing_is_left(temporary: &TempDir) {
    let end = Instant::now() + END_TIME;
    loop {
        let files: Vec<_> = fs::read_dir(temporary.path()).unwrap().flatten().collect();
        let processes = processes(temporary);
        if files.is_empty() && processes.is_empty() {
            return;
        }
        assert!(Instant::now() < end, "left: {files:?}, {processes:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_command_has_the_streams_and_the_status() {
    let [temporary, share, files] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let input = share.path().join("input");
    fs::write(&input, crate::input()).unwrap();
    let [image, log] = ["image", "log"].map(|name| files.path().join(name));
    let mut packed = Command::new(format!("{PROJECT}/scripts/image.sh"));
    packed.args(["--bare", "--file", &format!("{}:/input", input.display()), "-o"]).arg(&image);
    assert!(packed.status().unwrap().success());
    let output = in_turn(|| {
        run_sh(&temporary)
            .args(["--cpus=1", "-c", "some=word", "--log", "info", "--log-file"])
            .arg(&log)
            .arg("-i")
            .arg(&image)
            .arg("--share")
            .arg(share.path())
            .args(["sh", "-c", "cat; echo err >&2; sha256sum /input >sum; cat /proc/cmdline >words; exit 7"])
            .stdin(fs::File::open(&input).unwrap())
            .output()
            .unwrap()
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(output.stdout == crate::input(), "{} bytes came back", output.stdout.len());
    assert_eq!(said, "err\n");
    let sum = fs::read_to_string(share.path().join("sum")).unwrap();
    assert_eq!(
        sum.split(' ').next(),
        crate::host::stdout("sha256sum", &[input.to_str().unwrap()]).split(' ').next()
    );
    let words = fs::read_to_string(share.path().join("words")).unwrap();
    assert!(words.split_whitespace().any(|word| word == "some=word"), "{words}");
    assert!(fs::read_to_string(&log).unwrap().contains("hotslot"), "it is brought back");
    assert_nothing_is_left(&temporary);
}

#[test]
fn a_machine_that_hotslot_refuses_ends_with_its_reason() {
    // Refused at once, before a back-end has a front-end.
    for (options, reason) in
        [(["-m", "16M"], "give the guest more memory"), (["--log", "foo=bar"], "foo=bar")]
    {
        let temporary = tempfile::tempdir().unwrap();
        let output = in_turn(|| {
            run_sh(&temporary).args(options).args(["--", "true"]).stdin(Stdio::null()).output().unwrap()
        });
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{said}");
        assert!(said.contains(reason), "{said}");
        assert_nothing_is_left(&temporary);
    }
}

#[test]
fn this_machines_root_is_the_guests_and_stays_as_it_was() {
    let (temporary, here) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::write(here.path().join("given"), "given\n").unwrap();
    let line = "cat given; echo changed >given; cat given; echo $(</proc/1/comm); stat -f -c %T /proc /sys /";
    let output = in_turn(|| {
        // A shell of this machine's, not busybox.
        let mut command = run_sh(&temporary);
        command.args(["--root", "--", "bash", "-c", line]).current_dir(here.path());
        command.stdin(Stdio::null()).output().unwrap()
    });
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(out, "given\nchanged\ninit\nproc\nsysfs\noverlayfs\n", "{said}");
    assert_eq!(fs::read(here.path().join("given")).unwrap(), b"given\n");
    assert_nothing_is_left(&temporary);
}

#[test]
fn a_command_that_is_killed_leaves_nothing_behind() {
    let temporary = tempfile::tempdir().unwrap();
    in_turn(|| {
        let mut command = run_sh(&temporary);
        command.args(["--", "sh", "-c", "echo up; exec sleep 1000"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "up\n");
        assert!(!processes(&temporary).is_empty());
        let group = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process_group(group, rustix::process::Signal::KILL).unwrap();
        child.wait().unwrap();
    });
    assert_nothing_is_left(&temporary);
}
