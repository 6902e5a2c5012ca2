//! What a user sees of a machine that runs: its output, its input, its exit status, the last line of stderr,
//! the terminal afterwards. The guests are a few instructions, so any `/dev/kvm` will do, also one that is
//! software.

// clippy.toml allows these in tests; it does not know the helpers of a file like this one as such.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::File;
use std::io::{self, BufRead, Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hotslot_test_support::child::{signal_child, wait};
use hotslot_test_support::image::{self, Segment};
use hotslot_test_support::terminal::{settings, terminal};
use hotslot_test_support::{built, child, kvm};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tempfile::NamedTempFile;

/// Where the guests' code is.
const START: u64 = 2 << 20;

const COM1: u32 = 0x3f8;
const DEBUG_EXIT: u32 = 0xf4;

/// An ELF kernel of what `write` assembles.
fn guest(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> NamedTempFile {
    let mut assembler = CodeAssembler::new(64).unwrap();
    write(&mut assembler).unwrap();
    let code = assembler.assemble(START).unwrap();
    let code = Segment { zeroes: 0x10000, ..Segment::new(START, &code) };
    image::kernel(&image::elf(START, &[code]))
}

/// `out port, value`, one byte.
fn out_byte(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(edx, port)?;
    a.mov(eax, value)?;
    a.out(dx, al)
}

fn print(a: &mut CodeAssembler, text: &[u8]) -> Result<(), IcedError> {
    text.iter().try_for_each(|byte| out_byte(a, COM1, (*byte).into()))
}

/// Says so, and waits for ever.
fn say_and_hang(a: &mut CodeAssembler) -> Result<(), IcedError> {
    print(a, b"up\n")?;
    hang(a)
}

/// Starts a guest that says so, and waits until it did.
fn start(command: &mut Command) -> Child {
    let mut child = command.spawn().unwrap();
    let mut said = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"up\n");
    child
}

/// Waits for ever, with interrupts off.
fn hang(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut here = a.create_label();
    a.set_label(&mut here)?;
    a.jmp(here)
}

/// Sends back what it gets from the serial port, until a `q`; then ends with the number of bytes before that.
fn echo(a: &mut CodeAssembler) -> Result<(), IcedError> {
    // Interrupt me when there is input: the driver is here. (Interrupts stay off in the processor; it polls.)
    out_byte(a, COM1 + 1, 1)?;
    a.xor(ebx, ebx)?;
    let (mut wait, mut quit) = (a.create_label(), a.create_label());
    a.set_label(&mut wait)?;
    a.mov(edx, COM1 + 5)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.jz(wait)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)?;
    a.cmp(al, i32::from(b'q'))?;
    a.je(quit)?;
    a.out(dx, al)?;
    a.inc(ebx)?;
    a.jmp(wait)?;
    a.set_label(&mut quit)?;
    a.mov(edx, DEBUG_EXIT)?;
    a.mov(eax, ebx)?;
    a.out(dx, al)?;
    hang(a)
}

fn hotslot(kernel: &NamedTempFile) -> Command {
    let mut command = Command::new(built::hotslot());
    command.args(["-m", "8M", "--debug-exit", "-k"]).arg(kernel.path());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs to the end: status, stdout, stderr.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    finish(command.spawn().unwrap())
}

fn finish(child: Child) -> (Option<i32>, String, String) {
    let output = child::finish(child);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), stdout, stderr)
}

