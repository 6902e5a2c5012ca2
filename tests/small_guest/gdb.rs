//! What gdb sees of a guest, by packets of its remote protocol.

use std::path::PathBuf;

use hotslot::kvm::vm::reports_watchpoints;
use hotslot_test_support::backend::Backend;
use hotslot_test_support::files::{content, numbered_file};
use hotslot_test_support::gdb::Gdb;
use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::image::{self, Segment};
use hotslot_test_support::kvm;
use hotslot_test_support::wire::page_at;
use tempfile::{NamedTempFile, TempDir};

/// The guest's code: it counts in rax, and at COUNT.
const START: u64 = 2 << 20;
const LOOP: u64 = START + 2;
const STORE: u64 = LOOP + 3;
const JUMP: u64 = STORE + 8;
const COUNT: u64 = 4 << 20;

/// gdb's numbers of registers.
const RAX: usize = 0;
const RIP: usize = 16;

const SIGTERM: i32 = 128 + libc::SIGTERM;
const SIGKILL: i32 = 128 + libc::SIGKILL;

/// `xor eax, eax`; `inc rax`; `mov [COUNT], rax`; jumps back to `inc`.
fn counter() -> NamedTempFile {
    let store = [0x48, 0x89, 0x04, 0x25];
    let code =
        [&[0x31, 0xc0, 0x48, 0xff, 0xc0][..], &store, &(COUNT as u32).to_le_bytes(), &[0xeb, 0xf3]].concat();
    image::kernel(&image::elf(START, &[Segment::new(START, &code), Segment::new(COUNT, &[0; 8])]))
}

/// A guest that waits for gdb.
struct Waiting {
    guest: Guest,
    socket: PathBuf,
    _directory: TempDir,
}

impl Waiting {
    /// Runs this kernel with these options.
    fn run(kernel: NamedTempFile, options: &[&str]) -> Waiting {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("gdb.sock");
        let mut command = guest::command(kernel.path());
        command.args(options).arg("--gdb").arg(format!("unix:{}", socket.display()));
        Waiting { guest: Guest::spawn(command, Some(kernel)), socket, _directory: directory }
    }

    fn connect(&self) -> Gdb {
        let mut gdb = Gdb::connect(&self.socket);
        assert!(gdb.ask("?").starts_with("T05"));
        gdb
    }

    /// SIGTERM ends the machine.
    fn end(self) -> String {
        self.guest.wait_for_log("waits for gdb");
        self.guest.signal(libc::SIGTERM);
        let (status, log) = self.guest.wait();
        assert_eq!(status.code(), Some(SIGTERM), "{log}");
        log
    }
}

fn breaks(gdb: &mut Gdb, kind: u8, address: u64) {
    assert_eq!(gdb.ask(&format!("Z{kind},{address:x},1")), "OK");
}

fn breaks_no_more(gdb: &mut Gdb, kind: u8, address: u64) {
    assert_eq!(gdb.ask(&format!("z{kind},{address:x},1")), "OK");
}

#[test]
fn gdb_breaks_steps_and_continues() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    assert_eq!(gdb.register(RIP), START, "no instruction was executed");
    breaks(&mut gdb, 0, STORE);
    for count in 1..4 {
        let stop = gdb.ask("vCont;c");
        assert!(stop.starts_with("T05") && stop.contains("swbreak"), "{stop}");
        assert_eq!((gdb.register(RIP), gdb.register(RAX), gdb.read64(COUNT)), (STORE, count, count - 1));
        // gdb takes a breakpoint out to step over it.
        breaks_no_more(&mut gdb, 0, STORE);
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
        assert_eq!((gdb.register(RIP), gdb.read64(COUNT)), (JUMP, count));
        breaks(&mut gdb, 0, STORE);
    }
    breaks_no_more(&mut gdb, 0, STORE);
    breaks(&mut gdb, 1, LOOP);
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains("hwbreak"), "{stop}");
    assert_eq!(gdb.register(RIP), LOOP);
    breaks_no_more(&mut gdb, 1, LOOP);
    waiting.end();
}

