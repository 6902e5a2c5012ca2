//! The directory, for one guest: how its files are found, opened, listed, made and removed.
//!
//! A file is reached from a directory that is held, by one name: no path, and no link is followed. An O_PATH
//! descriptor holds the file while there are descriptors enough; later it is found again ([`super::inodes`]).
//! For operations that such a descriptor does not allow, the program opens `/proc/self/fd/N`, never the name,
//! which may mean another file by then. Only regular files and directories are opened. Called by
//! [`super::passthrough`].

use std::ffi::CStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{Attr, OpenOptions, stat64};
use fuse_backend_rs::api::filesystem::{Context, DirEntry, Entry};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::change::{Before, Change, Mapping};
use super::confine::Root;
use super::credentials::{ActingAs, InGroup, set_umask};
use super::dax::Window;
use super::identity::{ROOT, one_name};
use super::inodes::{Inode, Inodes, open_name};
use super::journal::Keeper;
use super::kept::Kept;
use super::locks::{self, Locks};
use super::opens::{Open, Opens};
use super::policy::{Cache, Policy};
use crate::complaints::Complaints;
use crate::lock::lock;

/// The most bytes of names that are read from a directory at a time.
const NAMES: u32 = 32 << 10;

/// The flags of an open that are passed on. Not O_DIRECT, which would make demands on the guest's buffers,
/// nor O_PATH, O_TMPFILE and O_CREAT, which would make it another operation.
///
/// Nor O_APPEND: without DAX the guest's kernel writes back what a program stored through a mapping, at its
/// offset and by any handle that can write; with O_APPEND the host would ignore that offset and add the data
/// to the end. A write says by itself whether it appends. So a file of the host that may only be appended to
/// (`chattr +a`) is not opened for writing.
const OPEN_FLAGS: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

/// A flag of a file's attributes: another file system is mounted there.
const FUSE_ATTR_SUBMOUNT: u32 = 1 << 0;

/// The directory, for one guest. Several threads use it at a time.
pub struct Directory {
    pub(super) root: Arc<Root>,
    pub(super) policy: Arc<Policy>,
    pub(super) inodes: Inodes,
    pub(super) opens: Arc<Opens>,
    pub(super) locks: Locks,
    pub(super) window: Option<Arc<Window>>,
    pub(super) keeper: Keeper,
    /// The directory, opened for FUSE_SYNCFS.
    pub(super) synced: File,
}

/// The reply to FUSE_CREATE, in the types of fuse-backend-rs.
pub type Opened = (Entry, Option<u64>, OpenOptions, Option<u32>);

