//! What is known of the files that the guest knows: which file a node is, by which names it was found, and
//! the descriptors of some.
//!
//! Only data: [`super::inodes`], which calls this under its lock, opens files. Descriptors that are no longer
//! wanted are handed back, to be closed once the lock is free: the host may have much to do then.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CStr;
use std::fs::File;
use std::sync::Arc;

use nix::time::{ClockId, clock_gettime};
use rustix::fs::FileType;

use super::change::Change;
use super::descriptors::Descriptors;
use super::handles::Handle;
use super::identity::{Identity, Name, ROOT};
use super::journal::Keeper;
use super::kept::Kept;

/// The most names that are kept for a file with several (hard links).
const MAX_NAMES: usize = 8;

/// A file that the guest knows.
struct Record {
    identity: Identity,
    lookups: u64,
    /// The newest last.
    names: Vec<Name>,
    held: Held,
}

enum Held {
    No,
    /// For the case that it is needed again, and when it was needed last.
    Cached(Arc<File>, u64),
    /// It could not be opened again.
    Pinned(Arc<File>),
}

/// Descriptors to close.
pub type Closed = Vec<Arc<File>>;

pub struct Records {
    by_node: HashMap<u64, Box<Record>>,
    by_id: HashMap<(u64, u64), u64>,
    /// Never used twice, so that a generation is not needed; not even by a process that was started again,
    /// whose guest would find another file. So it begins with a clock that is never set back.
    next: u64,
    /// The nodes whose descriptors are cached, by when they were needed last.
    cached: BTreeMap<u64, u64>,
    /// Counts uses.
    now: u64,
    pinned: usize,
    limits: Descriptors,
    keeper: Keeper,
}

impl Records {
    pub fn new(limits: Descriptors, keeper: Keeper) -> Self {
        Records {
            keeper,
            by_node: HashMap::new(),
            by_id: HashMap::new(),
            next: first_number(),
            cached: BTreeMap::new(),
            now: 0,
            pinned: 0,
            limits,
        }
    }

    /// The files that the guest of the last session knows.
    pub fn restore(&mut self, kept: &Kept) {
        for (&node, known) in &kept.nodes {
            self.by_id.insert(known.identity.id, node);
            let names = known.names.iter().cloned().collect();
            let identity = known.identity.clone();
            let record = Record { identity, lookups: known.lookups, names, held: Held::No };
            self.by_node.insert(node, Box::new(record));
        }
    }

    pub fn len(&self) -> usize {
        self.by_node.len()
    }

    pub fn has(&self, node: u64) -> bool {
        self.by_node.contains_key(&node)
    }

    /// The kind of a file that the guest knows, and its descriptor, if it is held.
    pub fn held(&mut self, node: u64) -> Option<(FileType, Option<Arc<File>>)> {
        let record = self.by_node.get_mut(&node)?;
        let path = match &mut record.held {
            Held::No => None,
            Held::Pinned(path) => Some(Arc::clone(path)),
            Held::Cached(path, used) => {
                self.cached.remove(used);
                self.now += 1;
                *used = self.now;
                self.cached.insert(*used, node);
                Some(Arc::clone(path))
            }
        };
        Some((record.identity.kind, path))
    }

    /// The name by which a file was found last.
    pub fn name(&self, node: u64) -> Option<Name> {
        self.by_node.get(&node)?.names.last().cloned()
    }

    pub fn handle(&self, node: u64) -> Option<&Handle> {
        self.by_node.get(&node)?.identity.handle.as_ref()
    }

    /// Whether a file that was just opened is the one that the guest knows by a node.
    pub fn is(&self, node: u64, identity: &Identity) -> bool {
        self.by_node.get(&node).is_some_and(|record| record.identity.is(identity))
    }

    /// The node of a file that was just opened. While a descriptor holds a file, no other has its inode
    /// number.
    pub fn find(&self, identity: &Identity, is_open: &dyn Fn(u64) -> bool) -> Option<u64> {
        let node = *self.by_id.get(&identity.id)?;
        let record = self.by_node.get(&node)?;
        let is_held = !matches!(record.held, Held::No) || is_open(node);
        (is_held || record.identity.is(identity)).then_some(node)
    }

    /// Counts a lookup of a file that was just opened by a name, or made without one. `is_open`: whether the
    /// guest has a node's file open.
    pub fn insert(
        &mut self,
        identity: Identity,
        name: Option<(u64, &CStr)>,
        path: Arc<File>,
        is_open: &dyn Fn(u64) -> bool,
    ) -> (u64, Closed) {
        let mut closed = Closed::new();
        let node = self.find(&identity, is_open).unwrap_or_else(|| {
            // Another file had this inode number.
            if let Some(&gone) = self.by_id.get(&identity.id) {
                self.keeper.note(|| Change::Gone(gone));
                closed.extend(self.remove(gone));
            }
            let is_first = self.by_node.is_empty();
            let node = if is_first { ROOT } else { self.next };
            self.next += u64::from(!is_first);
            self.by_id.insert(identity.id, node);
            node
        });
        let record = self.by_node.entry(node).or_insert_with(|| {
            let identity = Identity { id: identity.id, kind: identity.kind, born: None, handle: None };
            Box::new(Record { identity, lookups: 0, names: Vec::new(), held: Held::No })
        });
        if node != ROOT {
            self.keeper.note(|| Change::Lookup {
                node,
                identity: identity.clone(),
                name: name.map(|(parent, name)| (parent, name.to_owned())),
                count: 1,
            });
        }
        // It may have changed: overlayfs gives a file that is written first another time of birth.
        record.identity = identity;
        record.lookups += 1;
        if let Some((parent, name)) = name {
            record.add_name(parent, name);
        }
        closed.extend(self.hold(node, path, name.is_none()));
        (node, closed)
    }

