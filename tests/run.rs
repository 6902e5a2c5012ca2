//! `scripts/run.sh`: what it refuses, and that it does so before anything is built; what its help describes.
//! What the other scripts refuse. What becomes of run.sh's back-ends that end too early.

#![allow(clippy::unwrap_used)] // All of it is tests.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use hotslot_test_support::child;

const PROJECT: &str = env!("CARGO_MANIFEST_DIR");
const BACKEND: &str = env!("CARGO_BIN_EXE_hotslot-backend");

/// Runs a script with a cargo that builds nothing, which it needs for everything that it does not refuse.
fn run(name: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let programs = tempfile::tempdir().unwrap();
    let cargo = programs.path().join("cargo");
    fs::write(&cargo, "#!/bin/sh\necho no cargo >&2\nexit 1\n").unwrap();
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("/bin/bash");
    command.arg(format!("{PROJECT}/scripts/{name}")).args(arguments);
    command.env_clear().env("PATH", format!("{}:/usr/bin:/bin", programs.path().display()));
    if name == "bench.sh" {
        command.env("HOTSLOT_PROGRAMS", "/nonexistent");
    }
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
        (&["--shell", "--share", "/"], "--shell and --share: both take /mnt"),
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
        (&["--dump", "/no/where/core"], "--dump /no/where/core: this file cannot be written"),
        (&["--log-file", "/dev/null"], "--log-file /dev/null: this is not a regular file"),
        (&["-i", "/nonexistent", "true"], "-i /nonexistent: there is no such file"),
        (&["-c", &"y".repeat(70_000), "true"], "-c: 70000 bytes, and the kernel takes 2047"),
        (&["--tty"], "--tty: there is no COMMAND"),
        (&["--tty", "true"], "--tty: standard input is no terminal"),
    ] {
        let (status, said) = run("run.sh", arguments);
        assert_eq!(status, Some(2), "{arguments:?}: {said}");
        assert!(said.starts_with("run.sh: ") && said.contains(sentence), "{arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    }
}

#[test]
fn the_other_scripts_refuse_in_one_line_too() {
    let not_whole = "needs a whole number";
    let readme = format!("{PROJECT}/README.md");
    for (name, arguments, sentence) in [
        ("bench.sh", &["nothing"][..], "nothing: not understood"),
        ("bench.sh", &["--runs"], not_whole),
        ("bench.sh", &["--runs", "0", "boot"], not_whole),
        ("bench.sh", &["--keep"], "--keep needs a directory"),
        ("bench.sh", &["--keep", &readme, "size"], "README.md: this is no directory"),
        ("bench.sh", &["--hotslot", "other=/", "size"], "--hotslot other=/: this is not NAME=PATH"),
        ("bench.sh", &["--beside", "/bin/sh"], "--beside /bin/sh: this is not NAME=PATH"),
        ("bench.sh", &["many", "5", "6"], "many 5 6: how many machines"),
        ("bench.sh", &["--nothing"], "--nothing: not understood"),
        ("debian.sh", &["--programs"], "--programs needs a list"),
        ("debian.sh", &["--programs", ""], "--programs needs a list"),
        ("debian.sh", &["ext2"], "ext2: no such configuration"),
        ("doctor.sh", &["--nothing"], "--nothing: unknown option"),
        ("doctor.sh", &["", "more"], "more: not understood"),
        ("fuzz.sh", &["--seconds", "0"], not_whole),
        ("fuzz.sh", &["--sanitizer", "thread"], "--sanitizer takes address or none"),
        ("fuzz.sh", &["nothing"], "nothing: there is no such target"),
        ("image.sh", &["--nothing"], "--nothing: unknown option"),
        ("image.sh", &["-o"], "-o needs a value"),
        ("image.sh", &["--bare"], "no -o FILE"),
        ("interop.sh", &["--kills", "x"], not_whole),
        ("interop.sh", &["--cpus"], not_whole),
        ("interop.sh", &["--kills", "2", "rng"], "--kills needs --reconnect SECONDS"),
        ("interop.sh", &["nothing"], "nothing: no such back-end"),
        ("kernel.sh", &["--nothing"], "--nothing: unknown option"),
        ("kills.sh", &["--count", "-1"], not_whole),
        ("suites.sh", &["--seconds", ""], not_whole),
        ("suites.sh", &["--config", "dax"], "dax: pjdfstest has no such configuration"),
        ("suites.sh", &["--config", "dax-user", "fsx"], "dax-user: fsx has no such configuration"),
        ("suites.sh", &["nothing"], "nothing: there is no such suite"),
        ("test.sh", &["slow"], "slow: not understood"),
        ("test.sh", &["quick", "long"], "long: not understood behind quick"),
    ] {
        let (status, said) = run(name, arguments);
        assert_eq!(status, Some(2), "{name} {arguments:?}: {said}");
        assert!(said.starts_with(name) && said.contains(sentence), "{name} {arguments:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{name} {arguments:?}: {said}");
    }
    // That is no wrong command line.
    let (status, said) = run("bench.sh", &["size"]);
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("HOTSLOT_PROGRAMS=/nonexistent: there is no program hotslot"), "{said}");
    // Its own failures must differ from the command's exit statuses.
    for (arguments, sentence) in [
        (&["--nothing"][..], "--nothing: unknown option"),
        (&["--memory"], "--memory needs a value"),
        (&["--share", "/nonexistent", "--", "true"], "--share /nonexistent: this is not a directory"),
        (&["--tty"], "there is no COMMAND"),
        (&["--memory", "1q"], "--memory 1q: this is not a size"),
        (&["--memory", "1.5G"], "--memory 1.5G: this is not a size"),
        (&["--memory", "0"], "--memory 0: this is not a size"),
        (&["--timeout", "abc"], not_whole),
        (&["--env", "NAME"], "--env NAME: this is not NAME=VALUE"),
        (&["--env", "=value"], "--env =value: this is not NAME=VALUE"),
        (&["--append", "one\ntwo"], "--append: the kernel's command line is one line"),
        (&["--file", "/no/where"], "--file /no/where: there is no such file"),
        (&["--exec", "/no/where"], "--exec /no/where: there is no such file"),
    ] {
        let (status, said) = run("lab.sh", arguments);
        assert_eq!(status, Some(125), "{arguments:?}: {said}");
        assert!(said.starts_with("lab.sh: ") && said.contains(sentence), "{arguments:?}: {said}");
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
        let (_, said) = run("run.sh", &[option]);
        assert!(!said.contains("there is no such option"), "{option}: {said}");
    }
}

