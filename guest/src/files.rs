//! The probes of a file system: what its files can do, their contents, and whether two sides of it see the
//! same.
//!
//! Called by [`crate::probe`], in a guest and on the host that shares a directory with it: busybox maps no
//! file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{
    FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom as Look, XattrFlags, getxattr, listxattr,
    removexattr, setxattr,
};
use rustix::io::Errno;
use rustix::mm::MapFlags;
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::map::{Mapping, PAGE, bus_errors, zeroes_on_bus_error};
use crate::outcome::{Outcome, failed};
use crate::parameters::number;

const MIB: usize = 1 << 20;

pub fn expect<T: PartialEq + std::fmt::Debug>(what: &str, found: T, expected: T) -> Outcome<()> {
    if found == expected { Ok(()) } else { Err(format!("{what}: {found:?} instead of {expected:?}")) }
}

/// Opens to read and write; makes the file if it is missing.
fn open(path: &Path) -> Outcome<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).map_err(failed("open", path))
}

/// All of a file, as a shared mapping.
fn map(file: &File, path: &Path, writable: bool) -> Outcome<Mapping> {
    Mapping::whole(file, path, writable, MapFlags::SHARED)
}

// ------------------------------------------------------------------------------- what files can do

type Check = fn(&Path) -> Outcome<()>;

/// Each gets a path at which there is nothing.
const CHECKS: [(&str, Check); 16] = [
    ("write", write),
    ("append", append),
    ("truncate", truncate),
    ("rename", rename),
    ("unlink", unlink),
    ("link", link),
    ("symlink", symbolic_link),
    ("xattr", attributes),
    ("flock", flock),
    ("fcntl", fcntl),
    ("mmap-shared", mmap_shared),
    ("mmap-private", mmap_private),
    ("mmap-buffer", mmap_buffer),
    ("fallocate", fallocate),
    ("sparse", sparse),
    ("program", program),
];

/// Runs each check in a directory. The files that they make stay, but for those that a check removes.
pub fn all(directory: &str) -> Outcome<String> {
    for (name, check) in CHECKS {
        check(&Path::new(directory).join(name)).map_err(|sentence| format!("{name}: {sentence}"))?;
    }
    let names = CHECKS.map(|(name, _)| name);
    Ok(format!("probe files: {}", names.join(" ")))
}

fn write(path: &Path) -> Outcome<()> {
    let text = b"made, written, read";
    fs::write(path, text).map_err(failed("write", path))?;
    let found = fs::read(path).map_err(failed("read", path))?;
    expect("what was written", found.as_slice(), text)?;
    open(path)?.write_all_at(b"WRITTEN", 6).map_err(failed("write", path))?;
    let found = fs::read(path).map_err(failed("read", path))?;
    expect("what was overwritten", found.as_slice(), b"made, WRITTEN, read")
}

fn append(path: &Path) -> Outcome<()> {
    for word in ["one", "two", "three"] {
        let mut options = OpenOptions::new();
        let mut file = options.append(true).create(true).open(path).map_err(failed("open", path))?;
        file.write_all(word.as_bytes()).map_err(failed("append to", path))?;
    }
    let found = fs::read(path).map_err(failed("read", path))?;
    expect("what was appended", found.as_slice(), b"onetwothree")
}

fn truncate(path: &Path) -> Outcome<()> {
    let file = open(path)?;
    file.write_all_at(&[7; 3 * PAGE], 0).map_err(failed("write", path))?;
    for (length, data) in [(100, 100), (2 * PAGE, 100), (PAGE, 100)] {
        file.set_len(length as u64).map_err(failed("truncate", path))?;
        let found = fs::read(path).map_err(failed("read", path))?;
        expect("the length", found.len(), length)?;
        let is_right = |(at, byte): (usize, &u8)| *byte == if at < data { 7 } else { 0 };
        expect("what is left", found.iter().enumerate().position(|pair| !is_right(pair)), None)?;
    }
    Ok(())
}

