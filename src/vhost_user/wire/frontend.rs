//! Our requests on the main socket (vhost-user "Front-end message types"): the handshake, then starting and
//! stopping rings. Every wait has a deadline.
//!
//! [`Frontend::agree`] negotiates, and `connect` then asks what the back-end is. Each [`Conversation`] is a
//! few requests with one deadline, made by one thread at a time.

use std::error::Error;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK,
};

use super::connection::{Connection, ConnectionError, Deadline, Descriptors, Message};
use super::message::{
    self, ConfigHeader, F_PROTOCOL_FEATURES, FrontendRequest, Header, Inflight, Layout, MemoryRegion,
    ShmemConfig, SingleRegion, VringAddr, VringState, protocol_features as protocol,
};
use super::negotiate::{Agreement, Needs, NegotiationError, negotiate};
use super::observer::{Observer, Outcome, Pending, Request, Socket};

/// How long a back-end may take to answer a request of the set-up.
const SETUP_REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a request did not succeed.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum FrontendError {
    /// The stream broke, or the back-end is silent.
    #[error("{request} failed")]
    Connection { request: FrontendRequest, source: ConnectionError },
    /// SHM-12.
    #[error("the back-end answered {request} with {got} instead of {expected}")]
    WrongReply { request: FrontendRequest, got: String, expected: String },
    /// SHM-12.
    #[error("the back-end answered {request} with {got}: its answers are out of step")]
    OutOfStep { request: FrontendRequest, got: String },
    #[error("the back-end refused {request} (it answered {value:#x})")]
    Refused { request: FrontendRequest, value: u64 },
    /// SHM-90. Before the guest ran the back-end took `took`.
    #[error(
        "the back-end refuses SET_VRING_NUM of {size} entries for queue {index}, which the driver chose; before the guest \
         ran it took {took}: queue-size=N sets what the driver may choose"
    )]
    QueueSize { index: u16, size: u16, took: u16 },
    /// SHM-100.
    #[error(
        "the back-end does not keep FEATURES_OK (GET_STATUS says {status:#x}): it does not take the features {features:#x}"
    )]
    Features { features: u64, status: u64 },
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// SHM-14.
    #[error("the back-end announces {announced} shared memory regions, but {counted} have a size")]
    RegionCount { announced: u32, counted: usize },
}

impl FrontendError {
    /// The request that did not succeed, where there was one.
    pub fn request(&self) -> Option<FrontendRequest> {
        match *self {
            FrontendError::Connection { request, .. }
            | FrontendError::WrongReply { request, .. }
            | FrontendError::OutOfStep { request, .. }
            | FrontendError::Refused { request, .. } => Some(request),
            FrontendError::QueueSize { .. } => Some(FrontendRequest::SetVringNum),
            FrontendError::Features { .. } => Some(FrontendRequest::GetStatus),
            FrontendError::Negotiation(_) | FrontendError::RegionCount { .. } => None,
        }
    }

    /// Whether the connection is of no use any more: the stream is broken, out of step, or the back-end is
    /// silent.
    pub fn is_fatal(&self) -> bool {
        use FrontendError::{Connection, OutOfStep, WrongReply};
        matches!(self, Connection { .. } | WrongReply { .. } | OutOfStep { .. })
    }

    /// Whether the back-end hung up.
    pub fn is_hang_up(&self) -> bool {
        matches!(self, FrontendError::Connection { source, .. } if source.is_hang_up())
    }

    /// Whether the back-end hung up or is silent, instead of an answer.
    pub fn is_unanswered(&self) -> bool {
        let is_silence = |source: &ConnectionError| matches!(source, ConnectionError::TimedOut(_));
        let silent = matches!(self, FrontendError::Connection { source, .. } if is_silence(source));
        silent || self.is_hang_up()
    }
}

/// A connected back-end that we agreed with.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    /// What was agreed.
    pub agreement: Agreement,
    observer: Option<Arc<dyn Observer>>,
}

/// What a back-end does with a queue size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueSize {
    /// It takes it, as far as it says.
    Taken,
    /// It refused.
    Refused,
    /// It refused, and hung up.
    HungUp,
}

/// One ring as the driver set it up. Addresses are in the space of [`MemoryRegion::user_addr`].
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct Ring<'a> {
    pub index: u16,
    pub size: u16,
    /// The size that the back-end took before the guest ran.
    pub took: u16,
    /// The entry of the available ring that the back-end is to look at first.
    pub base: u16,
    pub descriptor_table: u64,
    pub available_ring: u64,
    pub used_ring: u64,
    /// Signalled for an available buffer.
    pub kick: BorrowedFd<'a>,
    /// The back-end signals it for a used buffer.
    pub call: BorrowedFd<'a>,
    /// The back-end signals it for a ring that makes no sense to it.
    pub error: BorrowedFd<'a>,
}

