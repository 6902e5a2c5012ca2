//! A trace as lines of text, as strace prints system calls: the default of `hotslot trace FILE`.
//!
//! ```text
//! seconds      device
//!     0.104512 disk   guest, vcpu0: Status = 0xf (...), but reads 0x4f (...) afterwards <0.000310>
//!     0.104530 disk     -> SET_FEATURES(features=0x130000000 ...) = 0 <0.000021>
//!     0.104615 disk   <- BACKEND_SHMEM_MAP(shmid=0, ...) [file of memory, ...] = -EEXIST: ... <0.000009>
//!     0.204100 disk   *** gone: the back-end hung up
//! ```
//!
//! `->` is a request to the back-end, `<-` one of it. What a vCPU's thread did while it served an access of
//! its guest is indented: the access caused it.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::record::{Access, Descriptor, Direction, Event, Fields, Message, Outcome, Record, Value, What};
use super::record::{Noise, ReadOrWrite};
use crate::picture::canvas::fit;
use crate::report::clean;

/// The most columns of a device's name. Longer names are in no trace of hotslot's.
const MOST_OF_A_NAME: usize = 128;

/// Makes the lines of a trace.
#[derive(Debug, Default)]
pub struct Lines {
    /// How many columns the longest name of a device takes.
    name_width: usize,
    /// Until when each thread serves an access of its guest.
    serves: BTreeMap<String, u64>,
}

impl Lines {
    /// Makes room for the name of a record's device. Called for each record before the first line.
    pub fn make_room(&mut self, record: &Record) {
        self.name_width = self.name_width.max(name(record).chars().count());
    }

    /// The line of a record, with its line feed. Called in the order in which the records began.
    pub fn line(&mut self, record: &Record) -> String {
        let Record { time_ns, took_ns, thread, what, .. } = record;
        let is_caused = self.serves.get(thread).is_some_and(|end| time_ns < end);
        if matches!(what, What::Register(_)) {
            self.serves.insert(thread.clone(), time_ns.saturating_add(*took_ns));
        }
        let (device, width, indent) = (name(record), self.name_width, if is_caused { "  " } else { "" });
        let mut line = format!("{:>12} {device:<width$} {indent}{}", seconds(*time_ns), said(record));
        if *took_ns > 0 {
            let _ = write!(line, " <{}>", seconds(*took_ns));
        }
        clean(&line) + "\n"
    }
}

fn name(record: &Record) -> String {
    fit(record.device.as_deref().unwrap_or("-"), MOST_OF_A_NAME)
}

fn said(record: &Record) -> String {
    match &record.what {
        What::Trace { hotslot, unix_ms, .. } => {
            let (seconds, rest) = (unix_ms / 1000, unix_ms % 1000);
            format!("a trace by hotslot {hotslot}, begun at {seconds}.{rest:03} (Unix time)")
        }
        What::Message(message) => {
            let arrow = if message.direction == Direction::ToBackend { "->" } else { "<-" };
            format!("{arrow} {} = {}", request(message), result(message))
        }
        What::Noise(Noise { bytes, reason, .. }) => format!("<- no message: {reason}; it began with {bytes}"),
        What::Register(access) => format!("guest, {}: {}", record.thread, register(access)),
        What::Event(event) => format!("*** {}", happened(event)),
        What::LeftOut { count } => format!("*** {count} records are missing: the disk was late"),
    }
}

/// A request with its fields and descriptors.
pub fn request(message: &Message) -> String {
    let name = match message.name.as_str() {
        "?" => format!("unknown request {}", message.id),
        name => name.to_owned(),
    };
    let mut text = format!("{name}({})", fields(&message.fields));
    text.push_str(&descriptors(&message.descriptors, message.descriptors_lost));
    text
}

/// The result of a request, as text.
pub fn result(message: &Message) -> String {
    let answer = message.answer.as_ref().map(|answer| match answer.0.as_slice() {
        [(name, Value::Number(number))] if name == "value" => value(name, *number),
        _ => fields(answer),
    });
    let mut text = match (&message.errno, answer, message.result) {
        (Some(errno), Some(_), _) => format!("-{errno}"),
        (Some(errno), None, _) if message.needs_reply => format!("-{errno}, which could not be sent"),
        (Some(errno), None, _) => format!("-{errno} (no answer was asked for)"),
        (None, Some(answer), _) if answer.is_empty() => "an empty answer".to_owned(),
        (None, Some(answer), _) => answer,
        (None, None, Outcome::Done) if message.direction == Direction::ToBackend => "sent".to_owned(),
        (None, None, Outcome::Done) => "done, and no answer was asked for".to_owned(),
        (None, None, _) => "no answer".to_owned(),
    };
    text.push_str(&descriptors(&message.answer_descriptors, false));
    if let Some(reason) = &message.reason {
        let _ = write!(text, ": {reason}");
    }
    if !message.bytes.is_empty() {
        let _ = write!(text, "; what came began with {}", message.bytes);
    }
    text
}

