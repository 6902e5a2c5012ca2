//! What tests run inside the guest to look at the machine from there. Each probe prints what it found, in one
//! line, and ends with 0; or says on standard error what is wrong, and ends with 1 (2: called wrongly).

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::process::ExitCode;

use crate::parameters::number;
use crate::{Outcome, files, hammer, speed};

const USAGE: &str = "usage: probe memory | cpus | pmem-write FILE TEXT | mem-read ADDRESS LENGTH | \
                     mem-write ADDRESS HEX-BYTES | hammer ADDRESS ADDRESS | panic | files DIR | fill FILE MIB | \
                     sum FILE read|map | watch FILE | turns FILE first|second | direct FILE DISK write|read | \
                     xattr FILE NAME | speed memory MIB | speed mapped|read|pages FILE";

/// The size of a page on x86_64.
pub const PAGE: usize = 4096;

/// Runs one probe.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let words: Vec<String> = arguments.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["memory"] => memory(),
        ["cpus"] => cpus(),
        ["pmem-write", file, text] => pmem_write(file, text),
        ["mem-read", address, length] => mem_read(address, length),
        ["mem-write", address, bytes] => mem_write(address, bytes),
        ["hammer", window, board] => hammer(window, board),
        ["panic"] => panic_kernel(),
        ["files", directory] => files::all(directory),
        ["fill", file, mib] => files::fill(file, mib),
        ["sum", file, how @ ("read" | "map")] => files::sum(file, *how == "map"),
        ["watch", file] => files::watch(file),
        ["turns", file, who @ ("first" | "second")] => files::turns(file, *who == "first"),
        ["direct", file, disk, how @ ("write" | "read")] => files::direct(file, disk, *how == "write"),
        ["xattr", file, name] => files::xattr(file, name),
        ["speed", "memory", mib] => speed::memory(mib),
        ["speed", "mapped", file] => speed::mapped(file),
        ["speed", "read", file] => speed::read(file),
        ["speed", "pages", file] => speed::first_pages(file),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(line) => {
            println!("{line}");
            ExitCode::SUCCESS
        }
        Err(sentence) => {
            eprintln!("probe: {sentence}");
            ExitCode::FAILURE
        }
    }
}

/// Memory of this process, or of the machine, mapped until this value is dropped.
pub struct Mapping {
    pub start: *mut u8,
    pub length: usize,
}

impl Mapping {
    /// `mmap` to read and write, wherever the kernel wants it; without a file, anonymous.
    pub fn new(length: usize, flags: libc::c_int, file: Option<(&File, i64)>) -> io::Result<Mapping> {
        Mapping::with(libc::PROT_READ | libc::PROT_WRITE, length, flags, file)
    }

