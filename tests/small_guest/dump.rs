//! Core files of a machine (`--dump`), by the bytes that elf(5) and Linux' `struct elf_prstatus` say.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::Path;

use hotslot_test_support::guest::{self, Guest};
use hotslot_test_support::image::{self, Segment};
use hotslot_test_support::kvm;
use rustix::process::{Resource, Rlimit, setrlimit};

const MIB: u64 = 1 << 20;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// The words of a program header.
const TYPE: usize = 0;
const OFFSET: usize = 1;
const VIRTUAL: usize = 2;
const PHYSICAL: usize = 3;
const LEN: usize = 4;

/// A core file.
struct Core {
    file: File,
    /// Program headers, as words of 8 bytes.
    headers: Vec<[u64; 7]>,
}

impl Core {
    fn read(path: &Path) -> Core {
        let file = File::open(path).unwrap();
        let mut header = [0; 64];
        file.read_exact_at(&mut header, 0).unwrap();
        assert_eq!(header[..7], [0x7f, b'E', b'L', b'F', 2, 1, 1]);
        assert_eq!(header[16..20], [4, 0, 62, 0], "ET_CORE, EM_X86_64");
        assert_eq!((header[32], header[54]), (64, 56));
        let count = u16::from_le_bytes([header[56], header[57]]);
        let core = Core { file, headers: Vec::new() };
        let headers = (0..u64::from(count)).map(|index| core.words(64 + index * 56)).collect();
        Core { headers, ..core }
    }

    fn words<const N: usize>(&self, offset: u64) -> [u64; N] {
        let mut bytes = vec![0; N * 8];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        std::array::from_fn(|index| u64::from_le_bytes(bytes[index * 8..][..8].try_into().unwrap()))
    }

    /// A word of memory, at an address of this kind.
    fn memory(&self, kind: usize, address: u64) -> u64 {
        let is_there = |header: &&[u64; 7]| {
            let start = header[kind];
            header[TYPE] as u32 == PT_LOAD as u32 && (start..start + header[LEN]).contains(&address)
        };
        let header = self.headers.iter().find(is_there).expect("the address is in the core");
        let [word] = self.words(header[OFFSET] + address - header[kind]);
        word
    }

    /// The registers of each vCPU: `struct user_regs_struct`.
    fn registers(&self) -> Vec<[u64; 27]> {
        let [.., notes] = [self.headers[0]];
        assert_eq!(notes[TYPE] as u32, PT_NOTE as u32);
        let (mut at, end) = (notes[OFFSET], notes[OFFSET] + notes[LEN]);
        let mut registers = Vec::new();
        while at < end {
            let mut head = [0; 20];
            self.file.read_exact_at(&mut head, at).unwrap();
            let word = |at: usize| u64::from(u32::from_le_bytes(head[at..][..4].try_into().unwrap()));
            let (name_len, len, kind) = (word(0), word(4), word(8));
            let content = at + 12 + name_len.next_multiple_of(4);
            if kind == 1 && head[12..].starts_with(b"CORE\0") {
                assert_eq!(len, 336);
                registers.push(self.words(content + 112));
            }
            at = content + len.next_multiple_of(4);
        }
        registers
    }
}

/// Of `struct user_regs_struct`.
const RAX: usize = 10;
const RIP: usize = 16;

#[test]
fn sigusr2_writes_a_core_and_the_guest_goes_on() {
    if !kvm::is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("core");
    let mut guest = Guest::boot(["--cpus", "2", "--dump", path.to_str().unwrap()]);
    for round in 1..3u64 {
        guest.write64(24 * MIB, round << 32 | 0x1234);
        guest.signal(libc::SIGUSR2);
        let said = "hotslot: the dump is written: ";
        guest_said(&guest, said, round as usize);
        // It was paused, and goes on.
        assert_eq!(guest.read64(24 * MIB), round << 32 | 0x1234);
        let core = Core::read(&path);
        for kind in [PHYSICAL, VIRTUAL] {
            assert_eq!(core.memory(kind, 24 * MIB), round << 32 | 0x1234);
        }
        let registers = core.registers();
        assert_eq!(registers.len(), 2);
        assert!((MIB..2 * MIB).contains(&registers[0][RIP]), "{:#x}", registers[0][RIP]);
        assert_eq!(registers[1][RIP], 0xfff0);
    }
    // What the guest has never touched takes no place.
    let file = fs::metadata(&path).unwrap();
    assert_eq!(file.mode() & 0o777, 0o600);
    assert!(file.len() > 64 * MIB && file.blocks() * 512 < 4 * MIB, "{file:?}");
    guest.exit();
}