impl Frontend {
    /// Agrees on features with the back-end behind a connected socket. `observer` sees all that passes there.
    pub fn agree(
        socket: UnixStream,
        needs: &Needs,
        observer: Option<Arc<dyn Observer>>,
    ) -> Result<Frontend, FrontendError> {
        let connection = Connection::new(socket, u64::LEN, Descriptors::None);
        let mut frontend = Frontend { connection, agreement: Agreement::default(), observer };
        frontend.agreement = frontend.set_up().negotiate(needs)?;
        Ok(frontend)
    }

    /// The main socket, to wait on and to shut down.
    pub fn socket(&self) -> &Arc<UnixStream> {
        self.connection.socket()
    }

    /// Begins to talk to the back-end; all of it ends at the deadline.
    pub fn converse(&mut self, deadline: Deadline) -> Conversation<'_> {
        let Frontend { connection, agreement, observer } = self;
        Conversation { connection, agreement, observer: observer.as_deref(), deadline }
    }

    /// Begins a part of the set-up, which takes a few seconds at most.
    pub fn set_up(&mut self) -> Conversation<'_> {
        self.converse(Deadline::after(SETUP_REPLY_TIMEOUT))
    }

    /// Asks how large the buffer is. The back-end's own, which comes with the answer, is not used: a driver's
    /// start needs an empty one. The answer is the only one on the main socket that has a descriptor
    /// (SHM-84), so no vCPU asks.
    pub fn inflight_size(&mut self, num_queues: u16, queue_size: u16) -> Result<u64, FrontendError> {
        let asked = Inflight { mmap_size: 0, mmap_offset: 0, num_queues, queue_size, padding: 0 };
        self.connection.allow(Descriptors::One);
        let answer: Inflight = self.set_up().ask(FrontendRequest::GetInflightFd, &asked.encode())?;
        self.connection.allow(Descriptors::None);
        Ok(answer.mmap_size)
    }

    /// Gives the back-end its end of the backend channel (SHM-7). The other end must be served already: the
    /// back-end may send requests before it answers this one (SHM-67). The caller closes its copy, so that
    /// the back-end's death is seen (SHM-8).
    pub fn set_backend_channel(&mut self, theirs: BorrowedFd<'_>) -> Result<(), FrontendError> {
        self.set_up().tell(FrontendRequest::SetBackendReqFd, &[], &[theirs])
    }
}

/// Requests with one deadline.
pub struct Conversation<'a> {
    connection: &'a mut Connection,
    agreement: &'a Agreement,
    observer: Option<&'a dyn Observer>,
    deadline: Deadline,
}