impl Directory {
    /// # Errors
    ///
    /// The directory's attributes or names cannot be read.
    pub fn new(
        root: Arc<Root>,
        policy: Arc<Policy>,
        window: Option<Arc<Window>>,
        keeper: Keeper,
        complaints: Arc<Complaints>,
    ) -> io::Result<Self> {
        let opens = Arc::new(Opens::new(root.descriptors.open, keeper.clone()));
        let inodes = Inodes::new(Arc::clone(&root), Arc::clone(&opens), keeper.clone(), complaints)?;
        let synced = open_file(&root, &root.dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let locks = Locks::new(root.descriptors.locks, keeper.clone());
        Ok(Directory { inodes, root, policy, opens, locks, window, keeper, synced })
    }

    /// The guest is that of the last session: what it knows, has open and has locked. Returns how much of
    /// that is lost.
    pub fn restore(&self, kept: &Kept) -> usize {
        self.inodes.restore(kept);
        let mut lost = 0;
        for (&(node, handle), &flags) in &kept.opens {
            let flags = OFlags::from_bits_retain(flags) & (OPEN_FLAGS & !OFlags::TRUNC);
            let may = !self.policy.read_only || flags & OFlags::RWMODE == OFlags::RDONLY;
            let inode = self.inodes.get(node).ok().filter(|_| may);
            let file = inode.and_then(|inode| self.open_inode(&inode, flags).ok());
            lost += usize::from(file.is_none());
            self.opens.restore(node, handle, file);
        }
        for (owner, locked) in &kept.locks {
            for &(first, last, kind) in &locked.ranges {
                let wanted = locks::wanted(owner, locked.handle, (first, last), kind);
                if self.set_lock(owner.node, &wanted).is_err() {
                    self.keeper.note(|| Change::Unlocked(*owner));
                    lost += 1;
                }
            }
        }
        self.keeper.commit(|| None);
        lost
    }

    /// Opens a file that was mapped, to map it again.
    pub fn open_mapped(&self, mapping: &Mapping) -> io::Result<File> {
        let inode = self.inodes.get(mapping.node)?;
        match mapping.writable && !self.policy.read_only {
            true => self.open_for_writing(&inode),
            false => self.open_for_reading(&inode),
        }
    }

    /// For a request that makes a name: whether the last process may have made it.
    pub fn makes_again(&self, parent: &Inode, name: &CStr) -> bool {
        let is_absent = || matches!(open_name(parent, name), Err(Errno::NOENT));
        self.keeper.attempt(|| is_absent().then_some(Before::default())).is_some()
    }

    /// A session of the guest begins or ends: closes, forgets and unmaps all.
    pub fn clear(&self) {
        self.locks.clear();
        self.opens.clear();
        self.inodes.clear();
        if let Some(window) = &self.window {
            window.empty();
        }
        self.keeper.note(|| Change::Clear);
    }

    pub fn check_writable(&self) -> io::Result<()> {
        if self.policy.read_only {
            return Err(Errno::ROFS.into());
        }
        Ok(())
    }

    /// Opens a file that the guest knows.
    pub fn open_inode(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        match inode.kind {
            FileType::RegularFile | FileType::Directory => Ok(self.reopen(&inode.path, flags)?),
            FileType::Symlink => Err(Errno::LOOP.into()),
            // The guest's kernel opens devices, FIFOs and sockets itself.
            _ => Err(Errno::NXIO.into()),
        }
    }

    pub fn reopen(&self, file: &File, flags: OFlags) -> io::Result<File> {
        open_file(&self.root, file, flags)
    }

    /// Opens a regular file for reading and writing, or finds it open for that: it may have become read-only
    /// since. Git creates files that are read-only from the beginning.
    pub fn open_for_writing(&self, inode: &Inode) -> io::Result<File> {
        self.open_or_find(inode, OFlags::RDWR)
    }

    /// The same with the access that is needed: O_RDWR, or O_WRONLY for a file that may not be readable.
    pub fn open_or_find(&self, inode: &Inode, needed: OFlags) -> io::Result<File> {
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL.into());
        }
        let opened = self.open_inode(inode, needed);
        if !is_denied(&opened) {
            return opened;
        }
        let mut opens = self.opens.of(inode.node).into_iter();
        match opens.find(|open| [needed, OFlags::RDWR].contains(&access(open))) {
            Some(open) => open.file.try_clone(),
            None => opened,
        }
    }

    /// Opens a regular file for reading, or finds it open for that: it may have become unreadable since.
    pub fn open_for_reading(&self, inode: &Inode) -> io::Result<File> {
        let opened = self.open_inode(inode, OFlags::RDONLY);
        if !is_denied(&opened) {
            return opened;
        }
        let mut opens = self.opens.of(inode.node).into_iter();
        match opens.find(|open| access(open) != OFlags::WRONLY) {
            Some(open) => open.file.try_clone(),
            None => opened,
        }
    }

    /// Opens a regular file to be mapped, and says whether for writing.
    ///
    /// Linux maps for reading first and asks for the same range again when it writes. A new mapping would
    /// then open a hole under the threads that read. So a file that can be written is mapped for writing at
    /// once. Other back-ends, with which a front-end may share the mapping, need that anyway. The exception
    /// are programs that no process of the guest has open for writing: the host runs no program that is open
    /// for writing.
    pub fn open_for_mapping(&self, inode: &Inode, writes: bool) -> io::Result<(File, bool)> {
        let is_program = inode.path.metadata()?.mode() & 0o111 != 0;
        let is_written = || {
            let opens = self.opens.of(inode.node);
            opens.iter().any(|open| access(open) != OFlags::RDONLY)
        };
        if writes || !self.policy.read_only && (!is_program || is_written()) {
            let opened = self.open_for_writing(inode);
            if writes || !is_denied(&opened) {
                return Ok((opened?, true));
            }
        }
        Ok((self.open_inode(inode, OFlags::RDONLY)?, false))
    }

    /// The flags for an open of the guest, if it may have one more.
    pub fn open_flags(&self, flags: u32) -> io::Result<OFlags> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        if flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC) {
            self.check_writable()?;
        }
        self.opens.check_room()?;
        Ok(flags)
    }

    pub fn open_options(&self) -> OpenOptions {
        match self.policy.cache {
            Cache::Never => OpenOptions::DIRECT_IO,
            Cache::Auto => OpenOptions::empty(),
            Cache::Always => OpenOptions::KEEP_CACHE,
        }
    }

    /// Counts a lookup of the file of an O_PATH descriptor, and of its name in a directory if it has one.
    fn entry(&self, name: Option<(&Inode, &CStr)>, path: File) -> io::Result<Entry> {
        let (inode, metadata) = self.inodes.insert(name.map(|(parent, name)| (parent.node, name)), path)?;
        let is_told = self.policy.announce_submounts && metadata.is_dir();
        let is_other =
            |parent: &Inode| parent.path.metadata().is_ok_and(|found| found.dev() != metadata.dev());
        let is_mount = name.filter(|_| is_told).is_some_and(|(parent, _)| is_other(parent));
        Ok(Entry {
            inode,
            generation: 0,
            attr: self.policy.ids.seen(attributes(&metadata)),
            attr_flags: if is_mount { FUSE_ATTR_SUBMOUNT } else { 0 },
            attr_timeout: self.policy.cache.timeout(),
            entry_timeout: self.policy.cache.timeout(),
        })
    }

    pub fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        let path = open_name(parent, one_name(name)?)?;
        self.entry(Some((parent, name)), path)
    }

    /// The reply for a file that was just created and opened, by a name or without one.
    pub fn opened(&self, name: Option<(&Inode, &CStr)>, file: File) -> io::Result<Opened> {
        let entry = self.entry(name, self.reopen(&file, OFlags::PATH)?)?;
        let handle = self.opens.insert(entry.inode, file);
        Ok((entry, Some(handle), self.open_options(), None))
    }

    /// Reads a directory from `offset` on, until `add` returns 0. At an error behind the first name it stops:
    /// the guest's next request meets the error.
    pub fn read_directory(
        &self,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(&Inode, DirEntry, &CStr) -> io::Result<usize>,
    ) -> io::Result<()> {
        let inode = self.inodes.get(node)?;
        let open = self.opens.get(node, handle)?;
        let mut buffer = Vec::with_capacity(size.min(NAMES) as usize);
        let _position = lock(&open.position);
        rustix::fs::seek(&open.file, SeekFrom::Start(offset))?;
        let mut names = RawDir::new(&open.file, buffer.spare_capacity_mut());
        let mut first = true;
        while let Some(name) = names.next() {
            let added = name.map_err(io::Error::from).and_then(|name| {
                let entry = DirEntry {
                    ino: if node == ROOT && name.file_name() == c".." {
                        inode.path.metadata()?.ino()
                    } else {
                        name.ino()
                    },
                    offset: name.next_entry_cookie(),
                    type_: name.file_type().as_raw_mode() >> 12,
                    name: name.file_name().to_bytes(),
                };
                add(&inode, entry, name.file_name())
            });
            match added {
                Ok(0) => break,
                Ok(_) => first = false,
                Err(e) if first => return Err(e),
                Err(_) => break,
            }
        }
        Ok(())
    }

    pub fn create_node(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        umask: u32,
        make: impl FnOnce(&File, &CStr) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let name = one_name(name)?;
        let again = self.makes_again(&parent, name);
        {
            let _acting = self.act_as(context, umask)?;
            match make(&parent.path, name) {
                Err(Errno::EXIST) if again => {}
                result => result?,
            }
        }
        self.find(&parent, name)
    }

    /// Makes this thread the guest's user with that user's umask, to create a file.
    pub fn act_as(&self, context: &Context, umask: u32) -> io::Result<Option<ActingAs>> {
        set_umask(umask)?;
        self.root.credentials.act_as(context, &self.policy.ids)
    }

    /// Takes this thread into a group of the guest, too, to create a file.
    pub fn join(&self, group: Option<u32>) -> io::Result<Option<InGroup>> {
        match group.and_then(|group| self.policy.ids.groups.outside(group)) {
            Some(group) => self.root.credentials.join(group),
            None => Ok(None),
        }
    }

    pub fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let name = one_name(name)?;
        self.inodes.remove_name(&parent, name, || rustix::fs::unlinkat(&parent.path, name, flags))
    }
}

