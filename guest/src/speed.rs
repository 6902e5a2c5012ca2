//! How long it takes to get at the bytes of a file, or of memory, and how long a program runs. Called by
//! [`crate::probe`]; `scripts/bench.sh` makes a table of it.
//!
//! Each prints nanoseconds, one line a figure, by the guest's clock.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::mm::MapFlags;

use crate::files::expect;
use crate::map::{Mapping, PAGE};
use crate::outcome::{Outcome, failed};
use crate::parameters::number;

const MIB: usize = 1 << 20;
/// What the guest's kernel maps of a file at a time, with DAX.
const PIECE: usize = 2 * MIB;
/// What programs read at a time, one after the other: cp, cat.
const BLOCK: usize = 128 << 10;
/// Reads, or writes, of a page each, at random.
const RANDOM: u64 = 2000;

/// What the first program of a guest prints.
const BOOTED: &[u8] = b"PID 1 runs";

/// How often what costs the same each time is done; the fastest counts, in which nothing else had a turn.
const TIMES: usize = 3;

/// Reads memory of this process, all of which was written before.
pub fn memory(mib: &str) -> Outcome<String> {
    let length = number(mib).ok_or_else(|| format!("{mib} is not a number of MiB"))? as usize * MIB;
    let mapping =
        Mapping::anonymous(length).map_err(|error| format!("cannot take {mib} MiB of memory: {error}"))?;
    (0..length).step_by(PAGE).for_each(|at| mapping.store(at, 1_u8));
    Ok(figure("memory", all_words_again(&mapping), length / MIB))
}

/// Maps a file that is mapped nowhere yet: a word of each piece, then all of it.
pub fn mapped(file: &str) -> Outcome<String> {
    let (file, path) = open(file)?;
    let mapping = Mapping::whole(&file, path, false, MapFlags::SHARED)?;
    let pieces = mapping.len() / PIECE;
    let touch = timed(|| (0..pieces).for_each(|piece| _ = mapping.load::<u64>(piece * PIECE)));
    let (first, again) = (all_words(&mapping), all_words_again(&mapping));
    Ok([
        figure("touch", touch, pieces),
        figure("mapped first", first, mapping.len() / MIB),
        figure("mapped again", again, mapping.len() / MIB),
    ]
    .join("\n"))
}

/// Reads a file from beginning to end, twice; then pages of it.
pub fn read(file: &str) -> Outcome<String> {
    let (file, path) = open(file)?;
    let length = file.metadata().map_err(failed("look at", path))?.len();
    let mut bytes = vec![0; BLOCK];
    let mut all = || -> Outcome<u128> {
        let began = Instant::now();
        for at in (0..length).step_by(BLOCK) {
            file.read_exact_at(&mut bytes, at).map_err(failed("read", path))?;
        }
        Ok(began.elapsed().as_nanos())
    };
    let (first, again) = (all()?, all()?);
    Ok([
        figure("read first", first, length as usize / MIB),
        figure("read again", again, length as usize / MIB),
        figure("random again", random(&file, path, length)?, RANDOM as usize),
    ]
    .join("\n"))
}

/// Reads pages of a file of which nothing was read yet.
pub fn first_pages(file: &str) -> Outcome<String> {
    let (file, path) = open(file)?;
    let length = file.metadata().map_err(failed("look at", path))?.len();
    let first = random(&file, path, length)?;
    Ok(figure("random first", first, RANDOM as usize))
}

/// Writes pages at random into a file; then has them stored.
pub fn writes(file: &str) -> Outcome<String> {
    let path = Path::new(file);
    let file = OpenOptions::new().write(true).open(path).map_err(failed("open", path))?;
    let length = file.metadata().map_err(failed("look at", path))?.len();
    let page = [b'w'; PAGE];
    let began = Instant::now();
    for at in places(length) {
        file.write_all_at(&page, at).map_err(failed("write", path))?;
    }
    file.sync_all().map_err(failed("flush", path))?;
    Ok(figure("random writes", began.elapsed().as_nanos(), RANDOM as usize))
}

