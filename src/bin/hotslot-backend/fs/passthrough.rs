//! The file system: each operation of the guest, done on the directory of the host.
//!
//! FUSE 7.31 (Linux' `include/uapi/linux/fuse.h`), decoded by fuse-backend-rs, whose [`FileSystem`] this
//! implements; what it does not decode comes from [`super::requests`]. Called on several threads at a time.
//!
//! A file is reached from a directory that is held, by one name that is no path and no link that is followed.
//! It is then held itself, with an O_PATH descriptor, and what cannot be done with that is done with its
//! number in `/proc/self/fd`: never with a name, which may mean another file by then. Only regular files and
//! directories are opened.
//!
//! Who may do what is checked by the guest's kernel, which knows the modes and owners of the files, and its
//! users' groups. The host's checks us: an ordinary user, who can do what that user can, or root; then files
//! are created as the guest's user, whose they are.

use std::ffi::CStr;
use std::fs::{File, Metadata};
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use fuse_backend_rs::abi::fuse_abi::{
    Attr, CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64,
};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Timespec, Timestamps,
    UTIME_NOW, UTIME_OMIT, XattrFlags,
};
use rustix::io::ReadWriteFlags;
use rustix::process::{Gid, Uid};
use rustix::thread::CapabilitySet;

use super::confine::Root;
use super::dax::{Mapping, Window};
use super::inodes::{Inode, Inodes, Open, Opens, ROOT};
use crate::requests::lock;

/// The most that one request reads or writes: what is agreed with the guest.
pub const MAX_IO: u32 = 1 << 20;
/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const XATTR_MAX: u32 = 64 << 10;
/// The most names that are read from a directory at a time, in bytes.
const NAMES: u32 = 32 << 10;
/// The most that one request copies; the guest asks again for the rest.
const MAX_COPY: u64 = 1 << 30;

/// What of the flags of an open is passed on. Not O_DIRECT, which would make demands on the guest's buffers,
/// nor O_PATH, O_TMPFILE and O_CREAT, which would make something else of it.
///
/// Nor O_APPEND: without DAX the guest's kernel writes back what a program stored through a mapping, at its
/// offset and by any handle that can write; with O_APPEND the host would ignore that offset and add the data
/// to the end. A write says by itself whether it appends. So a file of the host that may only be appended to
/// (`chattr +a`) is not opened for writing.
const OPEN_FLAGS: OFlags = OFlags::RWMODE.union(OFlags::TRUNC).union(OFlags::SYNC).union(OFlags::DSYNC);

/// How long the guest may believe what it was told.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// The guest asks each time and caches no data; without DAX it cannot share memory through a file
    None,
    /// Names and attributes for a second; data until a file is opened after it changed
    Auto,
    /// Everything: for a directory that nobody else changes
    Always,
}

impl Cache {
    fn timeout(self) -> Duration {
        match self {
            Cache::None => Duration::ZERO,
            Cache::Auto => Duration::from_secs(1),
            Cache::Always => Duration::from_secs(24 * 3600),
        }
    }
}

/// The directory, for one guest.
pub struct Directory {
    root: Arc<Root>,
    read_only: bool,
    cache: Cache,
    inodes: Inodes,
    opens: Opens,
    window: Option<Arc<Window>>,
}

type Opened = (Entry, Option<u64>, OpenOptions, Option<u32>);

impl Directory {
    /// # Errors
    ///
    /// The directory's attributes cannot be read.
    pub fn new(
        root: Arc<Root>,
        read_only: bool,
        cache: Cache,
        window: Option<Arc<Window>>,
    ) -> io::Result<Self> {
        Ok(Directory {
            inodes: Inodes::new(&root.dir)?,
            root,
            read_only,
            cache,
            opens: Opens::default(),
            window,
        })
    }

