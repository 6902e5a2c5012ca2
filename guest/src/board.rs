//! What the guest and the back-end of an endurance test agree on. `probe hammer` and the tests use this file,
//! so it depends on nothing.
//!
//! The back-end maps files into a window and takes them away again while the guest's processors read and
//! write there. No lock is shared, so only the words themselves tell what is right, and the **board**: a page
//! that both see all the time, in the window of another device.
//!
//! The window is made of [`PLACES`] places of 8 pages. What is mapped at a place starts with it and is at
//! most 4 pages long, the rest is never mapped. Each 8-byte word of a file holds its index in the window, its
//! writer, and when it was written. A processor only writes the words whose index modulo [`CPUS`] is its
//! number. While a file is not mapped it is full of [`POISON`].
//!
//! ```text
//!   a word:  tag (8 bits) | generation of the mapping, or the writer's count (24) | writer (8) | index in the window (24)
//!   a state: generation of the mapping (32) | unused (16) | length in pages (8) | kind (8)
//! ```
//!
//! For each place the board has a state. The back-end sets it to [`CHANGING`] before it asks for a change,
//! and to what is the case after the change was answered. So a guest that sees one state before and after its
//! access knows which value the access must give.

/// The processors that take part.
pub const CPUS: usize = 4;
/// The places of the window.
pub const PLACES: usize = 64;
/// The words of a page, of a place, of the window.
pub const PAGE_WORDS: usize = 512;
pub const PLACE_WORDS: usize = 8 * PAGE_WORDS;
pub const WINDOW_WORDS: usize = PLACES * PLACE_WORDS;
/// The longest mapping, in pages.
pub const LONGEST: usize = 4;

/// What the guest reads where nothing is mapped.
pub const HOLE: u64 = u64::MAX;
/// What is in a file that is not mapped.
pub const POISON: u64 = 0xdbdb_dbdb_dbdb_dbdb;
/// The top byte of every word of a file that is mapped.
pub const TAG: u64 = 0xa5;

/// The writer of a word that the back-end wrote; that of a processor is its number plus 1.
pub const BACKEND: u64 = 0;
/// Generations and counts in words have so many bits.
pub const COUNT_MASK: u64 = (1 << 24) - 1;

/// A word of a file.
pub const fn word(count: u64, writer: u64, index: usize) -> u64 {
    TAG << 56 | (count & COUNT_MASK) << 32 | writer << 24 | index as u64
}

/// The generation or count of a word.
pub const fn count(word: u64) -> u64 {
    word >> 32 & COUNT_MASK
}

/// The writer of a word.
pub const fn writer(word: u64) -> u64 {
    word >> 24 & 0xff
}

/// The kinds of a place's state: anything that was ever right is right.
pub const CHANGING: u64 = 0;
/// Nothing is mapped.
pub const UNMAPPED: u64 = 1;
/// A file is mapped, for reading.
pub const READ_ONLY: u64 = 2;
/// A file is mapped, for reading and writing.
pub const READ_WRITE: u64 = 3;
/// As [`READ_WRITE`], and the file may be cut short at any time: its words may be zeroes.
pub const MAY_BE_CUT: u64 = 4;

/// A place's state.
pub const fn state(kind: u64, pages: usize, generation: u64) -> u64 {
    generation << 32 | (pages as u64) << 8 | kind
}

/// Words of the board. The back-end sets `RESET_WANTED` to a new number; the first processor copies it to
/// `RESET_PENDING`, waits for the same number in `RESET_AGREED` (now no state claims anything), resets the
/// device, looks for mappings that are left, starts the device, and copies the number to `RESET_DONE`.
pub const READY: usize = 0;
pub const RESET_WANTED: usize = 1;
pub const RESET_PENDING: usize = 2;
pub const RESET_AGREED: usize = 3;
pub const RESET_DONE: usize = 4;
/// Not 0: the guest must end, with status [`GOOD_END`].
pub const STOP: usize = 5;
/// Not 0: the guest's processors must run with interrupts enabled.
pub const INTERRUPTS: usize = 6;
/// A word for each place.
pub const STATES: usize = 256;

/// The guest's exit status.
pub const GOOD_END: u8 = 42;

/// Where a processor reports, and what: words from here on.
pub const fn report(cpu: usize) -> usize {
    32 + cpu * 16
}
/// Accesses to the window so far.
pub const ACCESSES: usize = 0;
/// Writes among them; set before each. The count in the words that it writes.
pub const WRITES: usize = 1;
/// Reads that gave zeroes.
pub const ZEROES: usize = 2;
/// Reads that gave what they must not give.
pub const ERRORS: usize = 3;
/// The last of them: index in the window, value read, the place's state, value written before (or 0).
pub const WRONG: usize = 4;

/// The next random number; the upper bits are the better ones.
pub const fn random(last: u64) -> u64 {
    last.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT)
}
pub const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
pub const INCREMENT: u64 = 1_442_695_040_888_963_407;
/// Which bits of it choose the word of the window, and whether it is written (all of them 0) before it is
/// read.
pub const INDEX_SHIFT: u32 = 64 - WINDOW_WORDS.ilog2();
pub const WRITE_BITS: u64 = 3 << 32;

/// Registers of virtio-mmio (VIRTIO 1.3, table 4.1), as offsets.
pub const STATUS: u32 = 0x070;
pub const SHM_SEL: u32 = 0x0ac;
pub const SHM_BASE: u32 = 0x0b8;
/// The writes (register, value) that start a device after a reset: VIRTIO_F_VERSION_1, and one queue at 16
/// MiB that stays unused.
pub const START: [(u32, u32); 16] = [
    (STATUS, 1),
    (STATUS, 1 | 2),
    // The driver's features, lower half and upper half.
    (0x024, 0),
    (0x020, 0),
    (0x024, 1),
    (0x020, 1),
    (STATUS, 1 | 2 | 8),
    // Queue 0: 8 entries; descriptors, driver's and device's area; ready.
    (0x030, 0),
    (0x038, 8),
    (0x080, 0x100_0000),
    (0x084, 0),
    (0x090, 0x100_1000),
    (0x0a0, 0x100_2000),
    (0x044, 1),
    (STATUS, RUNNING),
    (SHM_SEL, 0),
];
/// Status of a device that was started so: ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK.
pub const RUNNING: u32 = 1 | 2 | 8 | 4;
