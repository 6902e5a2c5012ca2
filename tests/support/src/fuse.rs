//! A FUSE file system of one file, whose server leaves the requests unanswered that the test names. By the
//! bytes of Linux' `include/uapi/linux/fuse.h`.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write, stderr};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use tempfile::TempDir;

use crate::files::PAGE;
use crate::wait::eventually;

/// Requests, by their numbers.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const INTERRUPT: u32 = 36;
    pub const BATCH_FORGET: u32 = 42;
}

/// The pages of the file. Each is full of one byte, [`byte_of`].
pub const PAGES: u64 = 16;

pub fn byte_of(page: u64) -> u8 {
    page as u8 + 1
}

const HEADER: usize = 40;
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// The server ends by itself after this many seconds, and with it every wait for an answer of it.
const LONGEST: u32 = 180;

/// A mounted file system. Its server is a process of its own, which ends with the test, however that ends:
/// while it lives the kernel keeps those that wait for it, even against SIGKILL.
pub struct Fuse {
    /// To tell the server.
    control: UnixStream,
    /// The file, open for reading and writing.
    file: Option<File>,
    mounted: Option<TempDir>,
}

impl Fuse {
    /// Mounts it, and opens its file; `None` where that cannot be done, which is said. `here`: as a mount
    /// that other processes of the test see; else in a mount namespace of its own.
    pub fn mount(here: bool) -> Option<Fuse> {
        let result = match here {
            true => Fuse::try_mount(),
            false => thread::spawn(|| {
                // SAFETY: the call changes this thread only, which ends soon.
                if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
                    return Err(io::Error::last_os_error());
                }
                mount("none", Path::new("/"), libc::MS_REC | libc::MS_PRIVATE, "")?;
                let mut fuse = Fuse::try_mount()?;
                // Only in this namespace, which ends with the server.
                fuse.mounted = None;
                Ok(fuse)
            })
            .join()
            .unwrap(),
        };
        let say = |error: &io::Error| {
            let test = thread::current().name().unwrap_or("a test").to_string();
            // Not `eprintln!`: the test harness would keep it to itself.
            let _ = writeln!(stderr(), "SKIPPED: {test}: no FUSE file system can be mounted: {error}");
        };
        result.inspect_err(say).ok()
    }

    fn try_mount() -> io::Result<Fuse> {
        let dir = tempfile::tempdir()?;
        let device = File::options().read(true).write(true).open("/dev/fuse")?;
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        mount("fuse.test", dir.path(), libc::MS_NOSUID | libc::MS_NODEV, &options)?;
        let (control, theirs) = UnixStream::pair()?;
        // SAFETY: the child calls nothing but `serve`, which never returns.
        match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => serve(device, theirs),
            _ => drop(theirs),
        }
        drop(device);
        let file = File::options().read(true).write(true).open(dir.path().join("file"))?;
        Ok(Fuse { control, file: Some(file), mounted: Some(dir) })
    }

    pub fn file(&self) -> &File {
        self.file.as_ref().unwrap()
    }

    /// From now on these requests are left unanswered. With none: answers what was, and all that comes.
    pub fn hold(&self, opcodes: &[u32]) {
        let count = opcodes.len() as u32;
        self.tell(&words(&[&[count], opcodes].concat()));
    }

    /// Waits until somebody waits for an answer.
    pub fn wait_until_held(&self) {
        eventually("a request waits for its answer", || self.tell(&words(&[HOW_MANY])) > 0);
    }

    /// Tells the server something; gives how many requests are held.
    fn tell(&self, order: &[u8]) -> u8 {
        let mut control = &self.control;
        control.write_all(order).unwrap();
        let mut answer = [0];
        control.read_exact(&mut answer).unwrap();
        answer[0]
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // The server ends: then nothing waits for it.
        let _ = self.control.shutdown(Shutdown::Both);
        self.file = None;
        if let Some(dir) = &self.mounted {
            let path = CString::new(dir.path().as_os_str().as_bytes()).unwrap();
            // SAFETY: the path is a string of ours.
            unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
        }
    }
}

/// An order: only say how many requests are held.
const HOW_MANY: u32 = u32::MAX;

/// The server: what the child process does.
fn serve(device: File, control: UnixStream) -> ! {
    const DEVICE: i32 = 3;
    const CONTROL: i32 = 4;
    // Nothing else of the test may stay open here. Numbers out of the way first.
    // SAFETY: the child has one thread, and goes on with these two descriptors only.
    let [device, control] = [device.into_raw_fd(), control.into_raw_fd()]
        .map(|fd| unsafe { libc::fcntl(fd, libc::F_DUPFD, 100) });
    for (from, to) in [(device, DEVICE), (control, CONTROL)] {
        // SAFETY: as above.
        unsafe { libc::dup2(from, to) };
    }
    // SAFETY: as above.
    unsafe { libc::syscall(libc::SYS_close_range, CONTROL + 1, u32::MAX, 0) };
    // SAFETY: no memory is involved.
    unsafe { libc::alarm(LONGEST) };
    // SAFETY: the descriptor has no other owner.
    let device = unsafe { File::from_raw_fd(DEVICE) };
    // SAFETY: as above.
    let control = unsafe { UnixStream::from_raw_fd(CONTROL) };
    let content = (0..PAGES).flat_map(|page| vec![byte_of(page); PAGE as usize]).collect();
    let mut server = Server { device, held: Vec::new(), waiting: Vec::new(), content };
    while server.step(&control).is_some() {}
    // SAFETY: the call ends the process.
    unsafe { libc::_exit(0) }
}