#[test]
fn gdb_changes_registers_and_memory_and_interrupts_the_guest() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    breaks(&mut gdb, 1, LOOP);
    assert!(gdb.ask("vCont;c").contains("hwbreak"));
    breaks_no_more(&mut gdb, 1, LOOP);
    let mut registers = gdb.ask("g");
    registers.replace_range(..16, "0010000000000000");
    assert_eq!(gdb.ask(&format!("G{registers}")), "OK");
    assert_eq!(gdb.ask(&format!("M{:x},8:8877665544332211", COUNT + 8)), "OK");
    gdb.send("vCont;c");
    gdb.interrupt();
    let stop = gdb.answer();
    assert!(stop.starts_with("T02"), "{stop}");
    assert!(gdb.register(RAX) >= 0x1000);
    assert_eq!(gdb.read64(COUNT + 8), 0x1122_3344_5566_7788);
    // Beyond the page tables; in them, but beyond RAM.
    for packet in ["maaaaaaaaaaaaaaaa,8", "mb0000000,8", "Mb0000000,1:00"] {
        assert_eq!(gdb.ask(packet), "E0e", "{packet}");
    }
    // A piece that reaches beyond RAM ends with RAM; there are four debug registers; x86 watches no reads.
    assert_eq!(gdb.ask("m3fffffc,8").len(), 8);
    for (index, answer) in ["OK", "OK", "OK", "OK", "E16"].iter().enumerate() {
        assert_eq!(gdb.ask(&format!("Z1,{index:x},1")), *answer, "{index}");
    }
    assert_eq!(gdb.ask("Z3,1000,8"), "E16");
    assert_eq!(gdb.ask("Z0,b0000000,1"), "E0e", "no RAM for an instruction");
    waiting.end();
}

#[test]
fn a_packet_reads_as_much_as_an_answer_may_have() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    assert!(gdb.ask("qSupported:swbreak+").contains("PacketSize=1000"));
    assert_eq!(gdb.ask("m0,800").len(), 0x1000);
    for len in ["1001", "fffffffff", "ffffffffffffffff"] {
        assert_eq!(gdb.ask(&format!("m0,{len}")), "E16", "{len}");
    }
    waiting.end();
}

#[test]
fn a_watchpoint_stops_the_guest_or_is_refused() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    let watch = format!("Z2,{COUNT:x},8");
    if reports_watchpoints() {
        assert_eq!(gdb.ask(&watch), "OK");
        let stop = gdb.ask("vCont;c");
        assert!(stop.contains(&format!("watch:{COUNT:x};")), "{stop}");
        assert_eq!((gdb.register(RIP), gdb.read64(COUNT)), (JUMP, 1));
        waiting.end();
    } else {
        assert_eq!(gdb.ask(&watch), "E16");
        let log = waiting.end();
        let sentence = "this KVM does not report accesses to memory";
        assert!(log.contains(&format!("gdb's watchpoint at {COUNT:#x} is refused: {sentence}")), "{log}");
    }
}

#[test]
fn more_breakpoints_than_debug_registers() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    // The fifth is an instruction in RAM, and so is one that makes room for a hardware breakpoint.
    for elsewhere in 0..3 {
        breaks(&mut gdb, 0, START + 0x800 + elsewhere);
    }
    breaks(&mut gdb, 0, JUMP);
    // gdb may repeat itself.
    for _ in 0..2 {
        breaks(&mut gdb, 0, STORE);
    }
    breaks(&mut gdb, 1, LOOP);
    for (at, kind) in [(LOOP, "hwbreak"), (STORE, "swbreak"), (JUMP, "swbreak")] {
        let stop = gdb.ask("vCont;c");
        assert!(stop.contains(kind), "{stop}");
        assert_eq!(gdb.register(RIP), at);
        let kind = if kind == "hwbreak" { 1 } else { 0 };
        breaks_no_more(&mut gdb, kind, at);
        assert!(gdb.ask("vCont;s:1").starts_with("T05"));
        breaks(&mut gdb, kind, at);
    }
    for elsewhere in 0..3 {
        breaks_no_more(&mut gdb, 0, START + 0x800 + elsewhere);
    }
    assert_eq!(gdb.ask("D;1"), "OK");
    // What the guest executes is as it was.
    let mut gdb = waiting.connect();
    assert_eq!(gdb.ask(&format!("m{START:x},f")), "31c048ffc04889042500004000ebf3");
    waiting.end();
}

#[test]
fn each_vcpu_is_a_thread() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &["--cpus", "2"]);
    let mut gdb = waiting.connect();
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    // The other one waits until the first starts it.
    assert_eq!((gdb.ask("Hg2"), gdb.register(RIP)), ("OK".into(), 0xfff0));
    assert_eq!((gdb.ask("Hg1"), gdb.register(RIP)), ("OK".into(), START));
    breaks(&mut gdb, 0, STORE);
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains("thread:01"), "{stop}");
    // The other one alone: the first stays where it is.
    breaks_no_more(&mut gdb, 0, STORE);
    gdb.send("vCont;c:2");
    gdb.interrupt();
    gdb.answer();
    assert_eq!((gdb.ask("Hg1"), gdb.register(RIP), gdb.read64(COUNT)), ("OK".into(), STORE, 0));
    waiting.end();
}

