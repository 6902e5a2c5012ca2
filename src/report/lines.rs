//! The thread `lines`, which writes messages, so that no other thread waits for their reader: stderr may be a
//! full pipe, and so may a log file.
//!
//! [`super::say`] and the logger of `hotslot` use it once [`start`] was called; [`end`] is the end of the
//! program.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::stderr;

use crate::sandbox::vmm::Kind;
use crate::thread;

/// How many bytes may wait for their reader; one text may be longer. A line has about 100.
const MOST_WAITING: usize = 1 << 20;

/// How long the end of the program waits until everything is written.
const LAST_WRITES: Duration = Duration::from_secs(1);

static LINES: Lines = Lines { waiting: Mutex::new(Waiting::NOTHING), changed: Condvar::new() };

struct Lines {
    /// Lock order: innermost; never held while something is written.
    waiting: Mutex<Waiting>,
    changed: Condvar,
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

impl Waiting {
    const NOTHING: Waiting =
        Waiting { is_started: false, texts: VecDeque::new(), bytes: 0, dropped: 0, is_writing: false };
}

/// Where a text goes.
#[derive(Clone)]
enum Place {
    Stderr,
    File(Arc<File>),
}

/// Starts the thread. Until then each thread writes for itself.
///
/// # Errors
///
/// The host has no more threads.
pub fn start() -> io::Result<()> {
    thread::spawn("lines".into(), Kind::Helper, || {
        loop {
            LINES.write_next();
        }
    })?;
    LINES.lock().is_started = true;
    Ok(())
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

/// Ends the program at once, with a last text. Waits up to a second for the readers, and for no other
/// thread: one may be stuck in a system call. Nothing is unmapped or closed but by the kernel. May be called
/// by several threads; the first one's text is written.
pub fn end(last: &str, status: u8) -> ! {
    static IS_SAID: AtomicBool = AtomicBool::new(false);
    if !IS_SAID.swap(true, Ordering::SeqCst) && !last.is_empty() {
        // Whatever waits ahead of it.
        LINES.add(Place::Stderr, format!("{last}\n").into_bytes(), usize::MAX);
    }
    let is_busy = |waiting: &mut Waiting| waiting.is_writing || !waiting.texts.is_empty();
    let _late = LINES.changed.wait_timeout_while(LINES.lock(), LAST_WRITES, is_busy);
    // SAFETY: the call ends the process; it runs no handlers, which could wait for a lock.
    unsafe { libc::_exit(status.into()) }
}

impl Lines {
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
            let lines = format!("hotslot: warn: {dropped} lines left out: nobody read them in time\n");
            place.write(lines.as_bytes());
        }
        self.lock().is_writing = false;
        self.changed.notify_all();
    }
}

impl Place {
    /// Waits for the reader. What cannot be written is dropped.
    fn write(&self, mut text: &[u8]) {
        let fd = match self {
            Place::Stderr => stderr(),
            Place::File(file) => file.as_fd(),
        };
        while !text.is_empty() {
            // Not by `io::stderr`, whose lock a panic would wait for.
            match rustix::io::write(fd, text) {
                Ok(written) if written > 0 => text = &text[written..],
                Err(Errno::INTR) => {}
                // Another process that shares the file has made it non-blocking.
                Err(Errno::AGAIN)
                    if poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::OUT)], None).is_ok() => {}
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn what_has_no_room_is_dropped_and_counted_where_it_would_have_been() {
        let lines = Lines { waiting: Mutex::new(Waiting::NOTHING), changed: Condvar::new() };
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
