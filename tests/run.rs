//! `scripts/run.sh`: what it refuses, and that it does so before anything is built.

#![allow(clippy::unwrap_used)] // All of it is tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use hotslot_test_support::child;

const PROJECT: &str = env!("CARGO_MANIFEST_DIR");

/// Runs it with a cargo that builds nothing, which it needs for everything that it does not refuse.
fn run_sh(arguments: &[&str]) -> (Option<i32>, String) {
    let programs = tempfile::tempdir().unwrap();
    let cargo = programs.path().join("cargo");
    fs::write(&cargo, "#!/bin/sh\necho no cargo >&2\nexit 1\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("/bin/bash");
    command.arg(format!("{PROJECT}/scripts/run.sh")).args(arguments);
    command.env_clear().env("PATH", format!("{}:/usr/bin:/bin", programs.path().display()));
    let output = child::run(&mut command);
    assert!(output.stdout.is_empty() || arguments.contains(&"--help"), "{arguments:?}: {output:?}");
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn wrong_options_are_refused_by_their_names() {
    let readme = format!("{PROJECT}/README.md");
    for (arguments, sentence) in [
        (&["--shel"][..], "--shel: there is no such option"),
        (&["--cpus", "2", "-x", "--", "true"], "-x: there is no such option"),
        (&["--cpus", "x"], "--cpus x: this is not a number of processors"),
        (&["--cpus=0"], "--cpus 0: this is not a number of processors"),
        (&["--shell", "--cpus"], "--cpus needs a value"),
        (&["-m", "lots"], "-m lots: this is not a size"),
        (&["--share", "/nonexistent"], "--share /nonexistent: this is not a directory"),
        (&["--shell", "--share", "/"], "--shell and --share: both want /mnt"),
        (&["--kernel", &readme], "README.md: this is neither a bzImage nor an ELF file"),
        (&["--kernel", "/nonexistent"], "--kernel /nonexistent: there is no such file"),
        (&["--modules", "/"], "--modules /: they belong to a --kernel"),
        (&["--disk", "/nonexistent"], "--disk /nonexistent: this is not a file"),
        (&["--backend", "program"], "{socket} is missing"),
        (&["--backend", "program {socket}", "true"], "its --type is missing"),
        (&["--type", "blk"], "there is no --backend before it"),
        (&["--memory-picture"], "--memory-picture needs a value"),
        (&["--memory-picture", "/dev/null"], "--memory-picture /dev/null: this is not a regular file"),
        (&["--memory-picture", "/no/where/a.svg"], "a.svg: this file cannot be written"),
        (&["--tty"], "--tty: there is no COMMAND"),
        (&["--tty", "true"], "--tty: standard input is no terminal"),
    ] {
        let (status, said) = run_sh(arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {said}");
        assert!(said.starts_with("run.sh: ") && said.contains(sentence), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
}

#[test]
fn what_is_right_comes_to_the_build() {
    for arguments in [
        &[][..],
        &["--shell", "--cpus", "2", "-m", "1G", "-v"],
        &["--share", "/", "--no-dax"],
        &["-m1G", "--cpus=2", "-vv", "--", "--help"],
        &["true", "--shel"],
        &["--backend", "program {socket}", "--type", "blk,name=disk", "true"],
    ] {
        let (status, said) = run_sh(arguments);
        assert_eq!((status, said.contains("no cargo")), (Some(1), true), "{arguments:?}: {said}");
    }
}
