//! Threads that turn hostile, in processes of their own: this test program, started again.

use std::fs::File;
use std::io;
use std::process::{Command, Output};

use super::vmm::Kind;
use super::*;
use crate::thread;

const KINDS: [(Kind, &str); 8] = [
    (Kind::Vcpu, "vcpu0"),
    (Kind::Channel, "vhost-a"),
    (Kind::Keeper, "keep-a"),
    (Kind::Painter, "memory-picture"),
    (Kind::Helper, "helper"),
    (Kind::DebuggedVcpu, "vcpu1"),
    (Kind::Debugger, "gdb"),
    (Kind::Dumper, "dump"),
];

/// A system call by its name, and code that makes it and gives its result.
type Attempt = (&'static str, fn() -> libc::c_long);

/// What a hostile thread tries. Without a filter each would succeed, or fail with an error.
const ATTEMPTS: [Attempt; 15] = [
    ("openat", || File::open("/etc/passwd").map_or(-1, |_| 0)),
    ("open", || raw(libc::SYS_open, [c"/etc/passwd".as_ptr() as u64, 0, 0])),
    ("socket", || std::net::UdpSocket::bind("127.0.0.1:0").map_or(-1, |_| 0)),
    ("socketpair", || std::os::unix::net::UnixStream::pair().map_or(-1, |_| 0)),
    ("execve", || raw(libc::SYS_execve, [c"/bin/true".as_ptr() as u64, 0, 0])),
    ("ptrace", || raw(libc::SYS_ptrace, [libc::PTRACE_TRACEME.into(), 0, 0])),
    ("mmap", || executable(libc::SYS_mmap)),
    ("mprotect", || executable(libc::SYS_mprotect)),
    // A process.
    ("clone", || raw(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0])),
    ("clone", || raw(libc::SYS_clone, [libc::CLONE_NEWUSER as u64 | 0x10f00, 0, 0])),
    ("kill", || raw(libc::SYS_kill, [u64::from(std::process::id()), 0, 0])),
    // Another process, without a signal.
    ("tgkill", || raw(libc::SYS_tgkill, [1, 1, 0])),
    // TIOCSTI: a character that the terminal takes for a typed one.
    ("ioctl", || raw(libc::SYS_ioctl, [0, libc::TIOCSTI, c"x".as_ptr() as u64])),
    ("prctl", || raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0])),
    ("seccomp", || raw(libc::SYS_seccomp, [0; 3])),
];

fn raw(call: libc::c_long, arguments: [u64; 3]) -> libc::c_long {
    let [first, second, third] = arguments;
    // SAFETY: the pointers among the arguments are to static text, and no call in this file changes memory.
    unsafe { libc::syscall(call, first, second, third, 0, 0, 0) }
}

/// A page that can be executed, at an address of the kernel's choice or at none.
fn executable(call: libc::c_long) -> libc::c_long {
    let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
    let len = if call == libc::SYS_mmap { 4096 } else { 0 };
    // SAFETY: a new page for mmap, no page for mprotect.
    unsafe { libc::syscall(call, 0, len, protection, flags, -1, 0) }
}

/// Says which mode, kind and attempt a child of the test below is for.
const CHILD: &str = "HOTSLOT_TEST_HOSTILE";

#[test]
fn hostile() {
    let Ok(what) = std::env::var(CHILD) else { return };
    let mut numbers = what.split(',').map(|number| number.parse::<usize>().unwrap());
    let mut next = || numbers.next().unwrap();
    let mode = [Mode::On, Mode::Log, Mode::Off][next()];
    let ((kind, name), (_, attempt)) = (KINDS[next()], ATTEMPTS[next()]);
    prepare(mode).unwrap();
    let may_others_look = rustix::process::dumpable_behavior().unwrap() == DumpableBehavior::Dumpable;
    assert_eq!(may_others_look, mode != Mode::On);
    let turn_hostile = move || -> () {
        let result = attempt();
        say_and_exit(format_args!("the call returned {}", result >= 0))
    };
    let hostile = match kind {
        // It may start a thread, and that inherits.
        Kind::Helper => thread::spawn("parent".into(), kind, move || {
            thread::spawn(name.into(), kind, turn_hostile).unwrap().join().unwrap();
        }),
        _ => thread::spawn(name.into(), kind, turn_hostile),
    };
    if matches!(kind, Kind::Vcpu | Kind::DebuggedVcpu) {
        Kind::MainLoop.confine();
    }
    hostile.unwrap().join().unwrap();
}

fn say_and_exit(line: std::fmt::Arguments) -> ! {
    crate::report::say(line);
    // SAFETY: nothing runs afterwards.
    unsafe { libc::_exit(0) }
}

fn try_as_child(mode: usize, kind: usize, attempt: usize) -> Output {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "sandbox::tests::hostile", "--nocapture", "--test-threads", "1"])
        .env(CHILD, format!("{mode},{kind},{attempt}"))
        .output()
        .unwrap()
}

fn last_line(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap().lines().last().unwrap_or_default()
}

#[test]
fn what_a_thread_that_turned_hostile_tries_is_refused_by_a_last_line_with_call_and_thread() {
    for (kind, (_, thread)) in KINDS.iter().enumerate() {
        for (attempt, (call, _)) in ATTEMPTS.iter().enumerate() {
            let output = try_as_child(0, kind, attempt);
            let line = last_line(&output);
            let start = format!("error: the sandbox refused system call {call}(");
            let is_named = line.starts_with(&start) && line.ends_with(&format!(") on thread {thread}"));
            assert!(is_named && output.status.code() == Some(1), "{call} on {thread}: {output:?}");
        }
    }
}

#[test]
fn without_a_sandbox_and_where_it_only_logs_a_call_is_carried_out() {
    for mode in [1, 2] {
        let output = try_as_child(mode, 1, 0);
        assert_eq!(last_line(&output), "the call returned true", "{output:?}");
    }
}

/// Landlock alone, without a filter.
#[test]
fn no_file_can_be_opened_even_where_a_filter_allows_it() {
    let opened = std::thread::spawn(|| {
        restrict_files().unwrap();
        File::open("/etc/passwd").map(|_| ())
    });
    let opened = opened.join().unwrap();
    let lsms = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if !lsms.contains("landlock") {
        eprintln!("SKIPPED: this kernel has no Landlock");
        return;
    }
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn each_rule_has_a_reason_and_each_table_makes_a_filter() {
    for kind in KINDS.map(|(kind, _)| kind).into_iter().chain([Kind::MainLoop]) {
        let rules = || kind.tables().iter().copied().flatten();
        assert!(rules().all(|Rule { why, .. }| !why.is_empty()));
        let filter = rule::only(rules(), SeccompAction::Trap, 1).unwrap();
        println!("{kind:?}: {} calls, {} instructions", rules().count(), filter.len());
    }
}