#[test]
fn each_way_out_has_its_status_and_its_last_line() {
    if !kvm::is_here() {
        return;
    }
    type Guest = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let cases: [(Guest, i32, &str); 7] = [
        // ACPI: sleep type 5, go.
        (|a| out_byte(a, 0x600, 5 << 2 | 1 << 5), 0, "the guest switched itself off"),
        (|a| out_byte(a, 0x602, 1), 32, "the guest reset itself"),
        (|a| out_byte(a, 0x64, 0xfe), 32, "the guest reset itself"),
        (|a| out_byte(a, 0x505, 1), 34, "the guest's kernel panicked"),
        (|a| out_byte(a, DEBUG_EXIT, 77), 77, "the guest ended with status 77"),
        (|a| out_byte(a, DEBUG_EXIT, 0), 0, "the guest ended with status 0"),
        // No table for exceptions, none for double faults.
        (|a| a.ud2(), 33, "the guest crashed: triple fault on vCPU 0"),
    ];
    for (write, status, last_line) in cases {
        let kernel = guest(|a| {
            write(a)?;
            hang(a)
        });
        let (got, stdout, stderr) = run(&mut hotslot(&kernel));
        assert_eq!(got, Some(status), "{last_line}: {stderr}");
        assert_eq!(stdout, "");
        assert!(stderr.lines().last().is_some_and(|line| line.contains(last_line)), "{last_line}: {stderr}");
        // A crash is followed by the registers.
        assert_eq!(stderr.contains("rip "), status == 33, "{stderr}");
    }
}

#[test]
fn output_is_on_stdout_and_messages_on_stderr() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(|a| {
        print(a, b"Hello, ")?;
        print(a, b"guest!")?;
        out_byte(a, 0x600, 0x34)?;
        hang(a)
    });
    let (status, stdout, stderr) = run(&mut hotslot(&kernel));
    assert_eq!((status, stdout.as_str()), (Some(0), "Hello, guest!"));
    assert_eq!(stderr, "hotslot: the guest switched itself off\n");
    // To a file.
    let file = NamedTempFile::new().unwrap();
    let (status, stdout, _) =
        run(hotslot(&kernel).arg("--serial").arg(format!("file={}", file.path().display())));
    assert_eq!((status, stdout.as_str()), (Some(0), ""));
    assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "Hello, guest!");
    // No device is there.
    let (status, stdout, _) = run(hotslot(&kernel).args(["--serial", "off"]));
    assert_eq!((status, stdout.as_str()), (Some(0), ""));
}

#[test]
fn a_string_instruction_is_many_accesses() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(|a| {
        let mut text = a.create_label();
        a.lea(rsi, ptr(text))?;
        a.mov(ecx, 5)?;
        a.mov(edx, COM1)?;
        a.cld()?;
        a.rep().outsb()?;
        // KVM passes these on as one exit: 16 times what pvpanic has to say, which is 1.
        let buffer = START + 0x8000;
        a.mov(rdi, buffer)?;
        a.mov(ecx, 16)?;
        a.mov(edx, 0x505)?;
        a.rep().insb()?;
        a.mov(rbx, buffer)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(rcx, 0x0101_0101_0101_0101_u64)?;
        a.sub(rax, rcx)?;
        a.mov(edx, DEBUG_EXIT)?;
        a.out(dx, al)?;
        hang(a)?;
        a.set_label(&mut text)?;
        a.db(b"many\n")
    });
    let (status, stdout, _) = run(&mut hotslot(&kernel));
    assert_eq!((status, stdout.as_str()), (Some(0), "many\n"));
}

#[test]
// SHM-24, as far as no window is there.
fn nobodys_addresses_read_all_ones_and_take_any_write() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(|a| {
        let mut wrong = a.create_label();
        // In the hole, above all RAM, and at a port without a device.
        for address in [0xc000_0000_u64, 0xf000_0000] {
            a.mov(rbx, address)?;
            a.mov(dword_ptr(rbx), 0x1234)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.cmp(rax, -1)?;
            a.jne(wrong)?;
        }
        out_byte(a, 0x1234, 0)?;
        a.in_(eax, dx)?;
        a.cmp(eax, -1)?;
        a.jne(wrong)?;
        out_byte(a, DEBUG_EXIT, 1)?;
        a.set_label(&mut wrong)?;
        out_byte(a, DEBUG_EXIT, 2)?;
        hang(a)
    });
    let (status, _, stderr) = run(hotslot(&kernel).arg("-v"));
    assert_eq!(status, Some(1), "{stderr}");
    // KVM may pass on a read of 8 bytes as one or as two.
    let words: Vec<_> = stderr.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).collect();
    for counted in [&["mmio_writes", "2"][..], &["ports", "2"]] {
        let unclaimed = words.iter().skip_while(|line| line.first() != Some(&"unclaimed"));
        assert!(unclaimed.clone().any(|line| line.ends_with(counted)), "{stderr}");
    }
}

