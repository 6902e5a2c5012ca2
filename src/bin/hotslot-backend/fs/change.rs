//! What changes in what is known of the guest, one thing at a time, as it is recorded in the file of
//! `--state`.
//!
//! On disk a change is: u8 kind, u8 count, so many le64, le32 length, so many bytes. Made by the modules that
//! know the guest's files; collected and written by [`super::journal`].

use std::ffi::{CStr, CString};
use std::time::{Duration, SystemTime};

use rustix::fs::FileType;

use super::identity::{Identity, Name};

/// A part of a file in the window.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The file. The guest unmaps it before it forgets it.
    pub node: u64,
    pub file_offset: u64,
    pub len: u64,
    pub writable: bool,
}

/// The owner of locks of a file, as FUSE names it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner {
    pub node: u64,
    pub number: u64,
    pub is_flock: bool,
}

/// A request of the guest.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Key {
    pub unique: u64,
    pub opcode: u64,
    pub node: u64,
}

/// What a request that must not be executed twice found before it was executed: see
/// [`super::journal::Keeper::attempt`].
pub type Before = [u64; 2];

pub enum Change {
    /// The guest knows nothing but the root.
    Clear,
    /// The bits of FUSE_INIT.
    Agreed(u64),
    /// So many lookups of a file, found by a name or made without one.
    Lookup {
        node: u64,
        identity: Identity,
        name: Option<Name>,
        count: u64,
    },
    AddName {
        node: u64,
        name: Name,
    },
    DropName {
        node: u64,
        name: Name,
    },
    Forget {
        node: u64,
        count: u64,
    },
    Gone(u64),
    Opened {
        node: u64,
        handle: u64,
        flags: u32,
    },
    Closed {
        node: u64,
        handle: u64,
    },
    Mapped {
        offset: u64,
        mapping: Mapping,
    },
    Unmapped(u64),
    Locked {
        owner: Owner,
        handle: u64,
        first: u64,
        last: u64,
        kind: u32,
    },
    /// All locks of the owner.
    Unlocked(Owner),
    /// A request is about to be executed.
    Attempt {
        slot: u64,
        key: Key,
        before: Before,
    },
    /// It was executed, and this is the answer.
    Answer {
        slot: u64,
        key: Key,
        bytes: Vec<u8>,
    },
}

const CLEAR: u8 = 1;
const AGREED: u8 = 2;
const LOOKUP: u8 = 3;
const ADD_NAME: u8 = 4;
const DROP_NAME: u8 = 5;
const FORGET: u8 = 6;
const GONE: u8 = 7;
const OPENED: u8 = 8;
const CLOSED: u8 = 9;
const MAPPED: u8 = 10;
const UNMAPPED: u8 = 11;
const LOCKED: u8 = 12;
const UNLOCKED: u8 = 13;
const ATTEMPT: u8 = 14;
const ANSWER: u8 = 15;

impl Change {
    pub fn encode(&self, to: &mut Vec<u8>) {
        let text = |name: &Name| name.1.as_bytes().to_vec();
        let key = |key: &Key| [key.unique, key.opcode, key.node];
        let owner = |owner: &Owner| [owner.node, owner.number, owner.is_flock.into()];
        let (kind, numbers, bytes) = match self {
            Change::Clear => (CLEAR, vec![], vec![]),
            Change::Agreed(bits) => (AGREED, vec![*bits], vec![]),
            Change::Lookup { node, identity, name, count } => {
                let (dev, ino) = identity.id;
                let kind = identity.kind.as_raw_mode().into();
                // The root is the directory of no name.
                let parent = name.as_ref().map_or(0, |name| name.0);
                let numbers = vec![*node, dev, ino, kind, nanoseconds(identity.born), parent, *count];
                (LOOKUP, numbers, name.as_ref().map(text).unwrap_or_default())
            }
            Change::AddName { node, name } => (ADD_NAME, vec![*node, name.0], text(name)),
            Change::DropName { node, name } => (DROP_NAME, vec![*node, name.0], text(name)),
            Change::Forget { node, count } => (FORGET, vec![*node, *count], vec![]),
            Change::Gone(node) => (GONE, vec![*node], vec![]),
            Change::Opened { node, handle, flags } => (OPENED, vec![*node, *handle, (*flags).into()], vec![]),
            Change::Closed { node, handle } => (CLOSED, vec![*node, *handle], vec![]),
            Change::Mapped { offset, mapping: Mapping { node, file_offset, len, writable } } => {
                (MAPPED, vec![*offset, *node, *file_offset, *len, (*writable).into()], vec![])
            }
            Change::Unmapped(offset) => (UNMAPPED, vec![*offset], vec![]),
            Change::Locked { owner: of, handle, first, last, kind } => {
                let range = [*handle, *first, *last, (*kind).into()];
                (LOCKED, [&owner(of)[..], &range].concat(), vec![])
            }
            Change::Unlocked(of) => (UNLOCKED, owner(of).to_vec(), vec![]),
            Change::Attempt { slot, key: of, before } => {
                (ATTEMPT, [&[*slot][..], &key(of), before].concat(), vec![])
            }
            Change::Answer { slot, key: of, bytes } => {
                (ANSWER, [&[*slot][..], &key(of)].concat(), bytes.clone())
            }
        };
        to.extend([kind, numbers.len() as u8]);
        to.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        to.extend((bytes.len() as u32).to_le_bytes());
        to.extend(bytes);
    }

