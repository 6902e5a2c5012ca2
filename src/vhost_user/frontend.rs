//! Our requests on the main socket (vhost-user "Front-end message types"): connecting and negotiating, then
//! starting and stopping rings. Every wait has a deadline.
//!
//! The set-up calls [`Frontend::connect`]; from then on `device` calls it on vCPU threads, and `sharing` on a
//! thread of its own, one at a time.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::connection::{Connection, ConnectionError, Deadline};
use super::kind::DeviceKind;
use super::memory_table::MemoryTable;
use super::message::{
    FrontendRequest, Header, MemoryRegion, Payload, SHMEM_CONFIG_LEN, ShmemConfig, U64_LEN,
    protocol_features as protocol,
};
use super::negotiate::{Agreement, NegotiationError, Offer, negotiate};
use crate::report;
use crate::virtio::device::QueueSetup;

/// How long a back-end may take to answer a request of the set-up.
pub const SETUP_REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// VHOST_USER_MAX_CONFIG_SIZE: the most that GET_CONFIG can ask for, in bytes.
const MAX_CONFIG: usize = 256;

/// Bytes before the data in a GET_CONFIG or SET_CONFIG payload: offset, size, flags.
const CONFIG_HEADER: usize = 12;

/// Bytes of a vring state: index, number.
const VRING_STATE_LEN: usize = 8;

/// A device as the user asked for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Its name in messages.
    pub name: String,
    /// The socket that its back-end listens on.
    pub socket: PathBuf,
    /// The device type.
    pub kind: DeviceKind,
    /// The number of queues; `None` for what is usual for the type.
    pub queues: Option<u16>,
    /// The largest queue size that the driver may choose: a power of two up to 32768.
    pub queue_size: u16,
    /// The protocol feature bit that means SHMEM: 22, or 20 or 21 for a back-end built from a draft (SHM-1).
    pub shmem_bit: u32,
    /// Whether other devices' back-ends see what this one's maps (SHM-80).
    pub share_shmem: bool,
    /// How many requests of the backend channel are served in a second; `None` for as many as come (SHM-66).
    pub shmem_rate: Option<NonZeroU32>,
}

