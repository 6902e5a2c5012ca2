//! Describes a file descriptor by what the kernel itself knows: no call here asks the file's server, which
//! may never answer (SHM-83; `memory::origin` has the reasons).

use std::os::fd::BorrowedFd;

use rustix::fs::{AtFlags, FileType, OFlags, SealFlags, StatxFlags, fcntl_get_seals, fcntl_getfl, statx};

use super::record::Descriptor;

/// Describes a descriptor that a back-end sent.
pub fn describe(fd: BorrowedFd<'_>) -> Descriptor {
    describe_as(fd, "anonymous")
}

/// Describes a descriptor of hotslot's: an anonymous one is an eventfd.
pub fn describe_ours(fd: BorrowedFd<'_>) -> Descriptor {
    describe_as(fd, "eventfd")
}

fn describe_as(fd: BorrowedFd<'_>, anonymous: &str) -> Descriptor {
    let seals = fcntl_get_seals(fd).ok();
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(fd, "", flags, StatxFlags::TYPE | StatxFlags::SIZE).ok();
    let file_type = found.map(|found| FileType::from_raw_mode(found.stx_mode.into()));
    let kind = match file_type {
        _ if seals.is_some() => "file of memory",
        None => "unknown",
        Some(FileType::RegularFile) => "regular file",
        Some(FileType::Directory) => "directory",
        Some(FileType::Socket) => "socket",
        Some(FileType::Fifo) => "pipe",
        Some(FileType::CharacterDevice) => "character device",
        Some(FileType::BlockDevice) => "block device",
        Some(_) => anonymous,
    };
    let has_size = matches!(file_type, Some(FileType::RegularFile));
    Descriptor {
        kind: kind.to_owned(),
        size: found.filter(|_| has_size).map(|found| found.stx_size),
        access: access(fd).to_owned(),
        seals: seals.map(names),
    }
}

fn access(fd: BorrowedFd<'_>) -> &'static str {
    match fcntl_getfl(fd) {
        Ok(flags) if flags.contains(OFlags::PATH) => "path-only",
        Ok(flags) if flags.contains(OFlags::RDWR) => "read-write",
        Ok(flags) if flags.contains(OFlags::WRONLY) => "write-only",
        _ => "read-only",
    }
}

fn names(seals: SealFlags) -> String {
    let names = [
        (SealFlags::SEAL, "seal"),
        (SealFlags::SHRINK, "shrink"),
        (SealFlags::GROW, "grow"),
        (SealFlags::WRITE, "write"),
        (SealFlags::FUTURE_WRITE, "future_write"),
    ];
    let there = names.into_iter().filter(|&(seal, _)| seals.contains(seal));
    there.map(|(_, name)| name).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};

    use super::*;

    #[test]
    fn each_kind_of_descriptor_is_named() {
        let memfd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&memfd, 12345).unwrap();
        fcntl_add_seals(&memfd, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let is = describe(memfd.as_fd());
        let (kind, seals) = (is.kind.as_str(), is.seals.as_deref());
        assert_eq!((kind, is.size, seals), ("file of memory", Some(12345), Some("shrink grow")));
        assert_eq!(is.access, "read-write");
        let file = File::open("/proc/self/exe").unwrap();
        let is = describe(file.as_fd());
        assert_eq!((is.kind.as_str(), is.access.as_str(), is.seals), ("regular file", "read-only", None));
        assert_eq!(is.size, Some(file.metadata().unwrap().len()));
        let event = eventfd(0, EventfdFlags::empty()).unwrap();
        assert_eq!(describe(event.as_fd()).kind, "anonymous");
        assert_eq!(describe_ours(event.as_fd()).kind, "eventfd");
        let (socket, _) = UnixStream::pair().unwrap();
        assert_eq!((describe(socket.as_fd()).kind.as_str(), describe(socket.as_fd()).size), ("socket", None));
        assert_eq!(describe(File::open("/").unwrap().as_fd()).kind, "directory");
    }
}
