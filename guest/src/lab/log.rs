//! The log of the machine's kernel, with the messages of QEMU or hotslot: its end is kept, to be shown when
//! the lab fails.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use super::options::Names;
use crate::outcome::{Outcome, failed};

/// How many bytes are kept, and how many lines of them are shown.
const LOG_KEPT: usize = 256 * 1024;
const LOG_SHOWN: usize = 30;

pub struct Log {
    names: Names,
    lines: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Log {
    /// Reads `stream` to its end, and copies it to the file `copy` if there is one.
    pub fn follow(mut stream: UnixStream, copy: Option<&Path>, names: Names) -> Outcome<Log> {
        let mut copy = match copy {
            Some(path) => Some(File::create(path).map_err(failed("write", path))?),
            None => None,
        };
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if copy.as_mut().is_some_and(|file| file.write_all(&buffer[..length]).is_err()) {
                    copy = None;
                }
                // A leaf lock: nothing else is taken under it.
                let mut kept = kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                kept.extend_from_slice(&buffer[..length]);
                let surplus = kept.len().saturating_sub(LOG_KEPT);
                kept.drain(..surplus);
            }
        });
        Ok(Log { names, lines, reader: Some(reader) })
    }

    /// Prints the last lines. The machine has been stopped, so the log has an end.
    pub fn show(mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let Names { script, machine } = self.names;
        let kept = self.lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let text = String::from_utf8_lossy(&kept);
        let lines: Vec<&str> = text.lines().map(|line| line.trim_end_matches('\r')).collect();
        let first = lines.len().saturating_sub(LOG_SHOWN);
        if lines.is_empty() {
            eprintln!("{script}: the {machine}'s log is empty");
            return;
        }
        eprintln!("{script}: the last lines of the {machine}'s log:");
        for line in &lines[first..] {
            eprintln!("  {line}");
        }
    }
}
