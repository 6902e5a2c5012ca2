//! From the bytes of a request to the bytes of its answer.
//!
//! fuse-backend-rs decodes most of FUSE and calls [`super::passthrough`]. Here are the requests that it does
//! not decode (FUSE_TMPFILE, FUSE_SYNCFS, FUSE_STATX, FUSE_COPY_FILE_RANGE, the longer FUSE_SETXATTR, and
//! FUSE_SETLKW, for which it does not wait), FUSE_INIT (see [`super::init`]), FUSE_STATFS and FUSE_IOCTL,
//! whose answers only it could build, and FUSE_DESTROY, of whose answer it does not tell the length; a limit
//! to a request's size; and an error for each request that it does not answer. Called by [`super`] on the
//! threads that answer requests.

use std::ffi::CStr;
use std::fmt::Display;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse_backend_rs::abi::fuse_abi::{
    CopyFileRangeIn, CreateIn, EntryOut, InHeader, IoctlIn, IoctlOut, Kstatfs, LkIn, LkOut, Opcode, OpenOut,
    OutHeader, WriteOut,
};
use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::Context;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FsCacheReqHandler, Reader, VirtioFsWriter, Writer};
use fuse_vm_memory::ByteValued;
use rustix::io::Errno;

use super::change::{Change, Key};
use super::copies::Copies;
use super::dax::Window;
use super::directory::Directory;
use super::guest::Guest;
use super::init::{self, FUSE_SETXATTR_EXT};
use super::journal::Keeper;
use super::locks::LOCK_TIMEOUT;
use super::policy::LocksOf;
use super::queue::{self, Chain, Memory};
use super::refused::{MAX_REQUEST, Refused};
use crate::complaints::Complaints;
use crate::device::Later;

/// Opcodes that are newer than fuse-backend-rs.
const FUSE_SYNCFS: u32 = 50;
const FUSE_TMPFILE: u32 = 51;
const FUSE_STATX: u32 = 52;

/// A flag of FUSE_SETXATTR.
const FUSE_SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// A type of extension.
const FUSE_EXT_GROUPS: u32 = 32;
/// The length of `struct fuse_statx_in`.
const STATX_IN: usize = 24;
/// The most that an ioctl is given or gives; those that are known take 4 or 8 bytes.
const MAX_IOCTL: usize = 64;
/// The longest answer that is written down: that of FUSE_CREATE has 160 bytes. A FUSE_READDIRPLUS that is
/// executed twice counts its lookups twice, and the guest forgets them once: those files stay known until it
/// unmounts.
const MAX_KEPT: u32 = 256;

/// Answers the requests of one front-end.
pub struct Requester {
    server: Server<Arc<Directory>>,
    directory: Arc<Directory>,
    window: Option<Arc<Window>>,
    /// Whether the guest's FUSE_SETXATTR is the longer one (FUSE_SETXATTR_EXT).
    long_setxattr: AtomicBool,
    keeper: Keeper,
    complaints: Arc<Complaints>,
}

impl Requester {
    pub fn new(directory: Arc<Directory>, window: Option<Arc<Window>>, complaints: Arc<Complaints>) -> Self {
        Requester {
            keeper: directory.keeper.clone(),
            server: Server::new(Arc::clone(&directory)),
            directory,
            window,
            long_setxattr: AtomicBool::new(false),
            complaints,
        }
    }

    /// The guest is that of the last session.
    pub fn restore(&self, agreed: u64) {
        self.long_setxattr.store(agreed & FUSE_SETXATTR_EXT != 0, Ordering::Relaxed);
    }

    /// The front-end has reset the device and removed all mappings: closes and forgets all.
    pub fn reset(&self) {
        if let Some(window) = &self.window {
            window.forget();
        }
        self.directory.clear();
        self.keeper.commit(|| None);
    }

    /// Answers all requests that wait.
    pub fn stop_waiting(&self) {
        self.directory.locks.waiters.end();
    }