fn rename(path: &Path) -> Outcome<()> {
    let (old, directory) = (path.with_extension("old"), path.with_extension("directory"));
    fs::write(&old, "renamed").map_err(failed("write", &old))?;
    fs::write(path, "to be replaced").map_err(failed("write", path))?;
    fs::rename(&old, path).map_err(failed("rename", &old))?;
    expect("the old name", old.exists(), false)?;
    let found = fs::read(path).map_err(failed("read", path))?;
    expect("the new name", found.as_slice(), b"renamed")?;
    let moved = directory.join("file");
    fs::create_dir(&directory).map_err(failed("make", &directory))?;
    fs::rename(path, &moved).map_err(failed("move", path))?;
    let list = fs::read_dir(&directory).map_err(failed("list", &directory))?;
    let names: Vec<_> = list.flatten().map(|entry| entry.file_name()).collect();
    expect("the directory", names.as_slice(), &["file".into()])
}

/// A process can use a file that it has open and that has no name any more.
fn unlink(path: &Path) -> Outcome<()> {
    let mut file = open(path)?;
    file.write_all(b"still there").map_err(failed("write", path))?;
    fs::remove_file(path).map_err(failed("remove", path))?;
    expect("the name", path.exists(), false)?;
    let mut found = String::new();
    file.seek(SeekFrom::Start(0)).map_err(failed("seek in", path))?;
    file.read_to_string(&mut found).map_err(failed("read", path))?;
    expect("what is in it", found.as_str(), "still there")
}

fn link(path: &Path) -> Outcome<()> {
    let other = path.with_extension("other");
    fs::write(path, "linked").map_err(failed("write", path))?;
    fs::hard_link(path, &other).map_err(failed("link", path))?;
    fs::write(&other, "one file").map_err(failed("write", &other))?;
    let found = fs::read(path).map_err(failed("read", path))?;
    expect("what is in it", found.as_slice(), b"one file")?;
    let metadata = fs::metadata(path).map_err(failed("look at", path))?;
    expect("its names", metadata.nlink(), 2)
}

fn symbolic_link(path: &Path) -> Outcome<()> {
    let target = path.with_extension("target");
    fs::write(&target, "at the other end").map_err(failed("write", &target))?;
    symlink("symlink.target", path).map_err(failed("make", path))?;
    let text = fs::read_link(path).map_err(failed("read", path))?;
    expect("the target", text, PathBuf::from("symlink.target"))?;
    let found = fs::read(path).map_err(failed("read through", path))?;
    expect("what is there", found.as_slice(), b"at the other end")
}

const NAME: &str = "user.hotslot";

fn attributes(path: &Path) -> Outcome<()> {
    fs::write(path, "").map_err(failed("write", path))?;
    let value = b"a value";
    let set = || setxattr(path, NAME, value, XattrFlags::CREATE);
    set().map_err(failed("set an attribute of", path))?;
    expect("the same again", set(), Err(Errno::EXIST))?;
    expect("its value", attribute(path, NAME)?.as_slice(), value)?;
    let mut names = [0; 256];
    let length = listxattr(path, &mut names).map_err(failed("list the attributes of", path))?;
    let is_listed = names[..length].split(|byte| *byte == 0).any(|listed| listed == NAME.as_bytes());
    expect("whether it is listed", is_listed, true)?;
    const REMOVED: &str = "user.removed";
    setxattr(path, REMOVED, b"a", XattrFlags::empty()).map_err(failed("set an attribute of", path))?;
    removexattr(path, REMOVED).map_err(failed("remove an attribute of", path))?;
    expect("whether a removed one is there", attribute(path, REMOVED).is_ok(), false)
}

fn attribute(path: &Path, name: &str) -> Outcome<Vec<u8>> {
    let mut value = vec![0; 256];
    let length = getxattr(path, name, &mut value[..]).map_err(failed("read an attribute of", path))?;
    value.truncate(length);
    Ok(value)
}

/// Prints an extended attribute.
pub fn xattr(file: &str, name: &str) -> Outcome<String> {
    let value = attribute(Path::new(file), name)?;
    Ok(format!("probe xattr: {}", String::from_utf8_lossy(&value)))
}

