//! The thread `lines`, which writes messages, so that no other thread waits for their reader: stderr may be a
//! full pipe, and so may a log file. A trace has a thread `trace` of its own: neither delays the other.
//!
//! [`super::say`] and the logger of `hotslot` use it once [`start`] was called; [`end`] is the end of the
//! program.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::stderr;

use crate::sandbox::vmm::Kind;
use crate::thread;

/// How many bytes may wait for their reader; one text may be longer. A line has about 100.
const MOST_WAITING: usize = 1 << 20;

/// How long the end of the program waits until everything is written.
const LAST_WRITES: Duration = Duration::from_secs(1);

static LINES: Lines =
    Lines::new(|count| format!("hotslot: warn: {count} lines left out: nobody read them in time\n"));

/// Texts for one thread to write.
struct Lines {
    /// Lock order: innermost; never held while something is written.
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// What is written in place of this many texts for which there was no room.
    left_out: fn(u64) -> String,
}

struct Waiting {
    /// Whether there is a thread that writes.
    is_started: bool,
    texts: VecDeque<(Place, Vec<u8>)>,
    /// Of all texts.
    bytes: usize,
    /// Texts for which there was no room since the last one that was written.
    dropped: u64,
    /// A text was taken out and is not written yet.
    is_writing: bool,
}

/// Where a text goes.
#[derive(Clone)]
enum Place {
    Stderr,
    File(Arc<File>),
    Trace(Arc<TraceFile>),
}

/// Starts the thread. Until then each thread writes for itself.
///
/// # Errors
///
/// The host has no more threads.
pub fn start() -> io::Result<()> {
    LINES.start("lines")
}

/// Hands a text over, with its line feed.
pub(super) fn write(text: Vec<u8>) {
    LINES.add(Place::Stderr, text, MOST_WAITING);
}

/// Where a logger writes: each `write` is one text.
pub struct Log(Place);

impl Log {
    /// On stderr.
    pub fn to_stderr() -> Log {
        Log(Place::Stderr)
    }

    /// Into a file.
    pub fn to_file(file: File) -> Log {
        Log(Place::File(Arc::new(file)))
    }
}

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        LINES.add(self.0.clone(), text.to_vec(), MOST_WAITING);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The file of a trace, and its thread.
pub struct Trace {
    lines: &'static Lines,
    file: Arc<TraceFile>,
}

struct TraceFile {
    file: File,
    /// Told once, by the thread that writes, of what did not fit into the file.
    failed: Box<dyn Fn(io::Error) + Send + Sync>,
    has_failed: AtomicBool,
}

impl Trace {
    /// Starts the thread. `left_out`: the text in place of so many that had no room. `failed` is told, once,
    /// that the file takes no more.
    ///
    /// # Errors
    ///
    /// The host has no more threads.
    pub fn start(
        file: File,
        left_out: fn(u64) -> String,
        failed: impl Fn(io::Error) + Send + Sync + 'static,
    ) -> io::Result<Trace> {
        let lines = TRACE.get_or_init(|| Lines::new(left_out));
        lines.start("trace")?;
        let file = TraceFile { file, failed: Box::new(failed), has_failed: AtomicBool::new(false) };
        Ok(Trace { lines, file: Arc::new(file) })
    }

    /// Whether the file takes no more.
    pub fn has_ended(&self) -> bool {
        self.file.has_failed.load(Ordering::Relaxed)
    }

    /// Hands a text over, with its line feed.
    pub fn write(&self, text: Vec<u8>) {
        self.lines.add(Place::Trace(Arc::clone(&self.file)), text, MOST_WAITING);
    }
}

static TRACE: OnceLock<Lines> = OnceLock::new();

/// Ends the program at once, with a last text. Waits up to a second for the readers, and for no other
/// thread: one may be stuck in a system call. Nothing is unmapped or closed but by the kernel. May be called
/// by several threads; the first one's text is written.
pub fn end(last: &str, status: u8) -> ! {
    static IS_SAID: AtomicBool = AtomicBool::new(false);
    if !IS_SAID.swap(true, Ordering::SeqCst) && !last.is_empty() {
        // Whatever waits ahead of it.
        LINES.add(Place::Stderr, format!("{last}\n").into_bytes(), usize::MAX);
    }
    let deadline = Instant::now() + LAST_WRITES;
    // What happened to the trace is a message.
    for lines in [Some(&LINES), TRACE.get(), Some(&LINES)].into_iter().flatten() {
        lines.wait_until_written(deadline);
    }
    // SAFETY: the call ends the process; it runs no handlers, which could wait for a lock.
    unsafe { libc::_exit(status.into()) }
}

