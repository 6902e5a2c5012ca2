//! Kernels for `hotslot -k` that are made in a test: an ELF file of assembled code and data, and page tables
//! for it.

use std::io::Write;

use tempfile::NamedTempFile;

const PAGE: u64 = 0x1000;

/// Bytes at a guest physical address, and zeroes behind them.
pub struct Segment<'a> {
    pub address: u64,
    pub bytes: &'a [u8],
    pub zeroes: u64,
}

impl<'a> Segment<'a> {
    pub fn new(address: u64, bytes: &'a [u8]) -> Self {
        Segment { address, bytes, zeroes: 0 }
    }
}

/// An ELF file that starts at `entry`.
pub fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    elf_with_notes(entry, segments, &[])
}

/// A note of an ELF file.
pub fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [name.len() as u32, description.len() as u32, kind] {
        note.extend(number.to_le_bytes());
    }
    for part in [name, description] {
        note.extend(part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// The same, with a segment of notes.
pub fn elf_with_notes(entry: u64, segments: &[Segment], notes: &[u8]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1u32.to_le_bytes());
    for word in [entry, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, no sections
    }
    file.extend(0u32.to_le_bytes());
    for half in [64, 56, segments.len() as u16 + 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let notes_at = 64 + 56 * (segments.len() as u64 + 1);
    let mut offset = (notes_at + notes.len() as u64).next_multiple_of(PAGE);
    let first = offset;
    let mut contents = Vec::new();
    for segment in segments {
        let len = segment.bytes.len() as u64;
        file.extend(1u32.to_le_bytes()); // PT_LOAD
        file.extend(7u32.to_le_bytes()); // read, write, execute
        let address = segment.address;
        for word in [offset, address, address, len, len + segment.zeroes, PAGE] {
            file.extend(word.to_le_bytes());
        }
        contents.extend(segment.bytes);
        contents.resize(contents.len().next_multiple_of(PAGE as usize), 0);
        offset = first + contents.len() as u64;
    }
    file.extend(4u32.to_le_bytes()); // PT_NOTE
    file.extend(4u32.to_le_bytes()); // read
    let len = notes.len() as u64;
    for word in [notes_at, 0, 0, len, len, 4] {
        file.extend(word.to_le_bytes());
    }
    file.extend(notes);
    file.resize(first as usize, 0);
    file.extend(contents);
    file
}

/// The same in a file that can be named.
pub fn kernel(elf: &[u8]) -> NamedTempFile {
    let mut kernel = NamedTempFile::new().unwrap();
    kernel.write_all(elf).unwrap();
    kernel
}

/// Page tables at `at` that map the first `gib` GiB one to one, in pages of 2 MiB (a software KVM has no
/// larger ones): one PML4, one PDPT, then a page directory for each GiB.
pub fn page_tables(at: u64, gib: u64) -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut entries = vec![0u64; 2 * 512];
    entries[0] = (at + PAGE) | PRESENT_WRITABLE;
    for directory in 0..gib {
        entries[512 + directory as usize] = (at + (2 + directory) * PAGE) | PRESENT_WRITABLE;
    }
    entries.extend((0..gib * 512).map(|page| page << 21 | PRESENT_WRITABLE | LARGE));
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}
