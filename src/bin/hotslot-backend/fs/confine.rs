//! The directory, and the rights of the threads that serve it.
//!
//! [`super::directory`] never resolves a path: it opens one name at a time, in a directory that it holds, and
//! follows no link. This is a second line of defence, should that have a fault. Landlock (Linux 5.19 and
//! later) checks each open of a file, by where it is, and each change of a directory. Threads of root are
//! also in a chroot, and keep only the capabilities that a file system needs. Called by [`super`] on the
//! thread that serves; the threads that it starts inherit this. The main thread keeps its rights: it waits
//! for a signal and removes the socket.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, make_bitflags,
};
use rustix::fs::{Mode, OFlags};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use super::credentials::Credentials;
use super::descriptors::Descriptors;
use super::handles::Handles;

/// The capabilities that root always keeps: to act on files as their owners may, to set their flags (chattr),
/// and to create them as a user of the guest.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID);

const PROC_SELF_FD: &CStr = c"/proc/self/fd";

/// The directory, as the threads that serve it know it.
pub struct Root {
    /// Opened with O_PATH.
    pub dir: File,
    /// `/proc/self/fd`, which is also the working directory: the file of an O_PATH descriptor is opened by
    /// the descriptor's number in there.
    pub proc: File,
    pub credentials: Credentials,
    pub descriptors: Descriptors,
    /// If files may be opened by them.
    pub handles: Option<Handles>,
    /// What is less strict than it could be, and why.
    pub note: Option<String>,
}

/// What the threads may do in the directory, besides reading.
#[derive(Clone, Copy)]
pub struct Rights {
    pub read_only: bool,
    pub device_nodes: bool,
}

/// Opens the directory of the command line.
///
/// # Errors
///
/// It does not exist, is not a directory, or cannot be entered.
pub fn open(dir: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let file = rustix::fs::open(dir, flags, Mode::empty())?;
    rustix::fs::accessat(
        &file,
        c".",
        rustix::fs::Access::READ_OK | rustix::fs::Access::EXEC_OK,
        rustix::fs::AtFlags::EACCESS,
    )?;
    Ok(file.into())
}

/// Confines this thread and those that it starts.
///
/// # Errors
///
/// There is no /proc, or the kernel refused a step that it offers. A step that it does not offer is in
/// [`Root::note`].
pub fn confine(
    dir: &File,
    rights: Rights,
    descriptors: Descriptors,
    handles: Option<Handles>,
) -> io::Result<Root> {
    let proc: File =
        rustix::fs::open(PROC_SELF_FD, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?
            .into();
    let dir = dir.try_clone()?;
    let has = rustix::thread::capabilities(None)?.effective;

    // A root, a working directory and a umask of our own. `unshare` is deprecated because of other flags,
    // which concern file descriptors.
    #[expect(deprecated)]
    rustix::thread::unshare(UnshareFlags::FS)?;
    // The guest sends its processes' umasks.
    rustix::process::umask(Mode::empty());
    if has.contains(CapabilitySet::SYS_CHROOT) {
        rustix::process::fchdir(&dir)?;
        rustix::process::chroot(c".")?;
    }
    rustix::process::fchdir(&proc)?;

    if has.contains(CapabilitySet::SETGID) {
        rustix::thread::set_thread_groups(&[])?;
    }
    let mut kept = KEPT;
    kept.set(CapabilitySet::MKNOD, rights.device_nodes);
    kept.set(CapabilitySet::DAC_READ_SEARCH, handles.is_some());
    let kept = has & kept;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )?;
    rustix::thread::set_no_new_privs(true)?;
    let note = restrict(&dir, rights).err().map(|why| {
        format!("Landlock cannot guard the directory on this kernel ({why}): only our own checks do")
    });
    Ok(Root { dir, proc, credentials: Credentials::of(has), descriptors, handles, note })
}

/// Landlock: files of the directory, and no others.
fn restrict(dir: &File, rights: Rights) -> Result<(), RulesetError> {
    let all = AccessFs::from_all(ABI::V5);
    let allowed: BitFlags<AccessFs> = if rights.read_only {
        make_bitflags!(AccessFs::{ReadFile | ReadDir})
    } else if rights.device_nodes {
        all & !make_bitflags!(AccessFs::{Execute | IoctlDev})
    } else {
        all & !make_bitflags!(AccessFs::{Execute | MakeBlock | IoctlDev})
    };
    Ruleset::default()
        // Landlock's version 1 has no `Refer`, and forbids all moves between directories.
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .create()?
        .add_rule(PathBeneath::new(dir, allowed))?
        .restrict_self()?;
    Ok(())
}