/// An access of the guest.
pub fn register(access: &Access) -> String {
    let &Access { access: way, offset, width, value, shows, .. } = access;
    let shown = |value: u64| match access.register.as_str() {
        "Status" => format!("{value:#x} ({})", status(value)),
        _ => format!("{value:#x}"),
    };
    let place = match access.register.as_str() {
        "Config" => format!("Config[{:#x}], {width} bytes", offset.saturating_sub(0x100)),
        "?" => format!("{offset:#x}, {width} bytes"),
        name => name.to_owned(),
    };
    let mut text = match way {
        ReadOrWrite::Read => format!("reads {place}: {}", shown(value)),
        ReadOrWrite::Write => format!("{place} = {}", shown(value)),
    };
    if let Some(shows) = shows.filter(|&shows| shows != value) {
        let _ = write!(text, ", but reads {} afterwards", shown(shows));
    }
    if let Some(reason) = &access.reason {
        let _ = write!(text, ": {reason}");
    }
    text
}

/// What happened to a device.
pub fn happened(event: &Event) -> String {
    let mut text = event.event.clone();
    if !event.fields.is_empty() {
        let _ = write!(text, " ({})", fields(&event.fields));
    }
    if let Some(reason) = &event.reason {
        let _ = write!(text, ": {reason}");
    }
    text
}

fn fields(fields: &Fields) -> String {
    let mut shown = String::new();
    for (name, field) in &fields.0 {
        let text = match field {
            // Those of the bits in the field before.
            Value::Text(text) if name == "names" => {
                let _ = write!(shown, " ({text})");
                continue;
            }
            Value::Text(text) => text.clone(),
            Value::Number(number) => value(name, *number),
            Value::List(entries) => {
                let entries = entries.iter().map(|entry| format!("{{{}}}", self::fields(entry)));
                format!("[{}]", entries.collect::<Vec<_>>().join(", "))
            }
        };
        let comma = if shown.is_empty() { "" } else { ", " };
        let _ = write!(shown, "{comma}{name}={text}");
    }
    shown
}

/// Addresses, lengths and bits in hex, counts and numbers of things decimal.
fn value(name: &str, number: u64) -> String {
    let counts =
        ["shmid", "index", "value", "nregions", "num_queues", "queue_size", "deadline_seconds", "unmapped"];
    match name {
        "status" => format!("{number:#x} ({})", status(number)),
        _ if number == 0 || counts.contains(&name) && number < 1 << 32 => number.to_string(),
        _ => format!("{number:#x}"),
    }
}

/// The bits of the device status (VIRTIO 1.3, section 2.1).
fn status(value: u64) -> String {
    let names = [
        (1, "ACKNOWLEDGE"),
        (2, "DRIVER"),
        (8, "FEATURES_OK"),
        (4, "DRIVER_OK"),
        (64, "DEVICE_NEEDS_RESET"),
        (128, "FAILED"),
    ];
    let set = names.iter().filter(|(bit, _)| value & bit != 0).map(|(_, name)| *name);
    match value {
        0 => "reset".to_owned(),
        _ => set.collect::<Vec<_>>().join(" "),
    }
}

fn descriptors(descriptors: &[Descriptor], lost: bool) -> String {
    let described = descriptors.iter().map(|descriptor| {
        let Descriptor { kind, size, access, seals } = descriptor;
        let size = size.map_or(String::new(), |size| format!(", {size} bytes"));
        let seals = match seals.as_deref() {
            None => String::new(),
            Some("") => ", no seals".to_owned(),
            Some(seals) => format!(", seals: {seals}"),
        };
        format!("{kind}{size}, {access}{seals}")
    });
    let mut described: Vec<String> = described.collect();
    if lost {
        described.push("more that were not taken".to_owned());
    }
    // Those of a memory table are all the same file.
    let first = described.first().cloned().unwrap_or_default();
    match described.len() {
        0 => String::new(),
        count @ 2.. if described.iter().all(|one| *one == first) => format!(" [{count} times {first}]"),
        _ => format!(" [{}]", described.join("; ")),
    }
}

/// A time with microseconds.
pub fn seconds(ns: u64) -> String {
    format!("{}.{:06}", ns / 1_000_000_000, ns / 1000 % 1_000_000)
}
