//! The file descriptors that are sent to the front-end: of files whose words name their own offset, and of
//! objects that cannot be mapped.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::pipe::{PipeFlags, pipe_with};

/// All offsets and sizes here are multiples of it.
pub const PAGE: u64 = 4096;

/// The seed of the pattern that is mapped when the device is started.
pub const PATTERN: u64 = 1;

/// A file in memory whose little-endian 64-bit words are `seed << 32 | offset in the file`.
pub fn file(seed: u64, len: u64) -> io::Result<File> {
    let mut file = File::from(memfd_create("pattern", MemfdFlags::CLOEXEC)?);
    let words = (0..len).step_by(8).flat_map(|offset| (seed << 32 | offset).to_le_bytes());
    file.write_all(&words.collect::<Vec<_>>())?;
    Ok(file)
}

/// The same file again, opened for reading only.
pub fn read_only(file: &File) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    Ok(File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?.into())
}

/// The reading and the writing end of a pipe.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}

pub fn socket() -> io::Result<OwnedFd> {
    Ok(UnixStream::pair()?.0.into())
}

pub fn directory() -> io::Result<OwnedFd> {
    Ok(open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// A device without memory.
pub fn device() -> io::Result<OwnedFd> {
    Ok(File::open("/dev/null")?.into())
}