    /// Executes a request, or lets it wait for a lock (FUSE_SETLKW).
    pub fn answer_or_wait(
        &self,
        thread: usize,
        chain: Chain,
        guest: &Arc<Guest>,
        later: Later,
    ) -> Option<u32> {
        if self.directory.policy.locks == LocksOf::Host
            && let Some((header, wanted)) = wanted_lock(&chain, &guest.ram)
            && self.directory.set_lock(header.nodeid, &wanted).is_err_and(|e| is_again(&e))
        {
            let (directory, guest) = (Arc::clone(&self.directory), Arc::clone(guest));
            let chain_later = chain.clone();
            let attempt = move |is_last: bool| {
                let result = match directory.set_lock(header.nodeid, &wanted) {
                    Err(e) if is_again(&e) && !is_last => return false,
                    Err(e) if is_again(&e) => Err(Errno::NOLCK.into()),
                    result => result,
                };
                directory.keeper.commit(|| None);
                let answer = VirtioFsWriter::new(&*guest.ram, chain_later.clone()).ok();
                let answer =
                    answer.and_then(|mut to| reply(&mut to, &header, result.map(|()| Vec::new())).ok());
                later.hand_back(answer.map_or(0, |written| written as u32));
                true
            };
            // Without a thread the process does not wait.
            if self.directory.locks.waiters.add(LOCK_TIMEOUT, Box::new(attempt)).is_ok() {
                return None;
            }
        }
        Some(self.answer(thread, chain, guest))
    }

    /// Executes a request, on the thread of that number. Returns how many bytes of its buffers were written.
    pub fn answer(&self, thread: usize, chain: Chain, guest: &Guest) -> u32 {
        if self.keeper.0.is_none() {
            return self.execute(chain, guest);
        }
        let mut header = InHeader::default();
        queue::read_start(chain.clone(), &guest.ram, header.as_mut_slice());
        let key = Key { unique: header.unique, opcode: header.opcode.into(), node: header.nodeid };
        if let Some(answer) = self.keeper.begin(thread as u64, key)
            && queue::write_start(chain.clone(), &guest.ram, &answer)
        {
            return answer.len() as u32;
        }
        let written = self.execute(chain.clone(), guest);
        let is_short = written <= MAX_KEPT;
        self.keeper.commit(|| queue::read_answer(chain, &guest.ram, written as usize).filter(|_| is_short));
        written
    }

    fn execute(&self, chain: Chain, guest: &Guest) -> u32 {
        let copies = match Copies::of(&chain, guest, self.window.as_deref(), &self.directory) {
            Ok(None) => return self.answer_in(chain, &guest.ram),
            Ok(Some(copies)) => copies,
            Err(why) => return self.refuse(chain, &guest.ram, &why),
        };
        let written = self.answer_in(chain.clone(), copies.memory());
        let Err(why) = copies.write_back(written) else {
            return written;
        };
        let written = self.refuse(chain, copies.memory(), &why);
        // The place of the answer's header may be outside RAM, too.
        if copies.write_back(written).is_ok() { written } else { 0 }
    }

    /// The same, for a request that is all in this memory.
    fn answer_in(&self, chain: Chain, memory: &Memory) -> u32 {
        match self.try_answer(&chain, memory) {
            Ok(written) => written,
            Err(why) => self.refuse(chain, memory, &why),
        }
    }

