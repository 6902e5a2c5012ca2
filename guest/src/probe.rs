//! What tests run inside the guest to look at the machine from there. Each probe prints what it found, in one
//! line, and ends with 0; or prints on standard error what is wrong, and ends with 1 (2: called wrongly).

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use rustix::mm::MapFlags;

use crate::map::{self, Mapping, PAGE};
use crate::outcome::{Outcome, failed};
use crate::parameters::number;
use crate::sys::run_on;
use crate::{counter, files, hammer, keep, rights, speed};

const USAGE: &str = "usage: probe memory | cpus | pmem-write FILE TEXT | mem-read ADDRESS LENGTH | \
                     mem-write ADDRESS HEX-BYTES | hammer ADDRESS ADDRESS | counter [OFFSET | reset] | panic | files DIR | fill FILE MIB | \
                     sum FILE read|map | requests FILE NUMBER read|flush | watch FILE | turns FILE first|second | direct FILE DISK write|read | \
                     xattr FILE NAME | rights DIR | locked FILE | with-lock FILE SHELL-LINE | speed memory MIB | speed mapped|read|pages|writes|direct FILE | \
                     speed program NAME PROGRAM ARG... | speed boot NAME PROGRAM ARG... | keep NAME FILE | kept FILE NUMBER | cut DIR";

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
        ["counter"] => counter::counter(0, false),
        ["counter", "reset"] => counter::counter(0, true),
        ["counter", offset] => physical(offset).and_then(|offset| counter::counter(offset, false)),
        ["panic"] => panic_kernel(),
        ["files", directory] => files::all(directory),
        ["fill", file, mib] => files::fill(file, mib),
        ["sum", file, how @ ("read" | "map")] => files::sum(file, *how == "map"),
        ["requests", file, number, how @ ("read" | "flush")] => {
            files::requests(file, number, *how == "flush")
        }
        ["watch", file] => files::watch(file),
        ["turns", file, who @ ("first" | "second")] => files::turns(file, *who == "first"),
        ["direct", file, disk, how @ ("write" | "read")] => files::direct(file, disk, *how == "write"),
        ["xattr", file, name] => files::xattr(file, name),
        ["locked", file] => files::locked(file),
        ["with-lock", file, line] => files::with_lock(file, line),
        ["rights", directory] => rights::all(directory),
        ["speed", "memory", mib] => speed::memory(mib),
        ["speed", "mapped", file] => speed::mapped(file),
        ["speed", "read", file] => speed::read(file),
        ["speed", "pages", file] => speed::first_pages(file),
        ["speed", "writes", file] => speed::writes(file),
        ["speed", "direct", file] => speed::direct(file),
        ["speed", "program", name, program, arguments @ ..] => speed::program(name, program, arguments),
        ["speed", "boot", name, program, arguments @ ..] => speed::boot(name, program, arguments),
        ["keep", name, file] => keep::keep(name, file),
        ["kept", file, synced] => keep::kept(file, synced),
        ["cut", directory] => keep::cut(directory),
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

/// Writes and verifies a pattern in every page that is free.
fn memory() -> Outcome<String> {
    const MIB: usize = 1 << 20;
    const CHUNK: usize = 16 * MIB;
    /// Left to the kernel: page tables of what we take (1/512), and its own needs.
    const MARGIN: usize = 24 * MIB;
    let available = available_memory()?;
    let wanted = available.saturating_sub(MARGIN + available / 64) / CHUNK;
    let mut chunks = Vec::new();
    for _ in 0..wanted {
        chunks
            .push(Mapping::anonymous(CHUNK).map_err(|error| format!("cannot take {CHUNK} bytes: {error}"))?);
    }
    let pages = || {
        let places = chunks.iter().flat_map(|chunk| (0..CHUNK).step_by(PAGE).map(move |at| (chunk, at)));
        places.enumerate()
    };
    // Its number at each end of the page, differently, so that neither a page seen twice nor one cut short
    // passes.
    let pattern = |page: usize| (page as u64 ^ 0x9e37_79b9_7f4a_7c15, !(page as u64));
    const LAST: usize = PAGE - 8;
    for (page, (chunk, at)) in pages() {
        let (first, last) = pattern(page);
        chunk.store(at, first);
        chunk.store(at + LAST, last);
    }
    for (page, (chunk, at)) in pages() {
        let found: (u64, u64) = (chunk.load(at), chunk.load(at + LAST));
        if found != pattern(page) {
            return Err(format!("page {page} reads {found:x?} instead of {:x?}", pattern(page)));
        }
    }
    Ok(format!("probe memory: {} MiB written and verified", chunks.len() * CHUNK / MIB))
}

