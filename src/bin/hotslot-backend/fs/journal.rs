//! The file of `--state`: what is known of the guest outlives this process.
//!
//! It is a list of records, each with the changes that one request made, written before the guest has the
//! answer. What is written survives SIGKILL in the host's page cache; the guest does not survive the end of
//! the host, so nothing is synced. A record that the process did not finish is dropped: that request was not
//! answered, and the next back-end executes it again.
//!
//! ```text
//! 0   MAGIC
//! 24  le64 device and le64 inode number of the directory
//! 40  le64 where the records begin
//! 48  records: le32 length, changes; a length of 0 is the end
//! ```
//!
//! When most of the file is out of date, it is written anew: behind the records, and then, if there is room
//! now, at the front; each time the number at 40 changes last. A second file is not possible: the threads
//! that serve cannot open one.
//!
//! A request that must not be executed twice (make a directory, rename) is announced: [`Keeper::attempt`].
//! Called by the modules that know the guest's files, and by [`super::requests`].

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use hotslot::report::say;

use super::change::{Before, Change, Key};
use super::kept::Kept;
use crate::lock::lock;

const MAGIC: &[u8; 24] = b"hotslot-backend fs v1\n\0\0";
const DIRECTORY: u64 = 24;
const BEGIN: u64 = 40;
const RECORDS: u64 = 48;
/// So much may be out of date before the file is written anew, besides as much as is not.
const SLACK: u64 = 4 << 20;

/// Why a file cannot be one of `--state`.
#[derive(Debug, thiserror::Error)]
pub enum NoState {
    #[error("another hotslot-backend uses it")]
    InUse,
    #[error("it is not empty, and not the state of a hotslot-backend fs")]
    Other,
    #[error("it is the state of another directory")]
    OtherDirectory,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The file, and what is in it.
pub struct Journal {
    /// Lock order: innermost.
    inner: Mutex<Inner>,
    /// What the last process may have executed without an answer; taken once. Lock order: innermost.
    left: Mutex<Left>,
}

struct Inner {
    file: File,
    begin: u64,
    end: u64,
    /// How long the records were when they were written anew.
    compact: u64,
    kept: Kept,
    /// It could not be written: nothing is kept from now on.
    is_lost: bool,
}

#[derive(Default)]
struct Left {
    attempts: HashMap<u64, (Key, Before)>,
    answers: HashMap<u64, (Key, Vec<u8>)>,
}

/// What the thread's request has changed so far.
#[derive(Default)]
struct Current {
    slot: u64,
    key: Key,
    changes: Vec<Change>,
    has_attempted: bool,
    again: Option<Before>,
}

thread_local! {
    static CURRENT: RefCell<Current> = RefCell::default();
}

impl Journal {
    /// Opens or makes the file, for this directory.
    pub fn open(path: &Path, directory: &Metadata) -> Result<Self, NoState> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let mut file = options.open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Err(NoState::InUse),
            result => result.map_err(io::Error::from)?,
        }
        let id = [directory.dev().to_le_bytes(), directory.ino().to_le_bytes()].concat();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let mut inner =
            Inner { file, begin: RECORDS, end: RECORDS, compact: 0, kept: Kept::default(), is_lost: false };
        if bytes.is_empty() {
            inner.file.write_all_at(&[&MAGIC[..], &id, &RECORDS.to_le_bytes()].concat(), 0)?;
        } else {
            let header = bytes.get(..RECORDS as usize).filter(|header| header.starts_with(MAGIC));
            let header = header.ok_or(NoState::Other)?;
            if header[DIRECTORY as usize..BEGIN as usize] != id {
                return Err(NoState::OtherDirectory);
            }
            let begin = header[BEGIN as usize..].try_into().map(u64::from_le_bytes).unwrap_or(RECORDS);
            inner.read(&bytes, begin, path);
        }
        inner.write_anew()?;
        Ok(Journal { inner: Mutex::new(inner), left: Mutex::default() })
    }

    /// A session begins. Returns what is known of its guest, if it is the one of the last session.
    pub fn begin(&self) -> Kept {
        let kept = lock(&self.inner).kept.clone();
        *lock(&self.left) = Left { attempts: kept.attempts.clone(), answers: kept.answers.clone() };
        kept
    }

    fn write(&self, changes: &[Change]) {
        let inner = &mut *lock(&self.inner);
        if inner.is_lost {
            return;
        }
        changes.iter().for_each(|change| inner.kept.apply(change));
        let written = inner.append(changes.iter());
        if let Err(e) = written.and_then(|()| inner.write_anew_if_due()) {
            say(format_args!("fs: cannot write the state ({e}): nothing is kept from now on"));
            inner.is_lost = true;
            // A state that is out of date would be wrong.
            let _ = inner.file.set_len(0);
        }
    }
}

