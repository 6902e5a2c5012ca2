//! Locks of the guest's processes that the host's processes and other guests see (`--locks host`).
//!
//! FUSE names the owner of a lock by a number. The host has OFD locks and flock(2), whose owner is an open
//! file description: so each owner of the guest has one of its own here, for each file. It goes, and the
//! locks with it, when the owner closes the file (FUSE_FLUSH), or when the handle is released by which it
//! locked.
//!
//! Linux' virtio-fs has no FUSE_INTERRUPT: a process that waits for a lock here cannot be killed. So it waits
//! only [`LOCK_TIMEOUT`], and then gets ENOLCK. Called by [`super::passthrough`] and [`super::requests`].

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{FileLock, LkIn};
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::change::{Change, Owner};
use super::journal::Keeper;
use super::waiters::Waiters;
use crate::lock::lock;

/// How long a process waits for a lock.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(30);

/// A flag of FUSE_SETLK: flock(2), not fcntl(2).
const FUSE_LK_FLOCK: u32 = 1 << 0;

/// A file that an owner has locked.
struct Holder {
    file: File,
    /// By which it was locked first.
    handle: u64,
}

/// The locks of one guest.
pub struct Locks {
    /// The most owners, each of them with a descriptor.
    max_owners: usize,
    /// Lock order: innermost; no file is opened under it.
    holders: Mutex<HashMap<Owner, Arc<Holder>>>,
    /// For locks.
    pub waiters: Waiters,
    keeper: Keeper,
}

impl Locks {
    pub fn new(max_owners: usize, keeper: Keeper) -> Self {
        Locks { max_owners, holders: Mutex::default(), waiters: Waiters::default(), keeper }
    }

    /// FUSE_SETLK, and an attempt at FUSE_SETLKW. `open` opens the file for an owner of flock(2), or of
    /// fcntl(2).
    ///
    /// # Errors
    ///
    /// EAGAIN: another owner has a lock that is in the way. ENOLCK: too many owners. The errors of `open`.
    /// EBADF: it is not open in the mode that the lock needs.
    pub fn set(
        &self,
        node: u64,
        wanted: &LkIn,
        open: impl FnOnce(bool) -> io::Result<File>,
    ) -> io::Result<()> {
        let is_flock = wanted.lk_flags & FUSE_LK_FLOCK != 0;
        let owner = Owner { node, number: wanted.owner, is_flock };
        let range = record(&wanted.lk)?;
        let kind = i32::from(range.l_type);
        let is_whole = is_flock || range.l_start == 0 && range.l_len == 0;
        if kind == libc::F_UNLCK && is_whole {
            self.release(|other, _| *other == owner);
            return Ok(());
        }
        let known = lock(&self.holders).get(&owner).cloned();
        let holder = match known {
            Some(holder) => holder,
            None if kind == libc::F_UNLCK => return Ok(()),
            None => self.add(owner, Holder { file: open(is_flock)?, handle: wanted.fh })?,
        };
        if is_flock {
            let operation = match kind {
                libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
                _ => FlockOperation::NonBlockingLockExclusive,
            };
            rustix::fs::flock(&holder.file, operation)?;
        } else {
            on_record(&holder.file, FcntlArg::F_OFD_SETLK(&range))?;
        }
        let FileLock { start: first, end: last, .. } = wanted.lk;
        self.keeper.note(|| Change::Locked {
            owner,
            handle: holder.handle,
            first,
            last,
            kind: wanted.lk.type_,
        });
        if kind == libc::F_UNLCK {
            self.waiters.wake();
        }
        Ok(())
    }

    /// FUSE_GETLK: the first lock in the way of this one, of type F_UNLCK if there is none. Whose it is
    /// cannot be told. `file` is the file, open for anyone.
    pub fn first_in_the_way(&self, node: u64, wanted: &LkIn, file: &File) -> io::Result<FileLock> {
        let owner = Owner { node, number: wanted.owner, is_flock: false };
        let holder = lock(&self.holders).get(&owner).cloned();
        let file = holder.as_ref().map_or(file, |holder| &holder.file);
        let mut range = record(&wanted.lk)?;
        on_record(file, FcntlArg::F_OFD_GETLK(&mut range))?;
        let (start, len) = (range.l_start as u64, range.l_len as u64);
        let end = if len == 0 { i64::MAX as u64 } else { start + len - 1 };
        Ok(FileLock { type_: range.l_type as u32, start, end, pid: 0 })
    }

    /// FUSE_FLUSH: as close(2) does, releases the locks that the process has by fcntl(2).
    pub fn release_process(&self, node: u64, number: u64) {
        self.release(|other, _| *other == Owner { node, number, is_flock: false });
    }

    /// FUSE_RELEASE: releases what is locked by a handle.
    pub fn release_handle(&self, node: u64, handle: u64) {
        self.release(|other, holder| other.node == node && holder.handle == handle);
    }

    /// Releases all, and answers all requests that wait.
    pub fn clear(&self) {
        self.waiters.end();
        lock(&self.holders).clear();
    }

    /// Releases the locks of the owners for which this is true.
    fn release(&self, is_released: impl Fn(&Owner, &Holder) -> bool) {
        let mut holders = lock(&self.holders);
        let before = holders.len();
        holders.retain(|owner, holder| {
            let goes = is_released(owner, holder);
            if goes {
                self.keeper.note(|| Change::Unlocked(*owner));
            }
            !goes
        });
        if holders.len() < before {
            drop(holders);
            self.waiters.wake();
        }
    }

    /// Adds an owner, unless another thread was faster.
    fn add(&self, owner: Owner, holder: Holder) -> io::Result<Arc<Holder>> {
        let holders = &mut *lock(&self.holders);
        if holders.len() >= self.max_owners {
            return Err(Errno::NOLCK.into());
        }
        Ok(Arc::clone(holders.entry(owner).or_insert(Arc::new(holder))))
    }
}

/// A lock in the terms of FUSE.
pub fn wanted(owner: &Owner, handle: u64, (start, end): (u64, u64), kind: u32) -> LkIn {
    let lk = FileLock { start, end, type_: kind, pid: 0 };
    let lk_flags = if owner.is_flock { FUSE_LK_FLOCK } else { 0 };
    LkIn { fh: handle, owner: owner.number, lk, lk_flags, padding: 0 }
}

/// A lock in the terms of fcntl(2).
fn record(lock: &FileLock) -> io::Result<libc::flock> {
    let invalid = || io::Error::from(Errno::INVAL);
    let (start, end) = (i64::try_from(lock.start), i64::try_from(lock.end));
    let (Ok(start), Ok(end)) = (start, end) else {
        return Err(invalid());
    };
    let kind = i32::try_from(lock.type_).map_err(|_| invalid())?;
    if end < start || ![libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK].contains(&kind) {
        return Err(invalid());
    }
    Ok(libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        // 0 is to the end, wherever that will be.
        l_len: if end == i64::MAX { 0 } else { end - start + 1 },
        l_pid: 0,
    })
}

fn on_record(file: &File, command: FcntlArg) -> io::Result<()> {
    match fcntl(file.as_raw_fd(), command) {
        Ok(_) => Ok(()),
        // fcntl(2): which of the two is up to the system.
        Err(nix::errno::Errno::EACCES) => Err(Errno::AGAIN.into()),
        Err(errno) => Err(io::Error::from_raw_os_error(errno as i32)),
    }
}
