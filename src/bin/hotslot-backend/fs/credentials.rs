//! The user and the capabilities with which a thread acts for a user of the guest.
//!
//! Root takes the guest's user over where it creates files, so that they belong to that user. An ordinary
//! user of the host does everything as itself. Called by [`super::passthrough`] on the threads that answer
//! requests; each change is the thread's own, until its value is dropped.

use std::io;

use fuse_backend_rs::api::filesystem::Context;
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::CapabilitySet;

/// What the threads that serve may change.
#[derive(Clone, Copy)]
pub struct Credentials {
    acts_as_guest: bool,
}

impl Credentials {
    /// For threads that have these capabilities.
    pub fn of(capabilities: CapabilitySet) -> Self {
        Credentials { acts_as_guest: capabilities.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) }
    }

    /// Makes this thread the guest's user, if we may.
    pub fn act_as(self, context: &Context) -> io::Result<Option<ActingAs>> {
        if !self.acts_as_guest {
            return Ok(None);
        }
        if context.uid == u32::MAX || context.gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        let acting = ActingAs;
        // The group first: as another user we could not set it.
        rustix::thread::set_thread_res_gid(None, Gid::from_raw(context.gid), None)?;
        rustix::thread::set_thread_res_uid(None, Uid::from_raw(context.uid), None)?;
        // We do not know all groups of that user, and the guest's kernel has agreed.
        set_capability(CapabilitySet::DAC_OVERRIDE, true)?;
        Ok(Some(acting))
    }

    /// Takes CAP_FSETID from this thread, if `wanted` and if it has it: the host's kernel then clears
    /// set-user-id bits of the files that it writes. Linux asks for that at each write of a process without
    /// that capability.
    pub fn without_setid(self, wanted: bool) -> io::Result<Option<WithoutSetid>> {
        if !wanted || !self.acts_as_guest {
            return Ok(None);
        }
        set_capability(CapabilitySet::FSETID, false)?;
        Ok(Some(WithoutSetid))
    }
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

/// Until this is dropped, the thread lacks CAP_FSETID.
pub struct WithoutSetid;

impl Drop for WithoutSetid {
    fn drop(&mut self) {
        // It is permitted, so this cannot fail. If it did, fewer bits would be set than the guest asked for.
        let _ = set_capability(CapabilitySet::FSETID, true);
    }
}

/// Sets or clears an effective capability of this thread; sets only what is permitted.
fn set_capability(capability: CapabilitySet, on: bool) -> rustix::io::Result<()> {
    let mut sets = rustix::thread::capabilities(None)?;
    sets.effective.set(capability, on && sets.permitted.contains(capability));
    rustix::thread::set_capabilities(None, sets)
}