#[test]
fn input_comes_from_a_pipe_or_a_file_and_may_end() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(echo);
    // More than the port holds at once: nothing may be lost.
    let text = "0123456789".repeat(20);
    let input = format!("{text}q, and what nobody reads");

    let mut child = hotslot(&kernel).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let (status, stdout, stderr) = finish(child);
    assert_eq!((status, stdout.as_str()), (Some(200), text.as_str()), "{stderr}");

    let mut file = NamedTempFile::new().unwrap();
    file.write_all(input.as_bytes()).unwrap();
    let (status, stdout, _) = run(hotslot(&kernel).stdin(file.reopen().unwrap()));
    assert_eq!((status, stdout.as_str()), (Some(200), text.as_str()));

    // The end of input does not end the guest: it is told so by a signal at last.
    let (reader, writer) = io::pipe().unwrap();
    drop(writer);
    let kernel = guest(|a| {
        print(a, b"up\n")?;
        echo(a)
    });
    for stdin in [Stdio::null(), Stdio::from(reader)] {
        let mut child = start(hotslot(&kernel).stdin(stdin));
        std::thread::sleep(Duration::from_millis(200));
        assert!(child.try_wait().unwrap().is_none());
        signal_child(&mut child, libc::SIGTERM);
        assert_eq!(finish(child).0, Some(143));
    }
}