/// Waits until hotslot has said something so often.
fn guest_said(guest: &Guest, text: &str, times: usize) {
    hotslot_test_support::wait::eventually(text, || guest.log().matches(text).count() == times);
}

#[test]
fn a_crash_and_a_panic_leave_a_core_and_other_ends_do_not() {
    if !kvm::is_here() {
        return;
    }
    // mov eax, 0x1234; mov [4 MiB], rax; ud2, for which nothing is prepared.
    let crash = [0xb8, 0x34, 0x12, 0, 0, 0x48, 0x89, 0x04, 0x25, 0, 0, 0x40, 0, 0x0f, 0x0b];
    // pvpanic: out 0x505, al (in dx) with 1.
    let panic = [0x66, 0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xeb, 0xfe];
    let directory = tempfile::tempdir().unwrap();
    for (code, status) in [(&crash[..], 33), (&panic, 34)] {
        let start = 2 * MIB;
        let segments = [Segment::new(start, code), Segment::new(4 * MIB, &[0; 8])];
        let kernel = image::kernel(&image::elf(start, &segments));
        let path = directory.path().join(status.to_string());
        let mut command = guest::command(kernel.path());
        command.arg("--dump").arg(&path);
        let (code, log) = Guest::spawn(command, Some(kernel)).wait();
        assert_eq!(code.code(), Some(status), "{log}");
        let core = Core::read(&path);
        let registers = core.registers()[0];
        assert!((start..start + 16).contains(&registers[RIP]), "{:#x}", registers[RIP]);
        if status == 33 {
            assert_eq!((registers[RAX], core.memory(VIRTUAL, 4 * MIB)), (0x1234, 0x1234));
        }
    }
    let path = directory.path().join("none");
    fs::write(&path, "an earlier dump").unwrap();
    Guest::boot(["--dump", path.to_str().unwrap()]).exit();
    assert_eq!(fs::read(&path).unwrap(), b"an earlier dump");
}

#[test]
fn a_dump_that_cannot_be_written_is_said_and_changes_nothing_else() {
    if !kvm::is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("core");
    let kernel = guest::kernel();
    let mut command = guest::command(kernel.path());
    command.arg("--dump").arg(&path);
    // Room for guest memory, which is a file, too, but not for more.
    let limit = Rlimit { current: Some(64 * MIB), maximum: None };
    // SAFETY: it makes one system call.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Fsize, limit)?)) };
    let mut guest = Guest::spawn(command, Some(kernel));
    guest.write64(24 * MIB, 5);
    guest.signal(libc::SIGUSR2);
    guest.wait_for_log("hotslot: cannot write the dump ");
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(guest.read64(24 * MIB), 5);
    guest.exit();
}

#[test]
fn what_is_no_place_for_a_dump_is_refused() {
    if !kvm::is_here() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let _reader = File::options().read(true).write(true).open(&fifo).unwrap();
    let missing = directory.path().join("missing/core");
    for (path, why) in [(fifo.as_path(), "not a regular file"), (&missing, "No such file")] {
        let kernel = guest::kernel();
        let mut command = guest::command(kernel.path());
        command.arg("--dump").arg(path);
        let (status, log) = Guest::spawn(command, Some(kernel)).wait();
        assert_eq!(status.code(), Some(2), "{log}");
        let said = format!("cannot use {} for a dump: ", path.display());
        assert!(log.contains(&said) && log.contains(why), "{log}");
    }
}