    /// A session of the guest begins or ends: nothing is open, known or mapped.
    pub fn clear(&self) {
        self.opens.clear();
        self.inodes.clear();
        if let Some(window) = &self.window {
            window.empty();
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only {
            return error(libc::EROFS);
        }
        Ok(())
    }

    /// Opens what an inode stands for.
    fn open_inode(&self, inode: &Inode, flags: OFlags) -> io::Result<File> {
        match inode.kind {
            libc::S_IFREG | libc::S_IFDIR => Ok(self.reopen(&inode.path, flags)?),
            libc::S_IFLNK => error(libc::ELOOP),
            // The guest's kernel has devices, FIFOs and sockets of its own behind such files.
            _ => error(libc::ENXIO),
        }
    }

    fn reopen(&self, file: &File, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY;
        Ok(rustix::fs::openat(&self.root.proc, number(file), flags, Mode::empty())?.into())
    }

    /// Opens a regular file for writing, or finds it open for that: it may have become read-only since, as
    /// the files that git creates are from the beginning.
    fn open_for_writing(&self, inode: &Inode) -> io::Result<File> {
        if inode.kind != libc::S_IFREG {
            return error(libc::EINVAL);
        }
        let opened = self.open_inode(inode, OFlags::RDWR);
        if !is_denied(&opened) {
            return opened;
        }
        let mut opens = self.opens.of(inode.node).into_iter();
        match opens.find(|open| access(open) == OFlags::RDWR) {
            Some(open) => open.file.try_clone(),
            None => opened,
        }
    }

    /// Opens a regular file to be mapped. The second value says whether that is for writing.
    ///
    /// Linux maps for reading first and asks for the same range again when it writes, which would open a hole
    /// under those who read. So whatever can be written is mapped for that at once. Other back-ends, to which
    /// a front-end may have to hand the mapping, need that anyway. Except programs that nobody has open for
    /// writing: to run them the host wants no writer.
    fn open_for_mapping(&self, inode: &Inode, writes: bool) -> io::Result<(File, bool)> {
        let is_program = inode.path.metadata()?.mode() & 0o111 != 0;
        let is_written = || {
            let opens = self.opens.of(inode.node);
            opens.iter().any(|open| access(open) != OFlags::RDONLY)
        };
        if writes || !self.read_only && (!is_program || is_written()) {
            let opened = self.open_for_writing(inode);
            if writes || !is_denied(&opened) {
                return Ok((opened?, true));
            }
        }
        Ok((self.open_inode(inode, OFlags::RDONLY)?, false))
    }

    /// The flags that the guest opens a file with.
    fn open_flags(&self, flags: u32) -> io::Result<OFlags> {
        let flags = OFlags::from_bits_retain(flags) & OPEN_FLAGS;
        if flags & OFlags::RWMODE != OFlags::RDONLY || flags.contains(OFlags::TRUNC) {
            self.check_writable()?;
        }
        Ok(flags)
    }

    fn open_options(&self) -> OpenOptions {
        match self.cache {
            Cache::None => OpenOptions::DIRECT_IO,
            Cache::Auto => OpenOptions::empty(),
            Cache::Always => OpenOptions::KEEP_CACHE,
        }
    }

    /// Counts a lookup of what an O_PATH descriptor refers to.
    fn entry(&self, path: File) -> io::Result<Entry> {
        let (inode, metadata) = self.inodes.insert(path)?;
        Ok(Entry {
            inode,
            generation: 0,
            attr: attributes(&metadata),
            attr_flags: 0,
            attr_timeout: self.cache.timeout(),
            entry_timeout: self.cache.timeout(),
        })
    }

    fn find(&self, parent: &Inode, name: &CStr) -> io::Result<Entry> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let path = rustix::fs::openat(&parent.path, one_name(name)?, flags, Mode::empty())?;
        self.entry(path.into())
    }

    /// What was just opened, as a reply to the guest.
    fn opened(&self, file: File) -> io::Result<Opened> {
        let entry = self.entry(self.reopen(&file, OFlags::PATH)?)?;
        let handle = self.opens.insert(entry.inode, file);
        Ok((entry, Some(handle), self.open_options(), None))
    }

