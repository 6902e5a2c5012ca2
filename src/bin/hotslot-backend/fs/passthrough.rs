//! The file system: each request of the guest, carried out on the directory of the host.
//!
//! FUSE 7.31 (Linux' `include/uapi/linux/fuse.h`), decoded by fuse-backend-rs, whose [`FileSystem`] this
//! implements; what it does not decode comes from [`super::requests`]. Called on several threads at a time.
//!
//! The guest's kernel checks access: it knows the modes and owners of the files, and the groups of its users.
//! The host's kernel checks this process: an ordinary user of the host may do what that user may. Root
//! creates files as the guest's user ([`super::credentials`]).

use std::ffi::CStr;
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FileLock, LkIn, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64,
};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT,
};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::process::{Gid, Uid};

use super::change::Mapping;
use super::directory::{Directory, Opened, attributes, number};
use super::identity::{ROOT, one_name};
use super::ids::Map;
use super::inodes::Inode;
use super::lent::Lent;
use super::policy::{Cache, LocksOf};
use crate::lock::lock;

/// The most that one request reads or writes; the guest knows it from FUSE_INIT.
const MAX_IO: u32 = 1 << 20;
/// The most that one request copies; the guest asks again for the rest.
const MAX_COPY: u64 = 1 << 30;

/// What a FUSE_SETATTR sets.
const SET: SetattrValid = SetattrValid::MODE
    .union(SetattrValid::UID)
    .union(SetattrValid::GID)
    .union(SetattrValid::SIZE)
    .union(SetattrValid::ATIME)
    .union(SetattrValid::MTIME)
    .union(SetattrValid::CTIME);

/// Requests that fuse-backend-rs does not decode; called by [`super::requests`].
impl Directory {
    /// FUSE_STATFS.
    pub fn file_system(&self, node: u64) -> io::Result<rustix::fs::StatVfs> {
        Ok(rustix::fs::fstatvfs(&self.inodes.get(node)?.path)?)
    }

    /// FUSE_SYNCFS: writes back the file system that this directory is on.
    pub fn sync(&self, node: u64) -> io::Result<()> {
        if node == ROOT {
            // Errors since the descriptor was opened, or since the last call: so not a new one.
            return Ok(rustix::fs::syncfs(&self.synced)?);
        }
        let mount = self.reopen(&self.inodes.get(node)?.path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(rustix::fs::syncfs(mount)?)
    }

    /// FUSE_SETLK, and an attempt at FUSE_SETLKW; see [`super::locks::Locks::set`].
    pub fn set_lock(&self, node: u64, wanted: &LkIn) -> io::Result<()> {
        let inode = self.inodes.get(node)?;
        self.opens.get(node, wanted.fh)?;
        self.locks.set(node, wanted, |is_flock| {
            // flock(2) takes any, and the host runs no program that is open for writing.
            let reads_only = is_flock || self.policy.read_only || inode.kind != FileType::RegularFile;
            let writing = if reads_only { None } else { self.open_inode(&inode, OFlags::RDWR).ok() };
            match writing {
                Some(file) => Ok(file),
                None => self.open_inode(&inode, OFlags::RDONLY),
            }
        })
    }

    /// FUSE_GETLK.
    pub fn get_lock(&self, node: u64, wanted: &LkIn) -> io::Result<FileLock> {
        self.locks.first_in_the_way(node, wanted, &self.opens.get(node, wanted.fh)?.file)
    }

    /// FUSE_TMPFILE: a file without a name in `parent`, which may be given one by FUSE_LINK.
    pub fn temporary(&self, context: &Context, parent: u64, args: CreateIn) -> io::Result<Opened> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let flags = self.open_flags(args.flags)? & !OFlags::TRUNC;
        let file = {
            let _acting = self.act_as(context, args.umask)?;
            let flags = flags | OFlags::TMPFILE | OFlags::CLOEXEC;
            rustix::fs::openat(&parent.path, c".", flags, mode(args.mode))?
        };
        self.opened(None, file.into())
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
}

impl Directory {
    /// FUSE_SETATTR that sets nothing: Linux is about to write to a file with set-id bits as a process that
    /// must not leave them. With HANDLE_KILLPRIV_V2 it leaves the bits to us. It says so again at FUSE_WRITE,
    /// FUSE_OPEN and FUSE_FALLOCATE; but a write through the DAX window sends none of them.
    fn drop_setid(&self, inode: &Inode) -> io::Result<()> {
        if inode.kind != FileType::RegularFile {
            return Ok(());
        }
        // Without the group's right to execute it, the bit has another meaning.
        let is_program = inode.path.metadata()?.mode() & 0o010 != 0;
        self.drop_bits(inode, if is_program { Mode::SUID | Mode::SGID } else { Mode::SUID })
    }
}

impl FileSystem for Directory {
    type Inode = u64;
    type Handle = u64;

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(&self.inodes.get(parent)?, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.inodes.forget(inode, count);
    }