    /// Takes the first change off the bytes; `None` for what is none.
    pub fn decode(from: &mut &[u8]) -> Option<Change> {
        let (&[kind, count], rest) = from.split_first_chunk()?;
        let (numbers, rest) = rest.split_at_checked(8 * usize::from(count))?;
        let (len, rest) = rest.split_first_chunk()?;
        let (bytes, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        *from = rest;
        let numbers: Vec<u64> =
            numbers.as_chunks().0.iter().map(|number| u64::from_le_bytes(*number)).collect();
        let name = |parent| Some((parent, one_name(bytes)?));
        Some(match (kind, &numbers[..]) {
            (CLEAR, []) => Change::Clear,
            (AGREED, &[bits]) => Change::Agreed(bits),
            (LOOKUP, &[node, dev, ino, kind, born, parent, count]) => {
                let kind = FileType::from_raw_mode(u32::try_from(kind).ok()?);
                let identity = Identity { id: (dev, ino), kind, born: time(born)?, handle: None };
                let name = if bytes.is_empty() { None } else { Some(name(parent)?) };
                Change::Lookup { node, identity, name, count }
            }
            (ADD_NAME, &[node, parent]) => Change::AddName { node, name: name(parent)? },
            (DROP_NAME, &[node, parent]) => Change::DropName { node, name: name(parent)? },
            (FORGET, &[node, count]) => Change::Forget { node, count },
            (GONE, &[node]) => Change::Gone(node),
            (OPENED, &[node, handle, flags]) => {
                Change::Opened { node, handle, flags: u32::try_from(flags).ok()? }
            }
            (CLOSED, &[node, handle]) => Change::Closed { node, handle },
            (MAPPED, &[offset, node, file_offset, len, writable]) => Change::Mapped {
                offset,
                mapping: Mapping { node, file_offset, len, writable: writable != 0 },
            },
            (UNMAPPED, &[offset]) => Change::Unmapped(offset),
            (LOCKED, &[node, number, is_flock, handle, first, last, kind]) => Change::Locked {
                owner: Owner { node, number, is_flock: is_flock != 0 },
                handle,
                first,
                last,
                kind: u32::try_from(kind).ok()?,
            },
            (UNLOCKED, &[node, number, is_flock]) => {
                Change::Unlocked(Owner { node, number, is_flock: is_flock != 0 })
            }
            (ATTEMPT, &[slot, unique, opcode, node, first, second]) => {
                Change::Attempt { slot, key: Key { unique, opcode, node }, before: [first, second] }
            }
            (ANSWER, &[slot, unique, opcode, node]) => {
                Change::Answer { slot, key: Key { unique, opcode, node }, bytes: bytes.to_vec() }
            }
            _ => return None,
        })
    }
}

/// A name in a directory, and of nothing elsewhere: the file may be anyone's work.
fn one_name(bytes: &[u8]) -> Option<CString> {
    let name = CStr::to_owned(&CString::new(bytes).ok()?);
    super::identity::one_name(&name).ok()?;
    Some(name)
}

/// 0 for a file system that has no times of birth.
fn nanoseconds(time: Option<SystemTime>) -> u64 {
    let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_nanos() as u64)
}

fn time(nanoseconds: u64) -> Option<Option<SystemTime>> {
    match nanoseconds {
        0 => Some(None),
        _ => SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanoseconds)).map(Some),
    }
}
