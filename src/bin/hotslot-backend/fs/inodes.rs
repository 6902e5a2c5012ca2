//! The files that the guest knows, by node id.
//!
//! FUSE: a reply that names a file counts as a lookup of it, and FUSE_FORGET takes lookups back; until the
//! last one the node id stands for the same file, even if it is renamed or removed. A guest may know more
//! files than this process may have descriptors. So a file is held by an O_PATH descriptor only for some
//! time. It is opened again by a name by which the guest found it, in a directory that is held: one name at a
//! time, and no link is followed. Then it must be the same file. What the guest itself renames, links and
//! removes is followed; a file whose last name it removes stays held. Called by [`super::directory`] and
//! [`super::passthrough`].

use std::ffi::CStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::change::{Before, Change};
use super::confine::Root;
use super::identity::{Identity, Name};
use super::journal::Keeper;
use super::kept::Kept;
use super::opens::Opens;
use super::records::{Closed, Records};
use crate::complaints::Complaints;
use crate::lock::lock;

/// A file that the guest knows, held for the time of a request.
pub struct Inode {
    pub node: u64,
    /// Opened with O_PATH, so that the open had no effect on a device or FIFO; or one that the guest has
    /// open.
    pub path: Arc<File>,
    pub kind: FileType,
}

/// The files that the guest knows.
pub struct Inodes {
    root: Arc<Root>,
    opens: Arc<Opens>,
    /// Lock order: before `Opens`; no file is opened or closed under it.
    records: Mutex<Records>,
    /// Read-locked while the guest renames or removes a name, until that is recorded. Write-locked to find
    /// out whether a file is still where it was. Lock order: before `records`.
    moves: RwLock<()>,
    keeper: Keeper,
    complaints: Arc<Complaints>,
    has_complained: AtomicBool,
}

/// An attempt to open a file by its names.
enum Found {
    Here(Inode),
    /// This node is not what this name means now.
    NotBy(u64, Name),
}

impl Inodes {
    /// Only the root is known.
    ///
    /// # Errors
    ///
    /// Its attributes cannot be read.
    pub fn new(
        root: Arc<Root>,
        opens: Arc<Opens>,
        keeper: Keeper,
        complaints: Arc<Complaints>,
    ) -> io::Result<Self> {
        let path = root.dir.try_clone()?;
        let inodes = Inodes {
            records: Mutex::new(Records::new(root.descriptors, keeper.clone())),
            keeper,
            root,
            opens,
            moves: RwLock::default(),
            complaints,
            has_complained: AtomicBool::new(false),
        };
        inodes.insert(None, path)?;
        Ok(inodes)
    }

    /// The guest is that of the last session.
    pub fn restore(&self, kept: &Kept) {
        lock(&self.records).restore(kept);
    }

    /// # Errors
    ///
    /// ESTALE: the guest never looked that up, or forgot it; or the host has renamed or removed it.
    pub fn get(&self, node: u64) -> io::Result<Inode> {
        if let Some(inode) = self.held(node)? {
            return Ok(inode);
        }
        if let Ok(Found::Here(inode)) = self.open_again(node) {
            return Ok(inode);
        }
        // Unless the guest is moving it just now.
        let _still = self.moves.write().unwrap_or_else(PoisonError::into_inner);
        let mut last = None;
        loop {
            match self.open_again(node) {
                Ok(Found::Here(inode)) => return Ok(inode),
                Ok(Found::NotBy(node, (parent, name))) => {
                    lock(&self.records).drop_name(node, (parent, &name));
                    last = Some(name);
                }
                Err(e) => {
                    if let Some(name) = last {
                        self.complain(&name);
                    }
                    return Err(e);
                }
            }
        }
    }

    fn complain(&self, name: &CStr) {
        if !self.has_complained.swap(true, Ordering::Relaxed) {
            self.complaints.say(format_args!(
                "the host has moved or removed {name:?}, which the guest knows: the guest gets ESTALE and must \
                 look for the file again; this is said once"
            ));
        }
    }

    /// A file that need not be opened.
    fn held(&self, node: u64) -> io::Result<Option<Inode>> {
        let known = lock(&self.records).held(node);
        if let Some((kind, Some(path))) = known {
            return Ok(Some(Inode { node, path, kind }));
        }
        match (known, self.opens.any(node)) {
            (Some((kind, _)), Some(path)) => Ok(Some(Inode { node, path, kind })),
            // It lost its last name when there were no descriptors to spare.
            (None, Some(path)) => {
                let kind = FileType::from_raw_mode(path.metadata()?.mode());
                Ok(Some(Inode { node, path, kind }))
            }
            (Some(_), None) => Ok(None),
            (None, None) => Err(Errno::STALE.into()),
        }
    }

