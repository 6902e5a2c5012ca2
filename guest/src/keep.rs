//! The probes of what a crash may not lose: a writer that reports each sync (`keep`), a check of what it left
//! behind (`kept`), and a power cut of a file system (`cut`).
//!
//! Called by [`crate::probe`]: the writer in a guest that is killed, the others on the host afterwards.
//!
//! The file has 256 blocks of 4 KiB. Which block a write goes to, and what it writes, follows from the number
//! of the write alone; so a reported number says all that is synced. Each word of a block has the number of
//! its write, so that a block in which a later write was begun is recognised.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::mm::MapFlags;

use crate::map::{Mapping, PAGE};
use crate::outcome::{Outcome, failed};
use crate::parameters::number;

const BLOCKS: usize = 256;
const WORDS: usize = PAGE / 8;
/// Writes from one sync to the next.
const BATCH: u64 = 4;

/// The block that a write goes to.
fn place(write: u64) -> usize {
    // 2^64 divided by the golden ratio: its products spread evenly in their upper bits.
    (write.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as usize % BLOCKS
}

/// A word that a write leaves in its block.
fn content(write: u64, word: usize) -> u64 {
    write * (BLOCKS * WORDS) as u64 + (place(write) * WORDS + word) as u64
}

/// The write that a word in this place of the file comes from, if it is any's.
fn origin(found: u64, block: usize, word: usize) -> Option<u64> {
    let write = found / (BLOCKS * WORDS) as u64;
    (write > 0 && place(write) == block && content(write, word) == found).then_some(write)
}

/// Writes blocks until it is killed: batches by `write` and `fsync` in turn with batches by stores through a
/// mapping and `msync`. Prints the number of the last write after each sync, with a point behind it: a line
/// that a crash cut short has none.
pub fn keep(name: &str, file: &str) -> Outcome<String> {
    let path = Path::new(file);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.open(path).map_err(failed("open", path))?;
    file.set_len((BLOCKS * PAGE) as u64).map_err(failed("resize", path))?;
    let mapping = Mapping::whole(&file, path, true, MapFlags::SHARED)?;
    for write in 1.. {
        let (at, words) = (place(write) * PAGE, (0..WORDS).map(|word| content(write, word)));
        let is_mapped = write / BATCH % 2 == 1;
        if is_mapped {
            words.enumerate().for_each(|(index, word)| mapping.store(at + index * 8, word));
        } else {
            let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            file.write_all_at(&bytes, at as u64).map_err(failed("write", path))?;
        }
        if write % BATCH == BATCH - 1 {
            let synced = if is_mapped { mapping.synchronise() } else { file.sync_all() };
            synced.map_err(failed("synchronise", path))?;
            println!("synced {name} {write}.");
            io::stdout().flush().map_err(failed("write to", Path::new("standard output")))?;
        }
    }
    Ok(String::new())
}

/// Looks for each block's last write up to `synced`, or a later one.
pub fn kept(file: &str, synced: &str) -> Outcome<String> {
    let path = Path::new(file);
    let synced = number(synced).ok_or_else(|| format!("{synced} is not a number of a write"))?;
    let mut last = [0; BLOCKS];
    (1..=synced).for_each(|write| last[place(write)] = write);
    let file = File::open(path).map_err(failed("open", path))?;
    let (mut blocks, mut newer) = (0, 0);
    for (block, expected) in last.into_iter().enumerate().filter(|(_, expected)| *expected > 0) {
        let mut bytes = [0; PAGE];
        file.read_exact_at(&mut bytes, (block * PAGE) as u64).map_err(failed("read", path))?;
        let mut newest = expected;
        for (index, bytes) in bytes.chunks_exact(8).enumerate() {
            let found = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            match origin(found, block, index).filter(|write| *write >= expected) {
                Some(write) => newest = newest.max(write),
                None => {
                    let word = block * WORDS + index;
                    return Err(format!(
                        "{}: word {word} is {found:#x}, of write {:?}; write {expected} was synced, {synced} the last",
                        path.display(),
                        origin(found, block, index),
                    ));
                }
            }
        }
        blocks += 1;
        newer += u64::from(newest > expected);
    }
    Ok(format!("probe kept: {synced} writes, {blocks} blocks, {newer} of them newer"))
}

/// Ends an ext4 or XFS file system as if the power had failed: nothing that is not on its disk yet gets
/// there.
pub fn cut(directory: &str) -> Outcome<String> {
    /// `_IOR('X', 125, __u32)`: EXT4_IOC_SHUTDOWN (linux/fs/ext4/ext4.h), XFS_IOC_GOINGDOWN.
    const SHUTDOWN: libc::c_ulong = 0x8004_587d;
    /// EXT4_GOING_FLAGS_NOLOGFLUSH: the journal is not written out, either.
    static NO_LOG_FLUSH: u32 = 2;
    let path = Path::new(directory);
    let directory = File::open(path).map_err(failed("open", path))?;
    // SAFETY: an open descriptor that `directory` owns; the call only reads the number, which outlives it.
    match unsafe { libc::ioctl(directory.as_raw_fd(), SHUTDOWN, &raw const NO_LOG_FLUSH) } {
        0 => Ok("probe cut: done".to_owned()),
        _ => Err(failed("shut down the file system of", path)(io::Error::last_os_error())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_synced_and_is_not_there_is_found() {
        let path = std::env::temp_dir().join(format!("hotslot-kept-{}", std::process::id()));
        let name = path.to_str().unwrap();
        let mut bytes = vec![0; BLOCKS * PAGE];
        let mut write = |write: u64, words: usize| {
            for word in 0..words {
                let at = place(write) * PAGE + word * 8;
                bytes[at..at + 8].copy_from_slice(&content(write, word).to_le_bytes());
            }
            std::fs::write(&path, &bytes).unwrap();
        };
        (1..1000).for_each(|number| write(number, WORDS));
        // The last write is to a block of its own, or of a write before it.
        let all = kept(name, "999");
        let begun = place(1000);
        write(1000, 3);
        let (half, lost) = (kept(name, "999"), kept(name, "1000"));
        write((1..1000).find(|number| place(*number) == begun).unwrap(), 1);
        let old = kept(name, "999");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(all.unwrap(), "probe kept: 999 writes, 256 blocks, 0 of them newer");
        assert_eq!(half.unwrap(), "probe kept: 999 writes, 256 blocks, 1 of them newer");
        assert!(lost.unwrap_err().ends_with("write 1000 was synced, 1000 the last"));
        assert!(old.unwrap_err().ends_with("was synced, 999 the last"));
    }
}