    fn try_answer(&self, chain: &Chain, memory: &Memory) -> Result<u32, Refused> {
        let unreachable =
            |e| Refused { error: Errno::FAULT, why: format!("a request is not in the guest's memory: {e}") };
        let invalid = |why| Refused { error: Errno::INVAL, why };
        let request = Reader::from_descriptor_chain(&**memory, chain.clone()).map_err(unreachable)?;
        let mut answer = VirtioFsWriter::new(&**memory, chain.clone()).map_err(unreachable)?;
        let len = request.available_bytes();
        if len > MAX_REQUEST {
            return Err(invalid(format!("a request has {len} bytes, more than {MAX_REQUEST}")));
        }
        let header: InHeader = request
            .clone()
            .read_obj()
            .map_err(|_| invalid(format!("a request is too short for its header: {len} bytes")))?;
        let of_request = |what: &str, e: &dyn Display| {
            let InHeader { unique, opcode, .. } = header;
            invalid(format!("request {unique} with opcode {opcode} {what}: {e}"))
        };
        let no_room = |e: io::Error| of_request("has no room for its answer", &e);

        let groups = self.directory.join(supplementary_group(&header, request.clone()));
        let _groups = groups.map_err(|e| of_request("cannot be answered for a group", &e))?;
        let written = if let Some(result) = self.answer_ours(&header, request.clone()) {
            reply(&mut answer, &header, result).map_err(no_room)?
        } else {
            let mut window = self.window.as_ref().map(|_| HasWindow);
            let window = window.as_mut().map(|window| window as &mut dyn FsCacheReqHandler);
            self.server
                .handle_message(request, Writer::VirtioFs(answer), window, None)
                .map_err(|e| of_request("makes no sense", &e))?
        };
        u32::try_from(written).map_err(|e| no_room(io::Error::other(e)))
    }

    /// Answers a request with an error, and says why. Returns how many bytes were written.
    ///
    /// It uses only those buffers of the request that are in the guest's memory. Without this answer Linux
    /// before 7.1 would find zeros in place of its header. It would take the error for 0, which is success,
    /// and the length of the data for 0 - 16, and a program would be told that it has read so many bytes.
    fn refuse(&self, chain: Chain, memory: &Memory, refused: &Refused) -> u32 {
        let mut header = InHeader::default();
        let reached = queue::read_start(chain.clone(), memory, header.as_mut_slice());
        // A field of which a part is missing is 0. Linux finds the request of an answer by its buffer. From
        // 7.1 on it also compares `unique`: if they differ, the request fails with EIO, which is an error,
        // too.
        header.as_mut_slice()[reached / 8 * 8..].fill(0);
        let silent = wants_no_answer(&header);
        let answer = OutHeader {
            len: size_of::<OutHeader>() as u32,
            error: -refused.error.raw_os_error(),
            unique: header.unique,
        };
        let answered = !silent && queue::write_start(chain, memory, answer.as_slice());
        let why = &refused.why;
        if answered || silent {
            self.complaints.say(why);
        } else {
            self.complaints.say(format_args!("{why}; it gets no answer: there is no place for one"));
        }
        if answered { answer.len } else { 0 }
    }

