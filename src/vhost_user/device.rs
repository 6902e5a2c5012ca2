//! A virtio device whose back-end is another process: passes the driver's start, stop and reset to it.
//!
//! The set-up makes one in two steps, since sharing and the search for missing pages need all devices first:
//! [`super::connect::connect`] learns what the back-end is, [`VhostUserDevice::new`] opens the backend
//! channel. From then on `virtio::mmio` calls it on vCPU threads; [`super::watch`] runs beside it, and an
//! update thread of [`super::sharing`] where the back-end sees other devices' mappings.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use log::Level;
use thiserror::Error;

use super::handshake::Handshake;
use super::link::Link;
use super::memory_table::MemoryTable;
use super::own_regions::OwnRegions;
use super::sharing::{Owner, Participant, UpdateThread};
use super::shmem_handler::{BackendChannel, ShmemHandler};
use super::watch::Watch;
use super::wire::connection::Deadline;
use super::wire::frontend::{Conversation, Frontend, FrontendError, Ring};
use super::wire::message::protocol_features as protocol;
use super::wire::negotiate::Agreement;
use crate::config::device::DeviceSpec;
use crate::memory::GuestRange;
use crate::memory::shmem::SharedMemory;
use crate::report::with_causes;
use crate::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use crate::virtio::interrupt::Interrupt;
use crate::virtio::kick::borrow;
use crate::virtio::kind::DeviceKind;

/// How long a vCPU that starts a device waits for its back-end, in all.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a vCPU that resets a device, or a queue, or writes to a configuration space waits for its
/// back-end, in all.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a reset then waits for the device's thread. Longer than the longest wait of a request that it may
/// be carrying out: the 5 s in which the back-ends that see a mapping let go of it (`sharing`).
const CLEAR_TIMEOUT: Duration = Duration::from_secs(6);

/// Why the back-end is not asked at all.
#[derive(Debug, Error)]
enum NotAsked {
    #[error("its back-end is gone")]
    BackendLost,
    #[error("queue {index} has its {part} at {address:#x}, which is not all in RAM")]
    RingOutsideRam { index: u16, part: &'static str, address: u64 },
}

/// A virtio device behind vhost-user.
pub struct VhostUserDevice {
    kind: DeviceKind,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
    memory: MemoryTable,
    shmem: Arc<SharedMemory>,
    /// Its shared memory regions, where the back-end is to be told of them.
    own_regions: OwnRegions,
    link: Arc<Link>,
    /// The queues whose rings the back-end runs.
    running: BTreeSet<u16>,
    agreement: Agreement,
    /// The main socket. Lock order: after the transport's, before `Sharing`'s. Held for a conversation with
    /// the back-end, which has a deadline. The channel's thread never takes it (see [`super::watch`]).
    main: Arc<Mutex<Frontend>>,

    // Dropped last, in this order:
    /// Where its mappings are shown to others (SHM-80): first of all they are withdrawn.
    sharing: Option<Owner>,
    /// Serves the backend channel. Before the update thread: that hangs up, which the watch would take for
    /// the back-end's end.
    watch: Watch,
    /// Tells its back-end of other devices' mappings.
    updates: Option<UpdateThread>,
}

impl VhostUserDevice {
    /// Opens the backend channel of a back-end that is connected, and starts the device's thread.
    /// `participant`: what it is among devices that see each other's mappings (SHM-80).
    pub fn new(
        spec: &DeviceSpec,
        handshake: Handshake,
        memory: MemoryTable,
        shmem: Arc<SharedMemory>,
        interrupt: Arc<Interrupt>,
        participant: Option<Participant>,
    ) -> Result<VhostUserDevice, DeviceError> {
        let Handshake { mut frontend, queues, queue_size, config, memory_slots, .. } = handshake;
        let agreement = frontend.agreement;
        let own_regions = match agreement.has(protocol::SHMEM_ADDRESSES) {
            true => OwnRegions::new(&shmem)?,
            false => OwnRegions::default(),
        };
        let sharing = participant.clone().filter(|_| spec.share_shmem);
        let pair = agreement.has(protocol::BACKEND_REQ).then(UnixStream::pair).transpose()?;
        let (ours, theirs) = pair.unzip();
        let channel = ours.map(|ours| {
            let handler = ShmemHandler::new(&spec.name, Arc::clone(&shmem), sharing.clone());
            BackendChannel::new(&agreement, ours, handler)
        });
        let channel_socket = channel.as_ref().map(|channel: &BackendChannel| Arc::clone(channel.socket()));
        let main_socket = Arc::clone(frontend.socket());
        let link = Link::new(&spec.name, interrupt, main_socket, channel_socket);
        let watch =
            Watch::start(Arc::clone(&link), channel, Arc::clone(&shmem), sharing.clone(), spec.shmem_rate)?;
        if let Some(theirs) = theirs {
            frontend.set_backend_channel(theirs.as_fd())?;
        }
        let main = Arc::new(Mutex::new(frontend));
        let updates = participant.zip(memory_slots).map(|(participant, slots)| {
            let room = (slots as usize).saturating_sub(memory.regions.len() + own_regions.len());
            UpdateThread::start(&spec.name, participant, room, Arc::clone(&main), Arc::clone(&link))
        });
        let updates = updates.transpose()?;
        Ok(VhostUserDevice {
            kind: spec.kind,
            queue_sizes: vec![queue_size; queues.into()],
            config,
            memory,
            shmem,
            own_regions,
            link,
            running: BTreeSet::new(),
            agreement,
            main,
            sharing: sharing.map(Owner),
            watch,
            updates,
        })
    }

