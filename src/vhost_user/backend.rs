//! A device's back-end, and what the driver has made of the device: enough to make the same of a back-end
//! that comes back after its death.
//!
//! [`super::device`] keeps the record and tells the back-end, on vCPU threads; [`super::keeper`] takes up the
//! next session and tells it all of the record.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use thiserror::Error;

use super::handshake::{Handshake, changed_configuration, largest};
use super::link::{Link, OnLoss, Session};
use super::memory_table::MemoryTable;
use super::own_regions::OwnRegions;
use super::sharing::Participant;
use super::shmem_handler::{BackendChannel, RequestCounters, ShmemHandler};
use super::watch;
use super::wire::connection::Deadline;
use super::wire::frontend::{Conversation, Frontend, FrontendError, Ring};
use super::wire::message::protocol_features as protocol;
use super::wire::negotiate::Agreement;
use super::wire::observer::Observer;
use crate::config::device::DeviceSpec;
use crate::memory::shmem::SharedMemory;
use crate::report::with_causes;
use crate::virtio::device::{DeviceError, QueueSetup};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::kick;

/// How long a back-end may take for a start, in all.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a reset, the stop or start of one queue, or an access to a configuration space waits for a
/// back-end, in all.
pub const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the back-end is not asked at all.
#[derive(Debug, Error)]
enum NotAsked {
    #[error("its back-end is gone")]
    BackendLost,
    #[error("queue {index} has its {part} at {address:#x}, which is not all in RAM")]
    RingOutsideRam { index: u16, part: &'static str, address: u64 },
}

/// A device's back-end: what was agreed with the first one, which later ones must match; and the record.
pub struct Backend {
    /// What the user asked for, with as many queues, and for a type of unknown size as many bytes of
    /// configuration space, as the first back-end has.
    pub spec: DeviceSpec,
    /// Whether it is here.
    pub link: Arc<Link>,
    /// What it maps.
    pub shmem: Arc<SharedMemory>,
    /// What came of its requests, over all sessions.
    pub requests: Arc<RequestCounters>,
    /// What was agreed with the first one that came. A later one has agreed to the same.
    pub agreement: Agreement,
    /// To whom its mappings are shown (SHM-80).
    pub owner: Option<Participant>,
    /// Set where it sees other devices' mappings.
    pub recipient: Option<Participant>,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The size of its record of requests that it has begun; 0 where it keeps none.
    pub inflight_size: u64,
    memory: MemoryTable,
    /// Its shared memory regions, where it is to be told of them.
    own_regions: OwnRegions,
    /// The thread that serves its channel.
    watch: Arc<watch::Orders>,
    /// Lock order: after the transport's, before `Sharing`'s. Held for a conversation with the back-end,
    /// which has a deadline. The channel's thread never takes it (see [`super::watch`]).
    main: Mutex<Main>,
    /// Lock order: after `main`, innermost. It changes under `main` only.
    config: Mutex<Config>,
}

/// The main socket, and what the driver has made of the device.
pub struct Main {
    frontend: Frontend,
    /// Set while the driver has the device started.
    driver: Option<Driver>,
    /// The queues that it runs, or, with no driver, whose rings are still to be stopped.
    rings: BTreeMap<u16, QueueSetup>,
}

struct Driver {
    features: u64,
    /// The record of requests that the back-end has begun, for the next one. A file of ours: empty at each
    /// start, and no call on it waits for the back-end.
    inflight: Option<File>,
}

struct Config {
    bytes: Vec<u8>,
    /// Of each byte, whether the driver wrote it: a back-end that comes back is told again.
    written: Vec<bool>,
}

impl Backend {
    /// Makes the record of a back-end that has just connected. Gives its channel, to be served, and the
    /// back-end's end of it, for [`Self::give_channel`].
    pub fn new(
        spec: &DeviceSpec,
        handshake: Handshake,
        memory: MemoryTable,
        shmem: Arc<SharedMemory>,
        interrupt: Arc<Interrupt>,
        participant: Option<Participant>,
        on_loss: OnLoss,
    ) -> io::Result<(Backend, Option<BackendChannel>, Option<UnixStream>)> {
        let Handshake { frontend, queue_sizes, config, memory_slots, inflight_size, tracer, .. } = handshake;
        let mut spec = DeviceSpec { queues: Some(queue_sizes.len() as u16), ..spec.clone() };
        if spec.kind.config_sizes(0).is_empty() {
            // It was searched for once.
            spec.config_size = Some(config.len() as u16);
        }
        let agreement = frontend.agreement;
        let own_regions = match agreement.has(protocol::SHMEM_ADDRESSES) {
            true => OwnRegions::new(&shmem)?,
            false => OwnRegions::default(),
        };
        let (ours, theirs) = channel_sockets(&agreement)?;
        let session = Session::new(Arc::clone(frontend.socket()), ours.clone());
        let shown = Arc::clone(&shmem);
        let link = Link::new(&spec.name, interrupt, shown, session, spec.reconnect, on_loss, tracer);
        let owner = participant.clone().filter(|_| spec.share_shmem);
        let room = memory_slots
            .map(|slots| (slots as usize).saturating_sub(memory.regions.len() + own_regions.len()));
        let recipient = participant.zip(room).map(|(recipient, room)| {
            recipient.see_others(room, Arc::clone(&link));
            recipient
        });
        let backend = Backend {
            spec,
            link,
            shmem,
            requests: Arc::default(),
            agreement,
            owner,
            recipient,
            queue_sizes,
            inflight_size,
            memory,
            own_regions,
            watch: watch::Orders::new()?,
            main: Mutex::new(Main { frontend, driver: None, rings: BTreeMap::new() }),
            config: Mutex::new(Config { written: vec![false; config.len()], bytes: config }),
        };
        let channel = ours.map(|ours| backend.channel(&agreement, ours));
        Ok((backend, channel, theirs))
    }