    /// Opens a file by names, from the nearest directory above it that is held.
    fn open_again(&self, node: u64) -> io::Result<Found> {
        let most = lock(&self.records).len();
        let mut way: Vec<(u64, Name)> = Vec::new();
        let mut at = node;
        let mut inode = loop {
            if let Some(inode) = self.held(at)? {
                break inode;
            }
            let name = lock(&self.records).name(at);
            let Some(name) = name else {
                match (self.open_by_handle(at), way.pop()) {
                    (Ok(inode), child) => {
                        way.extend(child);
                        break inode;
                    }
                    // The directory is gone. What was in it may have a handle, too.
                    (Err(_), Some((child, name))) if self.root.handles.is_some() => {
                        return Ok(Found::NotBy(child, name));
                    }
                    (Err(e), _) => return Err(e),
                }
            };
            let parent = name.0;
            // The guest has forgotten the directory; or names that the host has moved lead round in a circle.
            if way.len() > most || !lock(&self.records).has(parent) {
                return Ok(Found::NotBy(at, name));
            }
            way.push((at, name));
            at = parent;
        };
        while let Some((child, name)) = way.pop() {
            let opened = match open_name(&inode, &name.1) {
                Ok(opened) => self.hold_again(child, opened)?,
                Err(Errno::NOENT | Errno::NOTDIR | Errno::STALE) => None,
                Err(e) => return Err(e.into()),
            };
            match opened {
                Some(opened) => inode = opened,
                None => return Ok(Found::NotBy(child, name)),
            }
        }
        Ok(Found::Here(inode))
    }

    /// If the host's kernel has dropped the file's name from its memory, the file has no place that Landlock
    /// could allow: it cannot be opened for reading or writing (EACCES) until the guest looks it up.
    fn open_by_handle(&self, node: u64) -> io::Result<Inode> {
        let stale = || io::Error::from(Errno::STALE);
        let handles = self.root.handles.as_ref().ok_or_else(stale)?;
        let handle = lock(&self.records).handle(node).cloned().ok_or_else(stale)?;
        self.hold_again(node, handles.open(&handle)?)?.ok_or_else(stale)
    }

    /// Keeps the descriptor of a file that was opened again, if it is the same file.
    fn hold_again(&self, node: u64, path: File) -> io::Result<Option<Inode>> {
        let metadata = path.metadata()?;
        let identity = self.identity(&path, &metadata);
        let path = Arc::new(path);
        let mut records = lock(&self.records);
        if !records.is(node, &identity) {
            return Ok(None);
        }
        let closed = records.hold(node, Arc::clone(&path), false);
        drop(records);
        drop(closed);
        Ok(Some(Inode { node, path, kind: FileType::from_raw_mode(metadata.mode()) }))
    }

    fn identity(&self, path: &File, metadata: &Metadata) -> Identity {
        Identity::new(metadata, self.root.handles.as_ref().and_then(|handles| handles.of(path)))
    }

    fn is_open(&self, node: u64) -> bool {
        self.opens.any(node).is_some()
    }

    /// Counts a lookup of the file of an O_PATH descriptor, which was found by a name in a directory, or was
    /// made without one.
    ///
    /// # Errors
    ///
    /// Its attributes cannot be read.
    pub fn insert(&self, name: Option<(u64, &CStr)>, path: File) -> io::Result<(u64, Metadata)> {
        let metadata = path.metadata()?;
        let identity = self.identity(&path, &metadata);
        let is_open = |node| self.is_open(node);
        let (node, _closed) = lock(&self.records).insert(identity, name, Arc::new(path), &is_open);
        Ok((node, metadata))
    }

    /// Removes a name with `remove`, and keeps the file that had it for as long as the guest knows it.
    pub fn remove_name(
        &self,
        parent: &Inode,
        name: &CStr,
        remove: impl FnOnce() -> rustix::io::Result<()>,
    ) -> io::Result<()> {
        let file = self.named(parent, name)?;
        let id = id_of(&file);
        if let Some(before) = self.keeper.attempt(|| id)
            && id != Some(before)
        {
            return Ok(());
        }
        let _closed = {
            let _moving = self.moves.read().unwrap_or_else(PoisonError::into_inner);
            remove()?;
            self.take_name(parent, name, file)
        };
        Ok(())
    }

    /// Renames with `rename`, or exchanges two names.
    pub fn rename(
        &self,
        (old_parent, old_name): (&Inode, &CStr),
        (new_parent, new_name): (&Inode, &CStr),
        is_exchange: bool,
        rename: impl FnOnce() -> rustix::io::Result<()>,
    ) -> io::Result<()> {
        let moved = self.named(old_parent, old_name)?;
        let replaced = self.named(new_parent, new_name)?;
        let names = || {
            let to = |file, parent: &Inode, name: &CStr| {
                let node = self.node_of(file)?;
                Some(Change::AddName { node, name: (parent.node, name.to_owned()) })
            };
            let back = replaced.as_ref().filter(|_| is_exchange);
            let moved = moved.as_ref().and_then(|file| to(file, new_parent, new_name));
            moved.into_iter().chain(back.and_then(|file| to(file, old_parent, old_name))).collect()
        };
        if let Some(before) = self.keeper.attempt_with(|| id_of(&moved), names)
            && id_of(&replaced) == Some(before)
        {
            return Ok(());
        }
        let moving = self.moves.read().unwrap_or_else(PoisonError::into_inner);
        rename()?;
        // Two names of one file: nothing has changed.
        if id_of(&moved) == id_of(&replaced) {
            return Ok(());
        }
        // A name comes before another goes, so that the file has one.
        self.add_name(new_parent, new_name, &moved);
        if is_exchange {
            self.add_name(old_parent, old_name, &replaced);
        }
        let _closed =
            [self.take_name(old_parent, old_name, moved), self.take_name(new_parent, new_name, replaced)];
        drop(moving);
        Ok(())
    }

