//! Every kind of standard input and output of hotslot: the guest goes on, and the exit status is the guest's.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use hotslot_test_support::child::{finish, signal_child, wait};
use hotslot_test_support::monitor::Operation;
use hotslot_test_support::wait::eventually;
use hotslot_test_support::{guest, kvm};

const DEBUG_EXIT: u64 = 0xf4;

fn request(operation: Operation, address: u64, value: u64) -> Vec<u8> {
    wide_request(operation, 1, address, value)
}

fn wide_request(operation: Operation, width: u8, address: u64, value: u64) -> Vec<u8> {
    let mut bytes = vec![operation as u8, width];
    bytes.extend(address.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

/// Reads that are answered, then the end with status 42.
fn script() -> Vec<u8> {
    let mut script = request(Operation::Read, 0x10_0000, 0).repeat(20);
    script.extend(request(Operation::Out, DEBUG_EXIT, 42));
    script
}

/// Closes a standard stream in the child.
fn closed(command: &mut Command, fd: i32) -> &mut Command {
    let close = move || {
        // SAFETY: the descriptor is the child's, which uses it no more.
        unsafe { libc::close(fd) };
        Ok(())
    };
    // SAFETY: the closure only calls close(2), which is async-signal-safe.
    unsafe { command.pre_exec(close) }
}

#[test]
fn input_is_a_file() {
    if !kvm::is_here() {
        return;
    }
    let input = tempfile::NamedTempFile::new().unwrap();
    input.as_file().write_all(&script()).unwrap();
    let kernel = guest::kernel();
    let mut hotslot = guest::command(kernel.path())
        .stdin(File::open(input.path()).unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = Vec::new();
    hotslot.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert_eq!(output.len(), 20 * 8);
    assert_eq!(wait(&mut hotslot).code(), Some(42));
}

#[test]
fn input_is_a_pipe_that_ends_before_the_guest() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest::kernel();
    let mut hotslot =
        guest::command(kernel.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = hotslot.stdin.take().unwrap();
    stdin.write_all(&script()).unwrap();
    drop(stdin);
    assert_eq!(wait(&mut hotslot).code(), Some(42));
}

#[test]
fn a_guest_that_polls_gets_all_of_64_kib() {
    if !kvm::is_here() {
        return;
    }
    const PLACE: u64 = 0x18_0000;
    const COUNT: u64 = (64 << 10) / 36;
    let kernel = guest::kernel();
    let mut hotslot =
        guest::command(kernel.path()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = hotslot.stdin.take().unwrap();
    // Beside the reading: neither pipe has room for all.
    let writer = std::thread::spawn(move || {
        for number in 0..COUNT {
            stdin.write_all(&wide_request(Operation::Write, 8, PLACE, !number)).unwrap();
            stdin.write_all(&wide_request(Operation::Read, 8, PLACE, 0)).unwrap();
        }
        stdin.write_all(&request(Operation::Out, DEBUG_EXIT, 42)).unwrap();
    });
    let mut output = Vec::new();
    hotslot.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    writer.join().unwrap();
    let answers: Vec<u64> =
        output.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
    let expected: Vec<u64> = (0..COUNT).flat_map(|number| [0, !number]).collect();
    assert_eq!(answers, expected);
    assert_eq!(wait(&mut hotslot).code(), Some(42));
}

#[test]
fn there_is_no_input() {
    if !kvm::is_here() {
        return;
    }
    // The guest waits for input, and has all the time: the end of input is not the end of the machine.
    for close in [false, true] {
        let kernel = guest::kernel();
        let mut command = guest::command(kernel.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        if close {
            closed(&mut command, 0);
        }
        let mut hotslot = command.spawn().unwrap();
        std::thread::sleep(Duration::from_millis(500));
        signal_child(&mut hotslot, libc::SIGTERM);
        let output = finish(hotslot);
        assert_eq!(output.status.code(), Some(128 + libc::SIGTERM), "closed: {close}");
        assert_eq!(output.stderr, b"hotslot: ended by SIGTERM\n");
    }
}

#[test]
fn the_output_cannot_be_written() {
    if !kvm::is_here() {
        return;
    }
    for case in ["reader gone", "closed", "full", "/dev/null"] {
        let input = tempfile::NamedTempFile::new().unwrap();
        input.as_file().write_all(&script()).unwrap();
        let kernel = guest::kernel();
        let mut command = guest::command(kernel.path());
        command.stdin(File::open(input.path()).unwrap()).stderr(Stdio::null());
        match case {
            "reader gone" => {
                let (_, writer) = std::io::pipe().unwrap();
                command.stdout(OwnedFd::from(writer));
            }
            "full" => {
                command.stdout(File::options().write(true).open("/dev/full").unwrap());
            }
            "closed" => {
                closed(&mut command, 1);
            }
            _ => {
                command.stdout(Stdio::null());
            }
        }
        assert_eq!(wait(&mut command.spawn().unwrap()).code(), Some(42), "{case}");
    }
}

/// A machine whose guest makes hotslot say more than `lines` lines, with this stderr; the guest ends with
/// status 42 where `ends`.
fn talkative(stderr: OwnedFd, lines: usize, ends: bool) -> std::process::Child {
    // Where nothing is. Each write is a line, with -vv.
    let nowhere = 0xf_0000_0000;
    let mut input = request(Operation::Write, nowhere, 0).repeat(lines);
    if ends {
        input.extend(request(Operation::Out, DEBUG_EXIT, 42));
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all(&input).unwrap();
    let kernel = guest::kernel();
    let mut command = guest::command(kernel.path());
    command.arg("-vv").stdin(File::open(file.path()).unwrap()).stdout(Stdio::null()).stderr(stderr);
    let child = command.spawn().unwrap();
    // hotslot opens both soon.
    std::thread::sleep(Duration::from_millis(500));
    child
}

#[test]
fn nobody_reads_the_messages() {
    // The pipe takes 4 KiB; the guest causes more than that, and goes on to its end.
    if !kvm::is_here() {
        return;
    }
    for ends in [true, false] {
        let (mut reader, writer) = std::io::pipe().unwrap();
        rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
        let mut hotslot = talkative(writer.into(), 200, ends);
        if !ends {
            eventually("the guest runs", || rustix::io::ioctl_fionread(&reader).unwrap() > 2048);
            signal_child(&mut hotslot, libc::SIGTERM);
        }
        let expected = if ends { 42 } else { 128 + libc::SIGTERM };
        assert_eq!(wait(&mut hotslot).code(), Some(expected));
        let mut said = Vec::new();
        reader.read_to_end(&mut said).unwrap();
        assert!(said.starts_with(b"hotslot: "));
    }
}

#[test]
fn the_messages_are_read_late() {
    // All of them are there then, the last line last.
    if !kvm::is_here() {
        return;
    }
    let (mut reader, writer) = std::io::pipe().unwrap();
    rustix::pipe::fcntl_setpipe_size(&writer, 4096).unwrap();
    let mut hotslot = talkative(writer.into(), 200, false);
    let mut said = Vec::new();
    let mut buffer = [0; 4096];
    while said.windows(16).filter(|words| words == b"nothing to write").count() < 200 {
        let count = reader.read(&mut buffer).unwrap();
        assert!(count > 0, "{}", String::from_utf8_lossy(&said));
        said.extend(&buffer[..count]);
    }
    signal_child(&mut hotslot, libc::SIGTERM);
    reader.read_to_end(&mut said).unwrap();
    assert_eq!(wait(&mut hotslot).code(), Some(128 + libc::SIGTERM));
    let said = String::from_utf8(said).unwrap();
    assert_eq!(said.lines().last(), Some("hotslot: ended by SIGTERM"));
}

#[test]
fn nothing_is_open_at_all() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest::kernel();
    let mut command = guest::command(kernel.path());
    for fd in 0..3 {
        closed(&mut command, fd);
    }
    let mut hotslot = command.spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    signal_child(&mut hotslot, libc::SIGTERM);
    assert_eq!(wait(&mut hotslot).code(), Some(128 + libc::SIGTERM));
}
