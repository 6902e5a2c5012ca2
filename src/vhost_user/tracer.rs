//! Makes records of what passes on a device's two sockets, and of what happens to its back-end
//! (`--trace-vhost-user`).
//!
//! `vmm::backends` makes one for each device of a machine that is traced. `wire` tells it of messages (it is
//! an [`Observer`]), [`super::link`] and its users of the rest.

use std::error::Error;
use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

use super::wire::frontend::FrontendError;
use super::wire::message::{
    BackendRequest, ConfigHeader, FrontendRequest, Header, Inflight, Layout, MMap, MemoryRegion, ShmemConfig,
    SingleRegion, VringAddr, VringState, protocol_features,
};
use super::wire::observer::{Observer, Outcome, Pending, Request, Socket};
use crate::config::device::DeviceSpec;
use crate::report::{errno_name, with_causes};
use crate::trace::descriptor::{describe, describe_ours};
use crate::trace::record::{self, Channel, Descriptor, Direction, Fields, Message, Noise, Value, What};
use crate::trace::recorder::Recorder;
use crate::virtio::kind::DeviceKind;

/// The most bytes that a record has in hex: the configuration space of a disk is 96 bytes long, that of most
/// other devices shorter.
const MOST_BYTES: usize = 96;

/// The named fields of a payload, as they are there.
macro_rules! named {
    ($payload:expr; $($name:ident),*) => {
        Fields(vec![$((stringify!($name).to_owned(), Value::Number($payload.$name.into()))),*])
    };
}

/// Records what happens to one device's back-end.
#[derive(Clone)]
pub struct Tracer {
    recorder: Recorder,
    kind: DeviceKind,
    shmem_bit: u32,
}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tracer")
    }
}

impl Tracer {
    /// For the device of this specification.
    pub fn new(recorder: Recorder, spec: &DeviceSpec) -> Arc<Tracer> {
        Arc::new(Tracer { recorder, kind: spec.kind, shmem_bit: spec.shmem_bit })
    }

    /// Something happened to the device ([`record::Event`]).
    pub fn event(&self, event: &str, fields: &[(&str, u64)], reason: Option<&str>) {
        let fields = fields.iter().map(|&(name, number)| (name.to_owned(), number.into()));
        self.recorder.event(event, Fields(fields.collect()), reason.map(str::to_owned));
    }

    /// The back-end that connected is not used.
    pub fn not_used(&self, why: &dyn Error) {
        self.event("not-used", &[], Some(&with_causes(why)));
    }

    /// The fields of a payload; the payload itself where it has none.
    fn fields(&self, socket: Socket, id: u32, payload: &[u8], is_answer: bool) -> Fields {
        let known = match socket {
            Socket::Backend => backend_fields(id, payload, is_answer),
            Socket::Main if is_answer => self.answer_fields(id, payload),
            Socket::Main => self.request_fields(id, payload),
        };
        match known {
            Some(fields) => fields,
            None if payload.is_empty() => Fields::default(),
            None => Fields(vec![("payload".to_owned(), hex(payload).into())]),
        }
    }

    /// `None` where the payload is not what belongs there.
    fn request_fields(&self, id: u32, payload: &[u8]) -> Option<Fields> {
        use FrontendRequest::*;
        match FrontendRequest::from_id(id)? {
            SetFeatures => self.features(payload),
            SetProtocolFeatures => self.protocol_features(payload),
            SetMemTable => memory_table(payload),
            SetVringNum | SetVringBase | SetVringEnable | GetVringBase => vring_state(payload),
            SetVringAddr => VringAddr::decode(payload)
                .map(|ring| named!(ring; index, flags, descriptor_table, used_ring, available_ring, log)),
            SetVringKick | SetVringCall | SetVringErr => number("index", payload),
            GetConfig | SetConfig => configuration(payload),
            GetInflightFd | SetInflightFd => inflight(payload),
            AddMemReg | RemMemReg => {
                SingleRegion::decode(payload).map(|SingleRegion { region, .. }| memory_region(region))
            }
            SetStatus => number("status", payload),
            GetFeatures | SetOwner | GetProtocolFeatures | GetQueueNum | SetBackendReqFd | ResetDevice
            | GetMaxMemSlots | GetStatus | GetShmemConfig => None,
        }
    }

    fn answer_fields(&self, id: u32, payload: &[u8]) -> Option<Fields> {
        use FrontendRequest::*;
        match FrontendRequest::from_id(id)? {
            GetFeatures => self.features(payload),
            GetProtocolFeatures => self.protocol_features(payload),
            GetVringBase => vring_state(payload),
            GetConfig => configuration(payload),
            GetInflightFd => inflight(payload),
            GetShmemConfig => shmem_config(payload),
            GetStatus => number("status", payload),
            _ => number("value", payload),
        }
    }

    fn features(&self, payload: &[u8]) -> Option<Fields> {
        u64::decode(payload).map(|bits| bits_and_names("features", bits, self.kind.feature_names(bits)))
    }

    fn protocol_features(&self, payload: &[u8]) -> Option<Fields> {
        let names = |bits| protocol_features::names(bits, self.shmem_bit);
        u64::decode(payload).map(|bits| bits_and_names("protocol_features", bits, names(bits)))
    }
}