    /// Makes this thread the guest's user until the value is dropped, where we may.
    fn act_as(&self, context: &Context) -> io::Result<Option<ActingAs>> {
        if !self.root.acts_as_guest {
            return Ok(None);
        }
        if context.uid == u32::MAX || context.gid == u32::MAX {
            return error(libc::EINVAL);
        }
        let acting = ActingAs;
        // The group first: without our user we could not.
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(context.gid), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(context.uid), None)?;
        // We do not know all groups of that user, and the guest's kernel has agreed.
        set_capability(CapabilitySet::DAC_OVERRIDE, true)?;
        Ok(Some(acting))
    }

    /// FUSE_STATFS.
    pub fn file_system(&self, node: u64) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(&self.inodes.get(node)?.path)?)
    }

    /// FUSE_SYNCFS: writes back the file system that the directory is on.
    pub fn sync(&self) -> io::Result<()> {
        let dir = self.reopen(&self.root.dir, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(rustix::fs::syncfs(dir)?)
    }

    /// FUSE_TMPFILE: a file without a name in `parent`, which may be given one by FUSE_LINK.
    pub fn temporary(&self, context: &Context, parent: u64, args: CreateIn) -> io::Result<Opened> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let flags = self.open_flags(args.flags)? & !OFlags::TRUNC;
        let file = {
            let _acting = self.act_as(context)?;
            let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
            rustix::fs::openat(&parent.path, c".", flags, mode(args.mode, args.umask))?
        };
        self.opened(file.into())
    }

    /// FUSE_COPY_FILE_RANGE. Node, handle and offset of each file; returns how much was copied.
    pub fn copy(&self, from: (u64, u64, u64), to: (u64, u64, u64), len: u64) -> io::Result<u32> {
        self.check_writable()?;
        let source = self.opens.get(from.0, from.1)?;
        let target = self.opens.get(to.0, to.1)?;
        let (mut at, mut put) = (from.2, to.2);
        let len = usize::try_from(len.min(MAX_COPY)).map_err(io::Error::other)?;
        let copied =
            rustix::fs::copy_file_range(&source.file, Some(&mut at), &target.file, Some(&mut put), len)?;
        u32::try_from(copied).map_err(io::Error::other)
    }

    /// Reads a directory from `offset` on, until `add` returns 0. What follows an error is left for the next
    /// time.
    fn read_directory(
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

    fn create_node(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&File, &CStr) -> rustix::io::Result<()>,
    ) -> io::Result<Entry> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let name = one_name(name)?;
        {
            let _acting = self.act_as(context)?;
            make(&parent.path, name)?;
        }
        self.find(&parent, name)
    }

    fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        Ok(rustix::fs::unlinkat(&parent.path, one_name(name)?, flags)?)
    }
}

