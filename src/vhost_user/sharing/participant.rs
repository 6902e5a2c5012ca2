//! A device as an owner (shares, withdraws, waits until the recipients were told) and as a recipient (is
//! told, and is cut off where that fails).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::super::link::Link;
use super::super::wire::frontend::{Conversation, FrontendError};
use super::super::wire::message::MemoryRegion;
use super::state::{Change, Device, Recipient, State};
use crate::memory::pages::OwnedPages;
use crate::memory::shmem::MappingInfo;
use crate::memory::{Access, PAGE_SIZE};

/// How long a recipient may take to answer ADD_MEM_REG or REM_MEM_REG.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a MAP waits in all until the recipients know of it. Longer than [`ANSWER_TIMEOUT`]: a silent
/// recipient is given up by then.
const MAP_TIMEOUT: Duration = Duration::from_secs(3);

/// How long an UNMAP, or a reset, waits in all until the recipients have let go. More than [`ANSWER_TIMEOUT`]
/// twice, so that a recipient which itself waits for a silent one outlives it.
const LET_GO_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for a back-end which may be waiting for us.
const CIRCLE_TIMEOUT: Duration = Duration::from_millis(20);

/// Why a recipient is cut off although it broke no rule that we know of.
#[derive(Debug, Error)]
#[error("it could not be told within {} s to let go of another device's memory", LET_GO_TIMEOUT.as_secs())]
struct KeepsMemory;

/// What all devices of a machine see of each other's mappings.
pub struct Sharing {
    /// How many files each owner may keep open here.
    max_files: usize,
    /// Lock order: after a device's inbox or main socket; innermost. Held for a look, never while a peer is
    /// waited for.
    table: Mutex<Table>,
    /// A recipient was told, or left.
    changed: Condvar,
}

#[derive(Default)]
struct Table {
    state: State,
    /// Of the recipients; the indices are those of [`State::devices`].
    links: Vec<Option<Arc<Link>>>,
}

/// Why a mapping is not shared: its owner has so many other files open here.
#[derive(Debug, Error)]
#[error("{0} of its files are shared, and no more can be kept open: other back-ends do not see this one")]
pub struct TooManyFiles(usize);

impl Sharing {
    /// Without devices. Each owner may keep `max_files` open files here; what it maps of more is not shared.
    pub fn new(max_files: usize) -> Arc<Self> {
        Arc::new(Sharing { max_files, table: Mutex::default(), changed: Condvar::new() })
    }

    /// Adds a device.
    pub fn join(self: &Arc<Self>) -> Participant {
        let mut table = self.lock();
        table.state.devices.push(Device::default());
        table.links.push(None);
        Participant { sharing: Arc::clone(self), id: table.links.len() - 1 }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something may be due: has the recipients told.
    fn tell_recipients(&self) {
        self.lock().links.iter().flatten().for_each(|link| link.tell_of_others());
    }
}

/// A device whose mappings others see. When it is dropped the device is gone, and so are its mappings; that
/// waits for no recipient.
pub struct Owner(pub Participant);

impl Drop for Owner {
    fn drop(&mut self) {
        let Participant { sharing, id } = &self.0;
        {
            let state = &mut sharing.lock().state;
            state.devices[*id].has_left = true;
            state.withdraw_all(*id);
        }
        sharing.tell_recipients();
    }
}

/// A device, among those that see each other's mappings.
#[derive(Clone)]
pub struct Participant {
    sharing: Arc<Sharing>,
    id: usize,
}

impl Participant {
    /// The owner made a mapping of `file`, at `host` in this process: others see it when this returns, as far
    /// as they can. A back-end that does not see it answers with an I/O error if the guest uses it there.
    ///
    /// Called on the owner's channel thread, under its inbox lock, after the mapping was made and before it
    /// is answered.
    pub fn share(&self, mapping: &MappingInfo, host: u64, file: Arc<OwnedFd>) -> Result<(), TooManyFiles> {
        let address = mapping.guest.start();
        // Whether others can map it as they do: neither how it was opened nor its seals tell for sure.
        let try_both =
            || OwnedPages::of_file(file.as_fd(), mapping.file_offset, PAGE_SIZE as usize, Access::ReadWrite);
        if mapping.access != Access::ReadWrite && try_both().is_err() {
            log::debug!(
                "the mapping at {address:#x} is not shared: its file cannot be mapped for reading and writing"
            );
            return Ok(());
        }
        let Ok(stat) = rustix::fs::fstat(&file) else { return Ok(()) };
        let inode = (stat.st_dev, stat.st_ino);
        let region = MemoryRegion {
            guest_addr: address,
            size: mapping.guest.len(),
            user_addr: host,
            mmap_offset: mapping.file_offset,
        };
        self.close_files();
        let max_files = self.sharing.max_files;
        if !self.sharing.lock().state.share(self.id, region, inode, &file, max_files) {
            return Err(TooManyFiles(max_files));
        }
        self.sharing.tell_recipients();
        for (recipient, _) in self.wait_until_told(&[address], MAP_TIMEOUT, true) {
            if let Some(link) = self.link_of(recipient) {
                link.log.warn(format_args!(
                    "the back-end is busy, and learns of another device's mapping at {address:#x} only later"
                ));
            }
        }
        Ok(())
    }