struct Server {
    device: File,
    /// What is left unanswered.
    held: Vec<u32>,
    /// Requests that were.
    waiting: Vec<Vec<u8>>,
    content: Vec<u8>,
}

fn mount(kind: &str, target: &Path, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    let [target, kind, options] = [target.as_os_str().as_bytes(), kind.as_bytes(), options.as_bytes()]
        .map(|text| CString::new(text).unwrap());
    let (target, kind, options) = (target.as_ptr(), kind.as_ptr(), options.as_ptr());
    // SAFETY: all are strings of ours, which live through the call.
    match unsafe { libc::mount(c"test".as_ptr(), target, kind, flags, options.cast()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn quads(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, size) = match node {
        ROOT => (libc::S_IFDIR | 0o755, 0),
        _ => (libc::S_IFREG | 0o644, PAGES * PAGE),
    };
    let times_and_mode = words(&[0, 0, 0, mode, 1, 0, 0, 0, PAGE as u32, 0]);
    [quads(&[node, size, size / 512, 0, 0, 0]), times_and_mode].concat()
}

impl Server {
    /// One request or order; `None` at the end of either.
    fn step(&mut self, mut control: &UnixStream) -> Option<()> {
        let mut polled = [PollFd::new(&self.device, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
        poll(&mut polled, None).ok()?;
        let [has_request, has_order] = polled.map(|entry| !entry.revents().is_empty());
        if has_order {
            let mut word = || {
                let mut bytes = [0; 4];
                control.read_exact(&mut bytes).ok()?;
                Some(u32::from_ne_bytes(bytes))
            };
            let count = word()?;
            if count != HOW_MANY {
                self.held = (0..count).map(|_| word()).collect::<Option<_>>()?;
                if count == 0 {
                    std::mem::take(&mut self.waiting).iter().for_each(|request| self.answer(request));
                }
            }
            control.write_all(&[self.waiting.len() as u8]).ok()?;
        } else if has_request {
            let mut buffer = vec![0; 1 << 18];
            let len = (&self.device).read(&mut buffer).ok()?;
            buffer.truncate(len);
            match self.held.contains(&u32::from_ne_bytes(field(&buffer, 4))) {
                true => self.waiting.push(buffer),
                false => self.answer(&buffer),
            }
        }
        Some(())
    }

    fn answer(&mut self, request: &[u8]) {
        let opcode = u32::from_ne_bytes(field(request, 4));
        let node = u64::from_ne_bytes(field(request, 16));
        let body = &request[HEADER..];
        let content = &mut self.content;
        let range = || {
            let start = u64::from_ne_bytes(field(body, 8)) as usize;
            let len = u32::from_ne_bytes(field(body, 16)) as usize;
            start..(start + len).min((PAGES * PAGE) as usize)
        };
        let answer = match opcode {
            opcode::FORGET | opcode::BATCH_FORGET | opcode::INTERRUPT => return,
            // Version 7.31; 4096 bytes to write at a time.
            opcode::INIT => Ok([words(&[7, 31, 0, 0, 0, 4096, 1]), vec![0; 36]].concat()),
            // The name is valid for long, the attributes are asked for each time.
            opcode::LOOKUP => Ok([quads(&[FILE, 0, 1 << 20, 0]), words(&[0, 0]), attributes(FILE)].concat()),
            opcode::GETATTR => Ok([quads(&[0, 0]), attributes(node)].concat()),
            opcode::OPEN => Ok(vec![0; 16]),
            opcode::READ => Ok(content[range()].to_vec()),
            opcode::WRITE => {
                let range = range();
                let len = range.len();
                content[range].copy_from_slice(&body[40..40 + len]);
                Ok(words(&[len as u32, 0]))
            }
            opcode::STATFS => Ok(vec![0; 80]),
            opcode::RELEASE | opcode::FLUSH => Ok(Vec::new()),
            _ => Err(-libc::ENOSYS),
        };
        let (error, payload) = answer.map_or_else(|error| (error, Vec::new()), |payload| (0, payload));
        let len = 16 + payload.len() as u32;
        let header = [words(&[len, error as u32]), field::<8>(request, 8).to_vec()].concat();
        // The process that asked may have been killed.
        let _ = (&self.device).write(&[header, payload].concat());
    }
}