impl FileSystem for Directory {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that crashed said no goodbye.
        self.clear();
        let mut options = FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::BIG_WRITES
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::MAX_PAGES
            | FsOptions::PARALLEL_DIROPS;
        options.set(FsOptions::AUTO_INVAL_DATA, self.cache != Cache::Always);
        options.set(FsOptions::MAP_ALIGNMENT, self.window.is_some());
        Ok(options & capable)
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&*self.inodes.get(parent)?, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let metadata = self.inodes.get(inode)?.path.metadata()?;
        Ok((attributes(&metadata), self.cache.timeout()))
    }

    fn setattr(
        &self,
        context: &Context,
        node: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        self.check_writable()?;
        let inode = self.inodes.get(node)?;
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(attr.st_mode & 0o7777);
            rustix::fs::chmodat(&self.root.proc, number(&inode.path), mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let set = |flag, id: u32| (valid.contains(flag) && id != u32::MAX).then_some(id);
            let uid = set(SetattrValid::UID, attr.st_uid).map(Uid::from_raw);
            let gid = set(SetattrValid::GID, attr.st_gid).map(Gid::from_raw);
            rustix::fs::chownat(&inode.path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let len = u64::try_from(attr.st_size).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            let _dropped = self.drop_setid(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle {
                Some(handle) => rustix::fs::ftruncate(&self.opens.get(node, handle)?.file, len)?,
                None => rustix::fs::ftruncate(self.open_for_writing(&inode)?, len)?,
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, tv_sec, nanoseconds: i64| Timespec {
                tv_sec,
                tv_nsec: if valid.contains(now) {
                    UTIME_NOW
                } else if valid.contains(set) {
                    nanoseconds
                } else {
                    UTIME_OMIT
                },
            };
            let times = Timestamps {
                last_access: time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    attr.st_atime,
                    attr.st_atime_nsec,
                ),
                last_modification: time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    attr.st_mtime,
                    attr.st_mtime_nsec,
                ),
            };
            rustix::fs::utimensat(&inode.path, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.getattr(context, node, None)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(inode)?;
        Ok(rustix::fs::readlinkat(&inode.path, c"", Vec::new())?.into_bytes())
    }

    fn symlink(&self, context: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.create_node(context, parent, name, |dir, name| rustix::fs::symlinkat(target, dir, name))
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        full_mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(full_mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            // What overlayfs makes of a removed file.
            FileType::CharacterDevice if rdev == 0 => {}
            _ => return error(libc::EPERM),
        }
        self.create_node(context, parent, name, |dir, name| {
            rustix::fs::mknodat(dir, name, kind, mode(full_mode, umask), 0)
        })
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        full_mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.create_node(context, parent, name, |dir, name| {
            rustix::fs::mkdirat(dir, name, mode(full_mode, umask))
        })
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::empty())
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(parent, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        _: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.check_writable()?;
        let (old_parent, new_parent) = (self.inodes.get(old_parent)?, self.inodes.get(new_parent)?);
        Ok(rustix::fs::renameat_with(
            &old_parent.path,
            one_name(old_name)?,
            &new_parent.path,
            one_name(new_name)?,
            RenameFlags::from_bits_retain(flags),
        )?)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.check_writable()?;
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(parent)?);
        let name = one_name(name)?;
        // Not AT_EMPTY_PATH, for which an ordinary user had no right before Linux 6.10.
        rustix::fs::linkat(
            &self.root.proc,
            number(&inode.path),
            &parent.path,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let inode = self.inodes.get(node)?;
        if inode.kind == libc::S_IFDIR {
            return error(libc::EISDIR);
        }
        let flags = self.open_flags(flags)?;
        let _dropped = self.drop_setid(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        let file = self.open_inode(&inode, flags)?;
        Ok((Some(self.opens.insert(node, file)), self.open_options(), None))
    }

    fn create(&self, context: &Context, parent: u64, name: &CStr, args: CreateIn) -> io::Result<Opened> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let name = one_name(name)?;
        let flags = self.open_flags(args.flags)?;
        let created = {
            let _acting = self.act_as(context)?;
            // Where there is something it is opened below, and not by its name.
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&parent.path, name, flags, mode(args.mode, args.umask))
        };
        let exclusive = OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL);
        match created {
            Err(rustix::io::Errno::EXIST) if !exclusive => {
                let entry = self.find(&parent, name)?;
                let opened = self.inodes.get(entry.inode).and_then(|inode| {
                    let _dropped = self.drop_setid(args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
                    self.open_inode(&inode, flags)
                });
                // The lookup is not answered then.
                let file = opened.inspect_err(|_| self.inodes.forget(entry.inode, 1))?;
                let handle = self.opens.insert(entry.inode, file);
                Ok((entry, Some(handle), self.open_options(), None))
            }
            created => self.opened(created?.into()),
        }
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        target: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let open = self.opens.get(node, handle)?;
        let size = (size.min(MAX_IO) as usize).min(target.available_bytes());
        // fuse-backend-rs wants a file of its own.
        target.write_from(&mut open.file.try_clone()?, size, offset)
    }

    fn write(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        source: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        from_cache: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.check_writable()?;
        let open = self.opens.get(node, handle)?;
        let _dropped = self.drop_setid(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let size = size.min(MAX_IO) as usize;
        if from_cache || flags & libc::O_APPEND as u32 == 0 {
            return source.read_to(&mut open.file.try_clone()?, size, offset);
        }
        // The guest's kernel took the offset from a size that may be old: the host knows where the end is.
        let mut data = vec![0; size];
        source.read_exact(&mut data)?;
        let end = ReadWriteFlags::APPEND;
        Ok(rustix::io::pwritev2(&open.file, &[IoSlice::new(&data)], offset, end)?)
    }

    /// Nothing is kept back that a close could write. The guest's kernel takes this as a yes, and does not
    /// ask again.
    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        error(libc::ENOSYS)
    }

    fn fsync(&self, _: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let open = self.opens.get(node, handle)?;
        if data_only { open.file.sync_data() } else { open.file.sync_all() }
    }

    fn fallocate(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.check_writable()?;
        let open = self.opens.get(node, handle)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(rustix::fs::fallocate(&open.file, mode, offset, length)?)
    }

    fn release(
        &self,
        _: &Context,
        node: u64,
        _: u32,
        handle: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        self.opens.remove(node, handle)
    }

    fn setxattr(&self, _: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        self.check_writable()?;
        let inode = self.inodes.get(inode)?;
        let flags = XattrFlags::from_bits_retain(flags);
        Ok(rustix::fs::setxattr(number(&inode.path), name, value, flags)?)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.inodes.get(inode)?;
        let path = number(&inode.path);
        if size == 0 {
            let len = rustix::fs::getxattr_query(path, name)?;
            return Ok(GetxattrReply::Count(u32::try_from(len).map_err(io::Error::other)?));
        }
        let mut value = vec![0; size.min(XATTR_MAX) as usize];
        let len = rustix::fs::getxattr(path, name, &mut value[..])?;
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inodes.get(inode)?;
        let path = number(&inode.path);
        if size == 0 {
            let len = rustix::fs::listxattr_query(path)?;
            let len = u32::try_from(len).map_err(io::Error::other)?;
            return Ok(ListxattrReply::Count(len));
        }
        let mut names = vec![0; size.min(XATTR_MAX) as usize];
        let len = rustix::fs::listxattr(path, &mut names[..])?;
        names.truncate(len);
        Ok(ListxattrReply::Names(names))
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.check_writable()?;
        let inode = self.inodes.get(inode)?;
        Ok(rustix::fs::removexattr(number(&inode.path), name)?)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes.get(node)?;
        let file = self.open_inode(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let options = match self.cache {
            Cache::Always => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            _ => OpenOptions::empty(),
        };
        Ok((Some(self.opens.insert(node, file)), options))
    }

    fn readdir(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.read_directory(node, handle, size, offset, &mut |_, entry, _| add_entry(entry))
    }

    fn readdirplus(
        &self,
        _: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.read_directory(node, handle, size, offset, &mut |dir, name, c_name| {
            // "." and "..", and what went since, are told without a node.
            let entry = self.find(dir, c_name).unwrap_or_default();
            let added = add_entry(name, entry);
            if !matches!(added, Ok(1..)) {
                self.inodes.forget(entry.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, context: &Context, node: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, node, data_only, handle)
    }

    fn releasedir(&self, _: &Context, node: u64, _: u32, handle: u64) -> io::Result<()> {
        self.opens.remove(node, handle)
    }

    fn setupmapping(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        file_offset: u64,
        len: u64,
        flags: u64,
        offset: u64,
        _: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        let window = self.window.as_ref().ok_or_else(|| from_raw(libc::ENOSYS))?;
        let inode = self.inodes.get(node)?;
        if inode.kind != libc::S_IFREG {
            return error(libc::EINVAL);
        }
        let writes = flags & SetupmappingFlags::WRITE.bits() != 0;
        if writes {
            self.check_writable()?;
        }
        let (file, writable) = self.open_for_mapping(&inode, writes)?;
        let mapping = Mapping { node, file_offset, len, writable };
        window.map(offset, mapping, &file)
    }

    fn removemapping(
        &self,
        _: &Context,
        _: u64,
        ranges: Vec<RemovemappingOne>,
        _: &mut dyn FsCacheReqHandler,
    ) -> io::Result<()> {
        let window = self.window.as_ref().ok_or_else(|| from_raw(libc::ENOSYS))?;
        ranges.iter().try_for_each(|range| window.remove(range.moffset, range.len))
    }

    fn lseek(&self, _: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let open = self.opens.get(node, handle)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The guest's kernel keeps the position.
            _ => return error(libc::EINVAL),
        };
        let _position = lock(&open.position);
        Ok(rustix::fs::seek(&open.file, position)?)
    }
}

/// This thread is the guest's user.
struct ActingAs;

impl Drop for ActingAs {
    fn drop(&mut self) {
        // Our real user is what it was, so both are allowed, and bring the capabilities back; if not, the
        // thread has fewer rights than it should.
        let _ = rustix::thread::set_thread_res_uid(None, Uid::ROOT, None);
        let _ = rustix::thread::set_thread_res_gid(None, Gid::ROOT, None);
    }
}

/// This thread lacks CAP_FSETID, so that the host's kernel takes set-user-id bits away from what it writes.
struct WithoutSetid;

impl Directory {
    /// Linux asks for that with each write of a process without that capability.
    fn drop_setid(&self, wanted: bool) -> io::Result<Option<WithoutSetid>> {
        if !wanted || !self.root.acts_as_guest {
            return Ok(None);
        }
        set_capability(CapabilitySet::FSETID, false)?;
        Ok(Some(WithoutSetid))
    }
}

impl Drop for WithoutSetid {
    fn drop(&mut self) {
        // It is permitted, so this cannot fail; if it did, fewer bits would be set than the guest asked for.
        let _ = set_capability(CapabilitySet::FSETID, true);
    }
}

/// Of this thread, and where it is permitted.
fn set_capability(capability: CapabilitySet, on: bool) -> rustix::io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective.set(capability, on && sets.permitted.contains(capability));
    rustix::thread::set_capabilities(None, sets)
}

/// The attributes of a file, in the terms of fuse-backend-rs.
fn attributes(metadata: &Metadata) -> stat64 {
    // FUSE has the same widths; what is cut off of a device number is zero on Linux.
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

fn mode(mode: u32, umask: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777 & !(umask & 0o777))
}

/// The name of a descriptor in `/proc/self/fd`.
fn number(file: &File) -> String {
    file.as_raw_fd().to_string()
}

/// A name that stands for something in a directory, and nothing elsewhere.
fn one_name(name: &CStr) -> io::Result<&CStr> {
    match name.to_bytes() {
        b"" | b"." | b".." => error(libc::EINVAL),
        bytes if bytes.contains(&b'/') => error(libc::EINVAL),
        _ => Ok(name),
    }
}

fn is_denied<T>(result: &io::Result<T>) -> bool {
    const DENIED: [i32; 4] = [libc::EACCES, libc::EPERM, libc::EROFS, libc::ETXTBSY];
    matches!(result, Err(e) if e.raw_os_error().is_some_and(|number| DENIED.contains(&number)))
}

/// How it is open: O_RDONLY, O_WRONLY or O_RDWR.
fn access(open: &Open) -> OFlags {
    rustix::fs::fcntl_getfl(&open.file).map_or(OFlags::RDONLY, |flags| flags & OFlags::RWMODE)
}

fn error<T>(number: i32) -> io::Result<T> {
    Err(from_raw(number))
}

fn from_raw(number: i32) -> io::Error {
    io::Error::from_raw_os_error(number)
}
