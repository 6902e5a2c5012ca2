//! The user and the capabilities with which a thread acts for a user of the guest.
//!
//! Root takes the guest's user over where it creates files, so that they belong to that user. An ordinary
//! user of the host does everything as itself. Called by [`super::passthrough`] on the threads that answer
//! requests; each change is the thread's own, until its value is dropped.

use std::cell::Cell;
use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::ids::Ids;

/// What the threads that serve may change.
#[derive(Clone, Copy)]
pub struct Credentials {
    acts_as_guest: bool,
    sets_capabilities: bool,
}

impl Credentials {
    /// For threads that have these capabilities.
    pub fn of(capabilities: CapabilitySet) -> Self {
        Credentials {
            acts_as_guest: capabilities.contains(CapabilitySet::SETUID | CapabilitySet::SETGID),
            sets_capabilities: capabilities.contains(CapabilitySet::SETFCAP),
        }
    }

    /// Whether the host lets these threads give files capabilities.
    pub fn may_set_capabilities(self) -> bool {
        self.sets_capabilities
    }

    /// Makes this thread the guest's user, if we may.
    pub fn act_as(self, context: &Context, ids: &Ids) -> io::Result<Option<ActingAs>> {
        if !self.acts_as_guest {
            return Ok(None);
        }
        if context.uid == u32::MAX || context.gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        let (user, group) = ids.creator(context.uid, context.gid)?;
        let acting = ActingAs;
        // The group first: as another user we could not set it.
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(group), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(user), None)?;
        // We do not know all groups of that user, and the guest's kernel has agreed. The guest's root keeps
        // all, also if it is another user here.
        let keeps = if context.uid == 0 { CapabilitySet::all() } else { CapabilitySet::DAC_OVERRIDE };
        set_capabilities(keeps, true)?;
        Ok(Some(acting))
    }

    /// Takes this thread into a group besides its own, if we may. The host then leaves the set-group-id bit
    /// in the mode of a file that gets this group from its directory.
    pub fn join(self, group: u32) -> io::Result<Option<InGroup>> {
        if !self.acts_as_guest || group == u32::MAX {
            return Ok(None);
        }
        rustix::thread::set_thread_groups(&[Gid::from_raw(group)])?;
        Ok(Some(InGroup))
    }

    /// Takes CAP_FSETID from this thread, if `wanted` and if it has it: the host's kernel then clears
    /// set-user-id bits of the files that it writes. Linux asks for that at each write of a process without
    /// that capability.
    pub fn without_setid(self, wanted: bool) -> io::Result<Option<WithoutSetid>> {
        if !wanted || !self.acts_as_guest {
            return Ok(None);
        }
        set_capabilities(CapabilitySet::FSETID, false)?;
        Ok(Some(WithoutSetid))
    }
}

/// Sets this thread's umask, for the file that it creates next. So the host applies the umask of the guest's
/// process, and, as it must, does not where the directory has a default ACL.
pub fn set_umask(umask: u32) -> io::Result<()> {
    thread_local!(static SHARES_UMASK: Cell<bool> = const { Cell::new(true) });
    if SHARES_UMASK.get() {
        // `unshare` is deprecated because of other flags, which concern file descriptors.
        #[expect(deprecated)]
        rustix::thread::unshare(UnshareFlags::FS)?;
        SHARES_UMASK.set(false);
    }
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    Ok(())
}

/// Until this is dropped, the thread is the guest's user.
pub struct ActingAs;

impl Drop for ActingAs {
    fn drop(&mut self) {
        // The real user and group are still root, so both are allowed, and the capabilities come back. If
        // either failed, the thread would have fewer rights than it should.
        let _ = rustix::thread::set_thread_res_uid(None, Uid::ROOT, None);
        let _ = rustix::thread::set_thread_res_gid(None, Gid::ROOT, None);
    }
}

/// Until this is dropped, the thread is in a group besides its own.
pub struct InGroup;

impl Drop for InGroup {
    fn drop(&mut self) {
        // The thread is root again, so this is allowed.
        let _ = rustix::thread::set_thread_groups(&[]);
    }
}

/// Until this is dropped, the thread lacks CAP_FSETID.
pub struct WithoutSetid;

impl Drop for WithoutSetid {
    fn drop(&mut self) {
        // It is permitted, so this cannot fail. If it did, fewer bits would be set than the guest asked for.
        let _ = set_capabilities(CapabilitySet::FSETID, true);
    }
}

/// Sets or clears effective capabilities of this thread; sets only what is permitted.
fn set_capabilities(capabilities: CapabilitySet, on: bool) -> rustix::io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    let capabilities = capabilities & sets.permitted;
    sets.effective.set(capabilities, on);
    rustix::thread::set_capabilities(None, sets)
}