impl Lines {
    const fn new(left_out: fn(u64) -> String) -> Lines {
        let waiting =
            Waiting { is_started: false, texts: VecDeque::new(), bytes: 0, dropped: 0, is_writing: false };
        Lines { waiting: Mutex::new(waiting), changed: Condvar::new(), left_out }
    }

    fn start(&'static self, name: &str) -> io::Result<()> {
        thread::spawn(name.into(), Kind::Helper, || {
            loop {
                self.write_next();
            }
        })?;
        self.lock().is_started = true;
        Ok(())
    }

    fn wait_until_written(&self, deadline: Instant) {
        let is_busy = |waiting: &mut Waiting| waiting.is_writing || !waiting.texts.is_empty();
        let left = deadline.saturating_duration_since(Instant::now());
        let _late = self.changed.wait_timeout_while(self.lock(), left, is_busy);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a text that is not the first to wait, and with which more than `most` bytes would wait, only a
    /// count is kept.
    fn add(&self, place: Place, text: Vec<u8>, most: usize) {
        let mut waiting = self.lock();
        if !waiting.is_started {
            drop(waiting);
            return place.write(&text);
        }
        if waiting.bytes > 0 && waiting.bytes + text.len() > most {
            waiting.dropped += 1;
            return;
        }
        waiting.bytes += text.len();
        waiting.texts.push_back((place, text));
        self.changed.notify_all();
    }

    /// Waits for a text and writes it.
    fn write_next(&self) {
        let is_idle = |waiting: &mut Waiting| waiting.texts.is_empty();
        let waited = self.changed.wait_while(self.lock(), is_idle);
        let mut waiting = waited.unwrap_or_else(PoisonError::into_inner);
        let Some((place, text)) = waiting.texts.pop_front() else { return };
        waiting.bytes -= text.len();
        waiting.is_writing = true;
        let dropped = std::mem::take(&mut waiting.dropped);
        drop(waiting);
        place.write(&text);
        if dropped > 0 {
            place.write((self.left_out)(dropped).as_bytes());
        }
        self.lock().is_writing = false;
        self.changed.notify_all();
    }
}

impl Place {
    /// Waits for the reader. What cannot be written is dropped.
    fn write(&self, text: &[u8]) {
        match self {
            // What cannot be said is not said.
            Place::Stderr => _ = write_all(stderr(), text),
            Place::File(file) => _ = write_all(file.as_fd(), text),
            // After a line that is written in part, no other may follow.
            Place::Trace(trace) if trace.has_failed.load(Ordering::Relaxed) => {}
            Place::Trace(trace) => {
                if let Err(error) = write_all(trace.file.as_fd(), text) {
                    trace.has_failed.store(true, Ordering::Relaxed);
                    (trace.failed)(error);
                }
            }
        }
    }
}

/// Writes all of a text, whatever interrupts that. Waits for the reader.
///
/// # Errors
///
/// It is written in part, or not at all.
pub fn write_all(fd: BorrowedFd<'_>, mut text: &[u8]) -> io::Result<()> {
    while !text.is_empty() {
        // Not by `io::stderr`, whose lock a panic would wait for.
        match rustix::io::write(fd, text) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => text = &text[written..],
            Err(Errno::INTR) => {}
            // Another process that shares the file has made it non-blocking.
            Err(Errno::AGAIN) if poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None).is_ok() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_has_no_room_is_dropped_and_counted_where_it_would_have_been() {
        let lines = Lines::new(LINES.left_out);
        lines.lock().is_started = true;
        let (mut reader, writer) = io::pipe().unwrap();
        let place = Place::File(Arc::new(File::from(std::os::fd::OwnedFd::from(writer))));
        // One text may be longer than all that may wait.
        let long = [vec![b'x'; MOST_WAITING], b"\n".to_vec()].concat();
        lines.add(place.clone(), long.clone(), MOST_WAITING);
        for _ in 0..3 {
            lines.add(place.clone(), b"dropped\n".to_vec(), MOST_WAITING);
        }
        lines.add(place.clone(), b"the last\n".to_vec(), usize::MAX);
        let mut said = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| lines.write_next());
            let mut buffer = vec![0; long.len()];
            reader.read_exact(&mut buffer).unwrap();
            assert!(buffer == long);
        });
        lines.add(place, b"later\n".to_vec(), MOST_WAITING);
        lines.write_next();
        lines.write_next();
        // The place had the last writer.
        drop(lines);
        reader.read_to_end(&mut said).unwrap();
        let said = String::from_utf8(said).unwrap();
        assert_eq!(said, "hotslot: warn: 3 lines left out: nobody read them in time\nthe last\nlater\n");
    }
}
