//! Who else sees a device's mappings (`share-shmem=on`, SHM-80): other back-ends are told of each by
//! ADD_MEM_REG, and told to let go of it by REM_MEM_REG, so that the guest can hand its pages to their
//! devices.
//!
//! `vmm::backends` makes one [`Sharing`] for the machine and a [`Member`] for each device. As an owner, a
//! member is used by `backend_channel` (MAP, UNMAP) and by `device` (reset, end); as a recipient, by `device`
//! (start) and by its [`Courier`], a thread that tells it what is due.
//!
//! # Who waits for whom
//!
//! What was mapped is told before MAP is answered, and what was unmapped before UNMAP is answered: the
//! owner's channel thread waits for *another* back-end, never for its own. That one may itself be waiting for
//! us, on the thread that would answer: while it is started or reset (a vCPU has its main socket), or because
//! a request of its own is being handled, whose sharing waits for a third back-end, or for the first. So:
//!
//! - Channel threads do not touch another device's main socket, nor wait for its lock. They say what is due,
//!   and wait, for a bounded time, until the courier or a vCPU has told it.
//! - Before a channel thread waits, it looks whether that would close a circle of owners that wait for each
//!   other. If so it gives the others only `CIRCLE_PATIENCE` (most back-ends have another thread for their
//!   main socket), and goes on: its answer is what the circle needs. What is due stays due, and is told when
//!   that back-end can listen again.
//! - A vCPU that holds a main socket waits for that back-end alone. Nobody waits for a vCPU but on that
//!   account.
//!
//! A recipient that leaves an ADD or a REM unanswered for `ANSWER_TIMEOUT` is given up, so it delays others
//! once. One that is just busy past `MAP_TIMEOUT` learns of the mapping later, and the log says so; one that
//! cannot be told within `LET_GO_TIMEOUT` to let go is cut off: it must not keep what its owner has taken
//! back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::connection::Deadline;
use super::frontend::{Frontend, FrontendError};
use super::message::MemoryRegion;
use super::watch::Link;
use crate::memory::shmem::MappingInfo;
use crate::memory::{Access, PAGE_SIZE};
use crate::report::MisuseLog;
use crate::thread;

/// How long a recipient may take to answer ADD_MEM_REG or REM_MEM_REG.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a MAP waits in all until the recipients know of it. Longer than [`ANSWER_TIMEOUT`]: who is silent
/// is gone by then.
const MAP_TIMEOUT: Duration = Duration::from_secs(3);

/// How long an UNMAP, or a reset, waits in all until the recipients have let go. More than [`ANSWER_TIMEOUT`]
/// twice, so that who is only busy with somebody silent outlives that one.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for a back-end which may be waiting for us.
const CIRCLE_PATIENCE: Duration = Duration::from_millis(20);

/// Why a recipient is cut off although it did nothing wrong that we know of.
#[derive(Debug, Error)]
#[error("it could not be told within {} s to let go of another device's memory", LET_GO_TIMEOUT.as_secs())]
struct KeepsMemory;

/// What all devices of a machine see of each other's mappings.
pub struct Sharing {
    /// How many files each owner may keep open here.
    max_files: usize,
    /// Lock order: after a device's inbox or main socket; innermost. Held for a look, never while a peer is
    /// waited for.
    state: Mutex<State>,
    /// Something was told, or is due, or somebody left.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Mappings ever shared.
    made: u64,
    /// What is mapped and shared now, by its first guest address.
    live: BTreeMap<u64, Shared>,
    members: Vec<Device>,
}

/// A mapping that others see.
#[derive(Clone)]
struct Shared {
    owner: usize,
    /// Of all mappings ever shared: no other has it.
    number: u64,
    region: MemoryRegion,
    file: Arc<OwnedFd>,
}

struct Device {
    log: Arc<MisuseLog>,
    /// The files of its mappings, by device and inode: one open descriptor for each, however many mappings it
    /// has.
    files: HashMap<(u64, u64), Weak<OwnedFd>>,
    /// It is gone: it shares nothing any more.
    has_left: bool,
    /// The recipient that the request which it waits for waits for.
    waits_for: Option<usize>,
    /// What it sees of others. `None` where its back-end cannot.
    sees: Option<Recipient>,
}