#[test]
fn without_standard_files_the_guest_goes_on() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(|a| {
        print(a, b"nobody reads this\n")?;
        print(a, b"nor this\n")?;
        out_byte(a, DEBUG_EXIT, 5)?;
        hang(a)
    });
    let shell = |redirections: &str| {
        let line = format!(r#"exec "$0" "$@" {redirections}"#);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &line]).arg(built::hotslot());
        command.args(["-m", "8M", "--debug-exit", "-k"]).arg(kernel.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        wait(&mut command.spawn().unwrap()).code()
    };
    assert_eq!(shell("<&-"), Some(5));
    assert_eq!(shell(">&-"), Some(5));
    assert_eq!(shell("<&- >&- 2>&-"), Some(5));

    // Readers that went away.
    let mut child = hotslot(&kernel).spawn().unwrap();
    drop(child.stdout.take());
    let (status, _, stderr) = finish(child);
    assert_eq!(status, Some(5), "{stderr}");
    let mut child = hotslot(&kernel).arg("-vv").spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(finish(child).0, Some(5));
}

#[test]
fn signals_end_the_machine_whatever_it_does() {
    if !kvm::is_here() {
        return;
    }
    let busy = guest(say_and_hang);
    // Its output is not read any more: it waits for that.
    let blocked = guest(|a| {
        print(a, b"up\n")?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        print(a, b"0123456789abcdefghijklmnopqrstuvwxyz\n")?;
        a.jmp(again)
    });
    for kernel in [&busy, &blocked] {
        for (number, name) in [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP")]
        {
            let mut child = start(hotslot(kernel).args(["--cpus", "2"]));
            std::thread::sleep(Duration::from_millis(300));
            signal_child(&mut child, number);
            assert_eq!(wait(&mut child).code(), Some(128 + number));
            let mut stderr = String::new();
            child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
            assert_eq!(stderr, format!("hotslot: ended by {name}\n"));
        }
    }
}

#[test]
fn sigusr1_prints_the_memory_map() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(say_and_hang);
    let mut child = start(&mut hotslot(&kernel));
    signal_child(&mut child, libc::SIGUSR1);
    let stderr = io::BufReader::new(child.stderr.take().unwrap());
    let map: Vec<_> = stderr.lines().take(2).map(Result::unwrap).collect();
    assert_eq!(map, ["guest physical memory:", "  0x000000000000-0x0000007fffff  RAM"]);
    signal_child(&mut child, libc::SIGINT);
    assert_eq!(wait(&mut child).code(), Some(130));
}

#[test]
fn the_terminal_is_raw_meanwhile_and_itself_afterwards() {
    if !kvm::is_here() {
        return;
    }
    let (echoing, busy) = (guest(echo), guest(hang));
    let typed = |keys: &'static [u8]| move |mut ours: &File, _: &mut Child| ours.write_all(keys).unwrap();
    type Act<'a> = &'a dyn Fn(&File, &mut Child);
    // Pasted faster than the guest reads.
    let pasted =
        |mut ours: &File, _: &mut Child| ours.write_all(&[&[b'x'; 20_000][..], b"q"].concat()).unwrap();
    let cases: [(&NamedTempFile, Act, i32); 8] = [
        // Ctrl-C is the guest's; so is Ctrl-a Ctrl-a, as one.
        (&echoing, &typed(b"\x03\x01\x01abcq"), 5),
        (&echoing, &pasted, 20_000 % 256),
        (&echoing, &typed(b"\x01h\x01x"), 130),
        // Also when the guest reads nothing, and much was typed.
        (
            &busy,
            &typed(b"what is it? what is it? what is it? what is it? what is it? what is it? \x01x"),
            130,
        ),
        (&busy, &|_, child| signal_child(child, libc::SIGTERM), 143),
        (&busy, &|_, child| signal_child(child, libc::SIGQUIT), 131),
        (&busy, &|_, child| signal_child(child, libc::SIGUSR2), 140),
        // Not ours to handle: the process dies of it, the terminal does not.
        (&busy, &|_, child| signal_child(child, libc::SIGABRT), -libc::SIGABRT),
    ];
    for (number, (kernel, act, expected)) in cases.into_iter().enumerate() {
        let (ours, theirs) = terminal();
        let before = settings(&theirs);
        let mut child = hotslot(kernel).stdin(theirs.try_clone().unwrap()).spawn().unwrap();
        let limit = Instant::now() + Duration::from_secs(10);
        while settings(&theirs) == before {
            assert!(Instant::now() < limit, "the terminal never became raw");
            std::thread::sleep(Duration::from_millis(5));
        }
        act(&ours, &mut child);
        let status = wait(&mut child);
        let signal = std::os::unix::process::ExitStatusExt::signal(&status);
        assert_eq!(status.code().or(signal.map(|signal| -signal)), Some(expected), "case {number}");
        assert_eq!(settings(&theirs), before, "case {number}");
    }
}

#[test]
fn input_that_is_dropped_is_told_of() {
    if !kvm::is_here() {
        return;
    }
    let kernel = guest(hang);
    let (mut ours, theirs) = terminal();
    let before = settings(&theirs);
    let child = hotslot(&kernel).stdin(theirs.try_clone().unwrap()).spawn().unwrap();
    while settings(&theirs) == before {
        std::thread::sleep(Duration::from_millis(5));
    }
    ours.write_all(&[b'x'; (1 << 20) + 100]).unwrap();
    ours.write_all(b"\x01x").unwrap();
    let (status, _, stderr) = finish(child);
    assert_eq!(status, Some(130), "{stderr}");
    let told = stderr.matches("input from the terminal is lost").count();
    assert_eq!(told, 1, "{stderr}");
}

#[test]
fn a_machine_that_cannot_be_built_leaves_the_terminal_alone() {
    let (_ours, theirs) = terminal();
    let before = settings(&theirs);
    let mut command = Command::new(built::hotslot());
    command.args(["-k", "/nowhere"]).stdin(theirs.try_clone().unwrap()).stderr(Stdio::null());
    assert_eq!(wait(&mut command.spawn().unwrap()).code(), Some(2));
    assert_eq!(settings(&theirs), before);
}