/// Why a request did not succeed.
#[derive(Debug, Error)]
pub enum FrontendError {
    /// Nobody listens, for as long as the user wants to wait.
    #[error("nobody accepted a connection within {} s", .waited.as_secs_f32())]
    NobodyListens {
        /// How long we tried.
        waited: Duration,
        /// What connect(2) said last.
        source: io::Error,
    },
    /// Something else is there, and waiting would not help.
    #[error("it is not a socket")]
    NotASocket,
    /// Nobody can listen there.
    #[error("its path is {0} bytes long, longer than the {MAX_PATH} that a socket's path can have")]
    PathTooLong(usize),
    /// The socket cannot be connected to, and waiting would not help.
    #[error("cannot connect")]
    Connect(#[source] io::Error),
    /// The stream broke, or the back-end is silent.
    #[error("{request} failed")]
    Connection {
        /// The request that was under way.
        request: FrontendRequest,
        /// What happened.
        source: ConnectionError,
    },
    /// SHM-12: what came is not the answer to what was asked.
    #[error("the back-end answered {request} with {got} instead of {expected}")]
    WrongReply {
        /// The request.
        request: FrontendRequest,
        /// What came.
        got: String,
        /// What should have come.
        expected: String,
    },
    /// The back-end said no.
    #[error("the back-end refused {request} (it answered {value:#x})")]
    Refused {
        /// The request.
        request: FrontendRequest,
        /// The answer.
        value: u64,
    },
    /// What it offers will not do.
    #[error(transparent)]
    Negotiation(#[from] NegotiationError),
    /// Fewer queues than the user asked for.
    #[error("the back-end has {available} queues, and the device is to have {wanted}")]
    Queues {
        /// The answer to GET_QUEUE_NUM.
        available: u64,
        /// What the user asked for, or what is usual.
        wanted: u16,
    },
    /// SHM-14.
    #[error("the back-end announces {announced} shared memory regions, but {counted} have a size")]
    RegionCount {
        /// nregions.
        announced: u32,
        /// How many sizes are not 0.
        counted: usize,
    },
    /// A ring that is not all in RAM.
    #[error("queue {index} has its {part} at {address:#x}, which is not all in RAM")]
    RingOutsideRam {
        /// The queue.
        index: u16,
        /// Which of its three parts.
        part: &'static str,
        /// Its guest physical address.
        address: u64,
    },
}

impl FrontendError {
    /// Whether the connection is of no use any more: the stream is broken, out of step, or nobody answers.
    pub fn is_fatal(&self) -> bool {
        matches!(self, FrontendError::Connection { .. } | FrontendError::WrongReply { .. })
    }
}

/// A connected back-end that we agreed with.
#[derive(Debug)]
pub struct Frontend {
    connection: Connection,
    agreement: Agreement,
}

/// What the set-up learns from a back-end.
#[derive(Debug)]
pub struct Handshake {
    /// The connection.
    pub frontend: Frontend,
    /// The number of queues.
    pub queues: u16,
    /// The configuration space; zeroes where the back-end has none.
    pub config: Vec<u8>,
    /// Size in bytes of each shared memory region; the index is its id, 0 means none. Empty without SHMEM.
    pub region_sizes: Vec<u64>,
    /// How many ranges of memory the back-end can be told of in all, RAM among them; `None` where it cannot
    /// be told of single ones (CONFIGURE_MEM_SLOTS), or need not be.
    pub memory_slots: Option<u64>,
}

impl Frontend {
    /// Connects to a back-end, waiting up to `patience` for somebody to listen, and finds out what it is.
    /// `sees_others`: there is another device whose mappings it is to see (SHM-80).
    pub fn connect(
        spec: &DeviceSpec,
        patience: Duration,
        sees_others: bool,
    ) -> Result<Handshake, FrontendError> {
        let socket = connect(&spec.name, &spec.socket, patience)?;
        let mut frontend = Frontend::negotiate(socket, spec, sees_others)?;
        let queues = frontend.queue_count(spec)?;
        let region_sizes = frontend.region_sizes()?;
        let config = frontend.config(&spec.name, spec.kind)?;
        let memory_slots = match frontend.agreement.has(protocol::CONFIGURE_MEM_SLOTS) {
            true => Some(frontend.memory_slots(Deadline::after(SETUP_REPLY_TIMEOUT))?),
            false => None,
        };
        Ok(Handshake { frontend, queues, config, region_sizes, memory_slots })
    }

    fn negotiate(
        socket: UnixStream,
        spec: &DeviceSpec,
        sees_others: bool,
    ) -> Result<Frontend, FrontendError> {
        let nothing_yet = Agreement::default();
        let mut frontend = Frontend { connection: Connection::new(socket, U64_LEN), agreement: nothing_yet };
        let deadline = Deadline::after(SETUP_REPLY_TIMEOUT);
        frontend.tell(FrontendRequest::SetOwner, &[], &[], deadline)?;
        let features = frontend.ask_u64(FrontendRequest::GetFeatures, deadline)?;
        let protocol_features = match features & super::message::F_PROTOCOL_FEATURES {
            0 => 0,
            _ => frontend.ask_u64(FrontendRequest::GetProtocolFeatures, deadline)?,
        };
        let agreement =
            negotiate(Offer { features, protocol_features }, spec.kind, spec.shmem_bit, sees_others)?;
        if let Some(acked) = agreement.protocol_features {
            // Before the agreement holds: a back-end need not know NEED_REPLY yet.
            frontend.tell(
                FrontendRequest::SetProtocolFeatures,
                &Payload::default().u64(acked),
                &[],
                deadline,
            )?;
        }
        frontend.agreement = agreement;
        Ok(frontend)
    }

    fn queue_count(&mut self, spec: &DeviceSpec) -> Result<u16, FrontendError> {
        let wanted = spec.queues.unwrap_or(spec.kind.default_queues());
        if self.agreement.has(protocol::MQ) {
            let deadline = Deadline::after(SETUP_REPLY_TIMEOUT);
            let available = self.ask_u64(FrontendRequest::GetQueueNum, deadline)?;
            if available < u64::from(wanted) {
                return Err(FrontendError::Queues { available, wanted });
            }
        }
        Ok(wanted)
    }

    /// SHM-10 to SHM-14.
    fn region_sizes(&mut self) -> Result<Vec<u64>, FrontendError> {
        if !self.agreement.has_shmem() {
            return Ok(Vec::new());
        }
        let request = FrontendRequest::GetShmemConfig;
        let reply = self.ask(request, &[], SHMEM_CONFIG_LEN, Deadline::after(SETUP_REPLY_TIMEOUT))?;
        let ShmemConfig { nregions, sizes } =
            ShmemConfig::decode(&reply).ok_or_else(|| wrong_size(request, reply.len(), SHMEM_CONFIG_LEN))?;
        let counted = sizes.iter().filter(|&&size| size > 0).count();
        if counted as u64 != u64::from(nregions) {
            return Err(FrontendError::RegionCount { announced: nregions, counted });
        }
        Ok(sizes)
    }

    fn config(&mut self, name: &str, kind: DeviceKind) -> Result<Vec<u8>, FrontendError> {
        let len = kind.config_len().unwrap_or(MAX_CONFIG);
        if len == 0 || !self.agreement.has(protocol::CONFIG) {
            return Ok(vec![0; kind.config_len().unwrap_or(0)]);
        }
        let request = FrontendRequest::GetConfig;
        let payload = Payload::default().u32(0).u32(len as u32).u32(0).bytes(&vec![0; len]);
        let deadline = Deadline::after(SETUP_REPLY_TIMEOUT);
        let reply = self.exchange(request, &payload, deadline)?;
        match reply.get(CONFIG_HEADER..) {
            Some(config) if config.len() == len => Ok(config.to_vec()),
            // That is how a back-end says that it has not so much of it.
            _ if kind.config_len().is_none() => {
                log::warn!("{name}: the back-end gives no {len} bytes of configuration: it stays empty");
                Ok(Vec::new())
            }
            _ => Err(wrong_size(request, reply.len(), CONFIG_HEADER + len)),
        }
    }

    /// What was agreed.
    pub fn agreement(&self) -> &Agreement {
        &self.agreement
    }

    /// Gives the back-end its end of the backend channel (SHM-7). The other end must be served already: the
    /// back-end may send requests before it answers this one (SHM-67). The caller closes its copy, so that
    /// the back-end's death is seen (SHM-8).
    pub fn set_backend_channel(&mut self, theirs: BorrowedFd<'_>) -> Result<(), FrontendError> {
        self.tell(FrontendRequest::SetBackendReqFd, &[], &[theirs], Deadline::after(SETUP_REPLY_TIMEOUT))
    }

    /// Tells the back-end the features and the memory with which it is to start.
    pub fn set_up(
        &mut self,
        accepted: u64,
        memory: &MemoryTable,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let features = self.agreement.features_for_backend(accepted);
        self.tell(FrontendRequest::SetFeatures, &Payload::default().u64(features), &[], deadline)?;
        let regions = memory.regions();
        let table = Payload::default().u32(regions.len() as u32).u32(0);
        let table = regions.iter().fold(table, Payload::region);
        let fds = vec![memory.file().as_fd(); regions.len()];
        self.tell(FrontendRequest::SetMemTable, &table, &fds, deadline)
    }

    /// Tells the back-end of one more range of memory, in `file`; it knows the range when this returns.
    pub fn add_memory(
        &mut self,
        region: &MemoryRegion,
        file: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        self.change_memory(FrontendRequest::AddMemReg, region, &[file], deadline)
    }

    /// Tells the back-end that it no longer has a range of memory, given as it was told of it; it has let go
    /// of it when this returns.
    pub fn remove_memory(&mut self, region: &MemoryRegion, deadline: Deadline) -> Result<(), FrontendError> {
        self.change_memory(FrontendRequest::RemMemReg, region, &[], deadline)
    }

    fn change_memory(
        &mut self,
        request: FrontendRequest,
        region: &MemoryRegion,
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let padding = 0;
        let payload = Payload::default().u64(padding).region(region);
        self.tell(request, &payload, fds, deadline)?;
        if self.agreement.has(protocol::REPLY_ACK) {
            return Ok(());
        }
        // Requests are handled in order: when this one is answered, that one was handled.
        self.memory_slots(deadline).map(drop)
    }

    fn memory_slots(&mut self, deadline: Deadline) -> Result<u64, FrontendError> {
        self.ask_u64(FrontendRequest::GetMaxMemSlots, deadline)
    }

    /// Starts a ring, from its first entry on.
    pub fn start_ring(
        &mut self,
        queue: &QueueSetup<'_>,
        memory: &MemoryTable,
        call: BorrowedFd<'_>,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let index = u32::from(queue.index);
        let state = |value: u32| Payload::default().u32(index).u32(value);
        let place = |part, address, len| {
            memory.user_address(address, len).ok_or(FrontendError::RingOutsideRam {
                index: queue.index,
                part,
                address,
            })
        };
        // VIRTIO section 2.7: sizes of the three parts of a split virtqueue.
        let size = u64::from(queue.size);
        let descriptors = place("descriptor table", queue.descriptors, 16 * size)?;
        let driver_area = place("available ring", queue.driver_area, 6 + 2 * size)?;
        let device_area = place("used ring", queue.device_area, 6 + 8 * size)?;
        let (flags, log) = (0, 0);
        let addresses = state(flags).u64(descriptors).u64(device_area).u64(driver_area).u64(log);

        self.tell(FrontendRequest::SetVringNum, &state(u32::from(queue.size)), &[], deadline)?;
        self.tell(FrontendRequest::SetVringBase, &state(0), &[], deadline)?;
        self.tell(FrontendRequest::SetVringAddr, &addresses, &[], deadline)?;
        let event = Payload::default().u64(u64::from(queue.index));
        self.tell(FrontendRequest::SetVringCall, &event, &[call], deadline)?;
        // SAFETY: the event lives as long as `queue` borrows it, which is longer than this call.
        let kick = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(queue.kick)) };
        self.tell(FrontendRequest::SetVringKick, &event, &[kick], deadline)?;
        if self.agreement.protocol_features.is_some() {
            self.tell(FrontendRequest::SetVringEnable, &state(1), &[], deadline)?;
        }
        Ok(())
    }

