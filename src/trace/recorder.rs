//! Writes a trace: `vmm::build` makes the [`Trace`], and a [`Recorder`] for each device; `vhost_user::tracer`
//! and `virtio::traced` give it what they see.
//!
//! A thread that records makes the line, hands it over, and goes on: the thread `trace` writes it
//! (`report::lines`). Without `--trace-vhost-user` there is no recorder, and nothing is measured or
//! formatted.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use thiserror::Error;

use super::record::{Event, FORMAT, Fields, Record, What};
use crate::report::{self, Failure, STATUS_USAGE, lines};

/// When the trace began.
static BEGAN: OnceLock<Instant> = OnceLock::new();

/// There can be no trace.
#[derive(Debug, Error)]
#[error("cannot write the trace {path}", path = .path.display())]
pub struct TraceError {
    path: PathBuf,
    source: io::Error,
}

impl Failure for TraceError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }
}

/// A trace that is being written.
pub struct Trace(Arc<lines::Trace>);

/// Records what happens to one device.
#[derive(Clone)]
pub struct Recorder {
    trace: Arc<lines::Trace>,
    device: Arc<str>,
}

impl Trace {
    /// Creates or empties the file, and starts the thread that writes it. Called before the process is
    /// confined.
    ///
    /// # Errors
    ///
    /// The file cannot be written to.
    pub fn create(path: &Path) -> Result<Trace, TraceError> {
        let failed = |source| TraceError { path: path.to_owned(), source };
        let file = report::create(path).map_err(failed)?;
        Trace::start(file, path).map_err(failed)
    }

    fn start(file: File, path: &Path) -> io::Result<Trace> {
        let path = path.to_owned();
        let out = lines::Trace::start(file, left_out, move |error| {
            log::warn!("the trace {} ends here, and the machine goes on: {error}", path.display());
        })?;
        let began = *BEGAN.get_or_init(Instant::now);
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first = What::Trace {
            format: FORMAT,
            hotslot: env!("CARGO_PKG_VERSION").to_owned(),
            unix_ms: unix.as_millis() as u64,
        };
        out.write(line(began, Duration::ZERO, None, first));
        Ok(Trace(Arc::new(out)))
    }

    /// For the device of this name.
    pub fn recorder(&self, device: &str) -> Recorder {
        Recorder { trace: Arc::clone(&self.0), device: device.into() }
    }
}

impl Recorder {
    /// Records what began then, and has just ended.
    pub fn ended(&self, began: Instant, what: What) {
        if !self.trace.has_ended() {
            self.trace.write(line(began, began.elapsed(), Some(&self.device), what));
        }
    }

    /// Records what has just happened.
    pub fn event(&self, event: &str, fields: Fields, reason: Option<String>) {
        let event = Event { event: event.to_owned(), fields, reason };
        if !self.trace.has_ended() {
            self.trace.write(line(Instant::now(), Duration::ZERO, Some(&self.device), What::Event(event)));
        }
    }
}

/// In place of so many records that had no room.
fn left_out(count: u64) -> String {
    let line = line(Instant::now(), Duration::ZERO, None, What::LeftOut { count });
    String::from_utf8(line).expect("invariant: JSON is UTF-8")
}

fn line(began: Instant, took: Duration, device: Option<&str>, what: What) -> Vec<u8> {
    let start = BEGAN.get().copied().unwrap_or(began);
    let record = Record {
        time_ns: began.saturating_duration_since(start).as_nanos() as u64,
        took_ns: took.as_nanos() as u64,
        thread: match thread::current().name() {
            None | Some("main") => "hotslot".to_owned(),
            Some(name) => name.to_owned(),
        },
        device: device.map(str::to_owned),
        what,
    };
    let mut line = serde_json::to_vec(&record).expect("invariant: a record's keys are texts");
    line.push(b'\n');
    line
}
