//! What is known of the guest, as the changes so far have made it: what a back-end that comes back needs.
//!
//! Only data; [`super::journal`] keeps one beside the file of `--state`, to write that anew.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::change::{Before, Change, Key, Mapping, Owner};
use super::identity::{Identity, Name};

/// The most names of a file, as in [`super::records`].
const MAX_NAMES: usize = 8;

#[derive(Clone, Default)]
pub struct Kept {
    pub agreed: u64,
    pub nodes: HashMap<u64, Node>,
    /// By node and handle: the flags of the open.
    pub opens: BTreeMap<(u64, u64), u32>,
    /// By offset in the window.
    pub mappings: BTreeMap<u64, Mapping>,
    pub locks: HashMap<Owner, Locked>,
    /// The last request of each thread: what it found before, while it is executed, and then its answer.
    pub attempts: HashMap<u64, (Key, Before)>,
    pub answers: HashMap<u64, (Key, Vec<u8>)>,
}

#[derive(Clone)]
pub struct Node {
    pub identity: Identity,
    pub lookups: u64,
    /// The newest last.
    pub names: VecDeque<Name>,
}

#[derive(Clone, Default)]
pub struct Locked {
    pub handle: u64,
    /// First and last byte, and the kind of the lock. None overlap.
    pub ranges: Vec<(u64, u64, u32)>,
}

impl Kept {
    pub fn apply(&mut self, change: &Change) {
        match change {
            Change::Clear => *self = Kept::default(),
            Change::Agreed(bits) => self.agreed = *bits,
            Change::Lookup { node, identity, name, count } => {
                let known = self.nodes.entry(*node).or_insert_with(|| Node {
                    identity: identity.clone(),
                    lookups: 0,
                    names: VecDeque::new(),
                });
                known.identity = identity.clone();
                known.lookups = known.lookups.saturating_add(*count);
                if let Some(name) = name {
                    known.add(name);
                }
            }
            Change::AddName { node, name } => {
                if let Some(known) = self.nodes.get_mut(node) {
                    known.add(name);
                }
            }
            Change::DropName { node, name } => {
                if let Some(known) = self.nodes.get_mut(node) {
                    known.names.retain(|other| other != name);
                }
            }
            Change::Forget { node, count } => {
                if let Some(known) = self.nodes.get_mut(node) {
                    known.lookups = known.lookups.saturating_sub(*count);
                    if known.lookups == 0 {
                        self.nodes.remove(node);
                    }
                }
            }
            Change::Gone(node) => {
                self.nodes.remove(node);
            }
            Change::Opened { node, handle, flags } => {
                self.opens.insert((*node, *handle), *flags);
            }
            Change::Closed { node, handle } => {
                self.opens.remove(&(*node, *handle));
            }
            Change::Mapped { offset, mapping } => {
                self.mappings.insert(*offset, *mapping);
            }
            Change::Unmapped(offset) => {
                self.mappings.remove(offset);
            }
            Change::Locked { owner, handle, first, last, kind } => {
                let locked = self.locks.entry(*owner).or_default();
                locked.handle = *handle;
                locked.set(*first, *last, *kind);
            }
            Change::Unlocked(owner) => {
                self.locks.remove(owner);
            }
            Change::Attempt { slot, key, before } => {
                self.attempts.insert(*slot, (*key, *before));
            }
            Change::Answer { slot, key, bytes } => {
                self.attempts.remove(slot);
                self.answers.insert(*slot, (*key, bytes.clone()));
            }
        }
    }

    /// Changes that make this out of nothing.
    pub fn changes(&self) -> impl Iterator<Item = Change> + '_ {
        let nodes = self.nodes.iter().flat_map(|(&node, known)| {
            let Node { identity, lookups, names } = known;
            let first = names.front().cloned();
            let lookup = Change::Lookup { node, identity: identity.clone(), name: first, count: *lookups };
            let others = names.iter().skip(1).map(move |name| Change::AddName { node, name: name.clone() });
            std::iter::once(lookup).chain(others)
        });
        let opens = self.opens.iter();
        let opens = opens.map(|(&(node, handle), &flags)| Change::Opened { node, handle, flags });
        let mappings = self.mappings.iter();
        let mappings = mappings.map(|(&offset, &mapping)| Change::Mapped { offset, mapping });
        let locks = self.locks.iter().flat_map(|(&owner, locked)| {
            let handle = locked.handle;
            let each = locked.ranges.iter();
            each.map(move |&(first, last, kind)| Change::Locked { owner, handle, first, last, kind })
        });
        let answers = self.answers.iter();
        let answers =
            answers.map(|(&slot, (key, bytes))| Change::Answer { slot, key: *key, bytes: bytes.clone() });
        let attempts = self.attempts.iter();
        let attempts = attempts.map(|(&slot, &(key, before))| Change::Attempt { slot, key, before });
        std::iter::once(Change::Agreed(self.agreed))
            .chain(nodes)
            .chain(opens)
            .chain(mappings)
            .chain(locks)
            .chain(answers)
            .chain(attempts)
    }
}

impl Node {
    fn add(&mut self, name: &Name) {
        self.names.retain(|other| other != name);
        if self.names.len() == MAX_NAMES {
            self.names.pop_front();
        }
        self.names.push_back(name.clone());
    }
}

impl Locked {
    fn set(&mut self, first: u64, last: u64, kind: u32) {
        let mut ranges = Vec::new();
        for &(other_first, other_last, other) in &self.ranges {
            if other_first < first {
                ranges.push((other_first, other_last.min(first - 1), other));
            }
            if other_last > last {
                ranges.push((other_first.max(last + 1), other_last, other));
            }
        }
        if kind != libc::F_UNLCK as u32 {
            ranges.push((first, last, kind));
        }
        self.ranges = ranges;
    }
}
