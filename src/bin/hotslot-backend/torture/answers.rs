//! Wrong answers on the main socket, as bytes. Pure data; `session` sends them.

use clap::ValueEnum;

use super::report::Verdict;
use super::wire::{self, flags, message, quads};

/// What is wrong about an answer.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum WrongAnswer {
    /// A byte less of payload.
    Short,
    /// Eight bytes more of payload.
    Long,
    /// Another request's id.
    Id,
    /// A file descriptor with it.
    Fd,
    /// "It failed": 1 where 0 means success, or no payload.
    Error,
    /// No reply flag.
    Request,
    /// Version 2 of the protocol.
    Version,
    /// Half of the bytes, and no more.
    Half,
}

impl WrongAnswer {
    /// The bytes to send to request `id` in place of an answer with this payload.
    pub fn bytes(self, id: u32, payload: &[u8]) -> Vec<u8> {
        let (mut header, mut payload) = ((id, flags::VERSION_1 | flags::REPLY), payload.to_vec());
        match self {
            WrongAnswer::Short => drop(payload.pop()),
            WrongAnswer::Long => payload.extend([0; 8]),
            WrongAnswer::Id => header.0 += 1,
            WrongAnswer::Error if is_acknowledgement(id) => payload = quads([1]),
            WrongAnswer::Error => payload.clear(),
            WrongAnswer::Request => header.1 &= !flags::REPLY,
            WrongAnswer::Version => header.1 = flags::VERSION_2 | flags::REPLY,
            WrongAnswer::Fd | WrongAnswer::Half => {}
        }
        let mut bytes = message(header.0, header.1, &payload);
        if self == WrongAnswer::Half {
            bytes.truncate(bytes.len() / 2);
        }
        bytes
    }
}

/// Whether the answer to a request is a u64 that is 0 for success.
fn is_acknowledgement(id: u32) -> bool {
    !matches!(
        id,
        wire::GET_FEATURES
            | wire::GET_PROTOCOL_FEATURES
            | wire::GET_QUEUE_NUM
            | wire::GET_SHMEM_CONFIG
            | wire::GET_STATUS
            | wire::GET_CONFIG
            | wire::GET_VRING_BASE
    )
}

/// Extreme or impossible shared memory regions.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum BadConfig {
    /// nregions one more than there are.
    Count,
    /// A size that is no multiple of any page size.
    Unaligned,
    /// Sizes whose sum is more than 2^64.
    Overflow,
    /// One region of 2^63 bytes.
    Huge,
    /// All 256 ids, a page each.
    All,
}

impl BadConfig {
    /// nregions, and the id and size of each region.
    pub fn answer(self, regions: &[(u8, u64)]) -> (u32, Vec<(u8, u64)>) {
        let regions = match self {
            BadConfig::Count => regions.to_vec(),
            BadConfig::Unaligned => vec![(0, 0x1001)],
            BadConfig::Overflow => vec![(0, 1 << 63), (1, 1 << 63), (2, 0x1000)],
            BadConfig::Huge => vec![(0, 1 << 63)],
            BadConfig::All => (0..=255).map(|shmid| (shmid, 0x1000)).collect(),
        };
        (regions.len() as u32 + u32::from(self == BadConfig::Count), regions)
    }

    /// The verdict on a front-end that was given these regions, and what a correct one does.
    pub fn verdict(self, started: bool) -> (Verdict, &'static str) {
        let wrong = |what: &str| Verdict::Wrong(what.to_owned());
        match (self, started) {
            (BadConfig::Count, _) => (Verdict::LeftOpen, "refuses what contradicts itself"),
            (BadConfig::All, false) => (
                wrong("it did not start the device"),
                "works with 256 regions (vhost-user, GET_SHMEM_CONFIG)",
            ),
            (BadConfig::All, true) | (_, false) => (Verdict::AsSpecified, ""),
            (_, true) => (
                wrong("it started the device"),
                "refuses sizes that cannot be (vhost-user, GET_SHMEM_CONFIG: multiples of the page size)",
            ),
        }
    }
}