struct Recipient {
    link: Arc<Link>,
    /// How many mappings it can be told of.
    room: usize,
    /// From its first SET_MEM_TABLE on.
    is_started: bool,
    /// What it was told, as it was told: by guest address, with the mapping's number.
    told: BTreeMap<u64, (u64, MemoryRegion)>,
    /// Guest addresses where it may have to be told something.
    due: BTreeSet<u64>,
    /// The one of them that it is being told about.
    under_way: Option<u64>,
    /// Guest addresses of mappings for which there was no room.
    left_out: BTreeSet<u64>,
}

/// What a recipient is to be told.
enum Change {
    Add(Shared),
    Remove(MemoryRegion),
}

impl Recipient {
    fn is_being_told(&self, addresses: &[u64]) -> bool {
        let is_due = |address| self.due.contains(address) || self.under_way == Some(*address);
        addresses.iter().any(is_due)
    }

    fn forget(&mut self) {
        self.told.clear();
        self.due.clear();
        self.left_out.clear();
        self.under_way = None;
    }
}

impl State {
    /// Marks what all recipients but the owner (SHM-79) are to be told.
    fn make_due(&mut self, owner: usize, addresses: &[u64]) {
        for (id, device) in self.members.iter_mut().enumerate() {
            if let Some(recipient) = device.sees.as_mut().filter(|it| id != owner && it.is_started) {
                recipient.due.extend(addresses);
            }
        }
    }

    fn recipient(&mut self, id: usize) -> Option<&mut Recipient> {
        self.members.get_mut(id)?.sees.as_mut()
    }

    fn is_being_told(&self, id: usize, addresses: &[u64]) -> bool {
        let recipient = self.members.get(id).and_then(|device| device.sees.as_ref());
        recipient.is_some_and(|recipient| recipient.is_being_told(addresses))
    }

    /// Whether `recipient` waits, over however many others, for `owner`.
    fn waits_for(&self, recipient: usize, owner: usize) -> bool {
        let mut at = Some(recipient);
        // It ends: nobody begins to wait where that would close a circle.
        while let Some(id) = at {
            if id == owner {
                return true;
            }
            at = self.members.get(id).and_then(|device| device.waits_for);
        }
        false
    }

    /// The next thing that a recipient is to be told.
    fn next_change(&mut self, id: usize) -> Option<(u64, Change)> {
        let device = self.members.get_mut(id)?;
        let recipient = device.sees.as_mut()?;
        while let Some(address) = recipient.due.pop_first() {
            let change = match (recipient.told.get(&address), self.live.get(&address)) {
                (Some((number, _)), Some(shared)) if *number == shared.number => continue,
                // What is there now comes next: it stays due.
                (Some((_, region)), _) => Change::Remove(*region),
                (None, Some(_)) if recipient.told.len() >= recipient.room => {
                    recipient.left_out.insert(address);
                    device.log.warn(format_args!(
                        "the back-end knows {} mappings of other devices, and cannot be told of more: it does not see the \
                         one at {address:#x}",
                        recipient.told.len()
                    ));
                    continue;
                }
                (None, Some(shared)) => Change::Add(shared.clone()),
                (None, None) => continue,
            };
            recipient.under_way = Some(address);
            return Some((address, change));
        }
        None
    }

    /// A recipient was told.
    fn record(&mut self, id: usize, address: u64, change: &Change, is_refused: bool) {
        let device = self.members.get_mut(id);
        let Some(recipient) = device.and_then(|device| device.sees.as_mut()) else {
            return;
        };
        recipient.under_way = None;
        match change {
            Change::Add(_) if is_refused => {}
            Change::Add(shared) => {
                recipient.told.insert(address, (shared.number, shared.region));
            }
            Change::Remove(_) => {
                recipient.told.remove(&address);
                let next = recipient.left_out.pop_first();
                recipient.due.extend(next);
                if self.live.contains_key(&address) {
                    recipient.due.insert(address);
                }
            }
        }
    }
}

