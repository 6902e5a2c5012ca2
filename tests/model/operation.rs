//! What may happen to a device: operations as values, and how random ones are made. Most of them are
//! sensible, so that much succeeds; some are wrong in each way that the contract knows. What they name ("the
//! third live mapping") is looked up when they are carried out, so that a shortened sequence still means
//! something.

use hotslot_test_support::bench::PAGE;
use proptest::collection::vec;
use proptest::prelude::*;

/// Regions of the device: id, bytes.
pub const REGIONS: [(u8, u64); 3] = [(0, 16 * PAGE), (7, 48 * PAGE), (255, PAGE)];
/// How many mappings the device may have.
pub const QUOTA: usize = 20;
pub const FILES: usize = 3;
/// A file has no more than this.
pub const LONGEST: u64 = 40 * PAGE;

#[derive(Clone, Debug)]
pub enum Operation {
    /// Requests of the back-end's, sent without waiting for answers.
    Requests {
        requests: Vec<Request>,
        /// Whether the machine has slots for them.
        slots: bool,
    },
    /// The guest resets the device while these requests are under way, and starts it again or not.
    Reset { late: Vec<Request>, start: bool },
    /// The guest starts the device, if it is reset.
    Start,
    /// The back-end makes a file shorter or longer.
    Resize { file: usize, len: u64 },
    /// The back-end writes into a file, where it is long enough.
    Store { file: usize, at: u64, byte: u8 },
    /// The guest reads a byte.
    Read(Place),
    /// The guest writes a byte.
    Write(Place, u8),
    /// The back-end dies after these last requests; the guest resets the device. A new one takes its place.
    Death { late: Vec<Request> },
}

impl Operation {
    /// Each request counts.
    pub fn count(&self) -> usize {
        match self {
            Operation::Requests { requests, .. } => requests.len(),
            Operation::Reset { late, .. } | Operation::Death { late } => 1 + late.len(),
            _ => 1,
        }
    }
}

#[derive(Clone, Debug)]
pub struct Request {
    pub what: What,
    /// NEED_REPLY.
    pub answer: bool,
}

#[derive(Clone, Debug)]
pub enum What {
    Map {
        shmid: u8,
        shm_offset: u64,
        len: u64,
        fd_offset: u64,
        flags: u64,
        fds: Fds,
    },
    Unmap {
        target: Target,
        /// With a descriptor, which it must not have.
        fd: bool,
    },
}

/// What comes with a SHMEM_MAP.
#[derive(Clone, Copy, Debug)]
pub enum Fds {
    File {
        file: usize,
        read_only: bool,
    },
    /// One descriptor, but of a character device.
    Device,
    None,
    Two,
}

/// What an SHMEM_UNMAP names.
#[derive(Clone, Debug)]
pub enum Target {
    /// A live mapping: exactly, or not quite.
    Live {
        nth: usize,
        twist: Twist,
    },
    Range {
        shmid: u8,
        shm_offset: u64,
        len: u64,
    },
}

#[derive(Clone, Copy, Debug)]
pub enum Twist {
    Exact,
    /// In whole pages, which is not always what was mapped.
    Rounded,
    /// Two mappings that border on each other, or what would be there.
    WithNext,
    Longer,
    Shorter,
    Later,
    OtherRegion,
}

/// Where the guest looks.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// Inside a live mapping.
    Live {
        nth: usize,
        offset: u64,
    },
    Region {
        index: usize,
        offset: u64,
    },
}