fn open_file(root: &Root, file: &File, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::openat(&root.proc, number(file), flags, Mode::empty())?.into())
}

/// The attributes of a file, in the types of fuse-backend-rs.
pub fn attributes(metadata: &Metadata) -> stat64 {
    // FUSE has the same widths, but for device numbers, whose upper half is zero on Linux.
    Attr {
        ino: metadata.ino(),
        size: metadata.size(),
        blocks: metadata.blocks(),
        atime: metadata.atime() as u64,
        mtime: metadata.mtime() as u64,
        ctime: metadata.ctime() as u64,
        atimensec: metadata.atime_nsec() as u32,
        mtimensec: metadata.mtime_nsec() as u32,
        ctimensec: metadata.ctime_nsec() as u32,
        mode: metadata.mode(),
        nlink: metadata.nlink() as u32,
        uid: metadata.uid(),
        gid: metadata.gid(),
        rdev: metadata.rdev() as u32,
        blksize: metadata.blksize() as u32,
        flags: 0,
    }
    .into()
}

/// The name of a descriptor in `/proc/self/fd`.
pub fn number(file: &File) -> String {
    file.as_raw_fd().to_string()
}

fn is_denied<T>(result: &io::Result<T>) -> bool {
    const DENIED: [Errno; 4] = [Errno::ACCESS, Errno::PERM, Errno::ROFS, Errno::TXTBSY];
    matches!(result, Err(e) if Errno::from_io_error(e).is_some_and(|errno| DENIED.contains(&errno)))
}

/// How a file is open: O_RDONLY, O_WRONLY or O_RDWR.
fn access(open: &Open) -> OFlags {
    rustix::fs::fcntl_getfl(&open.file).map_or(OFlags::RDONLY, |flags| flags & OFlags::RWMODE)
}
