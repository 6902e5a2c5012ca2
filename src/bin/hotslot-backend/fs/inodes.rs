//! The files that the guest knows, by node id, and those that it has open, by handle.
//!
//! FUSE: a reply that names a file counts as a lookup of it, and FUSE_FORGET takes lookups back; until the
//! last one the node id stands for the same file, whatever its name is by then. So each is held with an
//! O_PATH descriptor, which also keeps its inode number from being used again. Called by
//! [`super::passthrough`].

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex};

use crate::requests::lock;

/// FUSE_ROOT_ID.
pub const ROOT: u64 = 1;

/// A file that the guest knows.
pub struct Inode {
    pub node: u64,
    /// Opened with O_PATH: it can neither be read nor written, and opening it did nothing to a device or
    /// FIFO.
    pub path: File,
    /// `S_IFMT` of its mode.
    pub kind: u32,
    id: (u64, u64),
}

/// The files that the guest knows.
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
            None => Err(io::Error::from_raw_os_error(libc::ESTALE)),
        }
    }

    /// Counts a lookup of what an O_PATH descriptor refers to.
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
        let inode = Inode { node, path, kind: metadata.mode() & libc::S_IFMT, id };
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
    /// Held from a seek in a directory to the reading there.
    pub position: Mutex<()>,
}

/// What the guest has open.
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
            _ => Err(io::Error::from_raw_os_error(libc::EBADF)),
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

    /// All that are open of a file.
    pub fn of(&self, node: u64) -> Vec<Arc<Open>> {
        let inner = lock(&self.0);
        inner.by_handle.values().filter(|open| open.node == node).cloned().collect()
    }

    /// Closes all.
    pub fn clear(&self) {
        lock(&self.0).by_handle.clear();
    }
}