impl Conversation<'_> {
    fn negotiate(&mut self, needs: &Needs) -> Result<Agreement, FrontendError> {
        self.tell(FrontendRequest::SetOwner, &[], &[])?;
        let features = self.ask(FrontendRequest::GetFeatures, &[])?;
        let offered = match features & F_PROTOCOL_FEATURES {
            0 => 0,
            _ => self.ask(FrontendRequest::GetProtocolFeatures, &[])?,
        };
        let agreement = negotiate(features, offered, needs)?;
        if let Some(acked) = agreement.protocol_features {
            // Before the agreement holds: a back-end need not know NEED_REPLY yet.
            self.tell(FrontendRequest::SetProtocolFeatures, &acked.encode(), &[])?;
        }
        Ok(agreement)
    }

    /// What the back-end says of the number of its queues; `None` where it must not be asked.
    pub fn queue_count(&mut self) -> Result<Option<u64>, FrontendError> {
        let has_count = self.agreement.has(protocol::MQ);
        has_count.then(|| self.ask(FrontendRequest::GetQueueNum, &[])).transpose()
    }

    /// Tries the size of a queue before the guest runs (SHM-90).
    ///
    /// GET_FEATURES goes behind SET_VRING_NUM, and its answer shows that the back-end has handled both. So a
    /// back-end that hangs up is noticed at once, and one that leaves NEED_REPLY unanswered before
    /// SET_FEATURES, as old versions of the `vhost` crate do, is not waited for.
    pub fn try_queue_size(&mut self, index: u16, size: u16) -> Result<QueueSize, FrontendError> {
        let (request, fence) = (FrontendRequest::SetVringNum, FrontendRequest::GetFeatures);
        let ring = VringState { index: index.into(), value: size.into() }.encode();
        let mut tried = QueueSize::Taken;
        let mut attempt = || -> Result<(), FrontendError> {
            let sized = self.send(request, &ring, &[], self.agreement.has(protocol::REPLY_ACK))?;
            let asked = self.send(fence, &[], &[], false)?;
            let (sized, answer) = self.receive(sized)?;
            let (asked, answer) = if answer.header.request == fence as u32 {
                sized.ended(Outcome::default());
                (asked, answer)
            } else {
                match sized.take(answer, |reply| acknowledged(request, reply)) {
                    Err(FrontendError::Refused { .. }) => tried = QueueSize::Refused,
                    answered => answered?,
                }
                self.receive(asked)?
            };
            let _features: u64 = asked.take(answer, |reply| decode(fence, reply))?;
            Ok(())
        };
        match attempt() {
            Ok(()) => Ok(tried),
            Err(error) if error.is_hang_up() => Ok(QueueSize::HungUp),
            Err(error) => Err(error),
        }
    }

    /// SHM-10 to SHM-14.
    pub fn region_sizes(&mut self) -> Result<Vec<u64>, FrontendError> {
        let request = FrontendRequest::GetShmemConfig;
        self.exchange(request, &[], |reply| {
            let ShmemConfig { nregions, sizes, .. } = decode(request, reply)?;
            let counted = sizes.iter().filter(|&&size| size > 0).count();
            if counted as u64 != u64::from(nregions) {
                return Err(FrontendError::RegionCount { announced: nregions, counted });
            }
            Ok(sizes.to_vec())
        })
    }

    /// The first `len` bytes of the configuration space; fewer where the back-end answers with fewer, none
    /// where it refuses.
    pub fn config(&mut self, len: usize) -> Result<Vec<u8>, FrontendError> {
        let request = FrontendRequest::GetConfig;
        self.exchange(request, &message::config(0, &vec![0; len]), |mut reply| {
            if reply.is_empty() {
                // libvhost-user's refusal.
                return Ok(Vec::new());
            }
            let size = reply.len();
            match ConfigHeader::take(&mut reply) {
                Some(ConfigHeader { size: given, .. }) if reply.len() <= len => {
                    Ok(reply[..reply.len().min(given as usize)].to_vec())
                }
                _ => Err(wrong_size(request, size, ConfigHeader::LEN + len)),
            }
        })
    }

    /// How many ranges of memory the back-end can be told of in all, RAM among them.
    pub fn memory_slots(&mut self) -> Result<u64, FrontendError> {
        self.ask(FrontendRequest::GetMaxMemSlots, &[])
    }

    /// Tells the back-end the features that the driver accepted.
    pub fn set_features(&mut self, accepted: u64) -> Result<(), FrontendError> {
        let features = self.agreement.features_for_backend(accepted);
        self.tell(FrontendRequest::SetFeatures, &features.encode(), &[])
    }

    /// Tells the back-end that the driver sets FEATURES_OK, and looks whether it keeps that (SHM-100). STATUS
    /// was agreed on.
    pub fn keep_features_ok(&mut self, features: u64) -> Result<(), FrontendError> {
        self.set_status(STATUS_FEATURES_OK)?;
        let status: u64 = self.ask(FrontendRequest::GetStatus, &[])?;
        match status & u64::from(STATUS_FEATURES_OK) == u64::from(STATUS_FEATURES_OK) {
            true => Ok(()),
            false => Err(FrontendError::Features { features, status }),
        }
    }

    /// Tells the back-end the memory, regions of one file.
    pub fn set_memory(
        &mut self,
        regions: &[MemoryRegion],
        file: BorrowedFd<'_>,
    ) -> Result<(), FrontendError> {
        let files = vec![file; regions.len()];
        self.tell(FrontendRequest::SetMemTable, &message::memory_table(regions), &files)
    }

    /// ADD_MEM_REG of a range of memory, in `file`: the back-end knows it when this returns. Without `file`,
    /// REM_MEM_REG of a range, given as it was added: the back-end has let go of it when this returns.
    pub fn change_memory(
        &mut self,
        &region: &MemoryRegion,
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrontendError> {
        let request = if file.is_some() { FrontendRequest::AddMemReg } else { FrontendRequest::RemMemReg };
        self.tell(request, &SingleRegion { padding: 0, region }.encode(), file.as_slice())?;
        if self.agreement.has(protocol::REPLY_ACK) {
            return Ok(());
        }
        // Requests are handled in order: once this one is answered, the one above was handled.
        self.memory_slots().map(drop)
    }

    /// Gives the back-end the buffer, `mmap_size` bytes of this file, for queues of `queue_size` entries.
    pub fn set_inflight(
        &mut self,
        file: BorrowedFd<'_>,
        mmap_size: u64,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(), FrontendError> {
        let buffer = Inflight { mmap_size, mmap_offset: 0, num_queues, queue_size, padding: 0 };
        self.tell(FrontendRequest::SetInflightFd, &buffer.encode(), &[file])
    }

    /// Waits until the back-end runs the rings that it was told to start. Without REPLY_ACK it may still have
    /// that before it, and some back-ends then throw the driver's first kick away.
    pub fn wait_until_started(&mut self) -> Result<(), FrontendError> {
        match self.agreement.has(protocol::REPLY_ACK) {
            true => Ok(()),
            false => self.wait_until_handled(),
        }
    }

    /// Waits until the back-end has handled all that it was told: requests are handled in order.
    pub fn wait_until_handled(&mut self) -> Result<(), FrontendError> {
        self.ask::<u64>(FrontendRequest::GetFeatures, &[]).map(drop)
    }

    /// Starts a ring.
    pub fn start_ring(&mut self, ring: &Ring<'_>) -> Result<(), FrontendError> {
        let &Ring { size, took, base, descriptor_table, available_ring, used_ring, .. } = ring;
        let index = u32::from(ring.index);
        let state = |value| VringState { index, value }.encode();
        let addresses = VringAddr { index, flags: 0, descriptor_table, used_ring, available_ring, log: 0 };
        let event = u64::from(ring.index).encode();
        self.tell(FrontendRequest::SetVringNum, &state(size.into()), &[]).map_err(|error| match error {
            FrontendError::Refused { .. } => FrontendError::QueueSize { index: ring.index, size, took },
            error => error,
        })?;
        self.tell(FrontendRequest::SetVringBase, &state(base.into()), &[])?;
        self.tell(FrontendRequest::SetVringAddr, &addresses.encode(), &[])?;
        self.tell(FrontendRequest::SetVringCall, &event, &[ring.call])?;
        self.tell(FrontendRequest::SetVringErr, &event, &[ring.error])?;
        self.tell(FrontendRequest::SetVringKick, &event, &[ring.kick])?;
        if self.agreement.protocol_features.is_some() {
            self.tell(FrontendRequest::SetVringEnable, &state(1), &[])?;
        }
        Ok(())
    }

    /// Stops a ring: the back-end no longer uses it when this returns.
    pub fn stop_ring(&mut self, index: u16) -> Result<(), FrontendError> {
        let ring = VringState { index: index.into(), value: 0 };
        let _stopped_at: VringState = self.ask(FrontendRequest::GetVringBase, &ring.encode())?;
        Ok(())
    }

    /// Tells the back-end that the driver has started the device, where that was agreed on (SHM-70).
    pub fn set_running(&mut self) -> Result<(), FrontendError> {
        self.set_status(STATUS_RUNNING)
    }

    fn set_status(&mut self, status: u8) -> Result<(), FrontendError> {
        match self.agreement.has(protocol::STATUS) {
            true => self.tell(FrontendRequest::SetStatus, &u64::from(status).encode(), &[]),
            false => Ok(()),
        }
    }

    /// Tells the back-end that the device is reset, in the way or ways that were agreed on (SHM-70).
    pub fn reset_device(&mut self) -> Result<(), FrontendError> {
        let reset = match self.agreement.has(protocol::RESET_DEVICE) {
            true => self.tell(FrontendRequest::ResetDevice, &[], &[]),
            false => Ok(()),
        };
        if reset.as_ref().is_err_and(FrontendError::is_fatal) {
            return reset;
        }
        self.set_status(0)?;
        reset
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), FrontendError> {
        self.tell(FrontendRequest::SetConfig, &message::config(offset, data), &[])
    }

    /// Sends a request that by itself has no reply. Where REPLY_ACK was agreed on, asks for one and waits for
    /// it.
    fn tell(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontendError> {
        let need_reply = self.agreement.has(protocol::REPLY_ACK);
        let sent = self.send(request, payload, fds, need_reply)?;
        if !need_reply {
            sent.ended(Outcome::default());
            return Ok(());
        }
        let (sent, answer) = self.receive(sent)?;
        sent.take(answer, |reply| acknowledged(request, reply))
    }

    /// Sends a request that has a reply of a fixed layout.
    fn ask<T: Layout>(&mut self, request: FrontendRequest, payload: &[u8]) -> Result<T, FrontendError> {
        self.exchange(request, payload, |reply| decode(request, reply))
    }

    /// Sends a request that has a reply of any size, of which `take` makes something (SHM-12).
    fn exchange<T>(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        take: impl FnOnce(&[u8]) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        let sent = self.send(request, payload, &[], false)?;
        let (sent, answer) = self.receive(sent)?;
        sent.take(answer, take)
    }

    fn send(
        &self,
        request: FrontendRequest,
        payload: &[u8],
        files: &[BorrowedFd<'_>],
        need_reply: bool,
    ) -> Result<Sent, FrontendError> {
        let header = Header::request(request as u32, payload.len(), need_reply);
        let seen = Request { socket: Socket::Main, header, payload, files, files_lost: false };
        let sent = Sent { request, pending: self.observer.map(|observer| observer.begins(seen)) };
        match self.connection.send(header, payload, files, self.deadline) {
            Ok(()) => Ok(sent),
            Err(source) => Err(sent.failed(source, &[])),
        }
    }

    /// Waits for what may be the answer.
    fn receive(&mut self, sent: Sent) -> Result<(Sent, Message), FrontendError> {
        match self.connection.receive(self.deadline) {
            Ok(message) => Ok((sent, message)),
            Err(source) => Err(sent.failed(source, self.connection.unread())),
        }
    }
}

/// A request that was sent.
struct Sent {
    request: FrontendRequest,
    /// Where there is an observer that was not told of the end yet.
    pending: Option<Box<dyn Pending>>,
}

/// For the observer: another request of the conversation failed, and its record has the reason.
#[derive(Debug, Error)]
#[error("its answer is not waited for any more")]
struct Unfinished;

impl Drop for Sent {
    fn drop(&mut self) {
        if let Some(pending) = self.pending.take() {
            pending.ended(Outcome { why: Some(&Unfinished), ..Outcome::default() });
        }
    }
}

impl Sent {
    fn ended(mut self, outcome: Outcome<'_>) {
        if let Some(pending) = self.pending.take() {
            pending.ended(outcome);
        }
    }

    /// The socket failed; `noise` is what came of the answer.
    fn failed(self, source: ConnectionError, noise: &[u8]) -> FrontendError {
        let error = FrontendError::Connection { request: self.request, source };
        self.ended(Outcome { why: Some(&error), noise, ..Outcome::default() });
        error
    }

    /// Makes something of what came, if it is the answer.
    fn take<T>(
        self,
        message: Message,
        take: impl FnOnce(&[u8]) -> Result<T, FrontendError>,
    ) -> Result<T, FrontendError> {
        let is_answer = check_answer(self.request, message.header);
        let (answer, noise) = match &is_answer {
            Ok(()) => (Some(&message.payload[..]), Vec::new()),
            Err(_) => (None, [&message.header.encode(), &message.payload[..]].concat()),
        };
        let taken = is_answer.and_then(|()| take(&message.payload));
        let file = message.file.as_ref().map(AsFd::as_fd);
        let why = taken.as_ref().err().map(|error| error as &(dyn Error + 'static));
        self.ended(Outcome { answer, file, why, errno: 0, noise: &noise });
        taken
    }
}

/// Whether it is the reply to a request.
fn check_answer(request: FrontendRequest, header: Header) -> Result<(), FrontendError> {
    let id = header.request;
    let got = if id != request as u32 {
        FrontendRequest::from_id(id).map_or(format!("message {id}"), |other| format!("an answer to {other}"))
    } else if !header.is_reply() {
        "a message that is no reply".to_string()
    } else {
        return Ok(());
    };
    Err(FrontendError::OutOfStep { request, got })
}

/// What NEED_REPLY brought.
fn acknowledged(request: FrontendRequest, reply: &[u8]) -> Result<(), FrontendError> {
    match decode(request, reply)? {
        0 => Ok(()),
        value => Err(FrontendError::Refused { request, value }),
    }
}

/// The device's Status once the driver set FEATURES_OK, and DRIVER_OK (VIRTIO section 2.1).
const STATUS_FEATURES_OK: u8 =
    (VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK) as u8;
const STATUS_RUNNING: u8 = STATUS_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK as u8;

fn decode<T: Layout>(request: FrontendRequest, reply: &[u8]) -> Result<T, FrontendError> {
    T::decode(reply).ok_or_else(|| wrong_size(request, reply.len(), T::LEN))
}

fn wrong_size(request: FrontendRequest, got: usize, expected: usize) -> FrontendError {
    FrontendError::WrongReply { request, got: format!("{got} bytes"), expected: format!("{expected} bytes") }
}
