//! How long it takes to get at the bytes of a file, or of memory. Called by [`crate::probe`];
//! `scripts/bench.sh` makes a table of it.
//!
//! Each prints nanoseconds, one line a figure, by the guest's clock.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use rustix::mm::MapFlags;

use crate::map::{Mapping, PAGE};
use crate::outcome::{Outcome, failed};
use crate::parameters::number;

const MIB: usize = 1 << 20;
/// What the guest's kernel maps of a file at a time, with DAX.
const PIECE: usize = 2 * MIB;
/// What programs read at a time, one after the other: cp, cat.
const BLOCK: usize = 128 << 10;
/// Reads of a page each, at random.
const RANDOM: u64 = 2000;

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

fn random(file: &File, path: &Path, length: u64) -> Outcome<u128> {
    let mut page = [0; PAGE];
    let mut state = 1_u64;
    let began = Instant::now();
    for _ in 0..RANDOM {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = (state >> 33) % (length / PAGE as u64) * PAGE as u64;
        file.read_exact_at(&mut page, at).map_err(failed("read", path))?;
    }
    Ok(began.elapsed().as_nanos())
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