    /// Stops a ring: the back-end no longer uses it when this returns.
    pub fn stop_ring(&mut self, index: u16, deadline: Deadline) -> Result<(), FrontendError> {
        let state = Payload::default().u32(u32::from(index)).u32(0);
        self.ask(FrontendRequest::GetVringBase, &state, VRING_STATE_LEN, deadline).map(drop)
    }

    /// Tells the back-end of the device's Status, where that was agreed on (SHM-70).
    pub fn set_status(&mut self, status: u8, deadline: Deadline) -> Result<(), FrontendError> {
        if !self.agreement.has(protocol::STATUS) {
            return Ok(());
        }
        self.tell(FrontendRequest::SetStatus, &Payload::default().u64(u64::from(status)), &[], deadline)
    }

    /// Tells the back-end that the device is reset, in the way or ways that were agreed on (SHM-70).
    pub fn reset_device(&mut self, deadline: Deadline) -> Result<(), FrontendError> {
        let reset = match self.agreement.has(protocol::RESET_DEVICE) {
            true => self.tell(FrontendRequest::ResetDevice, &[], &[], deadline),
            false => Ok(()),
        };
        if reset.as_ref().is_err_and(FrontendError::is_fatal) {
            return reset;
        }
        self.set_status(0, deadline)?;
        reset
    }