    /// Talks to the back-end. One that breaks the protocol, or does not answer in time, is cut off.
    fn talk<T>(
        &self,
        deadline: Deadline,
        conversation: impl FnOnce(&mut Conversation<'_>) -> Result<T, FrontendError>,
    ) -> Result<T, DeviceError> {
        let mut frontend = self.main.lock().unwrap_or_else(PoisonError::into_inner);
        if self.link.is_lost() {
            return Err(NotAsked::BackendLost.into());
        }
        conversation(&mut frontend.converse(deadline)).map_err(|error| {
            if error.is_fatal() {
                self.link.give_up(&error);
            }
            error.into()
        })
    }

    /// A ring as the back-end is to be told of it.
    fn ring<'a>(&'a self, queue: &QueueSetup<'a>) -> Result<Ring<'a>, NotAsked> {
        let &QueueSetup { index, size, .. } = queue;
        let place = |part, address, len| {
            self.memory.user_address(address, len).ok_or(NotAsked::RingOutsideRam { index, part, address })
        };
        // VIRTIO section 2.7: sizes of the three parts of a split virtqueue.
        let entries = u64::from(size);
        Ok(Ring {
            index,
            size,
            descriptor_table: place("descriptor table", queue.descriptors, 16 * entries)?,
            available_ring: place("available ring", queue.driver_area, 6 + 2 * entries)?,
            used_ring: place("used ring", queue.device_area, 6 + 8 * entries)?,
            kick: borrow(queue.kick),
            call: borrow(self.link.interrupt.call()),
        })
    }
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> &str {
        &self.link.name
    }

    fn device_type(&self) -> u32 {
        self.kind.id()
    }

    fn features(&self) -> u64 {
        self.agreement.guest_features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Vec<u8> {
        self.config.clone()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        let start = offset as usize;
        let end = start.saturating_add(data.len());
        if self.config.get(start..end).is_none() || !self.agreement.has(protocol::CONFIG) {
            return Ok(());
        }
        if self.kind.has_settings() && &self.config[start..end] == data {
            return Ok(());
        }
        self.talk(Deadline::after(CONTROL_TIMEOUT), |to| to.set_config(start as u32, data))?;
        self.config[start..end].copy_from_slice(data);
        Ok(())
    }

    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        self.shmem.region(id)
    }

    fn start(&mut self, features: u64, queues: &[QueueSetup<'_>]) -> Result<(), DeviceError> {
        let rings: Vec<Ring> = queues.iter().map(|queue| self.ring(queue)).collect::<Result<_, _>>()?;
        let mut running = BTreeSet::new();
        // SHM-75: the gate opens with the first of these messages. Where REPLY_ACK allows, each is answered
        // before the write of DRIVER_OK completes, so the driver finds what the back-end maps when it starts.
        let started = self.talk(Deadline::after(START_TIMEOUT), |to| {
            self.shmem.open_gate();
            to.set_features_and_memory(features, &self.memory.regions, self.memory.file.as_fd())?;
            self.own_regions.tell(to, &self.link)?;
            if let Some(updates) = &self.updates {
                updates.recipient.tell_all(to)?;
            }
            for ring in &rings {
                // Also where it fails: a ring that the back-end was told of in part may run, and must be
                // stopped.
                running.insert(ring.index);
                to.start_ring(ring)?;
            }
            to.set_status(STATUS_RUNNING)
        });
        self.running = running;
        started
    }

    fn reset(&mut self) {
        self.shmem.close_gate();
        let deadline = Deadline::after(CONTROL_TIMEOUT);
        let running = std::mem::take(&mut self.running);
        let told = self.talk(deadline, |to| {
            running.into_iter().try_for_each(|index| to.stop_ring(index))?;
            to.reset_device()
        });
        // Where the back-end is lost, the log says so already.
        if let Err(error) = told
            && !self.link.is_lost()
        {
            let why = with_causes(&*error);
            self.link.log.warn(format_args!("while the device is reset: {why}"));
        }
        let log = |level, line: fmt::Arguments<'_>| self.link.log.log(level, line);
        match self.watch.clear(CLEAR_TIMEOUT) {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => log(Level::Info, format_args!("the reset removed {count} mappings")),
            Ok(Err(error)) => {
                let why = with_causes(&error);
                log(Level::Error, format_args!("mappings stay after a reset: {why}"));
            }
            Err(stuck) => {
                self.link.give_up(&stuck);
                // Its thread is left behind. The guest must not see the mappings any more.
                if let Err(error) = self.shmem.hide_all() {
                    let why = with_causes(&error);
                    log(Level::Error, format_args!("mappings stay after a reset: {why}"));
                }
            }
        }
        if let Some(sharing) = &self.sharing {
            sharing.withdraw_all();
            self.watch.close_files();
        }
    }

    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        // SHM-74: this removes no mapping.
        self.running.remove(&index);
        self.talk(Deadline::after(CONTROL_TIMEOUT), |to| to.stop_ring(index))
    }

    fn start_queue(&mut self, queue: QueueSetup<'_>) -> Result<(), DeviceError> {
        let ring = self.ring(&queue)?;
        let started = self.talk(Deadline::after(CONTROL_TIMEOUT), |to| to.start_ring(&ring));
        self.running.insert(queue.index);
        started
    }
}

/// The device's Status once the driver set DRIVER_OK (VIRTIO section 2.1).
const STATUS_RUNNING: u8 = {
    use virtio_bindings::virtio_config::*;
    (VIRTIO_CONFIG_S_ACKNOWLEDGE
        | VIRTIO_CONFIG_S_DRIVER
        | VIRTIO_CONFIG_S_FEATURES_OK
        | VIRTIO_CONFIG_S_DRIVER_OK) as u8
};