    /// The orders of the thread that serves the channel.
    pub fn watch(&self) -> &Arc<watch::Orders> {
        &self.watch
    }

    /// The main socket and the record.
    pub fn main(&self) -> MutexGuard<'_, Main> {
        self.main.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn channel(&self, agreement: &Agreement, ours: Arc<UnixStream>) -> BackendChannel {
        let handler = ShmemHandler::new(
            Arc::clone(&self.link),
            Arc::clone(&self.shmem),
            self.owner.clone(),
            Arc::clone(&self.requests),
        );
        let observer = self.link.tracer.clone().map(|tracer| tracer as Arc<dyn Observer>);
        BackendChannel::new(agreement, ours, handler, observer)
    }

    /// Gives the back-end its end of the channel, which must be served already. Closes our copy (SHM-8).
    pub fn give_channel(&self, main: &mut Main, theirs: Option<UnixStream>) -> Result<(), FrontendError> {
        theirs.map_or(Ok(()), |theirs| main.frontend.set_backend_channel(theirs.as_fd()))
    }

    /// Talks to the back-end. One that breaks the protocol, or does not answer in time, is cut off. While it
    /// is away nothing is said, and nothing is missed: the caller has changed the record, and the back-end
    /// comes back to that.
    pub fn tell(
        &self,
        main: &mut Main,
        timeout: Duration,
        conversation: impl FnOnce(&mut Conversation<'_>) -> Result<(), FrontendError>,
    ) -> Result<(), DeviceError> {
        let session = self.link.session();
        let gone: DeviceError = match session.is_over() {
            true => NotAsked::BackendLost.into(),
            false => match conversation(&mut main.frontend.converse(Deadline::after(timeout))) {
                Err(error) if error.is_fatal() => {
                    self.link.give_up(&session, &error);
                    error.into()
                }
                told => return Ok(told?),
            },
        };
        if self.link.is_away() { Ok(()) } else { Err(gone) }
    }

    /// The driver sets FEATURES_OK: with STATUS the back-end says whether it takes the features (SHM-100).
    pub fn accept_features(&self, features: u64) -> Result<(), DeviceError> {
        // That a back-end is lost is for the start to say, as without STATUS.
        if self.link.is_lost() { Ok(()) } else { self.offer_features(&mut self.main(), features) }
    }

    fn offer_features(&self, main: &mut Main, features: u64) -> Result<(), DeviceError> {
        if !self.agreement.has(protocol::STATUS) {
            return Ok(());
        }
        self.tell(main, CONTROL_TIMEOUT, |to| {
            // SHM-75: the first message of a start.
            self.shmem.open_gate();
            to.set_features(features)?;
            to.keep_features_ok(features)
        })
    }

    /// The driver started the device.
    pub fn start(&self, features: u64, queues: &[QueueSetup]) -> Result<(), DeviceError> {
        for queue in queues {
            self.ring(queue, 0)?;
        }
        let inflight = (self.inflight_size > 0).then(|| self.new_inflight()).transpose()?;
        let main = &mut *self.main();
        main.driver = Some(Driver { features, inflight });
        main.rings = queues.iter().map(|queue| (queue.index, queue.clone())).collect();
        self.link.expect(true);
        self.start_session(main, |_| Ok(0), &[])
    }

    /// Has the back-end do what the driver set up, each ring from its base on. `lost` is what the driver
    /// wrote to the configuration space of a back-end that died.
    fn start_session(
        &self,
        main: &mut Main,
        base: impl Fn(&QueueSetup) -> Result<u16, DeviceError>,
        lost: &[(u32, Vec<u8>)],
    ) -> Result<(), DeviceError> {
        // What the driver has set up stays the record, whatever happens to this session.
        let (driver, queues) = (main.driver.take(), std::mem::take(&mut main.rings));
        let mut told = 0;
        let result = driver.as_ref().map_or(Ok(()), |driver| {
            let rings: Result<Vec<Ring>, DeviceError> =
                queues.values().map(|queue| Ok(self.ring(queue, base(queue)?)?)).collect();
            let rings = rings?;
            // SHM-75: the gate opens with the first of these messages. Where REPLY_ACK allows, each is
            // answered before the write of DRIVER_OK completes, so the driver finds what the back-end maps
            // when it starts.
            self.tell(main, START_TIMEOUT, |to| {
                self.shmem.open_gate();
                to.set_features(driver.features)?;
                to.set_memory(&self.memory.regions, self.memory.file.as_fd())?;
                self.own_regions.tell(to, &self.link)?;
                if let Some(recipient) = &self.recipient {
                    recipient.tell_all(to)?;
                }
                if let Some(file) = &driver.inflight {
                    let (count, size) = (self.queue_sizes.len() as u16, largest(&self.queue_sizes));
                    to.set_inflight(file.as_fd(), self.inflight_size, count, size)?;
                }
                // What the bytes mean may depend on the features, and on the record of requests in flight.
                write_config(to, lost)?;
                for ring in &rings {
                    // Also where it fails: a ring that the back-end was told of in part may run, and must be
                    // stopped.
                    told += 1;
                    to.start_ring(ring)?;
                }
                to.set_running()?;
                to.wait_until_started()
            })
        });
        match result {
            Ok(()) => (main.driver, main.rings) = (driver, queues),
            Err(_) => main.rings = queues.into_iter().take(told).collect(),
        }
        result
    }

    /// The driver reset the device: the back-end is to stop, and nothing is to be made of the next one.
    pub fn reset(&self) -> Result<(), DeviceError> {
        let main = &mut *self.main();
        // Under this lock, so that a session that is started right now does not open it again.
        self.shmem.close_gate();
        let (_, rings) = (main.driver.take(), std::mem::take(&mut main.rings));
        self.link.expect(false);
        self.tell(main, CONTROL_TIMEOUT, |to| {
            rings.into_keys().try_for_each(|index| to.stop_ring(index))?;
            to.reset_device()
        })
    }

    /// The driver stopped a queue.
    pub fn stop_queue(&self, index: u16) -> Result<(), DeviceError> {
        let main = &mut *self.main();
        main.rings.remove(&index);
        self.tell(main, CONTROL_TIMEOUT, |to| to.stop_ring(index))
    }

    /// The driver started a queue.
    pub fn start_queue(&self, queue: QueueSetup) -> Result<(), DeviceError> {
        let main = &mut *self.main();
        let ring = self.ring(&queue, 0)?;
        main.rings.insert(queue.index, queue.clone());
        self.tell(main, CONTROL_TIMEOUT, |to| {
            to.start_ring(&ring)?;
            to.wait_until_started()
        })
    }

    /// The driver wrote to the configuration space.
    pub fn write_config(&self, start: usize, data: &[u8]) -> Result<(), DeviceError> {
        let main = &mut *self.main();
        let places = start..start.saturating_add(data.len());
        if self.config().bytes.get(places.clone()).is_none() || !self.agreement.has(protocol::CONFIG) {
            return Ok(());
        }
        if self.spec.kind.has_settings() && self.config().bytes[places.clone()] == *data {
            return Ok(());
        }
        let whole = {
            let mut config = self.config();
            config.bytes[places.clone()].copy_from_slice(data);
            config.written[places].fill(true);
            config.bytes.clone()
        };
        if !self.spec.kind.answers_in_config() {
            return self.tell(main, CONTROL_TIMEOUT, |to| to.set_config(start as u32, data));
        }
        // What the driver wrote is a question; the device answers it in the same space.
        self.tell(main, CONTROL_TIMEOUT, |to| to.set_config(0, &whole))?;
        self.ask_for_config(main, |config| self.config().bytes = config);
        Ok(())
    }

    /// The configuration space as the driver sees it.
    pub fn config_bytes(&self) -> Vec<u8> {
        self.config().bytes.clone()
    }

    /// The back-end has said that its configuration changed: asks for it, and shows it to the driver.
    pub fn read_config(&self) {
        self.ask_for_config(&mut self.main(), |config| self.show_config(config));
    }

    fn ask_for_config(&self, main: &mut Main, take: impl FnOnce(Vec<u8>)) {
        let (session, len, queues) =
            (self.link.session(), self.config().bytes.len(), self.queue_sizes.len() as u16);
        if session.is_over() {
            return;
        }
        match changed_configuration(&mut main.frontend, &self.spec, queues, len) {
            Ok(answer) => take(self.with_question(answer)),
            Err(error) if error.is_fatal() => self.link.give_up(&session, &error),
            Err(error) => {
                let why = with_causes(&error);
                self.link.log.warn(format_args!("the configuration stays as it was: {why}"));
            }
        }
    }

    /// Where the driver writes questions: the back-end's answer, and the driver's question beside it. The
    /// question has several bytes, written one by one; a back-end that does not know one answers with zeroes.
    fn with_question(&self, mut answer: Vec<u8>) -> Vec<u8> {
        if self.spec.kind.answers_in_config() {
            let Config { bytes, written } = &*self.config();
            let own = answer.iter_mut().zip(bytes).zip(written).filter(|(_, is_written)| **is_written);
            own.for_each(|((byte, question), _)| *byte = *question);
        }
        answer
    }

    fn show_config(&self, bytes: Vec<u8>) {
        if bytes != self.config().bytes {
            self.config().bytes.clone_from(&bytes);
            self.link.interrupt.config_changed(&bytes);
        }
    }

    /// Tells a recipient's back-end what is due (SHM-80).
    pub fn tell_of_others(&self, timeout: Duration) {
        let Some(recipient) = &self.recipient else { return };
        while recipient.is_due() {
            // One thing at a time: a vCPU may need the socket in between.
            let mut main = self.main();
            if self.link.session().is_over() {
                recipient.forget();
            } else {
                // A recipient that cannot be told is given up, and the log says why.
                let _ = recipient.tell_next(&mut main.frontend.converse(Deadline::after(timeout)));
            }
        }
    }

    /// Takes up the next session, with a back-end that is as the one before was, and brings it to where the
    /// record is. Whether the session goes on; if not, the link knows why, and another may be tried.
    ///
    /// # Errors
    ///
    /// The back-end refused something.
    pub fn resume(&self, handshake: Handshake) -> Result<bool, DeviceError> {
        let Handshake { frontend, config, .. } = handshake;
        let (ours, theirs) = channel_sockets(&frontend.agreement)?;
        let session = Session::new(Arc::clone(frontend.socket()), ours.clone());
        let channel = ours.map(|ours| self.channel(&frontend.agreement, ours));
        let main = &mut *self.main();
        main.frontend = frontend;
        self.watch.adopt(&session, channel);
        self.link.adopt(&session);
        if let Err(error) = self.give_channel(main, theirs) {
            self.link.give_up(&session, &error);
            return Ok(false);
        }
        let lost = self.lost_config(config);
        match main.driver.as_ref().map(|driver| driver.features) {
            None => self.tell(main, CONTROL_TIMEOUT, |to| write_config(to, &lost))?,
            Some(features) => self.offer_features(main, features)?,
        }
        self.start_session(main, |queue| Ok(self.used_index(queue)?), &lost)?;
        // Whatever it maps because of all this is on its channel then, even if nothing was answered.
        self.tell(main, CONTROL_TIMEOUT, |to| to.wait_until_handled())?;
        self.link.returned();
        if session.is_over() {
            return Ok(false);
        }
        // For buffers that the driver made available, and that the back-end used, while no session was there.
        for queue in main.rings.values() {
            kick::signal(&queue.kick);
        }
        self.link.interrupt.signal();
        self.watch.settle();
        Ok(true)
    }

    /// What the driver wrote to the configuration space and the new back-end does not have, by offset. The
    /// driver sees that, and in all other places what the new back-end has.
    fn lost_config(&self, mut new: Vec<u8>) -> Vec<(u32, Vec<u8>)> {
        let mut lost = vec![false; new.len()];
        {
            let Config { bytes, written } = &*self.config();
            for (at, _) in written.iter().enumerate().filter(|(_, is_written)| **is_written) {
                lost[at] = std::mem::replace(&mut new[at], bytes[at]) != bytes[at];
            }
        }
        let (mut start, mut runs) = (0, Vec::new());
        for run in lost.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            if run[0] {
                runs.push((start as u32, new[start..end].to_vec()));
            }
            start = end;
        }
        self.show_config(new);
        runs
    }