    /// The same with the protection that is given.
    pub fn with(
        protection: libc::c_int,
        length: usize,
        flags: libc::c_int,
        file: Option<(&File, i64)>,
    ) -> io::Result<Mapping> {
        let (descriptor, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing of ours.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, descriptor, offset) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Mapping { start: start.cast(), length })
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

/// Writes and verifies a pattern in every page that the kernel has to give.
fn memory() -> Outcome<String> {
    const MIB: usize = 1 << 20;
    const CHUNK: usize = 16 * MIB;
    /// Left to the kernel: page tables of what we take (1/512), and its own needs.
    const MARGIN: usize = 24 * MIB;
    let available = available_memory()?;
    let wanted = available.saturating_sub(MARGIN + available / 64) / CHUNK;
    let mut chunks = Vec::new();
    for _ in 0..wanted {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        chunks.push(
            Mapping::new(CHUNK, flags, None)
                .map_err(|error| format!("cannot take {CHUNK} bytes: {error}"))?,
        );
    }
    let pages = || {
        let starts = chunks
            .iter()
            .flat_map(|chunk| (0..CHUNK / PAGE).map(|page| chunk.start.wrapping_add(page * PAGE)));
        starts.enumerate()
    };
    // Its number at each end of the page, differently, so that neither a page seen twice nor one cut short
    // passes.
    let pattern = |page: usize| (page as u64 ^ 0x9e37_79b9_7f4a_7c15, !(page as u64));
    const LAST: usize = PAGE / 8 - 1;
    for (page, start) in pages() {
        let words = start.cast::<u64>();
        // SAFETY: the page lies in a mapping that `chunks` owns; both words lie in the page, aligned.
        unsafe {
            words.write_volatile(pattern(page).0);
            words.add(LAST).write_volatile(pattern(page).1);
        }
    }
    for (page, start) in pages() {
        let words = start.cast::<u64>();
        // SAFETY: as above.
        let found = unsafe { (words.read_volatile(), words.add(LAST).read_volatile()) };
        if found != pattern(page) {
            return Err(format!("page {page} reads {found:x?} instead of {:x?}", pattern(page)));
        }
    }
    Ok(format!("probe memory: {} MiB written and verified", chunks.len() * CHUNK / MIB))
}

/// Bytes that can be taken without driving the kernel into a corner.
fn available_memory() -> Outcome<usize> {
    let text =
        fs::read_to_string("/proc/meminfo").map_err(|error| format!("cannot read /proc/meminfo: {error}"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|value| value.trim().strip_suffix(" kB"))
        .and_then(|value| value.trim().parse::<usize>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| "/proc/meminfo has no MemAvailable".to_owned())
}

/// Runs on every processor that is online.
fn cpus() -> Outcome<String> {
    const ONLINE: &str = "/sys/devices/system/cpu/online";
    let text = fs::read_to_string(ONLINE).map_err(|error| format!("cannot read {ONLINE}: {error}"))?;
    let list = cpu_list(text.trim()).ok_or_else(|| format!("{ONLINE} reads {text:?}"))?;
    list.iter().try_for_each(|cpu| run_on(*cpu))?;
    Ok(format!("probe cpus: {} ran", list.len()))
}

/// From now on this thread runs on this processor.
pub fn run_on(cpu: usize) -> Outcome<()> {
    // SAFETY: the set is plain data, ours, and outlives the call; 0 names this thread.
    let (result, now) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        (libc::sched_setaffinity(0, size_of_val(&set), &raw const set), libc::sched_getcpu())
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        return Err(format!("cannot move to processor {cpu}: {error}"));
    }
    if usize::try_from(now) != Ok(cpu) {
        return Err(format!("asked for processor {cpu}, running on {now}"));
    }
    Ok(())
}

/// The kernel's notation for a set of processors, such as `0-3,5`.
fn cpu_list(text: &str) -> Option<Vec<usize>> {
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= libc::CPU_SETSIZE as usize {
            return None;
        }
        list.extend(first..=last);
    }
    Some(list)
}

/// Writes `text` into the first page of `path` through a shared mapping, a synchronous one if the file system
/// can.
fn pmem_write(path: &str, text: &str) -> Outcome<String> {
    let failed = |what: &'static str| move |error: io::Error| format!("cannot {what} {path}: {error}");
    if text.len() > PAGE {
        return Err(format!("{} bytes do not fit in a page of {PAGE}", text.len()));
    }
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).open(path).map_err(failed("open"))?;
    file.set_len(PAGE as u64).map_err(failed("resize"))?;
    let synchronous = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
    let (mapping, how) = match Mapping::new(PAGE, synchronous, Some((&file, 0))) {
        Ok(mapping) => (mapping, "MAP_SYNC"),
        Err(_) => {
            (Mapping::new(PAGE, libc::MAP_SHARED, Some((&file, 0))).map_err(failed("map"))?, "MAP_SHARED")
        }
    };
    // SAFETY: the text fits in the page (checked above), and the mapping is ours until the end of the
    // function.
    let result = unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), mapping.start, text.len());
        libc::msync(mapping.start.cast(), PAGE, libc::MS_SYNC)
    };
    if result != 0 {
        return Err(failed("synchronise")(io::Error::last_os_error()));
    }
    drop(mapping);
    file.sync_all().map_err(failed("synchronise"))?;
    Ok(format!("probe pmem-write: {} bytes by {how}", text.len()))
}

/// Physical memory through /dev/mem: the mapping, and the first wanted byte in it.
pub fn map_physical(address: u64, length: usize) -> Outcome<(Mapping, *mut u8)> {
    let address = i64::try_from(address).map_err(|_| format!("{address:#x} is no physical address"))?;
    let inside = address as usize % PAGE;
    let failed = |error: io::Error| {
        format!(
            "cannot map {length} bytes at {address:#x} through /dev/mem: {error} (the kernel allows neither RAM nor a driver's memory)"
        )
    };
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).open("/dev/mem").map_err(failed)?;
    let whole = (inside + length).next_multiple_of(PAGE);
    let mapping =
        Mapping::new(whole, libc::MAP_SHARED, Some((&file, address - inside as i64))).map_err(failed)?;
    let first = mapping.start.wrapping_add(inside);
    Ok((mapping, first))
}