    /// The answer to a request that fuse-backend-rs does not decode.
    fn answer_ours<'a>(&self, header: &InHeader, mut request: Reader<'a>) -> Option<io::Result<Vec<u8>>> {
        let body = |request: &mut Reader<'a>| request.read_exact(&mut [0; size_of::<InHeader>()]);
        let answer = match header.opcode {
            opcode if opcode == Opcode::Statfs as u32 => self.statfs(header),
            opcode if opcode == Opcode::CopyFileRange as u32 => body(&mut request)
                .and_then(|()| request.read_obj())
                .map_err(malformed)
                .and_then(|args| self.copy_file_range(header, args)),
            // fuse-backend-rs would answer it, but not tell the length of the answer.
            opcode if opcode == Opcode::Destroy as u32 => {
                self.directory.clear();
                Ok(Vec::new())
            }
            opcode if opcode == Opcode::Init as u32 => {
                body(&mut request).map_err(malformed).and_then(|()| self.init(request))
            }
            opcode if opcode == Opcode::Setxattr as u32 => {
                body(&mut request).map_err(malformed).and_then(|()| self.setxattr(header, request))
            }
            opcode if opcode == Opcode::Ioctl as u32 => {
                body(&mut request).map_err(malformed).and_then(|()| self.ioctl(header, request))
            }
            opcode if is_lock(opcode) && self.directory.policy.locks == LocksOf::Host => body(&mut request)
                .and_then(|()| request.read_obj())
                .map_err(malformed)
                .and_then(|wanted| self.lock(header, &wanted)),
            FUSE_STATX => body(&mut request)
                .and_then(|()| request.read_obj())
                .map_err(malformed)
                .and_then(|_: [u8; STATX_IN]| self.directory.extended_status(header.nodeid)),
            FUSE_SYNCFS => self.directory.sync(header.nodeid).map(|()| Vec::new()),
            FUSE_TMPFILE => body(&mut request)
                .and_then(|()| request.read_obj())
                .map_err(malformed)
                .and_then(|args| self.tmpfile(header, args)),
            _ => return None,
        };
        Some(answer)
    }

    fn init(&self, request: Reader) -> io::Result<Vec<u8>> {
        // A guest that crashed sent no FUSE_DESTROY.
        self.directory.clear();
        let (answer, agreed) = init::agree(request, &self.directory.policy, self.window.is_some())?;
        self.long_setxattr.store(agreed & FUSE_SETXATTR_EXT != 0, Ordering::Relaxed);
        self.keeper.note(|| Change::Agreed(agreed));
        Ok(answer.as_slice().to_vec())
    }

    fn statfs(&self, header: &InHeader) -> io::Result<Vec<u8>> {
        let stat = self.directory.file_system(header.nodeid)?;
        let answer = Kstatfs {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namemax as u32,
            frsize: stat.f_frsize as u32,
            ..Default::default()
        };
        Ok(answer.as_slice().to_vec())
    }

    fn copy_file_range(&self, header: &InHeader, args: CopyFileRangeIn) -> io::Result<Vec<u8>> {
        if args.flags != 0 {
            return Err(Errno::INVAL.into());
        }
        let size = self.directory.copy(
            (header.nodeid, args.fh_in, args.offset_in),
            (args.nodeid_out, args.fh_out, args.offset_out),
            args.len,
        )?;
        Ok(WriteOut { size, padding: 0 }.as_slice().to_vec())
    }

    /// `struct fuse_setxattr_in`, with FUSE_SETXATTR_EXT twice as long; then the name, a zero, the value.
    fn setxattr(&self, header: &InHeader, mut request: Reader) -> io::Result<Vec<u8>> {
        let mut args = [0; 16];
        let len = if self.long_setxattr.load(Ordering::Relaxed) { args.len() } else { args.len() / 2 };
        request.read_exact(&mut args[..len]).map_err(malformed)?;
        let [size, flags, more_flags, _] = words(args);
        let mut rest = Vec::new();
        request.read_to_end(&mut rest)?;
        let name = CStr::from_bytes_until_nul(&rest).map_err(|_| Errno::INVAL)?;
        let value = &rest[name.to_bytes_with_nul().len()..];
        let value = value.get(..size as usize).ok_or(Errno::INVAL)?;
        let drops_setgid = more_flags & FUSE_SETXATTR_ACL_KILL_SGID != 0;
        self.directory.set_attribute(header.nodeid, name, value, flags, drops_setgid)?;
        Ok(Vec::new())
    }

    /// `struct fuse_ioctl_in`, then what the call is given; answered by `struct fuse_ioctl_out` and what it
    /// gives, in exactly the guest's room for it.
    fn ioctl(&self, header: &InHeader, mut request: Reader) -> io::Result<Vec<u8>> {
        let args: IoctlIn = request.read_obj().map_err(malformed)?;
        let (given, room) = (args.in_size as usize, args.out_size as usize);
        if given > MAX_IOCTL || room > MAX_IOCTL {
            return Err(Errno::NOTTY.into());
        }
        let mut argument = vec![0; given];
        request.read_exact(&mut argument).map_err(malformed)?;
        let mut result = self.directory.control(header.nodeid, args.fh, args.cmd, &argument)?;
        result.resize(room, 0);
        Ok([IoctlOut::default().as_slice(), &result].concat())
    }

    fn lock(&self, header: &InHeader, wanted: &LkIn) -> io::Result<Vec<u8>> {
        if header.opcode == Opcode::Getlk as u32 {
            let lk = self.directory.get_lock(header.nodeid, wanted)?;
            return Ok(LkOut { lk }.as_slice().to_vec());
        }
        self.directory.set_lock(header.nodeid, wanted)?;
        Ok(Vec::new())
    }

    fn tmpfile(&self, header: &InHeader, args: CreateIn) -> io::Result<Vec<u8>> {
        let context = Context::from(header);
        let (entry, handle, options, _) = self.directory.temporary(&context, header.nodeid, args)?;
        let open = OpenOut { fh: handle.unwrap_or_default(), open_flags: options.bits(), passthrough: 0 };
        Ok([EntryOut::from(entry).as_slice(), open.as_slice()].concat())
    }
}

