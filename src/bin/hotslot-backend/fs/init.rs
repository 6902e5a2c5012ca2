//! FUSE_INIT: what the guest's kernel offers, and what of it this back-end takes.
//!
//! fuse-backend-rs would answer it, too, but knows neither FUSE_SETXATTR_EXT and FUSE_CREATE_SUPP_GROUP nor
//! where mappings begin. Called by [`super::requests`].

use std::io;

use fuse_backend_rs::abi::fuse_abi::{
    FsOptions, InitIn, InitIn2, InitOut, KERNEL_MINOR_VERSION, KERNEL_VERSION,
};
use fuse_backend_rs::api::server::MAX_REQ_PAGES;
use fuse_backend_rs::transport::Reader;
use rustix::io::Errno;

use super::dax::PAGE;
use super::policy::{Cache, LocksOf, Policy, Xattrs};

pub const FUSE_SETXATTR_EXT: u64 = 1 << 29;
pub const FUSE_CREATE_SUPP_GROUP: u64 = 1 << 34;

/// The most requests that the guest's kernel makes in the background at a time, such as to read ahead; from
/// the second number on it calls the file system congested.
const MAX_BACKGROUND: u16 = u16::MAX;
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;

/// What is agreed on, of the bits in `offered`.
fn wanted(policy: &Policy, has_window: bool) -> u64 {
    // Not ATOMIC_O_TRUNC: for O_RDONLY|O_TRUNC Linux sends FUSE_OPEN first, and only then looks whether the
    // file is a program that runs. The open fails with ETXTBSY, but the program would be gone. Without it, a
    // FUSE_SETATTR follows once all is checked.
    let mut options = FsOptions::ASYNC_READ
        | FsOptions::ASYNC_DIO
        | FsOptions::BIG_WRITES
        | FsOptions::DONT_MASK
        | FsOptions::DO_READDIRPLUS
        | FsOptions::READDIRPLUS_AUTO
        | FsOptions::HANDLE_KILLPRIV_V2
        | FsOptions::INIT_EXT
        | FsOptions::MAX_PAGES
        | FsOptions::PARALLEL_DIROPS;
    options.set(FsOptions::SUBMOUNTS, policy.announce_submounts);
    options.set(FsOptions::POSIX_ACL, policy.xattrs != Xattrs::Off);
    options.set(FsOptions::AUTO_INVAL_DATA, policy.cache != Cache::Always);
    options.set(FsOptions::POSIX_LOCKS | FsOptions::FLOCK_LOCKS, policy.locks == LocksOf::Host);
    options.set(FsOptions::MAP_ALIGNMENT, has_window);
    options.bits() | FUSE_SETXATTR_EXT | FUSE_CREATE_SUPP_GROUP
}

/// The answer to the arguments of a FUSE_INIT, and the bits that both sides have.
///
/// # Errors
///
/// EPROTO: the guest's FUSE is older than 7.
pub fn agree(mut request: Reader, policy: &Policy, has_window: bool) -> io::Result<(InitOut, u64)> {
    let malformed = |_| io::Error::from(Errno::INVAL);
    let offer: InitIn = request.read_obj().map_err(malformed)?;
    let version = InitOut { major: KERNEL_VERSION, minor: KERNEL_MINOR_VERSION, ..Default::default() };
    if offer.major < KERNEL_VERSION {
        return Err(Errno::PROTO.into());
    }
    if offer.major > KERNEL_VERSION {
        // The guest asks again with our version.
        return Ok((version, 0));
    }
    let mut offered = u64::from(offer.flags);
    if offered & FsOptions::INIT_EXT.bits() != 0 {
        let more: InitIn2 = request.read_obj().map_err(malformed)?;
        offered |= u64::from(more.flags2) << 32;
    }
    let agreed = offered & wanted(policy, has_window);
    let answer = InitOut {
        max_readahead: offer.max_readahead,
        flags: agreed as u32,
        flags2: (agreed >> 32) as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: u32::from(MAX_REQ_PAGES) * PAGE as u32,
        max_pages: MAX_REQ_PAGES,
        // The guest may set times to the nanosecond.
        time_gran: 1,
        map_alignment: if has_window { PAGE.trailing_zeros() as u16 } else { 0 },
        ..version
    };
    Ok((answer, agreed))
}