/// What another process finds.
pub fn in_another_process(look: impl FnOnce() -> bool) -> Outcome<bool> {
    // SAFETY: this program has one thread here; the child ends without returning.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let status = if look() { 0 } else { 1 };
        // SAFETY: it ends the child, whose memory is a copy.
        unsafe { libc::_exit(status) };
    }
    let ended = match Pid::from_raw(child).filter(|_| child > 0) {
        Some(child) => waitpid(Some(child), WaitOptions::empty()).map_err(io::Error::from),
        None => Err(io::Error::last_os_error()),
    };
    let ended = ended.map_err(|error| format!("cannot run another process: {error}"))?;
    Ok(ended.is_some_and(|(_, status)| status.exit_status() == Some(0)))
}

fn flock(path: &Path) -> Outcome<()> {
    let file = open(path)?;
    let get = || {
        open(path)
            .is_ok_and(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok())
    };
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(failed("lock", path))?;
    expect("whether another process gets it, too", in_another_process(get)?, false)?;
    rustix::fs::flock(&file, FlockOperation::Unlock).map_err(failed("unlock", path))?;
    expect("whether it does afterwards", in_another_process(get)?, true)
}

/// A lock of 100 bytes, or its release; `command` is F_SETLK or F_SETLKW.
fn lock_record(file: &File, command: libc::c_int, kind: libc::c_int, start: i64) -> io::Result<()> {
    // SAFETY: plain data, of which all zeroes is a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (kind as libc::c_short, start, 100);
    // SAFETY: the structure is ours and outlives the call; the descriptor is open.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn fcntl(path: &Path) -> Outcome<()> {
    let file = open(path)?;
    let lock = |file: &File, kind, start| lock_record(file, libc::F_SETLK, kind, start);
    let get = |start| move || open(path).is_ok_and(|file| lock(&file, libc::F_WRLCK, start).is_ok());
    lock(&file, libc::F_WRLCK, 1000).map_err(failed("lock", path))?;
    expect("whether another process gets a part", in_another_process(get(1050))?, false)?;
    expect("whether it gets another part", in_another_process(get(1100))?, true)?;
    lock(&file, libc::F_UNLCK, 1000).map_err(failed("unlock", path))?;
    expect("whether it does afterwards", in_another_process(get(1050))?, true)
}

fn byte_at(file: &File, path: &Path, at: usize) -> Outcome<u8> {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).map_err(failed("read", path))?;
    Ok(byte[0])
}

/// Two mappings and the file are one thing, whichever is written, to the last byte.
fn mmap_shared(path: &Path) -> Outcome<()> {
    const LENGTH: usize = 3 * MIB + 123;
    let file = open(path)?;
    file.set_len(LENGTH as u64).map_err(failed("extend", path))?;
    let (one, two) = (map(&file, path, true)?, map(&file, path, false)?);
    for (number, at) in [0, PAGE + 1, 2 * MIB - 1, 2 * MIB, LENGTH - 1].into_iter().enumerate() {
        let byte = number as u8 + 1;
        one.store(at, byte);
        expect("the other mapping", two.load(at), byte)?;
        expect("the file", byte_at(&file, path, at)?, byte)?;
        file.write_all_at(&[byte + 100], at as u64).map_err(failed("write", path))?;
        expect("the mapping", one.load(at), byte + 100)?;
    }
    one.synchronise().map_err(failed("synchronise", path))?;
    file.sync_all().map_err(failed("synchronise", path))
}

/// A mapping is the buffer of `write` to a new file, and of `read`.
fn mmap_buffer(path: &Path) -> Outcome<()> {
    const LENGTH: usize = 2 * MIB + 123;
    let pattern: Vec<u8> = (0..LENGTH).map(|at| (at % 251) as u8).collect();
    fs::write(path, &pattern).map_err(failed("write", path))?;
    let file = open(path)?;
    let mapping = map(&file, path, true)?;
    let copy_path = path.with_extension("copy");
    for start in [0, 2 * MIB - PAGE - 1, LENGTH - 5] {
        fs::write(&copy_path, b"").map_err(failed("empty", &copy_path))?;
        let mut copy = open(&copy_path)?;
        let mut at = start;
        while at < LENGTH {
            match mapping.write_to(&copy, at).map_err(failed("write out of a mapping to", &copy_path))? {
                0 => return Err(format!("a write out of a mapping wrote nothing at {at}")),
                count => at += count,
            }
        }
        let found = fs::read(&copy_path).map_err(failed("read", &copy_path))?;
        if found != pattern[start..] {
            return Err(format!("what was written out of a mapping from {start} on is something else"));
        }
        // Back, to another place of the file.
        copy.rewind().map_err(failed("seek in", &copy_path))?;
        let count = mapping.fill_from(&copy, LENGTH - found.len()).map_err(failed("read into", path))?;
        expect("the bytes read into a mapping", count, found.len())?;
        if fs::read(path).map_err(failed("read", path))? != pattern {
            return Err("what was read into a mapping is something else".to_string());
        }
    }
    Ok(())
}