impl Sharing {
    /// Nobody, with nothing. Each owner may keep `max_files` open files here; what it maps of more is not
    /// shared.
    pub fn new(max_files: usize) -> Arc<Self> {
        Arc::new(Sharing { max_files, state: Mutex::default(), changed: Condvar::new() })
    }

    /// Adds a device.
    pub fn join(self: &Arc<Self>, name: &str) -> Member {
        let mut state = self.lock();
        state.members.push(Device {
            log: Arc::new(MisuseLog::new(name)),
            files: HashMap::new(),
            has_left: false,
            waits_for: None,
            sees: None,
        });
        Member { sharing: Arc::clone(self), id: state.members.len() - 1 }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A device, among those that see each other's mappings.
#[derive(Clone)]
pub struct Member {
    sharing: Arc<Sharing>,
    id: usize,
}

impl Member {
    /// The owner made a mapping of `file`, at `host` in this process: others see it when this returns, as far
    /// as they can. Never fails: who does not see it answers with an I/O error if the guest uses it there,
    /// and the log says so.
    ///
    /// Called on the owner's channel thread, under its inbox lock, after the mapping was made and before it
    /// is answered.
    pub fn share(&self, mapping: &MappingInfo, host: u64, file: OwnedFd) {
        if !is_for_both(mapping, &file) {
            log::debug!(
                "the mapping at {:#x} is not shared: its file cannot be mapped for reading and writing",
                mapping.guest.start()
            );
            return;
        }
        let address = mapping.guest.start();
        {
            let mut state = self.sharing.lock();
            let number = state.made;
            let Some(file) = self.keep(&mut state, file) else {
                return;
            };
            let region = MemoryRegion {
                guest_addr: address,
                size: mapping.guest.len(),
                user_addr: host,
                mmap_offset: mapping.file_offset,
            };
            let shared = Shared { owner: self.id, number, region, file };
            state.made += 1;
            state.live.insert(address, shared);
            state.make_due(self.id, &[address]);
        }
        self.sharing.changed.notify_all();
        for (recipient, _) in self.wait_until_told(&[address], MAP_TIMEOUT, true) {
            let log = Arc::clone(&self.sharing.lock().members[recipient].log);
            log.warn(format_args!(
                "the back-end is busy, and learns of another device's mapping at {address:#x} only later"
            ));
        }
    }

    /// The owner's mapping at this guest address is gone: others have let go of it when this returns.
    ///
    /// Called as [`Self::share`] is, after the guest lost the mapping and before that is answered.
    pub fn withdraw(&self, address: u64) {
        {
            let mut state = self.sharing.lock();
            if state.live.remove(&address).is_none() {
                return;
            }
            state.make_due(self.id, &[address]);
        }
        self.wait_until_let_go(&[address], true);
    }

    /// All of the owner's mappings are gone: others have let go of them when this returns. Called on a vCPU's
    /// thread at a reset, which holds no main socket then.
    pub fn withdraw_all(&self) {
        let addresses = self.take_all();
        if !addresses.is_empty() {
            self.wait_until_let_go(&addresses, false);
        }
    }

    /// The owner is gone, and so are its mappings. Waits for nobody.
    pub fn leave(&self) {
        if let Some(device) = self.sharing.lock().members.get_mut(self.id) {
            device.has_left = true;
        }
        self.take_all();
        self.sharing.changed.notify_all();
    }

    /// Whether others are to see the mapping at this guest address.
    pub fn is_shared(&self, address: u64) -> bool {
        self.sharing.lock().live.contains_key(&address)
    }

    fn take_all(&self) -> Vec<u64> {
        let mut state = self.sharing.lock();
        let mut addresses = Vec::new();
        state.live.retain(|&address, shared| {
            let stays = shared.owner != self.id;
            if !stays {
                addresses.push(address);
            }
            stays
        });
        state.make_due(self.id, &addresses);
        addresses
    }

    /// The descriptor to keep for a file: the one there is, or this one. It holds nothing that the mapping
    /// does not hold.
    fn keep(&self, state: &mut State, file: OwnedFd) -> Option<Arc<OwnedFd>> {
        let device = state.members.get_mut(self.id).filter(|device| !device.has_left)?;
        let file = File::from(file);
        let metadata = file.metadata().ok()?;
        let key = (metadata.dev(), metadata.ino());
        if let Some(kept) = device.files.get(&key).and_then(Weak::upgrade) {
            return Some(kept);
        }
        device.files.retain(|_, kept| kept.strong_count() > 0);
        if device.files.len() >= self.sharing.max_files {
            device.log.warn(format_args!(
                "{} of its files are shared, and no more can be kept open: other back-ends do not see this one",
                device.files.len()
            ));
            return None;
        }
        let file = Arc::new(OwnedFd::from(file));
        device.files.insert(key, Arc::downgrade(&file));
        Some(file)
    }

    fn wait_until_let_go(&self, addresses: &[u64], on_channel: bool) {
        self.sharing.changed.notify_all();
        for (recipient, is_circle) in self.wait_until_told(addresses, LET_GO_TIMEOUT, on_channel) {
            // In a circle it is told as soon as this returns; if that fails, its courier gives it up.
            if let Some(link) = self.link_of(recipient).filter(|_| !is_circle) {
                link.give_up(&KeepsMemory);
            }
        }
    }

    /// Waits until all recipients were told of what is due at these addresses. Returns those that were not,
    /// and whether that was to end a circle. `on_channel`: the owner's back-end waits for us meanwhile.
    fn wait_until_told(&self, addresses: &[u64], timeout: Duration, on_channel: bool) -> Vec<(usize, bool)> {
        let deadline = Instant::now() + timeout;
        let mut late = Vec::new();
        let mut state = self.sharing.lock();
        for recipient in 0..state.members.len() {
            if !state.is_being_told(recipient, addresses) {
                continue;
            }
            let is_circle = on_channel && state.waits_for(recipient, self.id);
            let until = match is_circle {
                true => Instant::now() + CIRCLE_PATIENCE,
                false => deadline,
            };
            if on_channel && !is_circle {
                state.members[self.id].waits_for = Some(recipient);
            }
            let left = until.saturating_duration_since(Instant::now());
            let waited = self
                .sharing
                .changed
                .wait_timeout_while(state, left, |state| state.is_being_told(recipient, addresses));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if on_channel {
                state.members[self.id].waits_for = None;
            }
            if state.is_being_told(recipient, addresses) {
                late.push((recipient, is_circle));
            }
        }
        late
    }

    /// Tells the recipient the next thing that is due. One that cannot be told, or does not let go, is given
    /// up.
    fn tell_next(&self, frontend: &mut Frontend, deadline: Deadline) -> Result<(), FrontendError> {
        let Some((address, change)) = self.sharing.lock().next_change(self.id) else {
            // What was due may have become nothing.
            self.sharing.changed.notify_all();
            return Ok(());
        };
        let told = match &change {
            Change::Add(shared) => frontend.add_memory(&shared.region, shared.file.as_fd(), deadline),
            Change::Remove(region) => frontend.remove_memory(region, deadline),
        };
        let is_refused = match (&told, &change) {
            (Ok(()), _) => false,
            // It goes without: not told again before its next start.
            (Err(error @ FrontendError::Refused { .. }), Change::Add(_)) => {
                let log = Arc::clone(&self.sharing.lock().members[self.id].log);
                log.warn(format_args!("{error}: it does not see another device's mapping at {address:#x}"));
                true
            }
            (Err(error), _) => {
                // First cut off, then no longer waited for.
                if let Some(link) = self.link_of(self.id) {
                    link.give_up(error);
                }
                self.forget();
                return told;
            }
        };
        self.sharing.lock().record(self.id, address, &change, is_refused);
        self.sharing.changed.notify_all();
        Ok(())
    }

    /// The recipient is lost: it knows of nothing, and is told of nothing.
    fn forget(&self) {
        if let Some(recipient) = self.sharing.lock().recipient(self.id) {
            recipient.forget();
            recipient.is_started = false;
        }
        self.sharing.changed.notify_all();
    }

    fn link_of(&self, recipient: usize) -> Option<Arc<Link>> {
        let mut state = self.sharing.lock();
        state.recipient(recipient).map(|it| Arc::clone(&it.link))
    }
}

/// Whether others can map the file as they do: for reading and writing.
fn is_for_both(mapping: &MappingInfo, file: &OwnedFd) -> bool {
    if mapping.access == Access::ReadWrite {
        return true;
    }
    // Neither how it was opened nor its seals tell for sure; trying does.
    let Ok(offset) = libc::off_t::try_from(mapping.file_offset) else {
        return false;
    };
    let (len, both) = (PAGE_SIZE as usize, libc::PROT_READ | libc::PROT_WRITE);
    // SAFETY: without MAP_FIXED the kernel chooses addresses that nobody uses.
    let address =
        unsafe { libc::mmap(std::ptr::null_mut(), len, both, libc::MAP_SHARED, file.as_raw_fd(), offset) };
    if address == libc::MAP_FAILED {
        return false;
    }
    // SAFETY: the page was mapped above, and nobody else knows of it.
    unsafe { libc::munmap(address, len) };
    true
}

/// The thread that tells a recipient what is due. Dropping it stops and joins it, and ends the main socket.
pub struct Courier {
    member: Member,
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
}

impl Courier {
    /// Starts it for a back-end that can be told of `room` mappings, over its main socket.
    pub fn start(
        name: &str,
        member: Member,
        room: usize,
        main: Arc<Mutex<Frontend>>,
        link: Arc<Link>,
    ) -> io::Result<Courier> {
        if let Some(device) = member.sharing.lock().members.get_mut(member.id) {
            device.sees = Some(Recipient {
                link: Arc::clone(&link),
                room,
                is_started: false,
                told: BTreeMap::new(),
                due: BTreeSet::new(),
                under_way: None,
                left_out: BTreeSet::new(),
            });
        }
        let (courier, its_link) = (member.clone(), Arc::clone(&link));
        let thread = thread::spawn(format!("share-{name}"), move || courier.run(&main, &its_link))?;
        Ok(Courier { member, link, thread: Some(thread) })
    }

    /// SET_MEM_TABLE has made the back-end forget whatever it was told: tells it all there is. Called while
    /// it is started, on a vCPU's thread that has the main socket; what becomes due meanwhile is for the
    /// courier.
    pub fn restart(&self, frontend: &mut Frontend, deadline: Deadline) -> Result<(), FrontendError> {
        let id = self.member.id;
        let due = {
            let mut state = self.member.sharing.lock();
            let others = state.live.iter().filter(|(_, shared)| shared.owner != id);
            let addresses: BTreeSet<u64> = others.map(|(&address, _)| address).collect();
            let count = addresses.len();
            if let Some(recipient) = state.recipient(id) {
                recipient.forget();
                recipient.is_started = true;
                recipient.due = addresses;
            }
            count
        };
        for _ in 0..due {
            self.member.tell_next(frontend, deadline)?;
        }
        Ok(())
    }
}

impl Drop for Courier {
    fn drop(&mut self) {
        if let Some(device) = self.member.sharing.lock().members.get_mut(self.member.id) {
            device.sees = None;
        }
        self.member.sharing.changed.notify_all();
        // It may be waiting for an answer.
        self.link.hang_up();
        if let Some(thread) = self.thread.take() {
            // A panic in there was printed already.
            let _ = thread.join();
        }
    }
}

impl Member {
    /// The courier's thread.
    fn run(&self, main: &Mutex<Frontend>, link: &Link) {
        while self.wait_for_work() {
            // One thing at a time: a vCPU may want the socket in between.
            let mut frontend = main.lock().unwrap_or_else(PoisonError::into_inner);
            if link.is_lost() {
                self.forget();
            } else {
                // Whoever is not told is given up, and the log says why.
                let _ = self.tell_next(&mut frontend, Deadline::after(ANSWER_TIMEOUT));
            }
        }
    }

    /// False when there will be none any more.
    fn wait_for_work(&self) -> bool {
        let state = self.sharing.lock();
        let idle = self.sharing.changed.wait_while(state, |state| {
            state.recipient(self.id).is_some_and(|recipient| recipient.due.is_empty())
        });
        let mut state = idle.unwrap_or_else(PoisonError::into_inner);
        state.recipient(self.id).is_some()
    }
}