/// Bytes that can be taken without driving the kernel into a corner.
fn available_memory() -> Outcome<usize> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
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
    let text = fs::read_to_string(ONLINE).map_err(failed("read", Path::new(ONLINE)))?;
    let list = cpu_list(text.trim()).ok_or_else(|| format!("{ONLINE} reads {text:?}"))?;
    list.iter().try_for_each(|cpu| run_on(*cpu))?;
    Ok(format!("probe cpus: {} ran", list.len()))
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
    let path = Path::new(path);
    if text.len() > PAGE {
        return Err(format!("{} bytes do not fit in a page of {PAGE}", text.len()));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).map_err(failed("open", path))?;
    file.set_len(PAGE as u64).map_err(failed("resize", path))?;
    let (mapping, how) = match Mapping::part(&file, 0, PAGE, true, MapFlags::SHARED_VALIDATE | MapFlags::SYNC)
    {
        Ok(mapping) => (mapping, "MAP_SYNC"),
        Err(_) => (Mapping::whole(&file, path, true, MapFlags::SHARED)?, "MAP_SHARED"),
    };
    text.bytes().enumerate().for_each(|(at, byte)| mapping.store(at, byte));
    mapping.synchronise().map_err(failed("synchronise", path))?;
    file.sync_all().map_err(failed("synchronise", path))?;
    Ok(format!("probe pmem-write: {} bytes by {how}", text.len()))
}

/// A physical address: what `mmap` takes as an offset.
fn physical(address: &str) -> Outcome<u64> {
    let address_or_none = number(address).filter(|address| i64::try_from(*address).is_ok());
    address_or_none.ok_or_else(|| format!("{address} is not a physical address"))
}

fn hammer(window: &str, board: &str) -> Outcome<String> {
    hammer::hammer(physical(window)?, physical(board)?)
}

/// The widest access that an address and a length allow in one piece: a device's register is read at once.
fn access_width(first: usize, length: usize) -> usize {
    match length {
        2 | 4 | 8 if first.is_multiple_of(length) => length,
        _ => 1,
    }
}

/// Reads physical memory, in one access when the length is 1, 2, 4 or 8 and aligned; prints its bytes in hex.
fn mem_read(address: &str, length: &str) -> Outcome<String> {
    let length = number(length)
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| (1..=1 << 20).contains(length))
        .ok_or_else(|| format!("{length} is not a length from 1 to 1 MiB"))?;
    let (mapping, first) = map::physical(physical(address)?, length)?;
    let bytes = match access_width(first, length) {
        2 => mapping.load::<u16>(first).to_le_bytes().to_vec(),
        4 => mapping.load::<u32>(first).to_le_bytes().to_vec(),
        8 => mapping.load::<u64>(first).to_le_bytes().to_vec(),
        _ => (first..first + length).map(|at| mapping.load(at)).collect(),
    };
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes physical memory, in one access when the length is 1, 2, 4 or 8 and aligned.
fn mem_write(address: &str, hex: &str) -> Outcome<String> {
    let bytes = hex_bytes(hex).ok_or_else(|| format!("{hex:?} is not a string of bytes in hex"))?;
    let (mapping, first) = map::physical(physical(address)?, bytes.len())?;
    match (access_width(first, bytes.len()), bytes.as_slice()) {
        (2, &[a, b]) => mapping.store(first, u16::from_le_bytes([a, b])),
        (4, &[a, b, c, d]) => mapping.store(first, u32::from_le_bytes([a, b, c, d])),
        (8, &[a, b, c, d, e, f, g, h]) => {
            mapping.store(first, u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        }
        _ => bytes.iter().enumerate().for_each(|(index, byte)| mapping.store(first + index, *byte)),
    }
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
        open.and_then(|mut file| file.write_all(text)).map_err(failed("write", Path::new(file)))
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