fn physical(address: &str) -> Outcome<u64> {
    number(address).ok_or_else(|| format!("{address} is no physical address"))
}

fn hammer(window: &str, board: &str) -> Outcome<String> {
    hammer::hammer(physical(window)?, physical(board)?)
}

/// The widest access that an address and a length allow in one piece: a device's register is read at once.
fn access_width(first: *const u8, length: usize) -> usize {
    match length {
        2 | 4 | 8 if first.align_offset(length) == 0 => length,
        _ => 1,
    }
}

/// Reads physical memory, in one access when the length is 1, 2, 4 or 8 and aligned; prints its bytes in hex.
fn mem_read(address: &str, length: &str) -> Outcome<String> {
    let length = number(length)
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| (1..=1 << 20).contains(length))
        .ok_or_else(|| format!("{length} is no length from 1 to 1 MiB"))?;
    let (mapping, first) = map_physical(physical(address)?, length)?;
    // SAFETY: `length` bytes from `first` lie in `mapping`, which lives to the end of the function; the wide
    // accesses are aligned, as `access_width` promises.
    let bytes = unsafe {
        match access_width(first, length) {
            2 => first.cast::<u16>().read_volatile().to_le_bytes().to_vec(),
            4 => first.cast::<u32>().read_volatile().to_le_bytes().to_vec(),
            8 => first.cast::<u64>().read_volatile().to_le_bytes().to_vec(),
            _ => (0..length).map(|index| first.add(index).read_volatile()).collect(),
        }
    };
    drop(mapping);
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes physical memory, in one access when the length is 1, 2, 4 or 8 and aligned.
fn mem_write(address: &str, hex: &str) -> Outcome<String> {
    let bytes = hex_bytes(hex).ok_or_else(|| format!("{hex:?} is no string of bytes in hex"))?;
    let (mapping, first) = map_physical(physical(address)?, bytes.len())?;
    // SAFETY: as in `mem_read`; whoever runs this probe answers for what lies at that address.
    unsafe {
        match (access_width(first, bytes.len()), bytes.as_slice()) {
            (2, &[a, b]) => first.cast::<u16>().write_volatile(u16::from_le_bytes([a, b])),
            (4, &[a, b, c, d]) => first.cast::<u32>().write_volatile(u32::from_le_bytes([a, b, c, d])),
            (8, &[a, b, c, d, e, f, g, h]) => {
                first.cast::<u64>().write_volatile(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => bytes.iter().enumerate().for_each(|(index, byte)| first.add(index).write_volatile(*byte)),
        }
    }
    drop(mapping);
    Ok(format!("probe mem-write: {} bytes", bytes.len()))
}

fn hex_bytes(text: &str) -> Option<Vec<u8>> {
    if text.is_empty()
        || !text.len().is_multiple_of(2)
        || !text.bytes().all(|digit| digit.is_ascii_hexdigit())
    {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

/// Makes the kernel panic.
fn panic_kernel() -> Outcome<String> {
    let trigger = |file: &str, text: &[u8]| {
        let open = OpenOptions::new().write(true).open(file);
        open.and_then(|mut file| file.write_all(text))
            .map_err(|error| format!("cannot write {file}: {error}"))
    };
    trigger("/proc/sys/kernel/sysrq", b"1")?;
    trigger("/proc/sysrq-trigger", b"c")?;
    Err("the kernel did not panic".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_listed_as_the_kernel_lists_them() {
        assert_eq!(cpu_list("0"), Some(vec![0]));
        assert_eq!(cpu_list("0-2,5"), Some(vec![0, 1, 2, 5]));
        assert_eq!(cpu_list("2-0"), None);
        assert_eq!(cpu_list("0-99999999"), None);
        assert_eq!(cpu_list(""), None);
    }

    #[test]
    fn bytes_in_hex() {
        assert_eq!(hex_bytes("00ff1A"), Some(vec![0, 0xff, 0x1a]));
        for wrong in ["", "0", "0g", "+1", "é"] {
            assert_eq!(hex_bytes(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn memory_is_available() {
        assert!(available_memory().unwrap() > 0);
    }

    #[test]
    fn a_page_is_written_through_a_mapping() {
        let path = std::env::temp_dir().join(format!("hotslot-probe-{}", std::process::id()));
        let name = path.to_str().unwrap();
        let line = pmem_write(name, "hello").unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert!(line.starts_with("probe pmem-write: 5 bytes by MAP_S"));
        assert_eq!((bytes.len(), &bytes[..6]), (PAGE, b"hello\0".as_slice()));
    }
}
