//! Why a back-end does not serve, or no longer does: for all devices. `main` prints it and ends with its
//! status.

use std::io;
use std::path::PathBuf;

use hotslot::report::{Failure, NotPrinted, STATUS_ERROR, STATUS_USAGE};
use hotslot::sandbox::{self, SandboxError};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the socket path {path:?} has {len} bytes, more than the {max} that fit in a socket address")]
    PathTooLong { path: PathBuf, len: usize, max: usize },
    #[error("cannot listen on {0:?}: another process is listening there")]
    InUse(PathBuf),
    #[error("cannot listen on {0:?}: there is a file that is not a socket")]
    NotASocket(PathBuf),
    #[error("cannot listen on {path:?}")]
    Bind { path: PathBuf, source: io::Error },

    #[error("there is no file {path:?}")]
    NoFile { path: PathBuf, hint: Option<&'static str> },
    #[error("{path:?} is a {kind}; only {allowed} can be served")]
    NotRegular { path: PathBuf, kind: &'static str, allowed: &'static str },
    #[error(
        "{path:?} is in use: another process{} has it open for {}",
        pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        if *.writing { "writing" } else { "reading, or --shared" }
    )]
    InUseFile { path: PathBuf, writing: bool, pid: Option<i32> },
    #[error("{0:?} is in use: it is mounted, or a program has claimed it")]
    Claimed(PathBuf),
    #[error("{path:?} is empty, so the memory would have no size")]
    Empty { path: PathBuf, read_only: bool },
    #[error("--size {size} is not a multiple of the page size, {page}, or is zero")]
    BadSize { size: u64, page: u64 },
    #[error("{path:?} has {len} bytes, more than a region can have")]
    TooLong { path: PathBuf, len: u64 },
    #[error("{path:?} has {len} bytes, less than a block of {block}")]
    TooShort { path: PathBuf, len: u64, block: u32 },
    #[error("--block-size {block} is less than the {least} of the block device {path:?}")]
    BlockSize { path: PathBuf, block: u32, least: u32 },
    #[error("cannot {action} {path:?}")]
    File { action: &'static str, path: PathBuf, hint: Option<&'static str>, source: io::Error },
    #[error("cannot serve the directory {path:?}")]
    Directory { path: PathBuf, source: io::Error },
    #[error("{option}: {why}")]
    Ids { option: &'static str, why: String },
    #[error("{0} needs root's capabilities, which this user has not")]
    NeedsRoot(&'static str),
    #[error("files of {path:?} cannot be opened by handles, as --inode-file-handles mandatory demands")]
    NoHandles { path: PathBuf, source: io::Error },
    #[error("the state cannot be in {path:?}")]
    State { path: PathBuf, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("there can be no sandbox")]
    NoSandbox(#[source] SandboxError),
    #[error("the port {name:?} cannot be connected to {to}")]
    Port { name: String, to: String, source: io::Error },
    #[error("region {0} is given twice")]
    RegionTwice(u8),

    #[error("cannot set up {what}")]
    SetUp { what: &'static str, source: io::Error },
    #[error("{0}")]
    Session(String),
    #[error("the front-end did not do as specified, {0} times")]
    NotAsSpecified(u32),
    #[error("nothing of --do could be tried")]
    NothingTried,
    #[error(transparent)]
    NotPrinted(#[from] NotPrinted),
}

/// How a user makes a disk.
pub const MAKE_DISK: &str = "truncate -s SIZE PATH makes an empty disk";

impl Failure for Error {
    /// [`STATUS_USAGE`] if another command line helps.
    fn status(&self) -> u8 {
        match self {
            Error::SetUp { .. }
            | Error::Session(_)
            | Error::NotAsSpecified(_)
            | Error::NothingTried
            | Error::NotPrinted(_) => STATUS_ERROR,
            _ => STATUS_USAGE,
        }
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Error::PathTooLong { .. } => Some("a path relative to the working directory may be shorter"),
            Error::NoSandbox(_) => Some(sandbox::HINT),
            Error::InUse(_) => Some("each back-end needs a socket of its own"),
            Error::NoFile { hint, .. } | Error::File { hint, .. } => *hint,
            Error::NotRegular { kind: "block device", .. } => Some("hotslot-backend blk serves it as a disk"),
            Error::InUseFile { .. } | Error::Claimed(_) => Some(
                "several may use it if each has --read-only, or each has --shared (--help tells its danger)",
            ),
            Error::Empty { read_only: false, .. } => Some("--size SIZE extends it"),
            Error::TooShort { .. } => Some(MAKE_DISK),
            Error::State { .. } => {
                Some("a guest that starts anew needs no state: remove the file, or name another")
            }
            Error::NotAsSpecified(_) => Some("each is a line with NOT in it, on stdout"),
            Error::NothingTried => Some(
                "an action without @WHEN is done when the guest's driver starts the device; a line `no verdict` on stdout says why a case was not tried",
            ),
            _ => None,
        };
        hint.map(str::to_owned)
    }
}

impl Error {
    /// For `map_err`: what could not be set up.
    pub fn set_up(what: &'static str) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::SetUp { what, source }
    }
}
