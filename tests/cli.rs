//! What a user sees of a wrong command line or of files that cannot be booted: one sentence that names the
//! thing and the number, a hint where there is one, status 2, and nothing left behind.

// clippy.toml allows these in tests; it does not know the helpers of a file like this one as such.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use hotslot_test_support::{built, child};
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;

/// What hotslot said, and its exit status.
struct Answer {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

fn hotslot(arguments: &[&str], directory: &Path) -> Answer {
    run(Command::new(built::hotslot()).args(arguments).current_dir(directory))
}

fn run(command: &mut Command) -> Answer {
    let output = child::run(command);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    Answer { status: output.status.code(), stdout, stderr }
}

/// Runs hotslot with what must be refused. `parts` have to be in what it says, `hint` after "hint: ".
fn refused(arguments: &[&str], directory: &Path, parts: &[&str], hint: Option<&str>) {
    let before = names(directory);
    let answer = hotslot(arguments, directory);
    let said = &answer.stderr;
    assert_eq!(answer.status, Some(2), "{arguments:?}: {said}");
    assert_eq!(answer.stdout, "", "{arguments:?}");
    assert!(said.starts_with("error: "), "{arguments:?}: {said}");
    for part in parts {
        assert!(said.contains(part), "{arguments:?} lacks {part:?}: {said}");
    }
    assert_eq!(names(directory), before, "{arguments:?} left something behind");
    let given = said.lines().find_map(|line| line.strip_prefix("hint: "));
    match hint {
        Some(hint) => assert!(given.is_some_and(|given| given.contains(hint)), "{arguments:?}: {said}"),
        None => assert_eq!(given, None, "{arguments:?}"),
    }
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An ELF file for x86-64 with one segment of `filesz` bytes (all of them there) at 2 MiB, where it takes
/// `memsz` bytes. Its code is `hlt` and `jmp` back to it.
fn elf(filesz: usize, memsz: u64) -> Vec<u8> {
    let start = 2_u64 << 20;
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    bytes.extend([start, 64, 0].iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend([0, 0, 64, 56, 1, 0, 0, 0_u16].iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let fields = [120, start, start, filesz as u64, memsz, 4096];
    bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend([0xf4, 0xeb, 0xfd]);
    bytes.resize(120 + filesz, 0x90);
    bytes
}

/// A directory with kernels good and bad.
fn files() -> TempDir {
    let directory = TempDir::new().unwrap();
    let good = elf(4096, 1 << 20);
    let mut arm = good.clone();
    arm[18] = 183;
    let mut compressed = vec![0x1f, 0x8b];
    compressed.resize(4096, 7);
    let mut old = vec![0; 1024];
    old[0x202..0x208].copy_from_slice(b"HdrS\x02\x02");
    let mut cut = vec![0; 2048];
    cut[0x1f1] = 1;
    cut[0x1f4..0x1f6].copy_from_slice(&[0, 1]);
    cut[0x202..0x208].copy_from_slice(b"HdrS\x0f\x02");
    cut[0x236] = 1;
    for (name, bytes) in [
        ("good", &good[..]),
        ("empty", &[]),
        ("text", b"This is a text file, and not a kernel.\n"),
        ("arm", &arm),
        ("cut", &good[..2000]),
        ("cut-header", &good[..40]),
        ("gzip", &compressed),
        ("old-bzimage", &old),
        ("cut-bzimage", &cut),
        ("initramfs", &[0; 4 << 20]),
    ] {
        let mut file = std::fs::File::create(directory.path().join(name)).unwrap();
        file.write_all(bytes).unwrap();
    }
    directory
}

#[test]
fn kernels_that_cannot_be_booted() {
    let files = files();
    let here = files.path();
    let cases: [(&str, &[&str], Option<&str>); 11] = [
        ("missing", &["cannot open the kernel missing: No such file"], None),
        (".", &["the kernel . is not a regular file"], None),
        ("/dev/null", &["the kernel /dev/null is not a regular file"], None),
        ("empty", &["the kernel empty is empty"], None),
        ("text", &["the kernel text is neither an ELF vmlinux nor a bzImage"], Some("bzImage")),
        ("gzip", &["neither an ELF vmlinux nor a bzImage"], Some("gzip")),
        ("arm", &["the kernel arm is an ELF file for 64-bit Arm", "machine 183"], None),
        ("cut", &["the kernel cut is truncated", "2000 bytes", "4216"], None),
        ("cut-header", &["truncated", "40 bytes", "64"], None),
        ("old-bzimage", &["no 64-bit entry point", "2.2"], None),
        ("cut-bzimage", &["truncated", "2048 bytes", "5120"], None),
    ];
    for (kernel, parts, hint) in cases {
        refused(&["-k", kernel], here, parts, hint);
    }
}

#[test]
fn what_does_not_fit_into_memory() {
    let files = files();
    let here = files.path();
    let with = |more: &[&'static str]| [&["-k", "good"], more].concat();
    refused(&with(&["-m", "2M"]), here, &["the kernel good needs", "0x300000", "0x200000"], Some("--memory"));
    refused(
        &with(&["-m", "4M", "-i", "initramfs"]),
        here,
        &["the initramfs initramfs has 4194304 bytes", "only 1048576 bytes"],
        Some("--memory"),
    );
    refused(&with(&["-i", "nowhere"]), here, &["cannot open the initramfs nowhere"], None);
    refused(&with(&["-i", "empty"]), here, &["the initramfs empty is empty"], None);
    let long = "x".repeat(3000);
    refused(
        &["-k", "good", "-c", &long],
        here,
        &["command line has 30", "at most 2047"],
        Some("--no-default-cmdline"),
    );
}

#[test]
fn impossible_memory() {
    let files = files();
    let here = files.path();
    let with = |size: &'static str| ["-k", "good", "-m", size];
    refused(&with("0"), here, &["0 bytes of guest memory are too few"], Some("128M"));
    refused(&with("1000001"), here, &["1000001 bytes", "too few"], Some("128M"));
    refused(&with("134217729"), here, &["134217729", "4096"], Some("134217728 and 134221824"));
    refused(&with("4096T"), here, &["4503599627370496 bytes", "more than the"], None);
    refused(&with("99999999999T"), here, &["--memory", "99999999999T"], None);
    refused(&with("lots"), here, &["--memory", "lots"], None);
    refused(&with("-5"), here, &["--memory", "-5"], None);
}

#[test]
fn impossible_processors() {
    let files = files();
    let here = files.path();
    refused(&["-k", "good", "--cpus", "0"], here, &["--cpus", "a number, at least 1"], None);
    refused(&["-k", "good", "--cpus", "many"], here, &["--cpus", "many"], None);
    refused(&["-k", "good", "--cpus", "255"], here, &["255 vCPUs", "254"], None);
}

#[test]
fn impossible_devices() {
    let files = files();
    let here = files.path();
    for (device, part) in [
        ("", "no socket path"),
        ("type=fs", "no socket path"),
        ("a.sock", "no type for the device at a.sock"),
        ("a.sock,type=disk", "`disk`"),
        ("a.sock,type=fs,colour=red", "unknown key `colour`"),
        ("a.sock,type=fs,queues=none", "`none`"),
        ("a.sock,pmem", "`pmem` is a device type: say type=pmem"),
        ("a.sock,type=fs,reconnect=0", "`0` is not a good reconnect"),
        ("a.sock,type=fs,name=a\u{7f}", "1 to 64 characters for messages, without control characters"),
    ] {
        refused(&["-k", "good", "--vhost-user", device], here, &["--vhost-user", part], None);
    }
    let mut crowd = vec!["-k", "good"];
    crowd.extend(["--vhost-user", "a.sock,type=fs"].repeat(20));
    refused(&crowd, here, &["20 devices are more than the 19", "interrupt"], None);
    let twice =
        ["-k", "good", "--vhost-user", "a.sock,type=fs,name=one", "--vhost-user", "a.sock,type=blk,name=two"];
    refused(&twice, here, &["devices one and two have the same socket, a.sock"], None);
}

#[test]
fn wrong_usage() {
    let files = files();
    let here = files.path();
    refused(&[], here, &["--kernel"], None);
    refused(&["-k", "good", "--sandbox", "maybe"], here, &["--sandbox", "on, log, off"], None);
    refused(&["-k", "good", "--serial", "pty"], here, &["`pty`", "file=PATH"], None);
    refused(&["-k", "good", "--connect-timeout", "1h"], here, &["`1h`"], None);
    refused(&["-k", "good", "-v", "--log", "debug"], here, &["--log"], None);
    refused(&["-k", "good", "--log", "foo=bar"], here, &["`foo=bar`", "LEVEL is off, error"], None);
    refused(&["-k", "good", "--log", "info,loud"], here, &["`loud`"], None);
    refused(&["trace"], here, &["<FILE>"], None);
    refused(&["trace", "good", "--sequence", "dance"], here, &["--sequence", "mermaid"], None);
    refused(&["-k", "good", "trace", "good"], here, &["trace", "cannot be used with"], None);
    for arguments in [&["good"][..], &["good", "-m", "1G"], &["-m", "1G", "good"], &["-k", "good", "good"]] {
        refused(arguments, here, &["'good'", "tip: -k FILE names the kernel, -i FILE an initramfs"], None);
    }
    for arguments in [&["good"][..], &["--sandbox", "off", "good"]] {
        let answer = run(Command::new(built::hotslot_backend()).args(arguments));
        assert_eq!(answer.status, Some(2), "{arguments:?}: {}", answer.stderr);
        assert!(answer.stderr.contains("tip: the devices are blk, pmem, fs,"), "{}", answer.stderr);
    }
    rustix::fs::mkfifoat(rustix::fs::CWD, here.join("pipe"), 0o600.into()).unwrap();
    refused(&["-k", "good", "--log-file", "pipe"], here, &["pipe", "no process reads this pipe"], None);
    for (file, part) in [
        ("pipe", "memory picture pipe: it is not a regular file"),
        ("/dev/null", "it is not a regular file"),
        (".", "it is not a regular file"),
        ("no/where", "cannot create the memory picture no/where: No such file"),
    ] {
        refused(&["-k", "good", "--memory-picture", file], here, &[part], None);
    }
    refused(&["--print-layout=png"], here, &["png", "text, svg"], None);
    refused(&["--print-layout=svg", "-m", "1M"], here, &["1048576 bytes", "too few"], Some("128M"));
    refused(&["--print-layout=svg", "-m", "4096T"], here, &["52 bits of physical address"], None);
    refused(&["-k", "good", "--stats", "no/where"], here, &["for statistics: No such file"], None);
    refused(&["-k", "good", "--stats", "pipe"], here, &["pipe", "no process reads this pipe"], None);
    refused(&["-k", "good", "--log-file", "no/where"], here, &["no/where", "No such file"], None);
}

#[test]
fn questions_are_answered() {
    let files = files();
    let here = files.path();
    for (arguments, part) in [
        (&["--help"][..], "Exit status:"),
        (&["-V"], env!("CARGO_PKG_VERSION")),
        (&["--print-layout"], "console=ttyS0"),
        (&["trace", "--help"], "--sequence"),
        (&["--print-man"], r"trace\-vhost\-user"),
        (&["--print-completions", "bash"], "--trace-vhost-user"),
    ] {
        answered(Command::new(built::hotslot()).args(arguments), here, part);
    }
    for (arguments, part) in [
        (&["--help"][..], "torture"),
        (&["-V"], env!("CARGO_PKG_VERSION")),
        (&["man"], r"hotslot\-backend\-blk(1)"),
        (&["man", "blk"], r"\-\-block\-size"),
        (&["completions", "zsh"], "--block-size"),
    ] {
        answered(Command::new(built::hotslot_backend()).args(arguments), here, part);
    }
}

fn answered(command: &mut Command, directory: &Path, part: &str) {
    let answer = run(command.current_dir(directory));
    assert_eq!(answer.status, Some(0), "{command:?}");
    assert!(answer.stdout.contains(part), "{command:?}: {}", answer.stdout);
    assert_eq!(answer.stderr, "", "{command:?}");
}

#[test]
fn output_that_is_lost_is_an_error_unless_its_reader_left() {
    let files = files();
    let here = files.path();
    let record = r#"{"time_ns":1,"took_ns":0,"thread":"x","device":"d","kind":"event","event":"connected"}"#;
    std::fs::write(here.join("trace"), format!("{record}\n")).unwrap();
    for (program, arguments) in [
        (built::hotslot(), &["trace", "trace"][..]),
        (built::hotslot(), &["--print-layout=svg"]),
        (built::hotslot(), &["--print-man"]),
        (built::hotslot(), &["--help"]),
        (built::hotslot_backend(), &["fs", "--help"]),
        (built::hotslot_backend(), &["man"]),
        (built::hotslot_backend(), &["completions", "bash"]),
    ] {
        let to = |stdout: std::process::Stdio| {
            let mut command = Command::new(&program);
            command.args(arguments).current_dir(here).stdout(stdout).stderr(std::process::Stdio::piped());
            let output = command.spawn().unwrap().wait_with_output().unwrap();
            (output.status.code(), String::from_utf8(output.stderr).unwrap())
        };
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let (status, said) = to(full.into());
        assert_eq!(status, Some(1), "{arguments:?}: {said}");
        assert!(
            said.contains("error: cannot write to stdout; the output is not complete: No space"),
            "{said}"
        );
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        assert_eq!(to(writer.into()), (Some(0), String::new()), "{arguments:?}");
    }
}

#[test]
fn no_output_empties_another_file_of_the_command_line() {
    let files = files();
    let here = files.path();
    std::os::unix::fs::symlink("good", here.join("link")).unwrap();
    std::fs::hard_link(here.join("good"), here.join("hard link")).unwrap();
    std::fs::write(here.join("old"), "").unwrap();
    std::fs::hard_link(here.join("old"), here.join("old too")).unwrap();
    for output in ["--memory-picture", "--log-file", "--trace-vhost-user", "--dump", "--stats"] {
        let input = ["-k", "good", "-i", "initramfs"];
        for (file, other) in [("./link", "--kernel"), ("hard link", "--kernel"), ("initramfs", "--initramfs")]
        {
            let sentence = format!("{output} and {other} name the same file, {file}");
            refused(&[&input, &[output, file][..]].concat(), here, &[&sentence], None);
        }
        for (file, serial) in [("new", "file=./new"), ("old", "file=old too")] {
            let arguments = [&input, &[output, file, "--serial", serial][..]].concat();
            refused(&arguments, here, &[&format!("--serial and {output} name the same file")], None);
        }
    }
    assert_eq!(std::fs::metadata(here.join("good")).unwrap().len(), 120 + 4096);
    assert_eq!(std::fs::metadata(here.join("initramfs")).unwrap().len(), 4 << 20);
    // What several outputs may go to.
    let null = ["-k", "missing", "--log-file", "/dev/null", "--serial", "file=/dev/null"];
    refused(&null, here, &["cannot open the kernel missing"], None);
}

#[test]
fn memory_beyond_the_limit_of_file_sizes_is_an_error_and_no_signal() {
    let directory = TempDir::new().unwrap();
    for (size, bytes) in [("64M", "67108864"), ("2M", "2097152")] {
        let mut command = Command::new(built::hotslot());
        command.args(["-k", "nowhere", "-m", size]).current_dir(directory.path());
        let limit = || match setrlimit(Resource::Fsize, Rlimit { current: Some(1 << 20), maximum: None }) {
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        };
        // SAFETY: setrlimit(2) is async-signal-safe.
        let output = child::run(unsafe { command.pre_exec(limit) });
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(&format!("for {bytes} bytes of guest memory")), "{said}");
        assert!(said.contains("hint: ") && said.contains("ulimit -f"), "{said}");
    }
}
