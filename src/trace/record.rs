//! What a line of a trace says: a [`Record`] as JSON, the only form in which it is in the file.
//!
//! [`super::recorder`] writes records, [`super::read`] reads them. The pictures and texts of `hotslot trace`
//! are made of them and of nothing else.
//!
//! # The fields of a line
//!
//! | field | in | what it is |
//! |---|---|---|
//! | `time_ns` | all | when it began, in nanoseconds since the trace began |
//! | `took_ns` | all | how long it took, to the answer; 0 for what has no duration |
//! | `thread` | all | the thread of hotslot that did it: `vcpuN`, `vhost-DEVICE` (the backend channel), `keep-DEVICE`, `hotslot` (the set-up) |
//! | `device` | most | the device's name |
//! | `kind` | all | `trace`, `message`, `noise`, `register`, `event` or `left-out`: which of the fields below there are |
//! | `format`, `hotslot`, `unix_ms` | `trace` | the first line: 1; the version of hotslot; when the trace began, in milliseconds since 1970 |
//! | `channel` | `message`, `noise` | `main` or `backend`: the socket |
//! | `direction` | `message`, `noise` | `to-backend` or `from-backend`: which way the request went; an answer goes the other way |
//! | `name`, `id` | `message` | the request, as the specification calls it and as a number; an unknown one has the name `?` |
//! | `needs_reply` | `message` | whether NEED_REPLY was set |
//! | `fields` | `message`, `event` | its payload's fields by the specification's names, in its order: numbers, texts, lists. `payload` is one that has no such fields, in hex |
//! | `descriptors` | `message` | the descriptors that came or went with it: `kind`, `size` (bytes), `access`, `seals` |
//! | `descriptors_lost` | `message` | true where more came than were taken |
//! | `result` | `message` | `done`, `refused` (an answer says so, or would) or `failed` (there was no answer of use) |
//! | `answer` | `message` | the fields of the answer, where there was one |
//! | `answer_descriptors` | `message` | the descriptors that came with the answer |
//! | `errno` | `message` | what the back-end is told of a refusal, by name, whether or not it asked for an answer |
//! | `reason` | `message`, `noise`, `register`, `event` | why it was refused or failed, as a sentence |
//! | `bytes` | `noise`, `message` | in hex, the beginning of what came and was no message, or not the answer |
//! | `access`, `register`, `offset`, `value`, `width` | `register` | `read` or `write`; the register by name (`Config` for the configuration space); its offset in the block; the value; the number of bytes |
//! | `shows` | `register` | after a write: what the register reads then |
//! | `event` | `event` | what happened: see [`Event`] |
//! | `count` | `left-out` | how many records had no room here, because the disk was late |

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The number of this format, in the first line.
pub const FORMAT: u32 = 1;

/// A line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When it began, in nanoseconds since the trace began.
    pub time_ns: u64,
    /// How long it took, in nanoseconds.
    pub took_ns: u64,
    /// The thread of hotslot that did it.
    pub thread: String,
    /// The device's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// The rest.
    #[serde(flatten)]
    pub what: What,
}

/// What a line is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum What {
    /// The first line.
    Trace {
        /// [`FORMAT`].
        format: u32,
        /// The version of hotslot.
        hotslot: String,
        /// When the trace began, in milliseconds since 1970.
        unix_ms: u64,
    },
    /// A request, with what came of it.
    Message(Message),
    /// Bytes of the back-end that are no message, or none that belongs there.
    Noise(Noise),
    /// A guest's access to a control register, or to the configuration space, that left the guest.
    Register(Access),
    /// Something happened to a device.
    Event(Event),
    /// Records are missing here.
    LeftOut {
        /// How many.
        count: u64,
    },
}

/// One of a device's two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// The main socket, on which hotslot asks.
    Main,
    /// The backend channel, on which the back-end asks.
    Backend,
}

/// Which way a request went. Its answer goes the other way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// From hotslot.
    ToBackend,
    /// To hotslot.
    FromBackend,
}

/// What came of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was sent or carried out, and answered where an answer was asked for.
    Done,
    /// Its receiver refused it.
    Refused,
    /// There was no answer of use.
    Failed,
}

/// A request, with what came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // The table above has them.
pub struct Message {
    pub channel: Channel,
    pub direction: Direction,
    pub name: String,
    pub id: u32,
    pub needs_reply: bool,
    pub fields: Fields,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub descriptors: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub descriptors_lost: bool,
    pub result: Outcome,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Fields>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answer_descriptors: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub bytes: String,
}

/// Bytes of the back-end that are no message, or none that belongs there. They end the session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // The table above has them.
pub struct Noise {
    pub channel: Channel,
    pub direction: Direction,
    pub bytes: String,
    pub reason: String,
}

/// A file descriptor that was sent or that came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// `file of memory` (a memfd, or a file of tmpfs), `regular file`, `directory`, `socket`, `pipe`,
    /// `character device`, `block device`, `eventfd`, `anonymous` (the kernel's own, such as an eventfd), or
    /// `unknown`: its file system does not show it.
    pub kind: String,
    /// In bytes: of a file, as far as the kernel knows it without asking the file's server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// `read-only`, `write-only`, `read-write` or `path-only`.
    pub access: String,
    /// Of a file of memory: `seal`, `shrink`, `grow`, `write`, `future_write`, separated by spaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seals: Option<String>,
}

/// A guest's access to a register that a vCPU's thread served.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)] // The table above has them.
pub struct Access {
    pub access: ReadOrWrite,
    pub register: String,
    pub offset: u64,
    pub width: usize,
    pub value: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shows: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum ReadOrWrite {
    Read,
    Write,
}

/// Something happened to a device.
///
/// | `event` | what happened | `fields` |
/// |---|---|---|
/// | `connected` | a connection to a back-end was accepted; the handshake follows | |
/// | `not-used` | the back-end is not used, for `reason`, and at the start of the machine that ends it | |
/// | `region` | a shared memory region was placed | `shmid`, `guest_address`, `size` |
/// | `gone` | the session is over, for `reason`; the guest waits so long for the back-end to come back | `deadline_seconds` |
/// | `lost` | no other back-end may come, for `reason`; the device needs a reset | |
/// | `back` | a back-end came back, and goes on | |
/// | `channel-closed` | the back-end closed the backend channel | |
/// | `reset` | the device was reset: so many mappings are gone | `unmapped` |
/// | `old-mappings-gone` | the back-end that came back has not made so many anew | `unmapped` |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Its name.
    pub event: String,
    /// More of it.
    #[serde(default, skip_serializing_if = "Fields::is_empty")]
    pub fields: Fields,
    /// Why it happened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Fields by name, in the order of the payload: in JSON an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fields(pub Vec<(String, Value)>);

/// A field.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// A number.
    Number(u64),
    /// A text.
    Text(String),
    /// Several of the same kind, such as the entries of a memory table.
    List(Vec<Fields>),
}

impl Fields {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of this name.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.0.iter().find_map(|(field, value)| match value {
            Value::Number(number) if field == name => Some(*number),
            _ => None,
        })
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Value::Number(number)
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Value::Text(text)
    }
}

impl Serialize for Fields {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}
