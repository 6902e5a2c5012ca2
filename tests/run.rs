//! `scripts/run.sh`: what it refuses, and that it does so before anything is built; what its help describes.

#![allow(clippy::unwrap_used)] // All of it is tests.

use std::collections::BTreeSet;
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

/// The words of a text that are options.
fn options(text: &str) -> BTreeSet<&str> {
    let words = text.split(|character: char| !(character.is_ascii_lowercase() || character == '-'));
    words.filter(|word| word.starts_with('-') && !word.trim_start_matches('-').is_empty()).collect()
}

#[test]
fn the_help_describes_each_option_and_no_other() {
    let script = format!("{PROJECT}/scripts/run.sh");
    let output = child::run(Command::new("/bin/bash").args([&script, "--help"]));
    let help = String::from_utf8(output.stdout).unwrap();
    let list = help.split("\n\n").find(|paragraph| paragraph.starts_with("  --kernel")).unwrap();
    let described = options(list);

    let script = fs::read_to_string(script).unwrap();
    let (_, parse) = script.split_once("\nparse() {").unwrap();
    let (parse, _) = parse.split_once("\n}").unwrap();
    let patterns = parse.lines().filter_map(|line| line.trim().split_once(')')).map(|(pattern, _)| pattern);
    let parsed: BTreeSet<_> = patterns.filter(|text| text.starts_with('-')).flat_map(options).collect();
    assert_eq!(described, parsed);
    for option in described.into_iter().filter(|option| !["-h", "--help"].contains(option)) {
        let (_, said) = run_sh(&[option]);
        assert!(!said.contains("there is no such option"), "{option}: {said}");
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