    fn getattr(&self, _: &Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let metadata = self.inodes.get(inode)?.path.metadata()?;
        Ok((self.policy.ids.seen(attributes(&metadata)), self.policy.cache.timeout()))
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
        if !valid.intersects(SET) {
            self.drop_setid(&inode)?;
        }
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(attr.st_mode & 0o7777);
            rustix::fs::chmodat(&self.root.proc, number(&inode.path), mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let set = |flag, map: &Map, id: u32| match valid.contains(flag) && id != u32::MAX {
                true => map.outside(id).map(Some).ok_or(Errno::INVAL),
                false => Ok(None),
            };
            let uid = set(SetattrValid::UID, &self.policy.ids.users, attr.st_uid)?.map(Uid::from_raw);
            let gid = set(SetattrValid::GID, &self.policy.ids.groups, attr.st_gid)?.map(Gid::from_raw);
            rustix::fs::chownat(&inode.path, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let len = u64::try_from(attr.st_size).map_err(|_| io::Error::from(Errno::INVAL))?;
            let _dropped = self.root.credentials.without_setid(valid.contains(SetattrValid::KILL_SUIDGID))?;
            match handle {
                Some(handle) => rustix::fs::ftruncate(&self.opens.get(node, handle)?.file, len)?,
                None => rustix::fs::ftruncate(self.open_or_find(&inode, OFlags::WRONLY)?, len)?,
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
        self.create_node(context, parent, name, 0, |dir, name| rustix::fs::symlinkat(target, dir, name))
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
            // Overlayfs marks a removed file by one.
            FileType::CharacterDevice if rdev == 0 => {}
            FileType::CharacterDevice | FileType::BlockDevice if self.policy.device_nodes => {}
            // As mknod(2): it is found first that a name is taken, or too long.
            _ => {
                self.check_writable()?;
                let parent = self.inodes.get(parent)?;
                let found = rustix::fs::statat(&parent.path, one_name(name)?, AtFlags::SYMLINK_NOFOLLOW);
                return Err(match found {
                    Ok(_) => Errno::EXIST,
                    Err(Errno::NOENT) => Errno::PERM,
                    Err(e) => e,
                }
                .into());
            }
        }
        self.create_node(context, parent, name, umask, |dir, name| {
            rustix::fs::mknodat(dir, name, kind, mode(full_mode), rdev.into())
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
        self.create_node(context, parent, name, umask, |dir, name| {
            rustix::fs::mkdirat(dir, name, mode(full_mode))
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
        let (old_name, new_name) = (one_name(old_name)?, one_name(new_name)?);
        let flags = RenameFlags::from_bits_retain(flags);
        let is_exchange = flags.contains(RenameFlags::EXCHANGE);
        self.inodes.rename((&old_parent, old_name), (&new_parent, new_name), is_exchange, || {
            rustix::fs::renameat_with(&old_parent.path, old_name, &new_parent.path, new_name, flags)
        })
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.check_writable()?;
        let (inode, parent) = (self.inodes.get(inode)?, self.inodes.get(parent)?);
        let name = one_name(name)?;
        let again = self.makes_again(&parent, name);
        // AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH before Linux 6.10.
        let (proc, number) = (&self.root.proc, number(&inode.path));
        match rustix::fs::linkat(proc, number, &parent.path, name, AtFlags::SYMLINK_FOLLOW) {
            Err(Errno::EXIST) if again => {}
            result => result?,
        }
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
        if inode.kind == FileType::Directory {
            return Err(Errno::ISDIR.into());
        }
        let flags = self.open_flags(flags)?;
        let _dropped = self.root.credentials.without_setid(fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        let file = self.open_inode(&inode, flags)?;
        Ok((Some(self.opens.insert(node, file)), self.open_options(), None))
    }

    fn create(&self, context: &Context, parent: u64, name: &CStr, args: CreateIn) -> io::Result<Opened> {
        self.check_writable()?;
        let parent = self.inodes.get(parent)?;
        let name = one_name(name)?;
        let flags = self.open_flags(args.flags)?;
        let again = self.makes_again(&parent, name);
        let created = {
            let _acting = self.act_as(context, args.umask)?;
            // An existing file is opened below, and not by its name.
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&parent.path, name, flags, mode(args.mode))
        };
        let exclusive = OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL);
        match created {
            Err(Errno::EXIST) if !exclusive || again => {
                let entry = self.find(&parent, name)?;
                let opened = self.inodes.get(entry.inode).and_then(|inode| {
                    let _dropped =
                        self.root.credentials.without_setid(args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
                    self.open_inode(&inode, flags)
                });
                // After an error the guest does not know of the lookup.
                let file = opened.inspect_err(|_| self.inodes.forget(entry.inode, 1))?;
                let handle = self.opens.insert(entry.inode, file);
                Ok((entry, Some(handle), self.open_options(), None))
            }
            created => self.opened(Some((&parent, name)), created?.into()),
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
        target.write_from(Lent::of(&open.file).get(), size, offset)
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
        let _dropped = self.root.credentials.without_setid(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let size = size.min(MAX_IO) as usize;
        if from_cache || flags & OFlags::APPEND.bits() == 0 {
            return source.read_to(Lent::of(&open.file).get(), size, offset);
        }
        // The guest's kernel took the offset from a size that may be old: the host knows where the end is.
        let mut data = vec![0; size];
        source.read_exact(&mut data)?;
        let end = open.file.metadata()?.len();
        if let Some([end, _]) = self.keeper.attempt(|| Some([end, 0])) {
            let mut there = vec![0; size];
            let file = self.reopen(&open.file, OFlags::RDONLY)?;
            if file.read_exact_at(&mut there, end).is_ok() && there == data {
                return Ok(size);
            }
        }
        let end = ReadWriteFlags::APPEND;
        Ok(rustix::io::pwritev2(&open.file, &[IoSlice::new(&data)], offset, end)?)
    }

    /// Nothing is buffered here that a close could write: only locks are released. Without `--locks host`
    /// there are none; the guest's kernel takes ENOSYS for success, and does not ask again.
    fn flush(&self, _: &Context, node: u64, _: u64, lock_owner: u64) -> io::Result<()> {
        if self.policy.locks == LocksOf::Guest {
            return Err(Errno::NOSYS.into());
        }
        self.locks.release_process(node, lock_owner);
        Ok(())
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
        self.locks.release_handle(node, handle);
        self.opens.remove(node, handle)
    }

    fn getxattr(&self, _: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        self.attribute(inode, name, size)
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.attribute_names(inode, size)
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.remove_attribute(inode, name)
    }

    fn opendir(&self, _: &Context, node: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let inode = self.inodes.get(node)?;
        self.opens.check_room()?;
        let file = self.open_inode(&inode, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let options = match self.policy.cache {
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
            // "." and "..", and files that were removed meanwhile, are told without a node.
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
        self.locks.release_handle(node, handle);
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
        let window = self.window.as_ref().ok_or_else(|| io::Error::from(Errno::NOSYS))?;
        let inode = self.inodes.get(node)?;
        if inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL.into());
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
        let window = self.window.as_ref().ok_or_else(|| io::Error::from(Errno::NOSYS))?;
        ranges.iter().try_for_each(|range| window.remove(range.moffset, range.len))
    }

    fn lseek(&self, _: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let open = self.opens.get(node, handle)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            // The guest's kernel does the others itself.
            _ => return Err(Errno::INVAL.into()),
        };
        let _position = lock(&open.position);
        Ok(rustix::fs::seek(&open.file, position)?)
    }
}

fn mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777)
}