    /// Writes to the configuration space.
    pub fn set_config(&mut self, offset: u32, data: &[u8], deadline: Deadline) -> Result<(), FrontendError> {
        let flags_of_a_driver = 0;
        let payload =
            Payload::default().u32(offset).u32(data.len() as u32).u32(flags_of_a_driver).bytes(data);
        self.tell(FrontendRequest::SetConfig, &payload, &[], deadline)
    }

    /// Sends a request that by itself has no reply. Where REPLY_ACK was agreed on, asks for one and waits for
    /// it.
    fn tell(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        let need_reply = self.agreement.has(protocol::REPLY_ACK);
        let header = Header::request(request as u32, payload.len(), need_reply);
        self.send(request, header, payload, fds, deadline)?;
        if !need_reply {
            return Ok(());
        }
        match self.reply_u64(request, deadline)? {
            0 => Ok(()),
            value => Err(FrontendError::Refused { request, value }),
        }
    }

    fn ask_u64(&mut self, request: FrontendRequest, deadline: Deadline) -> Result<u64, FrontendError> {
        self.send(request, Header::request(request as u32, 0, false), &[], &[], deadline)?;
        self.reply_u64(request, deadline)
    }

    /// Sends a request that has a reply of `reply_len` bytes.
    fn ask(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        reply_len: usize,
        deadline: Deadline,
    ) -> Result<Vec<u8>, FrontendError> {
        let reply = self.exchange(request, payload, deadline)?;
        if reply.len() != reply_len {
            return Err(wrong_size(request, reply.len(), reply_len));
        }
        Ok(reply)
    }

