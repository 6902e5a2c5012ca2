//! The back-end's requests, on the backend channel (vhost-user "Back-end message types"): SHMEM_MAP and
//! SHMEM_UNMAP.
//!
//! A device's own thread ([`super::watch`]) serves the channel from the moment the back-end has its end
//! (SHM-68). At a reset the vCPU thread serves what is still queued (SHM-71). Each well framed request is
//! answered if it asks for it, however wrong it is (SHM-63); what is not well framed ends the channel
//! (SHM-64).

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::connection::{Connection, ConnectionError, Deadline, Message};
use super::message::{BackendRequest, Header, MMAP_LEN, MMap, U64_LEN, protocol_features as protocol};
use super::negotiate::Agreement;
use super::sharing::Member;
use crate::memory::Access;
use crate::memory::shmem::{MapRequest, SharedMemory, ShmemError};
use crate::report::{MisuseLog, with_causes};

/// How long a back-end may leave a full socket of answers unread (SHM-66).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the channel cannot go on.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The stream ended, or is out of step.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// SHM-64: the back-end answered a question that nobody asked.
    #[error("the back-end sent a reply (to message {0}) on the backend channel, where only requests belong")]
    Reply(u32),
}

/// Why a request is refused.
#[derive(Debug, Error)]
enum Refusal {
    /// SHM-63.
    #[error("its id is unknown")]
    Unknown,
    /// SHM-6.
    #[error("SHMEM was not negotiated")]
    NotNegotiated,
    /// SHM-25.
    #[error("its payload has {0} bytes, not {MMAP_LEN}")]
    Size(usize),
    /// SHM-27, SHM-54.
    #[error("{got} file descriptors came with it, not {expected}")]
    Descriptors { got: usize, expected: usize },
    /// SHM-48.
    #[error("this process has no room for its file descriptor")]
    DescriptorLost,
    /// SHM-42.
    #[error("it has unknown flags ({0:#x})")]
    Flags(u64),
    #[error(transparent)]
    Shmem(#[from] ShmemError),
}

impl Refusal {
    fn errno(&self) -> i32 {
        match self {
            Refusal::Unknown | Refusal::NotNegotiated => libc::EOPNOTSUPP,
            Refusal::Size(_) => libc::EPROTO,
            Refusal::Descriptors { .. } => libc::EBADF,
            Refusal::DescriptorLost => libc::EMFILE,
            Refusal::Flags(_) => libc::EINVAL,
            Refusal::Shmem(error) => error.errno(),
        }
    }
}

/// Our end of a backend channel.
pub struct BackendChannel {
    log: MisuseLog,
    reply_ack: bool,
    shmem: Option<Arc<SharedMemory>>,
    /// To show other back-ends what is mapped (SHM-80).
    sharing: Option<Member>,
    /// A copy of the socket, to wait on and to end it without the lock.
    socket: UnixStream,
    /// Lock order: before `SharedMemory`'s and `Sharing`'s. Held while requests are handled, which waits for
    /// no answer of the back-end; for room in its socket no longer than [`ANSWER_TIMEOUT`]. With
    /// `share-shmem=on` it is held while other back-ends are told, too: a reset, which drains the channel,
    /// finds each mapping shared or not begun, and a range is not mapped again before all have let go of it.
    /// `sharing` says why that wait ends.
    inbox: Mutex<Inbox>,
}

struct Inbox {
    connection: Connection,
    /// Whether the message that is half here was begun before the device was last reset.
    stale: bool,
    /// SHM-64: nothing that comes after what ended the channel is served, by whoever looks next.
    ended: bool,
}

impl BackendChannel {
    /// Serves `socket` for the device `name`; `shmem` is where mappings go, `sharing` who shows them to
    /// others.
    pub fn new(
        name: &str,
        agreement: &Agreement,
        socket: UnixStream,
        shmem: Arc<SharedMemory>,
        sharing: Option<Member>,
    ) -> io::Result<Self> {
        Ok(BackendChannel {
            log: MisuseLog::new(name),
            reply_ack: agreement.has(protocol::REPLY_ACK),
            shmem: agreement.has_shmem().then_some(shmem),
            sharing,
            socket: socket.try_clone()?,
            inbox: Mutex::new(Inbox {
                connection: Connection::new(socket, MMAP_LEN),
                stale: false,
                ended: false,
            }),
        })
    }

    /// Handles the next request, if all of it is there, and those that were read with it; never waits for
    /// more. Afterwards the socket tells when there is more. A back-end that never pauses keeps nobody from
    /// the lock.
    pub fn serve(&self) -> Result<(), ChannelError> {
        let mut inbox = self.lock();
        while self.serve_one(&mut inbox)? && inbox.connection.has_message() {}
        Ok(())
    }

    /// Handles the next request, if all of it is there; never waits for it. Tells whether it was: others may
    /// have been read with it, of which the socket does not tell.
    pub fn serve_request(&self) -> Result<bool, ChannelError> {
        self.serve_one(&mut self.lock())
    }

