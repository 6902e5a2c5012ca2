//! How the directory is served; from the command line.
//!
//! Made by [`super`]; read by the modules that carry out requests.

use std::time::Duration;

use clap::ValueEnum;

use super::ids::Ids;

/// The options.
pub struct Policy {
    pub read_only: bool,
    pub cache: Cache,
    pub xattrs: Xattrs,
    /// The guest is told which directories are on another file system than their parents.
    pub announce_submounts: bool,
    /// The guest may make block and character devices.
    pub device_nodes: bool,
    pub locks: LocksOf,
    pub ids: Ids,
}

/// How long the guest may cache. With DAX it caches no data, whatever this is.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Cache {
    /// The guest asks each time and caches no data; without DAX it cannot share memory through a file
    #[value(alias = "none")]
    Never,
    /// Names and attributes for a second; data until a file is opened after it changed
    Auto,
    /// Everything: for a directory that only the guest changes
    Always,
}

impl Cache {
    pub fn timeout(self) -> Duration {
        match self {
            Cache::Never => Duration::ZERO,
            Cache::Auto => Duration::from_secs(1),
            Cache::Always => Duration::from_secs(24 * 3600),
        }
    }
}

/// Which extended attributes the guest has.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Xattrs {
    /// Those of the host's files, as far as the host lets this program set them: user.*, POSIX ACLs, and as
    /// root security.capability
    Host,
    /// trusted.* and security.* too, which the host has as user.hotslot.trusted.* and
    /// user.hotslot.security.*; the guest does not see those names. Not for symbolic links and special files.
    /// As root, security.capability stays the host's
    Mapped,
    /// None, and no ACLs; saves the guest's kernel the questions
    Off,
}

/// Which processes see the locks of the guest's processes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LocksOf {
    /// The guest's own processes only; no request tells of a lock
    Guest,
    /// The processes of this machine, too, and other guests with this option. Each lock and each close of a
    /// file is a request, and a process waits for a lock no longer than 30 seconds
    Host,
}