    /// Where a ring stands, for a back-end that takes it up: the index of the used ring in RAM. What was made
    /// available and not used is done again, or is in the record of what was begun.
    fn used_index(&self, queue: &QueueSetup) -> io::Result<u16> {
        // VIRTIO section 2.7.8: behind the flags.
        let offset = self.memory.file_offset(queue.device_area + 2, 2).ok_or(io::ErrorKind::InvalidInput)?;
        let mut index = [0; 2];
        self.memory.file.read_exact_at(&mut index, offset)?;
        Ok(u16::from_le_bytes(index))
    }

    /// A ring as the back-end is to be told of it.
    fn ring<'a>(&'a self, queue: &'a QueueSetup, base: u16) -> Result<Ring<'a>, NotAsked> {
        let &QueueSetup { index, size, .. } = queue;
        let place = |part, address, len| {
            self.memory.user_address(address, len).ok_or(NotAsked::RingOutsideRam { index, part, address })
        };
        // VIRTIO section 2.7: sizes of the three parts of a split virtqueue.
        let entries = u64::from(size);
        Ok(Ring {
            index,
            size,
            took: self.queue_sizes.get(usize::from(index)).copied().unwrap_or(0),
            base,
            descriptor_table: place("descriptor table", queue.descriptors, 16 * entries)?,
            available_ring: place("available ring", queue.driver_area, 6 + 2 * entries)?,
            used_ring: place("used ring", queue.device_area, 6 + 8 * entries)?,
            kick: kick::borrow(&queue.kick),
            call: kick::borrow(self.link.interrupt.call()),
            error: self.watch.ring_error(),
        })
    }

    fn new_inflight(&self) -> io::Result<File> {
        let file = memfd_create("hotslot-inflight", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, self.inflight_size)?;
        Ok(file.into())
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the back-end what the driver wrote to places of the configuration space.
fn write_config(to: &mut Conversation<'_>, written: &[(u32, Vec<u8>)]) -> Result<(), FrontendError> {
    written.iter().try_for_each(|(start, bytes)| to.set_config(*start, bytes))
}

/// The two ends of a channel, ours first, where one was agreed on.
fn channel_sockets(agreement: &Agreement) -> io::Result<(Option<Arc<UnixStream>>, Option<UnixStream>)> {
    let pair = agreement.has(protocol::BACKEND_REQ).then(UnixStream::pair).transpose()?;
    Ok(pair.map(|(ours, theirs)| (Arc::new(ours), theirs)).unzip())
}