impl Observer for Tracer {
    fn begins(&self, request: Request<'_>) -> Box<dyn Pending> {
        let began = Instant::now();
        let Request { socket, header: Header { request: id, .. }, payload, files, files_lost } = request;
        let (channel, direction, describe): (_, _, fn(BorrowedFd<'_>) -> Descriptor) = match socket {
            Socket::Main => (Channel::Main, Direction::ToBackend, describe_ours),
            Socket::Backend => (Channel::Backend, Direction::FromBackend, describe),
        };
        let name = match socket {
            Socket::Main => FrontendRequest::from_id(id).map(|known| known.to_string()),
            Socket::Backend => BackendRequest::from_id(id).map(|known| known.to_string()),
        };
        let message = Message {
            channel,
            direction,
            name: name.unwrap_or_else(|| "?".to_owned()),
            id,
            needs_reply: request.header.needs_reply(),
            fields: self.fields(socket, id, payload, false),
            descriptors: files.iter().map(|&file| describe(file)).collect(),
            descriptors_lost: files_lost,
            result: record::Outcome::Done,
            answer: None,
            answer_descriptors: Vec::new(),
            errno: None,
            reason: None,
            bytes: String::new(),
        };
        Box::new(Begun { tracer: self.clone(), began, socket, message })
    }

    fn noise(&self, socket: Socket, bytes: &[u8], why: &dyn Error) {
        let channel = if socket == Socket::Main { Channel::Main } else { Channel::Backend };
        let (bytes, reason) = (hex(bytes), with_causes(why));
        let noise = Noise { channel, direction: Direction::FromBackend, bytes, reason };
        self.recorder.ended(Instant::now(), What::Noise(noise));
    }
}

/// A request whose end is not known yet.
struct Begun {
    tracer: Tracer,
    began: Instant,
    socket: Socket,
    message: Message,
}

impl Pending for Begun {
    fn ended(self: Box<Self>, outcome: Outcome<'_>) {
        let Begun { tracer, began, socket, mut message } = *self;
        let is_refusal = |why: &(dyn Error + 'static)| match why.downcast_ref::<FrontendError>() {
            Some(error) => matches!(error, FrontendError::Refused { .. }),
            None => outcome.errno != 0,
        };
        message.result = match outcome.why {
            None => record::Outcome::Done,
            Some(why) if is_refusal(why) => record::Outcome::Refused,
            Some(_) => record::Outcome::Failed,
        };
        message.answer = outcome.answer.map(|answer| tracer.fields(socket, message.id, answer, true));
        message.answer_descriptors = outcome.file.iter().map(|&file| describe(file)).collect();
        message.errno = (outcome.errno != 0).then(|| errno_name(outcome.errno));
        message.reason = outcome.why.map(with_causes);
        message.bytes = hex(outcome.noise);
        tracer.recorder.ended(began, What::Message(message));
    }
}

fn backend_fields(id: u32, payload: &[u8], is_answer: bool) -> Option<Fields> {
    if is_answer {
        return number("value", payload);
    }
    match BackendRequest::from_id(id)? {
        BackendRequest::ShmemMap | BackendRequest::ShmemUnmap => {
            let map = MMap::decode(payload)?;
            let mut fields = named!(map; shmid, fd_offset, shm_offset, len, flags);
            if map.flags == MMap::READ_WRITE {
                fields.0.push(("names".to_owned(), "read-write".to_owned().into()));
            }
            Some(fields)
        }
        _ => None,
    }
}

fn number(name: &str, payload: &[u8]) -> Option<Fields> {
    u64::decode(payload).map(|number| Fields(vec![(name.to_owned(), number.into())]))
}

fn bits_and_names(name: &str, bits: u64, names: String) -> Fields {
    Fields(vec![(name.to_owned(), bits.into()), ("names".to_owned(), names.into())])
}

fn vring_state(payload: &[u8]) -> Option<Fields> {
    VringState::decode(payload).map(|ring| named!(ring; index, value))
}

fn inflight(payload: &[u8]) -> Option<Fields> {
    Inflight::decode(payload).map(|buffer| named!(buffer; mmap_size, mmap_offset, num_queues, queue_size))
}

fn memory_region(region: MemoryRegion) -> Fields {
    named!(region; guest_addr, size, user_addr, mmap_offset)
}

fn memory_table(mut payload: &[u8]) -> Option<Fields> {
    let [count, _padding] = <[u32; 2]>::take(&mut payload)?;
    let regions: Option<Vec<_>> =
        (0..count).map(|_| MemoryRegion::take(&mut payload).map(memory_region)).collect();
    Some(Fields(vec![("regions".to_owned(), Value::List(regions?))]))
}

fn configuration(mut payload: &[u8]) -> Option<Fields> {
    let mut fields = ConfigHeader::take(&mut payload).map(|head| named!(head; offset, size, flags))?;
    fields.0.push(("bytes".to_owned(), hex(payload).into()));
    Some(fields)
}

/// The sizes that are not 0, with their ids.
fn shmem_config(payload: &[u8]) -> Option<Fields> {
    let ShmemConfig { nregions, sizes, .. } = ShmemConfig::decode(payload)?;
    let regions = (0u64..).zip(sizes).filter(|&(_, size)| size > 0);
    let region = |(shmid, size): (u64, u64)| {
        Fields(vec![("shmid".to_owned(), shmid.into()), ("size".to_owned(), size.into())])
    };
    let regions = Value::List(regions.map(region).collect());
    Some(Fields(vec![("nregions".to_owned(), u64::from(nregions).into()), ("regions".to_owned(), regions)]))
}

/// The first [`MOST_BYTES`] of these, in hex.
fn hex(bytes: &[u8]) -> String {
    let mut text: String = bytes.iter().take(MOST_BYTES).map(|byte| format!("{byte:02x}")).collect();
    if bytes.len() > MOST_BYTES {
        text.push_str("...");
    }
    text
}