    /// The owner's mapping at this guest address is gone: others have let go of it when this returns.
    ///
    /// Called as [`Self::share`] is, after the guest lost the mapping and before that is answered.
    pub fn withdraw(&self, address: u64) {
        let was_shared = self.sharing.lock().state.withdraw(self.id, address);
        if was_shared {
            self.wait_until_let_go(&[address], true);
            self.close_files();
        }
    }

    /// Closes the owner's files that are no longer shared. That can wait: called by the owner's device's
    /// thread alone, with no lock held that others need.
    pub fn close_files(&self) {
        let files = self.sharing.lock().state.take_files_to_close(self.id);
        drop(files);
    }

    /// All of the owner's mappings are gone, or about to be made anew by a back-end that came back: others
    /// have let go of them when this returns. Called on a vCPU's thread at a reset, or the keeper's, which
    /// hold no main socket then.
    pub fn withdraw_all(&self) {
        let addresses = self.sharing.lock().state.withdraw_all(self.id);
        if !addresses.is_empty() {
            self.wait_until_let_go(&addresses, false);
        }
    }

    /// Whether others are to see the mapping at this guest address.
    pub fn is_shared(&self, address: u64) -> bool {
        self.sharing.lock().state.live.contains_key(&address)
    }

    fn wait_until_let_go(&self, addresses: &[u64], on_channel: bool) {
        self.sharing.tell_recipients();
        for (recipient, is_circle) in self.wait_until_told(addresses, LET_GO_TIMEOUT, on_channel) {
            // In a circle it is told as soon as this returns; if that fails, its keeper gives it up.
            if let Some(link) = self.link_of(recipient).filter(|_| !is_circle) {
                link.give_up(&link.session(), &KeepsMemory);
            }
        }
    }

    /// Waits until all recipients were told of what is due at these addresses. Returns those that were not,
    /// and whether that was to end a circle. `on_channel`: the owner's back-end waits for us meanwhile.
    fn wait_until_told(&self, addresses: &[u64], timeout: Duration, on_channel: bool) -> Vec<(usize, bool)> {
        let deadline = Instant::now() + timeout;
        let mut late = Vec::new();
        let mut table = self.sharing.lock();
        for recipient in 0..table.state.devices.len() {
            if !table.state.is_being_told(recipient, addresses) {
                continue;
            }
            let is_circle = on_channel && table.state.waits_for(recipient, self.id);
            let left = match is_circle {
                true => CIRCLE_TIMEOUT,
                false => deadline.saturating_duration_since(Instant::now()),
            };
            if on_channel && !is_circle {
                table.state.devices[self.id].waits_for = Some(recipient);
            }
            let waited = self
                .sharing
                .changed
                .wait_timeout_while(table, left, |table| table.state.is_being_told(recipient, addresses));
            table = waited.unwrap_or_else(PoisonError::into_inner).0;
            if on_channel {
                table.state.devices[self.id].waits_for = None;
            }
            if table.state.is_being_told(recipient, addresses) {
                late.push((recipient, is_circle));
            }
        }
        late
    }