impl Drop for Requester {
    fn drop(&mut self) {
        // They hold the directory, and what the guest has locked there.
        self.stop_waiting();
    }
}

/// The lock that a request waits for, if it is a FUSE_SETLKW.
fn wanted_lock(chain: &Chain, memory: &Memory) -> Option<(InHeader, LkIn)> {
    let mut request = Reader::from_descriptor_chain(&**memory, chain.clone()).ok()?;
    let header: InHeader = request.read_obj().ok()?;
    (header.opcode == Opcode::Setlkw as u32).then_some((header, request.read_obj().ok()?))
}

fn is_lock(opcode: u32) -> bool {
    [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw].iter().any(|&lock| opcode == lock as u32)
}

fn is_again(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::AGAIN)
}

/// fuse-backend-rs decodes FUSE_SETUPMAPPING and FUSE_REMOVEMAPPING only where there is one of these. It
/// would be given the number of a file descriptor that it does not own; so [`Directory`] uses the window
/// itself.
struct HasWindow;

impl FsCacheReqHandler for HasWindow {
    fn map(&mut self, _: u64, _: u64, _: u64, _: u64, _: RawFd) -> io::Result<()> {
        Err(Errno::NOSYS.into())
    }

    fn unmap(&mut self, _: Vec<RemovemappingOne>) -> io::Result<()> {
        Err(Errno::NOSYS.into())
    }
}

/// Writes an answer. Returns its length.
fn reply(answer: &mut VirtioFsWriter, header: &InHeader, result: io::Result<Vec<u8>>) -> io::Result<usize> {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(e) => (-e.raw_os_error().unwrap_or(Errno::IO.raw_os_error()), Vec::new()),
    };
    let len = size_of::<OutHeader>() + body.len();
    let header =
        OutHeader { len: u32::try_from(len).map_err(io::Error::other)?, error, unique: header.unique };
    answer.write_all(&[header.as_slice(), &body].concat())?;
    Ok(len)
}

/// The group besides the process's own that a request to create a file names (FUSE_CREATE_SUPP_GROUP): that
/// of the directory, if the process is in it. It is in an extension behind the arguments: `struct
/// fuse_ext_header`, then `struct fuse_supp_groups`.
fn supplementary_group(header: &InHeader, mut request: Reader) -> Option<u32> {
    // `total_extlen`, in units of 8 bytes; `padding` also has what followed.
    let len = (header.padding as u16) as usize * 8;
    let at = request.available_bytes().checked_sub(len).filter(|_| len != 0)?;
    let [_, kind, count, group] = words(request.split_at(at).ok()?.read_obj::<[u8; 16]>().ok()?);
    (kind == FUSE_EXT_GROUPS && count == 1).then_some(group)
}

fn wants_no_answer(header: &InHeader) -> bool {
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt]
        .iter()
        .any(|&opcode| header.opcode == opcode as u32)
}

/// Little-endian numbers.
fn words(bytes: [u8; 16]) -> [u32; 4] {
    let word = |at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

fn malformed(_: io::Error) -> io::Error {
    Errno::INVAL.into()
}
