//! FUSE by its bytes (Linux' `include/uapi/linux/fuse.h`): nothing of the back-end's own tables, so that an
//! error there cannot hide.

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const READLINK: u32 = 5;
pub const SYMLINK: u32 = 6;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const LINK: u32 = 13;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const SETXATTR: u32 = 21;
pub const GETXATTR: u32 = 22;
pub const LISTXATTR: u32 = 23;
pub const REMOVEXATTR: u32 = 24;
pub const FLUSH: u32 = 25;
pub const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const GETLK: u32 = 31;
pub const SETLK: u32 = 32;
pub const SETLKW: u32 = 33;
pub const CREATE: u32 = 35;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const IOCTL: u32 = 39;
pub const BATCH_FORGET: u32 = 42;
pub const FALLOCATE: u32 = 43;
pub const READDIRPLUS: u32 = 44;
pub const RENAME2: u32 = 45;
pub const LSEEK: u32 = 46;
pub const COPY_FILE_RANGE: u32 = 47;
pub const SETUPMAPPING: u32 = 48;
pub const REMOVEMAPPING: u32 = 49;
pub const SYNCFS: u32 = 50;
pub const TMPFILE: u32 = 51;
pub const STATX: u32 = 52;
pub const LAST: u32 = 60;

pub const ROOT: u64 = 1;
/// FUSE_MAP_ALIGNMENT, an INIT flag.
pub const MAP_ALIGNMENT: u32 = 1 << 26;
/// FATTR_SIZE.
pub const SET_SIZE: u32 = 1 << 3;

pub const HEADER: usize = 40;

/// A request as a guest's user makes it.
pub fn request(opcode: u32, node: u64, (uid, gid): (u32, u32), body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(((HEADER + body.len()) as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(UNIQUE.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    for word in [uid, gid, 1, 0] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    bytes
}

/// What an answer has to repeat.
pub const UNIQUE: u64 = 0x1122_3344_5566_7788;

pub fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn quads<const N: usize>(quads: [u64; N]) -> Vec<u8> {
    quads.iter().flat_map(|quad| quad.to_le_bytes()).collect()
}

/// A string with its zero.
pub fn name(name: &str) -> Vec<u8> {
    raw_name(name.as_bytes())
}

/// The same, of any bytes.
pub fn raw_name(name: &[u8]) -> Vec<u8> {
    [name, b"\0"].concat()
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A kernel that can do everything but FUSE_INIT_EXT, which lengthens this.
pub fn init() -> Vec<u8> {
    words([7, 31, 1 << 20, !(1 << 30)])
}

/// The same with FUSE_INIT_EXT.
pub fn init_ext() -> Vec<u8> {
    [words([7, 38, 1 << 20, u32::MAX, u32::MAX]), vec![0; 44]].concat()
}

/// `struct fuse_setxattr_in` of FUSE_SETXATTR_EXT, with a name and a value.
pub fn setxattr(file: &str, value: &[u8], setxattr_flags: u32) -> Vec<u8> {
    [&words([value.len() as u32, 0, setxattr_flags, 0])[..], &name(file), value].concat()
}

/// `struct fuse_setattr_in` that sets what `valid` says.
pub fn setattr(valid: u32, mode: u32, (uid, gid): (u32, u32)) -> Vec<u8> {
    [words([valid, 0]), vec![0; 60], words([mode, 0, uid, gid, 0])].concat()
}

pub fn create(flags: i32, mode: u32, file: &str) -> Vec<u8> {
    [words([flags as u32, mode, 0, 0]), name(file)].concat()
}

pub fn open(flags: i32) -> Vec<u8> {
    words([flags as u32, 0])
}

pub fn read(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    [quads([handle, offset]), words([size, 0]), quads([0]), words([0, 0])].concat()
}

pub fn write(handle: u64, offset: u64, data: &[u8]) -> Vec<u8> {
    let size = data.len() as u32;
    [&quads([handle, offset])[..], &words([size, 0]), &quads([0]), &words([0, 0]), data].concat()
}

/// `struct fuse_setattr_in` with a new size.
pub fn set_size(size: u64) -> Vec<u8> {
    [words([SET_SIZE, 0]), quads([0, size]), vec![0; 64]].concat()
}

pub fn setupmapping(file_offset: u64, len: u64, flags: u64, offset: u64) -> Vec<u8> {
    quads([u64::MAX, file_offset, len, flags, offset])
}

pub fn removemapping(ranges: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = words([ranges.len() as u32]);
    for &(offset, len) in ranges {
        bytes.extend(quads([offset, len]));
    }
    bytes
}
