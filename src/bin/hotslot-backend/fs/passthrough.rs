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
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{
    CreateIn, FOPEN_IN_KILL_SUIDGID, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV, stat64,
};
use fuse_backend_rs::abi::virtio_fs::{RemovemappingOne, SetupmappingFlags};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW,
    UTIME_OMIT, XattrFlags,
};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::process::{Gid, Uid};

use super::dax::Mapping;
use super::directory::{Cache, Directory, Opened, attributes, number, one_name};
use crate::lock::lock;

/// The most that one request reads or writes; the guest knows it from FUSE_INIT.
const MAX_IO: u32 = 1 << 20;
/// XATTR_SIZE_MAX and XATTR_LIST_MAX.
const XATTR_MAX: u32 = 64 << 10;
/// The most that one request copies; the guest asks again for the rest.
const MAX_COPY: u64 = 1 << 30;

/// Requests that fuse-backend-rs does not decode; called by [`super::requests`].
impl Directory {
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
            let _acting = self.root.credentials.act_as(context)?;
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
}

impl FileSystem for Directory {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        // A guest that crashed sent no FUSE_DESTROY.
        self.clear();
        // Not ATOMIC_O_TRUNC: for O_RDONLY|O_TRUNC Linux sends FUSE_OPEN first, and only then looks whether
        // the file is a program that runs. The open fails with ETXTBSY, but the program would be gone.
        // Without it, a FUSE_SETATTR follows once all is checked.
        let mut options = FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
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
            // Overlayfs marks a removed file by one.
            FileType::CharacterDevice if rdev == 0 => {}
            _ => return Err(Errno::PERM.into()),
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
        // AT_EMPTY_PATH needs CAP_DAC_READ_SEARCH before Linux 6.10.
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
        let created = {
            let _acting = self.root.credentials.act_as(context)?;
            // An existing file is opened below, and not by its name.
            let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(&parent.path, name, flags, mode(args.mode, args.umask))
        };
        let exclusive = OFlags::from_bits_retain(args.flags).contains(OFlags::EXCL);
        match created {
            Err(Errno::EXIST) if !exclusive => {
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
        // fuse-backend-rs needs `&mut File`.
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
        let _dropped = self.root.credentials.without_setid(fuse_flags & WRITE_KILL_PRIV != 0)?;
        let size = size.min(MAX_IO) as usize;
        if from_cache || flags & OFlags::APPEND.bits() == 0 {
            return source.read_to(&mut open.file.try_clone()?, size, offset);
        }
        // The guest's kernel took the offset from a size that may be old: the host knows where the end is.
        let mut data = vec![0; size];
        source.read_exact(&mut data)?;
        let end = ReadWriteFlags::APPEND;
        Ok(rustix::io::pwritev2(&open.file, &[IoSlice::new(&data)], offset, end)?)
    }

    /// Nothing is buffered here that a close could write. The guest's kernel takes ENOSYS for success, and
    /// does not ask again.
    fn flush(&self, _: &Context, _: u64, _: u64, _: u64) -> io::Result<()> {
        Err(Errno::NOSYS.into())
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
        let mapping = Mapping { inode, file_offset, len, writable };
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

fn mode(mode: u32, umask: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o7777 & !(umask & 0o777))
}