/// What is written to a private mapping stays there.
fn mmap_private(path: &Path) -> Outcome<()> {
    let file = open(path)?;
    file.write_all_at(&[1; 2 * PAGE], 0).map_err(failed("write", path))?;
    let private = Mapping::whole(&file, path, true, MapFlags::PRIVATE)?;
    private.store(10, 2_u8);
    expect("the mapping", (private.load::<u8>(10), private.load::<u8>(11)), (2, 1))?;
    expect("the file", byte_at(&file, path, 10)?, 1)?;
    file.write_all_at(&[3], PAGE as u64).map_err(failed("write", path))?;
    expect("a page not written yet", private.load::<u8>(PAGE), 3)
}

fn fallocate(path: &Path) -> Outcome<()> {
    let file = open(path)?;
    let allocate = |mode, start, length| {
        rustix::fs::fallocate(&file, mode, start, length).map_err(failed("allocate", path))
    };
    let size = || {
        let metadata = file.metadata().map_err(failed("look at", path))?;
        Outcome::Ok((metadata.len(), metadata.blocks() * 512))
    };
    let (page, mib) = (PAGE as u64, MIB as u64);
    allocate(FallocateFlags::empty(), 0, mib)?;
    let (length, allocated) = size()?;
    expect("the length", length, mib)?;
    expect("whether there are blocks for it", allocated >= mib, true)?;
    allocate(FallocateFlags::KEEP_SIZE, mib, mib)?;
    expect("the length", size()?.0, mib)?;
    file.write_all_at(&[9; MIB], 0).map_err(failed("write", path))?;
    let mapping = map(&file, path, true)?;
    expect("a byte of the mapping", mapping.load::<u8>(PAGE), 9)?;
    allocate(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, page, page)?;
    for (at, expected) in [(PAGE - 1, 9), (PAGE, 0), (2 * PAGE - 1, 0), (2 * PAGE, 9)] {
        expect("around the hole", byte_at(&file, path, at)?, expected)?;
        expect("around the hole, mapped", mapping.load(at), expected)?;
    }
    Ok(())
}

/// Holes are holes, are found, and read as zeroes; one that is written through a mapping is none any more.
fn sparse(path: &Path) -> Outcome<()> {
    const LENGTH: usize = 64 * MIB;
    let file = open(path)?;
    file.set_len(LENGTH as u64).map_err(failed("extend", path))?;
    let mapping = map(&file, path, true)?;
    expect("a hole", byte_at(&file, path, 40 * MIB)?, 0)?;
    mapping.store(32 * MIB, 1_u8);
    let blocks = file.metadata().map_err(failed("look at", path))?.blocks();
    // One page, or a huge one; none where attributes are remembered for a while.
    expect("whether it is mostly holes", blocks <= 2 * MIB as u64 / 512, true)?;
    let seek = |what| rustix::fs::seek(&file, what);
    let data = seek(Look::Data(0)).map_err(failed("look for data in", path))?;
    let hole = seek(Look::Hole(32 * MIB as u64)).map_err(failed("look for a hole in", path))?;
    expect("where data begin", data as usize / (2 * MIB), 16)?;
    expect("whether they end", (hole as usize) < 34 * MIB + 1, true)?;
    // Last: some file systems give a hole a page when a mapping of it is read.
    expect("a hole, mapped", mapping.load::<u8>(0), 0)
}