    /// Keeps a descriptor of a file: for as long as the guest knows it (`pin`), or while there are
    /// descriptors enough. A file that cannot be pinned for lack of descriptors is forgotten.
    pub fn hold(&mut self, node: u64, path: Arc<File>, pin: bool) -> Closed {
        let pin = pin || node == ROOT;
        let Some(record) = self.by_node.get_mut(&node) else {
            return vec![path];
        };
        match &record.held {
            Held::Cached(_, used) => {
                self.cached.remove(used);
            }
            Held::Pinned(_) => self.pinned -= 1,
            Held::No => {}
        }
        self.now += 1;
        let held = if pin { Held::Pinned(path) } else { Held::Cached(path, self.now) };
        let mut closed = Closed::new();
        closed.extend(std::mem::replace(&mut record.held, held).file());
        if pin {
            self.pinned += 1;
            if self.pinned > self.limits.pinned && node != ROOT {
                self.keeper.note(|| Change::Gone(node));
                closed.extend(self.remove(node));
            }
            return closed;
        }
        self.cached.insert(self.now, node);
        while self.cached.len() > self.limits.cached {
            let oldest = self.cached.pop_first().and_then(|(_, node)| self.by_node.get_mut(&node));
            closed.extend(oldest.and_then(|record| std::mem::replace(&mut record.held, Held::No).file()));
        }
        closed
    }

    /// The guest has given a name to a file, of which it may know nothing.
    pub fn add_name(
        &mut self,
        identity: &Identity,
        (parent, name): (u64, &CStr),
        is_open: &dyn Fn(u64) -> bool,
    ) {
        let node = self.find(identity, is_open);
        if let Some(node) = node
            && let Some(record) = self.by_node.get_mut(&node)
        {
            record.add_name(parent, name);
            self.keeper.note(|| Change::AddName { node, name: (parent, name.to_owned()) });
        }
    }

    /// The guest has taken a name from a file, which `path` holds and of which it may know nothing.
    /// `is_last`: whether the file had no other.
    pub fn take_name(
        &mut self,
        identity: &Identity,
        (parent, name): (u64, &CStr),
        path: Arc<File>,
        is_last: bool,
        is_open: &dyn Fn(u64) -> bool,
    ) -> Closed {
        let Some(node) = self.find(identity, is_open) else {
            return vec![path];
        };
        self.drop_name(node, (parent, name));
        let pin = self
            .by_node
            .get(&node)
            .is_none_or(|record| record.names.is_empty() && (record.identity.handle.is_none() || is_last));
        self.hold(node, path, pin)
    }

    /// A file is not found by a name any more.
    pub fn drop_name(&mut self, node: u64, (parent, name): (u64, &CStr)) {
        if let Some(record) = self.by_node.get_mut(&node) {
            self.keeper.note(|| Change::DropName { node, name: (parent, name.to_owned()) });
            record.names.retain(|known| (known.0, known.1.as_c_str()) != (parent, name));
        }
    }

    /// Takes lookups back. The root stays.
    pub fn forget(&mut self, node: u64, count: u64) -> Option<Arc<File>> {
        let record = self.by_node.get_mut(&node)?;
        self.keeper.note(|| Change::Forget { node, count });
        record.lookups = record.lookups.saturating_sub(count);
        if record.lookups == 0 && node != ROOT { self.remove(node) } else { None }
    }

    /// Forgets all but the root.
    pub fn clear(&mut self) -> Closed {
        let nodes: Vec<u64> = self.by_node.keys().copied().filter(|&node| node != ROOT).collect();
        nodes.into_iter().filter_map(|node| self.remove(node)).collect()
    }

    fn remove(&mut self, node: u64) -> Option<Arc<File>> {
        let record = self.by_node.remove(&node)?;
        if self.by_id.get(&record.identity.id) == Some(&node) {
            self.by_id.remove(&record.identity.id);
        }
        match &record.held {
            Held::No => {}
            Held::Cached(_, used) => {
                self.cached.remove(used);
            }
            Held::Pinned(_) => self.pinned -= 1,
        }
        record.held.file()
    }
}

impl Record {
    /// Without room for more: most files have one name.
    fn add_name(&mut self, parent: u64, name: &CStr) {
        let is = |known: &Name| (known.0, known.1.as_c_str()) == (parent, name);
        if let Some(at) = self.names.iter().position(is) {
            self.names[at..].rotate_left(1);
            return;
        }
        if self.names.len() == MAX_NAMES {
            self.names.remove(0);
        }
        self.names.reserve_exact(1);
        self.names.push((parent, name.to_owned()));
    }
}

impl Held {
    fn file(self) -> Option<Arc<File>> {
        match self {
            Held::No => None,
            Held::Cached(file, _) | Held::Pinned(file) => Some(file),
        }
    }
}

/// Greater than the numbers of the processes before this one, since none finds a file each nanosecond.
fn first_number() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("invariant: each Linux has it");
    (now.tv_sec() as u64).wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec() as u64)
}