impl Inner {
    fn read(&mut self, bytes: &[u8], begin: u64, path: &Path) {
        let mut at = usize::try_from(begin).unwrap_or(usize::MAX);
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let Some((len, rest)) = rest.split_first_chunk() else {
                break;
            };
            let len = u32::from_le_bytes(*len) as usize;
            if len == 0 {
                break;
            }
            let changes = rest.get(..len).and_then(|mut record| {
                let mut changes = Vec::new();
                while !record.is_empty() {
                    changes.push(Change::decode(&mut record)?);
                }
                Some(changes)
            });
            let Some(changes) = changes else {
                say(format_args!("fs: the last record of {path:?} is incomplete, and is left out"));
                break;
            };
            changes.iter().for_each(|change| self.kept.apply(change));
            at += 4 + len;
        }
        self.begin = begin;
        self.end = at.min(bytes.len()) as u64;
    }

    fn append<'a>(&mut self, changes: impl Iterator<Item = &'a Change>) -> io::Result<()> {
        let record = record(changes);
        self.file.write_all_at(&record, self.end)?;
        self.end += record.len() as u64;
        Ok(())
    }

    fn write_anew_if_due(&mut self) -> io::Result<()> {
        if self.end - self.begin > 2 * self.compact + SLACK { self.write_anew() } else { Ok(()) }
    }

    fn write_anew(&mut self) -> io::Result<()> {
        let changes: Vec<Change> = self.kept.changes().collect();
        let record = record(changes.iter());
        let len = record.len() as u64;
        let record = [&record[..], &[0; 4]].concat();
        loop {
            let fits_in_front = RECORDS + len + 4 <= self.begin;
            let begin = if fits_in_front { RECORDS } else { self.end };
            self.file.write_all_at(&record, begin)?;
            self.file.write_all_at(&begin.to_le_bytes(), BEGIN)?;
            self.file.set_len(begin + len)?;
            (self.begin, self.end, self.compact) = (begin, begin + len, len);
            // It went behind the old records for lack of room in front of them. Now there may be room.
            if fits_in_front || RECORDS + len + 4 > begin {
                return Ok(());
            }
        }
    }
}

fn record<'a>(changes: impl Iterator<Item = &'a Change>) -> Vec<u8> {
    let mut record = vec![0; 4];
    changes.for_each(|change| change.encode(&mut record));
    let len = (record.len() - 4) as u32;
    record[..4].copy_from_slice(&len.to_le_bytes());
    record
}

/// The journal of `--state`; `None` without that option: then nothing is kept.
#[derive(Clone, Default)]
pub struct Keeper(pub Option<Arc<Journal>>);

impl Keeper {
    /// A request begins on this thread, which is number `slot`. Returns the answer that the last process has
    /// written down and perhaps not given.
    pub fn begin(&self, slot: u64, key: Key) -> Option<Vec<u8>> {
        let journal = self.0.as_ref()?;
        let left = &mut *lock(&journal.left);
        let done = left.answers.iter().find(|(_, (of, _))| *of == key).map(|(&slot, _)| slot);
        if let Some(slot) = done {
            return left.answers.remove(&slot).map(|(_, bytes)| bytes);
        }
        let tried = left.attempts.iter().find(|(_, (of, _))| *of == key).map(|(&slot, _)| slot);
        let again = tried.and_then(|slot| left.attempts.remove(&slot)).map(|(_, before)| before);
        CURRENT.replace(Current { slot, key, again, ..Current::default() });
        None
    }

    /// The thread's request changes this.
    pub fn note(&self, change: impl FnOnce() -> Change) {
        if self.0.is_some() {
            CURRENT.with_borrow_mut(|current| current.changes.push(change()));
        }
    }

    /// The thread's request is about to be executed, and must not be twice. `before`: what tells later
    /// whether it was; `None` if it will fail. Returns what the last process found, if that has begun to
    /// execute it.
    pub fn attempt(&self, before: impl FnOnce() -> Option<Before>) -> Option<Before> {
        self.attempt_with(before, Vec::new)
    }

    /// The same, with changes that are recorded before it is executed.
    pub fn attempt_with(
        &self,
        before: impl FnOnce() -> Option<Before>,
        changes: impl FnOnce() -> Vec<Change>,
    ) -> Option<Before> {
        let journal = self.0.as_ref()?;
        let announced = CURRENT.with_borrow_mut(|current| {
            if current.again.is_some() {
                return Err(current.again);
            }
            current.has_attempted = true;
            Ok((current.slot, current.key))
        });
        match announced {
            Err(again) => again,
            Ok((slot, key)) => {
                if let Some(before) = before() {
                    let mut changes = changes();
                    changes.push(Change::Attempt { slot, key, before });
                    journal.write(&changes);
                }
                None
            }
        }
    }

    /// The request is executed: writes down what it has changed, and its answer.
    pub fn commit(&self, answer: impl FnOnce() -> Option<Vec<u8>>) {
        let Some(journal) = &self.0 else { return };
        let Current { slot, key, mut changes, has_attempted, again } = CURRENT.take();
        if changes.is_empty() && !has_attempted && again.is_none() {
            return;
        }
        if let Some(bytes) = answer() {
            changes.push(Change::Answer { slot, key, bytes });
        }
        journal.write(&changes);
    }
}