    /// Sends a request that has a reply of any size.
    fn exchange(
        &mut self,
        request: FrontendRequest,
        payload: &[u8],
        deadline: Deadline,
    ) -> Result<Vec<u8>, FrontendError> {
        self.send(request, Header::request(request as u32, payload.len(), false), payload, &[], deadline)?;
        self.reply(request, deadline)
    }

    fn send(
        &self,
        request: FrontendRequest,
        header: Header,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        self.connection
            .send(header, payload, fds, deadline)
            .map_err(|source| FrontendError::Connection { request, source })
    }

    fn reply_u64(&mut self, request: FrontendRequest, deadline: Deadline) -> Result<u64, FrontendError> {
        let reply = self.reply(request, deadline)?;
        let value = reply.as_slice().try_into().map_err(|_| wrong_size(request, reply.len(), U64_LEN))?;
        Ok(u64::from_ne_bytes(value))
    }

    /// Waits for a reply; its size is the caller's to check (SHM-12).
    fn reply(&mut self, request: FrontendRequest, deadline: Deadline) -> Result<Vec<u8>, FrontendError> {
        let message = self
            .connection
            .receive(deadline)
            .map_err(|source| FrontendError::Connection { request, source })?;
        let wrong = |got, expected| Err(FrontendError::WrongReply { request, got, expected });
        if message.header.request != request as u32 {
            let id = message.header.request;
            return wrong(format!("a message with id {id}"), format!("id {}", request as u32));
        }
        if !message.header.is_reply() {
            return wrong("a request".to_string(), "a reply".to_string());
        }
        if !message.fds.is_empty() || message.fds_lost {
            return wrong(format!("{} file descriptors", message.fds.len()), "none".to_string());
        }
        Ok(message.payload)
    }
}

impl AsFd for Frontend {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.connection.as_fd()
    }
}

fn wrong_size(request: FrontendRequest, got: usize, expected: usize) -> FrontendError {
    FrontendError::WrongReply { request, got: format!("{got} bytes"), expected: format!("{expected} bytes") }
}

/// unix(7): sun_path has 108 bytes, of which the last is a zero.
const MAX_PATH: usize = 107;

/// Connects, trying again while nobody listens; says so each second.
fn connect(name: &str, path: &Path, patience: Duration) -> Result<UnixStream, FrontendError> {
    const RETRY: Duration = Duration::from_millis(20);
    const TELL: Duration = Duration::from_secs(1);
    let len = path.as_os_str().len();
    if len > MAX_PATH {
        return Err(FrontendError::PathTooLong(len));
    }
    let start = Instant::now();
    let mut told = 0;
    loop {
        let source = match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(source) => source,
        };
        if !matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) {
            return Err(FrontendError::Connect(source));
        }
        // A refusal means a socket that nobody listens on (yet), or no socket.
        if path.metadata().is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(FrontendError::NotASocket);
        }
        let waited = start.elapsed();
        if waited >= patience {
            return Err(FrontendError::NobodyListens { waited: patience, source });
        }
        let seconds = waited.as_secs() / TELL.as_secs();
        if seconds > told {
            told = seconds;
            report::say(format_args!(
                "hotslot: {name}: waiting for a back-end on {} ({seconds} s)",
                path.display()
            ));
        }
        thread::sleep(RETRY.min(patience - waited));
    }
}
