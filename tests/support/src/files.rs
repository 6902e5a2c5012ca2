//! Files that back-ends map.

use std::fs::File;
use std::io::Write;

use rustix::fs::MemfdFlags;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;

/// A file in memory of `len` zeroes.
pub fn memfd(len: u64) -> File {
    memfd_with(MemfdFlags::empty(), len)
}

/// One that can be sealed, say.
pub fn memfd_with(flags: MemfdFlags, len: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("test", flags | MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

/// A file of `pages` pages full of `byte`.
pub fn file_of(pages: u64, byte: u8) -> File {
    let mut file = memfd(0);
    file.write_all(&vec![byte; (pages * PAGE) as usize]).unwrap();
    file
}

/// A file of `pages` pages, whose words of 8 bytes say where they are: [`content`].
pub fn numbered_file(seed: u64, pages: u64) -> File {
    let mut file = memfd(0);
    let words = (0..pages * PAGE / 8).flat_map(|word| content(seed, word * 8).to_le_bytes());
    file.write_all(&words.collect::<Vec<u8>>()).unwrap();
    file
}

/// The word at an offset of a [`numbered_file`].
pub fn content(seed: u64, offset: u64) -> u64 {
    seed << 32 | offset
}
