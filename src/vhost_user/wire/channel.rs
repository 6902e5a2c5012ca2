//! The back-end's requests, on the backend channel (vhost-user "Back-end message types"): SHMEM_MAP,
//! SHMEM_UNMAP and CONFIG_CHANGE_MSG. A [`Handler`] carries them out.
//!
//! A device's own thread serves the channel from the moment the back-end has its end (SHM-68), and no other
//! thread does: a call on a received descriptor can wait. At a reset that thread serves what is still queued
//! (SHM-71). Each well framed request is answered if it asks for it, however wrong it is (SHM-63); one that
//! is not well framed ends the channel (SHM-64).

use std::error::Error;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::connection::{Connection, ConnectionError, Deadline, Descriptors, Message};
use super::message::{BackendRequest, Header, Layout, MMap, protocol_features as protocol};
use super::negotiate::Agreement;
use super::observer::{Observer, Outcome, Request, Socket};

/// How long a back-end may leave a full socket of answers unread (SHM-66).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// Carries out a back-end's requests.
///
/// All methods are called on the thread that serves the channel, one request at a time. None may wait for the
/// same back-end (SHM-67).
pub trait Handler {
    /// Why a request is not carried out.
    type Error: Error + 'static;

    /// SHMEM_MAP; the flags are known ones. The guest can see the mapping when this returns (SHM-60). The
    /// handler closes the file, or keeps it.
    fn map(&self, request: &MMap, file: OwnedFd) -> Result<(), Self::Error>;

    /// SHMEM_UNMAP. No vCPU can reach the file when this returns (SHM-56).
    fn unmap(&self, request: &MMap) -> Result<(), Self::Error>;

    /// CONFIG_CHANGE_MSG: the configuration space is another one now.
    fn config_changed(&self);

    /// The errno value that the back-end is told (SHM-58): positive, never 0.
    fn errno(error: &Self::Error) -> i32;