#[test]
fn the_guest_goes_on_when_gdb_is_gone_and_another_may_come() {
    if !kvm::is_here() {
        return;
    }
    let waiting = Waiting::run(counter(), &["-v"]);
    let mut last = 0;
    for says_so in [true, false, true] {
        let mut gdb = waiting.connect();
        assert_eq!(gdb.ask(&format!("m{STORE:x},1")), "48", "no breakpoint of the one before");
        if gdb.register(RIP) != START {
            let count = gdb.read64(COUNT);
            assert!(count > last, "the guest went on");
            last = count;
        }
        breaks(&mut gdb, 0, STORE);
        breaks(&mut gdb, 1, LOOP);
        assert!(gdb.ask("vCont;c").starts_with("T05"));
        if says_so {
            assert_eq!(gdb.ask("D;1"), "OK");
        } else {
            drop(gdb);
        }
        let end = std::time::Instant::now() + std::time::Duration::from_millis(300);
        while std::time::Instant::now() < end {
            std::thread::yield_now();
        }
    }
    let log = waiting.end();
    assert!(log.contains("gdb has detached") && log.contains("gdb has hung up"), "{log}");
    let says = "hotslot: the guest waits for gdb: gdb -ex 'target remote ";
    assert!(log.contains(says), "{log}");
}

#[test]
fn the_machine_ends_whatever_gdb_does() {
    if !kvm::is_here() {
        return;
    }
    // Nobody has come; one has come and says nothing; the guest runs; it is stopped at a breakpoint.
    Waiting::run(counter(), &[]).end();
    let waiting = Waiting::run(counter(), &["--cpus", "2"]);
    let _silent = Gdb::connect(&waiting.socket);
    waiting.end();
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    gdb.send("vCont;c");
    waiting.end();
    let waiting = Waiting::run(counter(), &[]);
    let mut gdb = waiting.connect();
    breaks(&mut gdb, 0, STORE);
    assert!(gdb.ask("vCont;c").starts_with("T05"));
    waiting.end();
    // `kill`, and what is no protocol.
    let waiting = Waiting::run(counter(), &[]);
    waiting.connect().send("k");
    let (status, log) = waiting.guest.wait();
    assert_eq!((status.code(), log.lines().last()), (Some(SIGKILL), Some("hotslot: killed by gdb")));
    let waiting = Waiting::run(counter(), &[]);
    waiting.connect().send("Gxyz");
    waiting.guest.wait_for_log("the guest goes on");
    waiting.end();
}

#[test]
fn gdb_reads_what_a_back_end_has_mapped_and_cannot_change_it() {
    // SHM-101
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let kernel = guest::kernel();
    let waiting = Waiting::run(kernel, &["--vhost-user", &backend.device("device")]);
    waiting.connect().ask("D");
    let Waiting { mut guest, socket, _directory } = waiting;
    guest.start_device();
    let (base, _) = guest.region(0);
    let file = numbered_file(7, 1);
    assert_eq!(backend.map(page_at(1), &file), 0);
    assert_eq!(guest.read64(base + 0x1000), content(7, 0));
    let mut gdb = Gdb::connect(&socket);
    assert_eq!(gdb.read64(base + 0x1000), content(7, 0));
    assert_eq!(gdb.ask(&format!("M{:x},1:00", base + 0x1000)), "E0e");
    assert_eq!(gdb.ask(&format!("m{base:x},8")), "E0e", "a hole");
    // The back-end is served while the guest is stopped.
    assert_eq!(backend.map(page_at(2), &numbered_file(8, 1)), 0);
    assert_eq!(gdb.read64(base + 0x2000), content(8, 0));
    assert_eq!(backend.unmap(page_at(2)), 0);
    // A page without a file behind it.
    file.set_len(0).unwrap();
    assert_eq!(gdb.ask(&format!("m{:x},8", base + 0x1000)), "E0e");
    gdb.ask("D");
    guest.exit();
}

#[test]
fn an_address_that_is_in_use_is_named() {
    if !kvm::is_here() {
        return;
    }
    let kernel = counter();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a file");
    std::fs::write(&file, "contents").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    for (address, name) in [
        (port.to_string(), format!("127.0.0.1:{port}")),
        (format!("unix:{}", file.display()), file.display().to_string()),
    ] {
        let mut command = guest::command(kernel.path());
        command.args(["--gdb", &address]);
        let (status, log) = Guest::spawn(command, None).wait();
        assert_eq!(status.code(), Some(2), "{log}");
        assert!(log.contains(&format!("cannot listen for gdb on {name}: ")), "{log}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"contents");
    // A socket that is left over is replaced; it is for its user only.
    let socket = directory.path().join("socket");
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    let mut command = guest::command(kernel.path());
    command.arg("--gdb").arg(format!("unix:{}", socket.display()));
    let guest = Guest::spawn(command, None);
    Gdb::connect(&socket).ask("?");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&socket).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    Waiting { guest, socket, _directory: directory }.end();
}