    /// Makes it a recipient whose back-end can be told of `room` mappings.
    pub fn see_others(&self, room: usize, link: Arc<Link>) {
        let mut table = self.sharing.lock();
        table.links[self.id] = Some(link);
        table.state.devices[self.id].sees = Some(Recipient::new(room));
    }

    /// The recipient is no longer one.
    pub fn see_nothing(&self) {
        let mut table = self.sharing.lock();
        table.links[self.id] = None;
        table.state.devices[self.id].sees = None;
        self.sharing.changed.notify_all();
    }

    /// SET_MEM_TABLE has made the recipient's back-end forget whatever it was told: tells it all there is.
    /// Called while it is started, on a vCPU's thread that has the main socket; what becomes due meanwhile is
    /// for the keeper.
    pub fn tell_all(&self, to: &mut Conversation<'_>) -> Result<(), FrontendError> {
        let due = self.sharing.lock().state.restart(self.id);
        for _ in 0..due {
            self.tell_next(to)?;
        }
        Ok(())
    }

    /// Tells the recipient the next thing that is due. A recipient that cannot be told, or does not let go,
    /// is given up.
    pub fn tell_next(&self, to: &mut Conversation<'_>) -> Result<(), FrontendError> {
        let mut table = self.sharing.lock();
        let (change, link) = (table.state.next_change(self.id), table.links[self.id].clone());
        drop(table);
        if let (Some(change), Some(link)) = (change, link) {
            let told = match &change {
                Change::Add(shared) => to.change_memory(&shared.region, Some(shared.file.as_fd())),
                Change::Remove(region) => to.change_memory(region, None),
                Change::LeaveOut { address, told } => {
                    link.log.warn(format_args!(
                        "the back-end knows {told} mappings of other devices, and cannot be told of more: it does not see \
                         the one at {address:#x}"
                    ));
                    Ok(())
                }
            };
            let is_refused = match (&told, &change) {
                (Ok(()), _) => false,
                // It is not told of this mapping again before its next start.
                (Err(error @ FrontendError::Refused { .. }), Change::Add(shared)) => {
                    let address = shared.region.guest_addr;
                    link.log.warn(format_args!(
                        "{error}: it does not see another device's mapping at {address:#x}"
                    ));
                    true
                }
                (Err(error), _) => {
                    // First cut off, then no longer waited for.
                    link.give_up(&link.session(), error);
                    self.sharing.lock().state.discard(change);
                    self.forget();
                    return told;
                }
            };
            let state = &mut self.sharing.lock().state;
            state.record(self.id, &change, is_refused);
            state.discard(change);
        }
        // Also where nothing had to be told: what was due may have become nothing.
        self.sharing.changed.notify_all();
        Ok(())
    }

    /// The recipient is lost, or away.
    pub fn forget(&self) {
        if let Some(recipient) = self.sharing.lock().state.recipient(self.id) {
            recipient.forget();
        }
        self.sharing.changed.notify_all();
    }

    /// Whether something is due for the recipient.
    pub fn is_due(&self) -> bool {
        self.sharing.lock().state.recipient(self.id).is_some_and(|recipient| !recipient.due.is_empty())
    }

    fn link_of(&self, recipient: usize) -> Option<Arc<Link>> {
        self.sharing.lock().links[recipient].clone()
    }
}