    /// Handles all that is queued now, as far as `deadline` allows, and not what a back-end adds meanwhile. A
    /// request of which only a part is here is refused when the rest comes (SHM-71). The gate of the shared
    /// memory is closed, so none of it leaves a mapping behind.
    pub fn drain(&self, deadline: Deadline) -> Result<(), ChannelError> {
        let mut inbox = self.lock();
        let end = inbox.connection.end_of_queue()?;
        while inbox.connection.position() < end && !deadline.has_passed() && self.serve_one(&mut inbox)? {}
        inbox.stale = inbox.connection.position() < end;
        Ok(())
    }

    /// Handles the next request. False where there is none, or not all of it.
    fn serve_one(&self, inbox: &mut Inbox) -> Result<bool, ChannelError> {
        if inbox.ended {
            return Err(ConnectionError::HungUp.into());
        }
        let served = self.serve_next(inbox);
        inbox.ended = served.is_err();
        served
    }

    fn serve_next(&self, inbox: &mut Inbox) -> Result<bool, ChannelError> {
        let Some(message) = inbox.connection.try_receive()? else {
            return Ok(false);
        };
        let stale = std::mem::take(&mut inbox.stale);
        let (request, needs_reply) = (message.header.request, message.header.needs_reply());
        if message.header.is_reply() {
            return Err(ChannelError::Reply(request));
        }
        let result = if stale { Err(ShmemError::GateClosed.into()) } else { self.handle(message) };
        if let Err(refusal) = &result {
            self.say_refused(request, refusal);
        }
        if needs_reply && self.reply_ack {
            // SHM-58: 0, or a negative errno as a u64.
            let value = result.map_or_else(|refusal| i64::from(-refusal.errno()) as u64, |()| 0);
            let header = Header::reply(request, U64_LEN);
            inbox.connection.send(header, &value.to_ne_bytes(), &[], Deadline::after(ANSWER_TIMEOUT))?;
        }
        Ok(true)
    }

    /// Ends the channel: the back-end sees a hang-up, and an answer that waits for room is given up.
    pub fn shut_down(&self) {
        // It fails only where the peer was faster.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its descriptors are closed when this returns, whatever it returns (SHM-27, SHM-46): all but the one of
    /// a file that is shared.
    fn handle(&self, message: Message) -> Result<(), Refusal> {
        match BackendRequest::from_id(message.header.request) {
            Some(BackendRequest::ShmemMap) => self.map(message),
            Some(BackendRequest::ShmemUnmap) => self.unmap(message),
            None => Err(Refusal::Unknown),
        }
    }

    fn map(&self, mut message: Message) -> Result<(), Refusal> {
        let (shmem, request) = self.shmem_request(&message)?;
        if message.fds_lost {
            return Err(Refusal::DescriptorLost);
        }
        let [file] = message.fds.as_slice() else {
            return Err(Refusal::Descriptors { got: message.fds.len(), expected: 1 });
        };
        let access = match request.flags {
            0 => Access::ReadOnly,
            MMap::READ_WRITE => Access::ReadWrite,
            flags => return Err(Refusal::Flags(flags)),
        };
        shmem.map(&MapRequest {
            shmid: request.shmid,
            shm_offset: request.shm_offset,
            len: request.len,
            file: file.as_fd(),
            file_offset: request.fd_offset,
            access,
        })?;
        // After the guest's mapping, and before the answer: the guest hands no page to a device that does not
        // know it.
        if let (Some(sharing), Some(file)) = (&self.sharing, message.fds.pop())
            && let Some((mapping, host)) = shmem.mapping(request.shmid, request.shm_offset)
        {
            sharing.share(&mapping, host, file);
        }
        Ok(())
    }

    fn unmap(&self, message: Message) -> Result<(), Refusal> {
        let (shmem, request) = self.shmem_request(&message)?;
        if !message.fds.is_empty() || message.fds_lost {
            return Err(Refusal::Descriptors { got: message.fds.len().max(1), expected: 0 });
        }
        shmem.unmap(request.shmid, request.shm_offset, request.len)?;
        if let (Some(sharing), Some(region)) = (&self.sharing, shmem.region(request.shmid)) {
            sharing.withdraw(region.start() + request.shm_offset);
        }
        Ok(())
    }

    fn shmem_request(&self, message: &Message) -> Result<(&SharedMemory, MMap), Refusal> {
        let shmem = self.shmem.as_ref().ok_or(Refusal::NotNegotiated)?;
        let request = MMap::decode(&message.payload).ok_or(Refusal::Size(message.payload.len()))?;
        Ok((shmem, request))
    }

    fn say_refused(&self, request: u32, refusal: &Refusal) {
        let why = with_causes(refusal);
        match BackendRequest::from_id(request) {
            Some(known) => self.log.warn(format_args!("{known} is refused: {why}")),
            None => self.log.warn(format_args!("backend request {request} is refused: {why}")),
        }
    }
}

/// To wait on.
impl AsFd for BackendChannel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::super::message::HEADER_LEN;
    use super::*;
    use crate::memory::alloc::WindowAllocator;
    use crate::memory::{GuestMapper, GuestRange, SlotId};