    /// The file that has a name, if there is one.
    fn named(&self, parent: &Inode, name: &CStr) -> io::Result<Option<(File, Metadata)>> {
        match open_name(parent, name) {
            Ok(file) => {
                let metadata = file.metadata()?;
                Ok(Some((file, metadata)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn node_of(&self, (file, metadata): &(File, Metadata)) -> Option<u64> {
        let identity = self.identity(file, metadata);
        lock(&self.records).find(&identity, &|node| self.is_open(node))
    }

    fn add_name(&self, parent: &Inode, name: &CStr, file: &Option<(File, Metadata)>) {
        if let Some((file, metadata)) = file {
            let identity = self.identity(file, metadata);
            lock(&self.records).add_name(&identity, (parent.node, name), &|node| self.is_open(node));
        }
    }

    fn take_name(&self, parent: &Inode, name: &CStr, file: Option<(File, Metadata)>) -> Closed {
        let Some((file, metadata)) = file else {
            return Closed::new();
        };
        let identity = self.identity(&file, &metadata);
        let is_last = metadata.is_dir() || metadata.nlink() <= 1;
        let (name, path) = ((parent.node, name), Arc::new(file));
        lock(&self.records).take_name(&identity, name, path, is_last, &|node| self.is_open(node))
    }

    /// Takes lookups back. The root stays.
    pub fn forget(&self, node: u64, count: u64) {
        let _closed = lock(&self.records).forget(node, count);
    }

    /// Forgets all but the root.
    pub fn clear(&self) {
        let _closed = lock(&self.records).clear();
    }
}

/// Device and inode number.
fn id_of(file: &Option<(File, Metadata)>) -> Option<Before> {
    file.as_ref().map(|(_, it)| [it.dev(), it.ino()])
}

/// Opens a file by its name, with O_PATH; of a link, the link itself.
pub fn open_name(parent: &Inode, name: &CStr) -> rustix::io::Result<File> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&parent.path, name, flags, Mode::empty())?.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use rustix::fs::AtFlags;
    use rustix::thread::CapabilitySet;

    use super::*;
    use crate::fs::credentials::Credentials;
    use crate::fs::descriptors::Descriptors;
    use crate::fs::identity::ROOT;

    /// Another thread looks for a file without a descriptor when its name has changed, and that is not yet
    /// recorded.
    #[test]
    fn a_file_is_found_while_its_name_changes() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root {
            dir: File::open(dir.path()).unwrap(),
            proc: File::open("/proc/self/fd").unwrap(),
            credentials: Credentials::of(CapabilitySet::empty()),
            descriptors: Descriptors { open: 0, cached: 0, pinned: 10, locks: 0 },
            handles: None,
            note: None,
        };
        let complaints = Arc::new(Complaints::of("test"));
        let (keeper, opens) = (Keeper::default(), Arc::new(Opens::new(0, Keeper::default())));
        let inodes = Inodes::new(Arc::new(root), opens, keeper, complaints).unwrap();
        let top = inodes.get(ROOT).unwrap();
        let [renamed, removed] = [c"renamed", c"removed"].map(|name| {
            fs::write(dir.path().join(name.to_str().unwrap()), "").unwrap();
            inodes.insert(Some((ROOT, name)), open_name(&top, name).unwrap()).unwrap().0
        });
        thread::scope(|scope| {
            let look = |node| {
                let (begins, begun) = mpsc::channel();
                let inodes = &inodes;
                let found = scope.spawn(move || {
                    begins.send(()).unwrap();
                    inodes.get(node).map(|inode| inode.node).ok()
                });
                begun.recv().unwrap();
                // Time enough to look in vain, if it did not wait.
                thread::sleep(Duration::from_millis(50));
                found
            };
            let mut found = Vec::new();
            let rename = || {
                rustix::fs::renameat(&top.path, c"renamed", &top.path, c"new")?;
                found.push(look(renamed));
                Ok(())
            };
            inodes.rename((&top, c"renamed"), (&top, c"new"), false, rename).unwrap();
            let remove = || {
                rustix::fs::unlinkat(&top.path, c"removed", AtFlags::empty())?;
                found.push(look(removed));
                Ok(())
            };
            inodes.remove_name(&top, c"removed", remove).unwrap();
            let found: Vec<_> = found.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert_eq!(found, [Some(renamed), Some(removed)]);
        });
    }
}