/// Reads and writes pages at random past the kernel's cache: of a file, or of a disk.
pub fn direct(file: &str) -> Outcome<String> {
    let path = Path::new(file);
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let mut file = options.open(path).map_err(failed("open", path))?;
    // A disk has no length of its own.
    let length = file.seek(SeekFrom::End(0)).map_err(failed("look at", path))?;
    let page = Mapping::anonymous(PAGE).map_err(|error| format!("cannot take a page: {error}"))?;
    page.store(0, 1_u8);
    let mut each = |what: &str, access: fn(&Mapping, &File, usize) -> io::Result<usize>| -> Outcome<u128> {
        let began = Instant::now();
        for at in places(length) {
            file.seek(SeekFrom::Start(at)).map_err(failed(what, path))?;
            let count = access(&page, &file, 0).map_err(failed(what, path))?;
            expect(what, count, PAGE)?;
        }
        Ok(began.elapsed().as_nanos())
    };
    let (reads, writes) = (each("read", Mapping::fill_from)?, each("write", Mapping::write_to)?);
    Ok([figure("direct reads", reads, RANDOM as usize), figure("direct writes", writes, RANDOM as usize)]
        .join("\n"))
}

/// Runs a program, with its output thrown away.
pub fn program(name: &str, program: &str, arguments: &[&str]) -> Outcome<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::null());
    let began = Instant::now();
    let status = command.status().map_err(|error| format!("cannot run {program}: {error}"))?;
    let took = began.elapsed().as_nanos();
    if status.success() { Ok(figure(name, took, 1)) } else { Err(format!("{program}: {status}")) }
}

/// Starts a VMM, reads its standard output until the first program of the guest speaks, and kills the VMM.
pub fn boot(name: &str, program: &str, arguments: &[&str]) -> Outcome<String> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("cannot run {program}: {error}"))?;
    let lines = child.stdout.take().into_iter().flat_map(|output| BufReader::new(output).split(b'\n'));
    let is_booted = |line: io::Result<Vec<u8>>| {
        line.is_ok_and(|line| line.windows(BOOTED.len()).any(|bytes| bytes == BOOTED))
    };
    let booted = lines.map(is_booted).find(|booted| *booted);
    let took = began.elapsed().as_nanos();
    let status = child.kill().and_then(|()| child.wait()).map_err(failed("end", Path::new(program)))?;
    match booted {
        Some(_) => Ok(figure(name, took, 1)),
        None => Err(format!("{program} ended before its guest had booted: {status}")),
    }
}

fn random(file: &File, path: &Path, length: u64) -> Outcome<u128> {
    let mut page = [0; PAGE];
    let began = Instant::now();
    for at in places(length) {
        file.read_exact_at(&mut page, at).map_err(failed("read", path))?;
    }
    Ok(began.elapsed().as_nanos())
}

/// Where pages of a file lie: at random, and the same each time.
fn places(length: u64) -> impl Iterator<Item = u64> {
    let mut state = 1_u64;
    (0..RANDOM).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % (length / PAGE as u64) * PAGE as u64
    })
}

fn open(file: &str) -> Outcome<(File, &Path)> {
    let path = Path::new(file);
    Ok((File::open(path).map_err(failed("open", path))?, path))
}

fn all_words(mapping: &Mapping) -> u128 {
    timed(|| mapping.words().for_each(|_| ()))
}

fn all_words_again(mapping: &Mapping) -> u128 {
    (0..TIMES).map(|_| all_words(mapping)).fold(u128::MAX, u128::min)
}

fn timed(work: impl FnOnce()) -> u128 {
    let began = Instant::now();
    work();
    began.elapsed().as_nanos()
}

/// A line with the time for one of so many.
fn figure(name: &str, nanoseconds: u128, count: usize) -> String {
    format!("speed {name}: {}", nanoseconds / count.max(1) as u128)
}