    /// A request is refused with this errno, for this reason or by one of the methods above. For the log.
    fn refused(&self, request: fmt::Arguments<'_>, errno: i32, why: &dyn Error);
}

/// Why the channel cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The stream ended, or is out of step.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// SHM-64.
    #[error("the back-end sent a reply (to message {0}) on the backend channel, where only requests belong")]
    Reply(u32),
}

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
enum Refusal<E: Error + 'static> {
    /// SHM-63.
    #[error("its id is unknown")]
    Unknown,
    /// SHM-6.
    #[error("{0} was not negotiated")]
    NotNegotiated(&'static str),
    /// SHM-25.
    #[error("its payload has {0} bytes, not {len}", len = MMap::LEN)]
    Size(usize),
    /// SHM-27, SHM-54.
    #[error("{0} came with it")]
    Descriptors(&'static str),
    /// SHM-48.
    #[error("this process has no room for its file descriptor")]
    DescriptorLost,
    /// SHM-42.
    #[error("it has unknown flags ({0:#x})")]
    Flags(u64),
    /// SHM-71.
    #[error("the device is reset: mappings are refused until it is started again")]
    Stale,
    #[error(transparent)]
    Handler(E),
}

/// Our end of a backend channel.
pub struct Channel<H> {
    handler: H,
    observer: Option<Arc<dyn Observer>>,
    reply_ack: bool,
    shmem: bool,
    config: bool,
    /// To wait on without the lock.
    socket: Arc<UnixStream>,
    /// Only the thread that serves locks it. Lock order: before every lock of the handler's.
    inbox: Mutex<Inbox>,
}

struct Inbox {
    connection: Connection,
    /// Whether the message that is half here was begun before the device was last reset.
    stale: bool,
    /// SHM-64: after an error nothing more is served.
    ended: bool,
}

impl<H: Handler> Channel<H> {
    /// Serves `socket`, as agreed. `observer` sees all that passes there.
    pub fn new(
        agreement: &Agreement,
        socket: impl Into<Arc<UnixStream>>,
        handler: H,
        observer: Option<Arc<dyn Observer>>,
    ) -> Self {
        let connection = Connection::new(socket, MMap::LEN, Descriptors::One);
        Channel {
            handler,
            observer,
            reply_ack: agreement.has(protocol::REPLY_ACK),
            shmem: agreement.shmem,
            config: agreement.has(protocol::CONFIG),
            socket: Arc::clone(connection.socket()),
            inbox: Mutex::new(Inbox { connection, stale: false, ended: false }),
        }
    }

    /// The socket, to wait on and to shut down: then the back-end sees a hang-up, and an answer that waits
    /// for room is given up.
    pub fn socket(&self) -> &Arc<UnixStream> {
        &self.socket
    }

    /// Handles the next request, if all of it is there, and those that were read with it; never waits for
    /// more. Afterwards the socket tells when there is more. Reads at most once, so that a busy back-end
    /// cannot hold the lock.
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
    /// request of which only a part is here is refused when the rest comes (SHM-71). The caller has made the
    /// handler refuse SHMEM_MAP, so that none of it leaves a mapping behind.
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
        let message = match inbox.connection.try_receive() {
            Ok(Some(message)) => message,
            Ok(None) => return Ok(false),
            Err(error) => {
                // A hang-up between two messages is no noise.
                if let (Some(observer), false) = (&self.observer, inbox.connection.unread().is_empty()) {
                    observer.noise(Socket::Backend, inbox.connection.unread(), &error);
                }
                return Err(error.into());
            }
        };
        let stale = std::mem::take(&mut inbox.stale);
        let (request, needs_reply) = (message.header.request, message.header.needs_reply());
        if message.header.is_reply() {
            let error = ChannelError::Reply(request);
            if let Some(observer) = &self.observer {
                let bytes = [&message.header.encode(), &message.payload[..]].concat();
                observer.noise(Socket::Backend, &bytes, &error);
            }
            return Err(error);
        }
        let pending = self.observer.as_ref().map(|observer| {
            let (header, payload, files_lost) = (message.header, &message.payload[..], message.files_lost);
            let file = message.file.as_ref().map(AsFd::as_fd);
            let files = file.as_slice();
            observer.begins(Request { socket: Socket::Backend, header, payload, files, files_lost })
        });
        let result = if stale { Err(Refusal::Stale) } else { self.handle(message) };
        let errno = result.as_ref().map_or_else(errno::<H>, |()| 0);
        if let Err(refusal) = &result {
            match BackendRequest::from_id(request) {
                Some(known) => self.handler.refused(format_args!("{known}"), errno, refusal),
                None => self.handler.refused(format_args!("backend request {request}"), errno, refusal),
            }
        }
        // SHM-58: 0, or a negative errno as a u64.
        let answer = (needs_reply && self.reply_ack).then(|| (i64::from(-errno) as u64).encode());
        let sent = answer.as_deref().map_or(Ok(()), |answer| {
            let header = Header::reply(request, u64::LEN);
            inbox.connection.send(header, answer, &[], Deadline::after(ANSWER_TIMEOUT))
        });
        if let Some(pending) = pending {
            let unsent = sent.as_ref().err().map(|error| error as &(dyn Error + 'static));
            let refused = result.as_ref().err().map(|refusal| refusal as &(dyn Error + 'static));
            let answer = answer.as_deref().filter(|_| unsent.is_none());
            pending.ended(Outcome { answer, why: unsent.or(refused), errno, ..Outcome::default() });
        }
        sent?;
        Ok(true)
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message's descriptors are closed when this returns, whatever it returns (SHM-27, SHM-46): all but
    /// the one that the handler took.
    fn handle(&self, mut message: Message) -> Result<(), Refusal<H::Error>> {
        let request = BackendRequest::from_id(message.header.request).ok_or(Refusal::Unknown)?;
        let is_negotiated = match request {
            BackendRequest::ConfigChange => self.config,
            BackendRequest::ShmemMap | BackendRequest::ShmemUnmap => self.shmem,
            _ => false,
        };
        if !is_negotiated {
            return Err(Refusal::NotNegotiated(request.feature()));
        }
        if request == BackendRequest::ConfigChange {
            self.handler.config_changed();
            return Ok(());
        }
        let payload = MMap::decode(&message.payload).ok_or(Refusal::Size(message.payload.len()))?;
        let (file, lost) = (message.file.take(), message.files_lost);
        let handled = match (request == BackendRequest::ShmemMap, file) {
            (true, None) if lost => return Err(Refusal::DescriptorLost),
            (true, None) => return Err(Refusal::Descriptors("no file descriptor")),
            (true, Some(_)) if lost => {
                return Err(Refusal::Descriptors("more than one file descriptor"));
            }
            (true, Some(_)) if payload.flags & !MMap::READ_WRITE != 0 => {
                return Err(Refusal::Flags(payload.flags));
            }
            (true, Some(file)) => self.handler.map(&payload, file),
            (false, None) if !lost => self.handler.unmap(&payload),
            (false, _) => return Err(Refusal::Descriptors("a file descriptor")),
        };
        handled.map_err(Refusal::Handler)
    }
}

fn errno<H: Handler>(refusal: &Refusal<H::Error>) -> i32 {
    match refusal {
        Refusal::Unknown | Refusal::NotNegotiated(_) => libc::EOPNOTSUPP,
        Refusal::Size(_) => libc::EPROTO,
        Refusal::Descriptors(_) => libc::EBADF,
        Refusal::DescriptorLost => libc::EMFILE,
        Refusal::Flags(_) => libc::EINVAL,
        Refusal::Stale => libc::EBUSY,
        Refusal::Handler(error) => H::errno(error),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::io::Write;
    use std::net::Shutdown;
    use std::os::fd::AsFd;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    /// Nothing here comes as far as a handler.
    struct Nothing;

    impl Handler for Nothing {
        type Error = Infallible;

        fn map(&self, _: &MMap, _: OwnedFd) -> Result<(), Infallible> {
            Ok(())
        }

        fn unmap(&self, _: &MMap) -> Result<(), Infallible> {
            Ok(())
        }

        fn config_changed(&self) {}

        fn errno(error: &Infallible) -> i32 {
            match *error {}
        }

        fn refused(&self, _: fmt::Arguments<'_>, _: i32, _: &dyn Error) {}
    }

    fn channel() -> (Channel<Nothing>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Channel::new(&Agreement::default(), ours, Nothing, None), theirs)
    }

    fn is_readable(socket: impl AsFd) -> bool {
        poll(&mut [PollFd::new(&socket, PollFlags::IN)], Some(&Timespec::default())).unwrap() == 1
    }

    #[test]
    fn the_lock_is_free_between_reads_however_much_there_is() {
        // SHM-66: requests of 12 bytes, so that a read never ends with one. The lock is taken for a read at a
        // time.
        let (channel, mut theirs) = channel();
        theirs.write_all(&Header::request(50, 0, false).encode().repeat(1000)).unwrap();
        channel.serve().unwrap();
        assert!(is_readable(channel.socket()), "not all at once");
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
        assert!(!is_readable(channel.socket()) && !channel.lock().stale);
        theirs.write_all(&request[..5]).unwrap();
        channel.drain(Deadline::after(Duration::from_secs(20))).unwrap();
        assert!(!is_readable(channel.socket()) && channel.lock().stale);
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
        // SHM-66, SHM-71: else a back-end that keeps sending delays a reset until its deadline.
        let (channel, mut theirs) = channel();
        let requests = Header::request(50, 0, false).encode().repeat(1000);
        let mut sent = 0;
        theirs.set_nonblocking(true).unwrap();
        while let Ok(count) = theirs.write(&requests[sent % Header::LEN..]) {
            sent += count;
        }
        theirs.set_nonblocking(false).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                // From where it was cut off.
                let _ = theirs.write_all(&requests[sent % Header::LEN..]);
                while theirs.write_all(&requests).is_ok() {}
            });
            channel.drain(Deadline::after(Duration::from_secs(20))).unwrap();
            channel.socket().shutdown(Shutdown::Both).unwrap();
        });
        let position = channel.lock().connection.position() as usize;
        assert!((sent..sent + Header::LEN).contains(&position), "{position} of {sent}");
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
            channel.socket().shutdown(Shutdown::Both).unwrap();
            let ended = served.join().unwrap();
            assert!(matches!(ended, Err(ChannelError::Connection(ConnectionError::HungUp))));
        });
    }
}
