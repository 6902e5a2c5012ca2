//! The figures that are known: what each is called, its unit, and whether the picture shows it.

/// What a number counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nanoseconds.
    Time,
    /// Ticks of the time-stamp counter.
    Ticks,
    /// Bytes, shown in units of 2^20.
    MiB,
    /// Bytes, shown in units of 10^6.
    MB,
    /// Of things that are counted, or of events in a second.
    Number,
}

/// What is known of a figure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub title: String,
    pub unit: Unit,
    pub is_in_picture: bool,
}

/// Subjects that others are compared with: the first of them that a figure has. Floors come first, then QEMU.
pub const REFERENCES: [&str; 7] = ["bare", "ram", "quiet", "host", "no-idle-slots", "q35", "qemu"];

/// Name, title, unit, whether it is in the picture.
const KNOWN: &[(&str, &str, Unit, bool)] = &[
    ("boot-vmlinux", "exec to PID 1, vmlinux", Unit::Time, true),
    ("boot-bzImage", "exec to PID 1, bzImage", Unit::Time, true),
    ("map-same-4k", "MAP of 4 KiB, a range that comes again", Unit::Time, true),
    ("unmap-same-4k", "UNMAP of 4 KiB, a range that comes again", Unit::Time, true),
    ("map-same-2m", "MAP of 2 MiB, a range that comes again", Unit::Time, false),
    ("unmap-same-2m", "UNMAP of 2 MiB, a range that comes again", Unit::Time, false),
    ("map-file-4k", "MAP of a file on disk, 4 KiB", Unit::Time, false),
    ("unmap-file-4k", "UNMAP of a file on disk, 4 KiB", Unit::Time, false),
    ("map-new-4k", "MAP of 4 KiB, a new range", Unit::Time, true),
    ("unmap-new-4k", "UNMAP of 4 KiB, a new range", Unit::Time, true),
    ("map-same-4k-live", "MAP, comes again, 16,000 live", Unit::Time, true),
    ("unmap-same-4k-live", "UNMAP, comes again, 16,000 live", Unit::Time, true),
    ("map-same-2m-live", "MAP of 2 MiB, comes again, 16,000 live", Unit::Time, false),
    ("unmap-same-2m-live", "UNMAP of 2 MiB, comes again, 16,000 live", Unit::Time, false),
    ("map-file-4k-live", "MAP of a file on disk, 16,000 live", Unit::Time, false),
    ("unmap-file-4k-live", "UNMAP of a file on disk, 16,000 live", Unit::Time, false),
    ("map-new-4k-live", "MAP, a new range, 16,000 live", Unit::Time, true),
    ("unmap-new-4k-live", "UNMAP, a new range, 16,000 live", Unit::Time, true),
    ("reset-live", "reset with 16,000 mappings", Unit::Time, true),
    ("call-mmap", "mmap of a page in the window", Unit::Time, false),
    ("call-add-slot", "KVM_SET_USER_MEMORY_REGION, a new slot", Unit::Time, false),
    ("call-delete-slot", "KVM_SET_USER_MEMORY_REGION, deleting it", Unit::Time, false),
    ("call-reserve", "mmap of PROT_NONE over the page", Unit::Time, false),
    ("call-round-trip", "a request that does nothing", Unit::Time, false),
    ("stripped", "program, stripped, MB", Unit::MB, true),
    ("crates", "crates of the VMM, without macros", Unit::Number, true),
    ("crates-all", "crates of the VMM, with macros and theirs", Unit::Number, false),
    ("resident", "resident beside RAM, MiB", Unit::MiB, true),
    ("exits", "exits to user space of 2,000 requests", Unit::Number, true),
    ("neighbour", "a request beside a back-end, ticks", Unit::Ticks, true),
    ("speed-lines-4k", "16 MiB read, 4 KiB pages, ticks", Unit::Ticks, true),
    ("speed-pages-4k", "a word of each 4 KiB, 4 KiB pages, ticks", Unit::Ticks, true),
    ("speed-lines-2m", "16 MiB read, 2 MiB pages, ticks", Unit::Ticks, true),
    ("speed-pages-2m", "a word of each 4 KiB, 2 MiB pages, ticks", Unit::Ticks, true),
    ("session-untar", "DAX session: tar -x", Unit::Time, false),
    ("session-git-status", "DAX session: git status", Unit::Time, true),
    ("session-random", "DAX session: pages at random in a second", Unit::Number, true),
    ("files-memory", "1 MiB of the guest's own memory", Unit::Time, false),
    ("files-mapped-again", "1 MiB through a mapping, again", Unit::Time, false),
    ("files-mapped-first", "1 MiB through a mapping, first", Unit::Time, false),
    ("files-touch", "the first word of 2 MiB of a mapping", Unit::Time, false),
    ("files-read-first", "1 MiB by reads of 128 KiB, first", Unit::Time, true),
    ("files-read-again", "1 MiB by reads of 128 KiB, again", Unit::Time, false),
    ("files-random-first", "a page at random, first", Unit::Time, true),
    ("files-random-again", "a page at random, again", Unit::Time, false),
    ("programs-untar", "tar: 1,000 files unpacked", Unit::Time, false),
    ("programs-list", "ls -lR of 1,000 files", Unit::Time, true),
    ("programs-git-add", "git add: 120 files", Unit::Time, true),
    ("programs-git-status", "git status", Unit::Time, false),
    ("programs-compile", "gcc: 3 files", Unit::Time, true),
    ("programs-remove", "rm -r", Unit::Time, false),
    ("programs-read-first", "1 MiB by reads of 128 KiB, first", Unit::Time, false),
    ("programs-read-again", "1 MiB by reads of 128 KiB, again", Unit::Time, false),
    ("programs-random-first", "a page read at random, first", Unit::Time, false),
    ("programs-random-again", "a page read at random, again", Unit::Time, false),
    ("programs-random-writes", "a page written at random", Unit::Time, false),
    ("programs-direct-reads", "a page read, O_DIRECT", Unit::Time, false),
    ("programs-direct-writes", "a page written, O_DIRECT", Unit::Time, false),
    ("micro-encode", "SHMEM_MAP encoded", Unit::Time, false),
    ("micro-decode", "SHMEM_MAP decoded", Unit::Time, false),
    ("micro-ledger", "a mapping recorded and removed", Unit::Time, false),
    ("micro-ledger-16000", "the same among 16,000", Unit::Time, false),
    ("micro-channel", "a MAP with its descriptor, answered", Unit::Time, true),
];

/// Where a figure stands among others.
pub fn place(name: &str) -> usize {
    KNOWN.iter().position(|(known, ..)| *known == name).unwrap_or(KNOWN.len())
}

/// What is known of a figure. One that is not known has its name for a title, and nanoseconds.
pub fn entry(name: &str) -> Entry {
    let (_, title, unit, is_in_picture) =
        KNOWN.get(place(name)).copied().unwrap_or((name, name, Unit::Time, false));
    Entry { name: name.to_owned(), title: title.to_owned(), unit, is_in_picture }
}
