//! The files and directories that the guest has open, by node and handle.
//!
//! Called by [`super::directory`] and [`super::passthrough`]; and by [`super::inodes`], for which an open
//! file is as good as a descriptor of its own.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use super::change::Change;
use super::journal::Keeper;
use crate::lock::lock;

/// An open file or directory.
pub struct Open {
    pub file: Arc<File>,
    /// Held from a seek in a directory to the reading there. Lock order: before `Inodes`.
    pub position: Mutex<()>,
}

/// The files that the guest has open. Lock order: innermost.
pub struct Opens {
    inner: Mutex<OpensInner>,
    limit: usize,
    keeper: Keeper,
}

#[derive(Default)]
struct OpensInner {
    by_node_and_handle: BTreeMap<(u64, u64), Arc<Open>>,
    /// Those that a back-end had open which died, and that could not be opened again.
    lost: HashSet<(u64, u64)>,
    last: u64,
}

impl Opens {
    /// None is open. Each takes a descriptor, of which there are `limit`.
    pub fn new(limit: usize, keeper: Keeper) -> Self {
        Opens { inner: Mutex::default(), limit, keeper }
    }

    /// What the guest of the last session has open, if it could be opened again.
    pub fn restore(&self, node: u64, handle: u64, file: Option<File>) {
        let inner = &mut *lock(&self.inner);
        inner.last = inner.last.max(handle);
        match file {
            Some(file) => {
                let open = Open { file: Arc::new(file), position: Mutex::new(()) };
                inner.by_node_and_handle.insert((node, handle), Arc::new(open));
            }
            None => {
                inner.lost.insert((node, handle));
            }
        }
    }

    /// Asked before a file is opened or made. Threads that ask at the same time may together exceed the limit
    /// by their number.
    ///
    /// # Errors
    ///
    /// ENFILE: the guest has so many files open that it cannot have one more.
    pub fn check_room(&self) -> io::Result<()> {
        match lock(&self.inner).by_node_and_handle.len() {
            open if open < self.limit => Ok(()),
            _ => Err(Errno::NFILE.into()),
        }
    }

    /// A handle for the file.
    pub fn insert(&self, node: u64, file: File) -> u64 {
        let inner = &mut *lock(&self.inner);
        inner.last += 1;
        let handle = inner.last;
        self.keeper.note(|| {
            let flags = rustix::fs::fcntl_getfl(&file).map_or(0, |flags| flags.bits());
            Change::Opened { node, handle, flags }
        });
        let open = Open { file: Arc::new(file), position: Mutex::new(()) };
        inner.by_node_and_handle.insert((node, inner.last), Arc::new(open));
        inner.last
    }

    /// # Errors
    ///
    /// EBADF: no such handle, or not of this file. ESTALE: the back-end that opened it died, and it could not
    /// be opened again.
    pub fn get(&self, node: u64, handle: u64) -> io::Result<Arc<Open>> {
        let inner = lock(&self.inner);
        match inner.by_node_and_handle.get(&(node, handle)) {
            Some(open) => Ok(Arc::clone(open)),
            None if inner.lost.contains(&(node, handle)) => Err(Errno::STALE.into()),
            None => Err(Errno::BADF.into()),
        }
    }

    /// # Errors
    ///
    /// As for [`Opens::get`].
    pub fn remove(&self, node: u64, handle: u64) -> io::Result<()> {
        // The file is closed once the lock is free: the host may have much to do then.
        let mut inner = lock(&self.inner);
        let removed = inner.by_node_and_handle.remove(&(node, handle));
        let was_lost = inner.lost.remove(&(node, handle));
        drop(inner);
        if removed.is_none() && !was_lost {
            return Err(Errno::BADF.into());
        }
        self.keeper.note(|| Change::Closed { node, handle });
        Ok(())
    }

    /// All handles of a file.
    pub fn of(&self, node: u64) -> Vec<Arc<Open>> {
        let inner = lock(&self.inner);
        inner
            .by_node_and_handle
            .range((node, 0)..=(node, u64::MAX))
            .map(|(_, open)| Arc::clone(open))
            .collect()
    }

    /// The descriptor of one of the handles of a file.
    pub fn any(&self, node: u64) -> Option<Arc<File>> {
        let inner = lock(&self.inner);
        let open = inner.by_node_and_handle.range((node, 0)..=(node, u64::MAX)).next();
        open.map(|(_, open)| Arc::clone(&open.file))
    }

    /// Closes all.
    pub fn clear(&self) {
        let mut inner = lock(&self.inner);
        inner.lost.clear();
        let closed = std::mem::take(&mut inner.by_node_and_handle);
        drop(inner);
        drop(closed);
    }
}