    /// A machine that nothing is mapped in.
    struct NoGuest;

    impl GuestMapper for NoGuest {
        unsafe fn map(&self, _: GuestRange, _: *mut u8, _: Access) -> io::Result<SlotId> {
            Err(io::Error::from_raw_os_error(libc::ENOSPC))
        }

        fn unmap(&self, _: SlotId) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }

    fn channel() -> (BackendChannel, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut windows = WindowAllocator::new(1 << 32, 1 << 40);
        let shmem = SharedMemory::new([], &mut windows, Arc::new(NoGuest), 1).unwrap();
        let agreement = Agreement::default();
        (BackendChannel::new("test", &agreement, ours, Arc::new(shmem), None).unwrap(), theirs)
    }

    fn is_readable(socket: impl AsFd) -> bool {
        let mut poll = libc::pollfd {
            fd: std::os::fd::AsRawFd::as_raw_fd(&socket.as_fd()),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, on our stack.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    #[test]
    fn the_lock_is_free_between_reads_however_much_there_is() {
        // SHM-66: requests of 12 bytes, so that a read never ends with one. The lock is taken for a read at a
        // time.
        let (channel, mut theirs) = channel();
        theirs.write_all(&Header::request(50, 0, false).encode().repeat(1000)).unwrap();
        channel.serve().unwrap();
        assert!(is_readable(&channel), "not all at once");
        for _ in 0..1000 {
            channel.serve().unwrap();
        }
        let inbox = channel.lock();
        assert_eq!(inbox.connection.position(), 12_000);
        assert_eq!(inbox.connection.end_of_queue().unwrap(), 12_000);
    }

    #[test]
    fn a_drain_takes_everything_and_remembers_what_was_begun() {
        // SHM-71
        let (channel, mut theirs) = channel();
        let request = Header::request(50, 0, false).encode();
        theirs.write_all(&request.repeat(1000)).unwrap();
        channel.drain(Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(!is_readable(&channel) && !channel.lock().stale);
        theirs.write_all(&request[..5]).unwrap();
        channel.drain(Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(!is_readable(&channel) && channel.lock().stale);
        theirs.write_all(&request[5..]).unwrap();
        channel.serve().unwrap();
        assert!(!channel.lock().stale);
    }

    #[test]
    fn nothing_is_served_after_what_ended_the_channel() {
        // SHM-64: whether the device's thread finds it or a reset.
        let (mut channel, mut theirs) = channel();
        channel.reply_ack = true;
        let (reply, request) = (Header::reply(50, 0), Header::request(50, 0, true));
        theirs.write_all(&[reply.encode(), request.encode()].concat()).unwrap();
        let drain = || channel.drain(Deadline::after(Duration::from_secs(20)));
        assert!(matches!(drain(), Err(ChannelError::Reply(50))));
        for ended in [drain(), channel.serve()] {
            assert!(matches!(ended, Err(ChannelError::Connection(ConnectionError::HungUp))));
        }
        assert!(!is_readable(&theirs), "an answer");
    }

    #[test]
    fn a_drain_ends_where_the_queue_did_when_it_began() {
        // SHM-66, SHM-71: or whoever sends all the time keeps a reset waiting until its deadline.
        let (channel, mut theirs) = channel();
        let requests = Header::request(50, 0, false).encode().repeat(1000);
        let mut sent = 0;
        theirs.set_nonblocking(true).unwrap();
        while let Ok(count) = theirs.write(&requests[sent % HEADER_LEN..]) {
            sent += count;
        }
        theirs.set_nonblocking(false).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // From where it was cut off.
                let _ = theirs.write_all(&requests[sent % HEADER_LEN..]);
                while theirs.write_all(&requests).is_ok() {}
            });
            channel.drain(Deadline::after(Duration::from_secs(20))).unwrap();
            channel.shut_down();
        });
        let position = channel.lock().connection.position() as usize;
        assert!((sent..sent + HEADER_LEN).contains(&position), "{position} of {sent}");
    }

    #[test]
    fn who_waits_for_room_is_woken_when_the_channel_is_shut_down() {
        // SHM-66
        let (mut channel, mut theirs) = channel();
        channel.reply_ack = true;
        theirs.write_all(&Header::request(50, 0, true).encode().repeat(5000)).unwrap();
        let channel = &channel;
        std::thread::scope(|scope| {
            let served = scope.spawn(move || channel.drain(Deadline::after(Duration::from_secs(20))));
            let patience = Deadline::after(Duration::from_secs(20));
            while !is_readable(&theirs) && !patience.has_passed() {
                std::thread::yield_now();
            }
            channel.shut_down();
            let ended = served.join().unwrap();
            assert!(matches!(ended, Err(ChannelError::Connection(ConnectionError::HungUp))));
        });
    }
}
