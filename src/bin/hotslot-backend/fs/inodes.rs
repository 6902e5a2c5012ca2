//! The files that the guest knows, by node id, and those that it has open, by handle.
//!
//! FUSE: a reply that names a file counts as a lookup of it, and FUSE_FORGET takes lookups back; until the
//! last one the node id stands for the same file, even if it is renamed or removed. So each is held by an
//! O_PATH descriptor, which also keeps the host from reusing its inode number. Called by [`super::directory`]
//! and [`super::passthrough`].

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use rustix::fs::FileType;
use rustix::io::Errno;

use crate::lock::lock;

/// FUSE_ROOT_ID.
pub const ROOT: u64 = 1;

/// A file that the guest knows.
pub struct Inode {
    pub node: u64,
    /// Opened with O_PATH: it can neither be read nor written, and the open had no effect on a device or
    /// FIFO.
    pub path: File,
    pub kind: FileType,
    id: (u64, u64),
}

/// The files that the guest knows. Lock order: innermost; no file is opened under it.
pub struct Inodes(Mutex<Known>);

struct Known {
    by_node: HashMap<u64, (Arc<Inode>, u64)>,
    by_id: HashMap<(u64, u64), u64>,
    /// Never used twice, so that a generation is not needed.
    next: u64,
}

impl Inodes {
    /// Only the root is known.
    ///
    /// # Errors
    ///
    /// Its attributes cannot be read.
    pub fn new(root: &File) -> io::Result<Self> {
        let inodes = Inodes(Mutex::new(Known { by_node: HashMap::new(), by_id: HashMap::new(), next: ROOT }));
        inodes.insert(root.try_clone()?)?;
        Ok(inodes)
    }

    /// # Errors
    ///
    /// ESTALE: the guest never looked that up, or forgot it.
    pub fn get(&self, node: u64) -> io::Result<Arc<Inode>> {
        match lock(&self.0).by_node.get(&node) {
            Some((inode, _)) => Ok(Arc::clone(inode)),
            None => Err(Errno::STALE.into()),
        }
    }

    /// Counts a lookup of the file of an O_PATH descriptor.
    ///
    /// # Errors
    ///
    /// Its attributes cannot be read.
    pub fn insert(&self, path: File) -> io::Result<(u64, Metadata)> {
        let metadata = path.metadata()?;
        let id = (metadata.dev(), metadata.ino());
        let known = &mut *lock(&self.0);
        if let Some(node) = known.by_id.get(&id) {
            if let Some((_, lookups)) = known.by_node.get_mut(node) {
                *lookups += 1;
            }
            return Ok((*node, metadata));
        }
        let node = known.next;
        known.next += 1;
        let inode = Inode { node, path, kind: FileType::from_raw_mode(metadata.mode()), id };
        known.by_node.insert(node, (Arc::new(inode), 1));
        known.by_id.insert(id, node);
        Ok((node, metadata))
    }

    /// Takes lookups back. The root stays.
    pub fn forget(&self, node: u64, count: u64) {
        let known = &mut *lock(&self.0);
        let Some((inode, lookups)) = known.by_node.get_mut(&node) else {
            return;
        };
        *lookups = lookups.saturating_sub(count);
        if *lookups == 0 && node != ROOT {
            known.by_id.remove(&inode.id);
            known.by_node.remove(&node);
        }
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let known = &mut *lock(&self.0);
        known.by_node.retain(|&node, _| node == ROOT);
        known.by_id.retain(|_, &mut node| node == ROOT);
    }
}

/// An open file or directory.
pub struct Open {
    pub node: u64,
    pub file: File,
    /// Held from a seek in a directory to the reading there. Lock order: before `Inodes`.
    pub position: Mutex<()>,
}

/// The files that the guest has open. Lock order: innermost.
#[derive(Default)]
pub struct Opens(Mutex<OpensInner>);

#[derive(Default)]
struct OpensInner {
    by_handle: HashMap<u64, Arc<Open>>,
    last: u64,
}

impl Opens {
    /// A handle for the file.
    pub fn insert(&self, node: u64, file: File) -> u64 {
        let inner = &mut *lock(&self.0);
        inner.last += 1;
        let open = Open { node, file, position: Mutex::new(()) };
        inner.by_handle.insert(inner.last, Arc::new(open));
        inner.last
    }

    /// # Errors
    ///
    /// EBADF: no such handle, or not of this file.
    pub fn get(&self, node: u64, handle: u64) -> io::Result<Arc<Open>> {
        match lock(&self.0).by_handle.get(&handle) {
            Some(open) if open.node == node => Ok(Arc::clone(open)),
            _ => Err(Errno::BADF.into()),
        }
    }

    /// # Errors
    ///
    /// As for [`Opens::get`].
    pub fn remove(&self, node: u64, handle: u64) -> io::Result<()> {
        self.get(node, handle)?;
        lock(&self.0).by_handle.remove(&handle);
        Ok(())
    }

    /// All handles of a file.
    pub fn of(&self, node: u64) -> Vec<Arc<Open>> {
        let inner = lock(&self.0);
        inner.by_handle.values().filter(|open| open.node == node).cloned().collect()
    }

    /// Closes all.
    pub fn clear(&self) {
        lock(&self.0).by_handle.clear();
    }
}