#[test]
fn what_is_right_comes_to_the_build() {
    for arguments in [
        &[][..],
        &["--shell", "--cpus", "2", "-m", "1G", "-v"],
        &["--share", "/", "--no-dax"],
        &["-m1g", "--cpus=2", "-vv", "--", "--help"],
        &["true", "--shel"],
        &["--backend", "program {socket}", "--type", "blk,name=disk", "true"],
    ] {
        let (status, said) = run("run.sh", arguments);
        assert_eq!((status, said.contains("no cargo")), (Some(1), true), "{arguments:?}: {said}");
    }
}

#[test]
fn what_the_emulated_host_cannot_reach_is_refused_there() {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap();
    let virtualises = processor.split_whitespace().any(|flag| ["vmx", "svm"].contains(&flag));
    let opens = fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    for option in ["--gdb", "--vhost-user"] {
        let (status, said) = run("run.sh", &[option, "unix:socket", "true"]);
        let expected =
            if virtualises && opens { (1, "no cargo") } else { (2, "its sockets are this machine's") };
        assert_eq!((status, said.contains(expected.1)), (Some(expected.0), true), "{option}: {said}");
    }
}

/// A hotslot that says how it was started, and which sockets are there.
const HOTSLOT: &str = r#"#!/bin/sh
echo "ran $*"
for word; do
    case $word in *,type=*) [ -S "${word%%,*}" ] && echo "has ${word#*,}" ;; esac
done
"#;

/// `run/host.sh` with these lines of back-ends.
fn host(devices: &str) -> (Option<i32>, String) {
    let programs = tempfile::tempdir().unwrap();
    let hotslot = programs.path().join("hotslot");
    fs::write(&hotslot, HOTSLOT).unwrap();
    fs::set_permissions(&hotslot, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new("/bin/sh");
    command.arg(format!("{PROJECT}/scripts/run/host.sh")).env("TMPDIR", programs.path());
    command
        .env("HOTSLOT", hotslot)
        .env("JOB", "console")
        .env("DEVICES", devices)
        .env("CMDLINE", "of the user");
    for name in ["BACKEND", "KERNEL", "GUEST", "SETUP"] {
        command.env(name, "none");
    }
    let output = child::run(&mut command);
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

#[test]
fn a_back_end_that_ends_before_it_listens_ends_all() {
    let files = tempfile::tempdir().unwrap();
    let (empty, full) = (files.path().join("empty"), files.path().join("full"));
    fs::write(&empty, "").unwrap();
    fs::write(&full, [0; 512]).unwrap();
    let disk = |path: &Path| format!("'{BACKEND}' blk --once --socket {{socket}} --file {}", path.display());
    let first = format!("type=blk,name=first {}\n", disk(&full));
    for (line, reason) in [
        (disk(&empty), "has 0 bytes"),
        ("nothing {socket}".to_owned(), "not found"),
        ("true {socket}".to_owned(), "true {socket}"),
    ] {
        let (ended, said) = host(&format!("{first}type=blk,name=second {line}"));
        assert_eq!(ended, Some(1), "{said}");
        assert!(said.contains(reason) && !said.contains("ran "), "{said}");
        let last = format!("run.sh: a back-end ended before it listened: {line}\n");
        assert!(said.contains(&last), "{said}");
    }

    // One that takes its time is waited for.
    let (ended, said) = host(&format!("type=blk,name=slow sh -c \"sleep 0.2; exec {}\"", disk(&full)));
    assert_eq!(ended, Some(0), "{said}");
    assert!(said.contains("has type=blk,name=slow\n"), "{said}");
    // hotslot takes these options once, and the user may have given them.
    assert!(said.contains("-c quiet of the user -- sh /etc/hotslot/run/guest.sh"), "{said}");
    assert!(!said.contains("--connect-timeout"), "{said}");
}