/// A program that runs is not opened for writing, and the attempt leaves it as it is.
fn program(path: &Path) -> Outcome<()> {
    fs::copy("/proc/self/exe", path).map_err(failed("write", path))?;
    let length = || fs::metadata(path).map(|metadata| metadata.len()).map_err(failed("look at", path));
    let before = length()?;
    let mut running = Command::new(path)
        .args(["probe", "watch"])
        .arg(path)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .map_err(failed("run", path))?;
    let attempts = [OFlags::WRONLY, OFlags::RDONLY | OFlags::TRUNC]
        .map(|flags| rustix::fs::open(path, flags, Mode::empty()).err());
    let after = length();
    // The end of its input is its end.
    let status = running.wait().map_err(failed("wait for", path))?;
    expect("what becomes of an open for writing", attempts, [Some(Errno::TXTBSY); 2])?;
    expect("its length", after?, before)?;
    expect("whether it ran to its end", status.success(), true)
}

// ------------------------------------------------------------------------------- what is in them

/// A word of a filled file, by its number: no two places are alike, and no page begins with a zero.
fn content(word: u64) -> u64 {
    let mixed = (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed ^ mixed >> 32) | 1
}

/// Fills a file with words that depend on their place alone.
pub fn fill(file: &str, mib: &str) -> Outcome<String> {
    let path = Path::new(file);
    let count = number(mib).ok_or_else(|| format!("{mib} is not a number of MiB"))?;
    let file = open(path)?;
    let mut bytes = vec![0; MIB];
    for mib in 0..count {
        let first = mib * (MIB as u64 / 8);
        for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&content(first + index as u64).to_le_bytes());
        }
        file.write_all_at(&bytes, mib * MIB as u64).map_err(failed("write", path))?;
    }
    Ok(format!("probe fill: {count} MiB"))
}