/// A sequence for one device and those that take its place.
pub fn sequence() -> impl Strategy<Value = Vec<Operation>> {
    vec(operation(), 1..400)
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        20 => (vec(request(), 1..8), prop::bool::weighted(0.9))
            .prop_map(|(requests, slots)| Operation::Requests { requests, slots }),
        1 => (vec(request(), 0..8), prop::bool::weighted(0.8))
            .prop_map(|(late, start)| Operation::Reset { late, start }),
        1 => Just(Operation::Start),
        8 => (0..FILES, file_len()).prop_map(|(file, len)| Operation::Resize { file, len }),
        4 => (0..FILES, 0..LONGEST, any::<u8>())
            .prop_map(|(file, at, byte)| Operation::Store { file, at, byte }),
        20 => place().prop_map(Operation::Read),
        15 => (place(), any::<u8>()).prop_map(|(place, byte)| Operation::Write(place, byte)),
        // More rarely than a reset.
        1 => (vec(request(), 0..8), prop::bool::weighted(0.2)).prop_map(|(late, dies)| match dies {
            true => Operation::Death { late },
            false => Operation::Reset { late, start: true },
        }),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let what = prop_oneof![
        6 => (shmid(), shm_offset(), len(), fd_offset(), flags(), fds()).prop_map(
            |(shmid, shm_offset, len, fd_offset, flags, fds)| What::Map {
                shmid,
                shm_offset,
                len,
                fd_offset,
                flags,
                fds,
            }
        ),
        3 => (target(), prop::bool::weighted(0.02)).prop_map(|(target, fd)| What::Unmap { target, fd }),
    ];
    (what, any::<bool>()).prop_map(|(what, answer)| Request { what, answer })
}

fn pages(range: std::ops::Range<u64>) -> impl Strategy<Value = u64> {
    range.prop_map(|page| page * PAGE)
}

/// Where u64 ends.
fn top() -> impl Strategy<Value = u64> {
    (0..3 * PAGE).prop_map(|below| u64::MAX - below)
}

fn shmid() -> impl Strategy<Value = u8> {
    prop_oneof![10 => Just(0), 20 => Just(7), 2 => Just(255), 1 => any::<u8>()]
}

fn shm_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        40 => pages(0..49),
        1 => 0..49 * PAGE,
        1 => top(),
        1 => Just(u64::MAX - (PAGE - 1)),
        1 => Just(1 << 63),
    ]
}

fn len() -> impl Strategy<Value = u64> {
    prop_oneof![
        30 => pages(1..6),
        8 => 1..5 * PAGE,
        3 => pages(0..50),
        1 => Just(0),
        1 => top(),
    ]
}

fn fd_offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        40 => pages(0..41),
        1 => 0..LONGEST,
        1 => top(),
        // Where off_t ends.
        2 => pages(0..9).prop_map(|below| (1 << 63) - below),
        1 => Just(1 << 40),
    ]
}

fn flags() -> impl Strategy<Value = u64> {
    prop_oneof![20 => Just(0), 20 => Just(1), 1 => any::<u64>()]
}

fn fds() -> impl Strategy<Value = Fds> {
    prop_oneof![
        40 => (0..FILES, prop::bool::weighted(0.2))
            .prop_map(|(file, read_only)| Fds::File { file, read_only }),
        1 => Just(Fds::Device),
        1 => Just(Fds::None),
        1 => Just(Fds::Two),
    ]
}

fn target() -> impl Strategy<Value = Target> {
    let twist = prop_oneof![
        10 => Just(Twist::Exact),
        1 => Just(Twist::Rounded),
        1 => Just(Twist::WithNext),
        1 => Just(Twist::Longer),
        1 => Just(Twist::Shorter),
        1 => Just(Twist::Later),
        1 => Just(Twist::OtherRegion),
    ];
    prop_oneof![
        6 => (0..QUOTA, twist).prop_map(|(nth, twist)| Target::Live { nth, twist }),
        1 => (shmid(), shm_offset(), len())
            .prop_map(|(shmid, shm_offset, len)| Target::Range { shmid, shm_offset, len }),
    ]
}

fn file_len() -> impl Strategy<Value = u64> {
    prop_oneof![pages(0..41), 0..LONGEST, Just(0), Just(LONGEST)]
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        5 => (0..QUOTA, 0..6 * PAGE).prop_map(|(nth, offset)| Place::Live { nth, offset }),
        1 => (0..REGIONS.len(), 0..48 * PAGE).prop_map(|(index, offset)| Place::Region { index, offset }),
    ]
}