/// A sum in which each word counts, and where it is. It takes a multiplication for 8 bytes: emulated
/// processors are slow.
fn add(sum: u64, word: u64) -> u64 {
    (sum.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Reads a file to its end, or through a mapping of all of it; prints its sum and how long it took.
pub fn sum(file: &str, mapped: bool) -> Outcome<String> {
    let path = Path::new(file);
    let mut file = File::open(path).map_err(failed("open", path))?;
    let began = Instant::now();
    let (mut sum, mut length) = (0, 0);
    if mapped {
        let mapping = map(&file, path, false)?;
        length = mapping.len();
        sum = mapping.words().fold(sum, add);
    } else {
        let mut bytes = vec![0; MIB];
        loop {
            let count = file.read(&mut bytes).map_err(failed("read", path))?;
            if count == 0 {
                break;
            }
            length += count;
            for word in bytes[..count].chunks_exact(8) {
                sum = add(sum, u64::from_le_bytes(word.try_into().unwrap_or_default()));
            }
        }
    }
    Ok(format!("probe sum: {sum:016x} of {length} bytes in {} ms", began.elapsed().as_millis()))
}

/// Reads 64 bytes of a file, or flushes it, so often: each is a request of the device behind it.
pub fn requests(path: &str, times: &str, flush: bool) -> Outcome<String> {
    let path = Path::new(path);
    let times = number(times).ok_or_else(|| format!("{times} is no number"))?;
    let mut file = OpenOptions::new().read(true).write(flush).open(path).map_err(failed("open", path))?;
    for _ in 0..times {
        if flush {
            file.sync_all().map_err(failed("flush", path))?;
        } else {
            file.read_exact(&mut [0; 64]).map_err(failed("read", path))?;
        }
    }
    Ok(format!("probe requests: {times}"))
}

/// Maps a file and prints how many of its pages are data, how many zeroes, how many raised SIGBUS; then does
/// so again, through the same mapping, at each line of standard input, until its end or an empty line.
pub fn watch(file: &str) -> Outcome<String> {
    let path = Path::new(file);
    let file = File::open(path).map_err(failed("open", path))?;
    let mapping = map(&file, path, false)?;
    zeroes_on_bus_error();
    let mut lines = io::stdin().lock().lines();
    loop {
        let before = bus_errors();
        let (mut data, mut zero, mut bus) = (0, 0, before);
        for at in (0..mapping.len()).step_by(PAGE) {
            let byte: u8 = mapping.load(at);
            match bus_errors() {
                now if now > bus => bus = now,
                _ if byte == 0 => zero += 1,
                _ => data += 1,
            }
        }
        println!("watch: {data} with data, {zero} with zeroes, {} bus errors", bus - before);
        match lines.next() {
            Some(Ok(line)) if !line.is_empty() => {}
            _ => return Ok("probe watch: the end".to_owned()),
        }
    }
}

// ------------------------------------------------------------------------------- two sides

/// How often the sides of `turns` take turns, and how long one waits for the other.
const TURNS: u64 = 1000;
const TURN_LIMIT: Duration = Duration::from_secs(60);

/// Two sides count in one page of a file that both have mapped, in turns: each sees at once what the other
/// stores, and neither makes a system call for it.
pub fn turns(file: &str, is_first: bool) -> Outcome<String> {
    let path = Path::new(file);
    let file = open(path)?;
    file.set_len(PAGE as u64).map_err(failed("resize", path))?;
    let mapping = map(&file, path, true)?;
    let counter = mapping.atomic_u64(0);
    let end = Instant::now() + TURN_LIMIT;
    for turn in 0..TURNS {
        let mine = 2 * turn + if is_first { 0 } else { 1 };
        while counter.load(Ordering::Acquire) != mine {
            if Instant::now() > end {
                let found = counter.load(Ordering::Acquire);
                return Err(format!("{}: {found} after {TURN_LIMIT:?}, waiting for {mine}", path.display()));
            }
            std::thread::yield_now();
        }
        counter.store(mine + 1, Ordering::Release);
    }
    Ok(format!("probe turns: {TURNS}"))
}

/// Says whether another process has locked a file by flock(2), and whether by fcntl(2).
pub fn locked(file: &str) -> Outcome<String> {
    let path = Path::new(file);
    let file = open(path)?;
    let whole = rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    let record = lock_record(&file, libc::F_SETLK, libc::F_WRLCK, 0).is_err();
    Ok(format!("probe locked: {whole} {record}"))
}

/// Waits for a file's locks, both kinds of them, and has them while a line for the shell runs.
pub fn with_lock(file: &str, line: &str) -> Outcome<String> {
    let path = Path::new(file);
    let file = open(path)?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(failed("lock", path))?;
    lock_record(&file, libc::F_SETLKW, libc::F_WRLCK, 0).map_err(failed("lock a part of", path))?;
    let status = Command::new("sh").args(["-c", line]).status();
    let status = status.map_err(|error| format!("cannot run the shell: {error}"))?;
    expect("whether the line succeeds", status.success(), true)?;
    Ok("probe with-lock: done".to_owned())
}

/// Writes a whole file to the beginning of a disk, or reads it from there, past the page cache: the disk
/// reads and writes the memory into which the file is mapped.
pub fn direct(file: &str, disk: &str, to_disk: bool) -> Outcome<String> {
    let (path, disk_path) = (Path::new(file), Path::new(disk));
    let file = open(path)?;
    let mapping = map(&file, path, true)?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let disk = options.open(disk_path).map_err(failed("open", disk_path))?;
    let mut done = 0;
    while done < mapping.len() {
        let (what, count) = match to_disk {
            true => ("write", mapping.write_to(&disk, done)),
            false => ("read", mapping.fill_from(&disk, done)),
        };
        match count.map_err(failed(what, disk_path))? {
            0 => return Err(format!("{} ends at {done} bytes", disk_path.display())),
            count => done += count,
        }
    }
    Ok(format!("probe direct: {done} bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What this machine's own file system does is what the probe expects of any.
    #[test]
    fn a_file_system_that_works_passes() {
        let directory = std::env::temp_dir().join(format!("hotslot-files-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let outcome = all(directory.to_str().unwrap());
        let file = directory.join("filled");
        let name = file.to_str().unwrap();
        let filled = fill(name, "2").unwrap();
        let sums = [sum(name, false).unwrap(), sum(name, true).unwrap()];
        fs::remove_dir_all(&directory).unwrap();
        assert!(outcome.unwrap().ends_with("sparse program"));
        assert_eq!(filled, "probe fill: 2 MiB");
        let value = |line: &String| line.split(" in ").next().unwrap().to_owned();
        assert_eq!(value(&sums[0]), value(&sums[1]));
    }
}
