//! A virtio device whose back-end is another process: what the driver does, told to the back-end.
//!
//! The set-up makes one in two steps, since the place of the shared memory regions depends on all back-ends:
//! [`super::frontend::Frontend::connect`] learns what the back-end is, [`VhostUserDevice::new`] opens the
//! backend channel. From then on `virtio::mmio` calls it on vCPU threads; [`super::watch`] runs beside it,
//! and a courier of [`super::sharing`] where the back-end sees other devices' mappings.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;

use super::backend_channel::BackendChannel;
use super::connection::Deadline;
use super::frontend::{DeviceSpec, Frontend, FrontendError, Handshake};
use super::memory_table::MemoryTable;
use super::message::protocol_features as protocol;
use super::negotiate::Agreement;
use super::sharing::{Courier, Member};
use super::watch::{Link, Watch};
use crate::memory::GuestRange;
use crate::memory::shmem::SharedMemory;
use crate::report::with_causes;
use crate::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use crate::virtio::interrupt::Interrupt;

/// How long a vCPU that starts a device waits for its back-end, in all.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a vCPU that resets a device, or a queue, or writes to a configuration space waits for its
/// back-end, in all.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// The back-end is gone, or was cut off.
#[derive(Debug, Error)]
#[error("its back-end is gone")]
struct BackendLost;

/// A virtio device behind vhost-user.
pub struct VhostUserDevice {
    name: String,
    device_type: u32,
    queue_sizes: Vec<u16>,
    config: Vec<u8>,
    memory: MemoryTable,
    shmem: Arc<SharedMemory>,
    interrupt: Arc<Interrupt>,
    link: Arc<Link>,
    /// The queues whose rings the back-end runs.
    running: BTreeSet<u16>,
    agreement: Agreement,
    /// The main socket.
    ///
    /// Lock order: after the transport's, before `Sharing`'s. Held for a conversation with the back-end,
    /// which has a deadline. The channel's thread never takes it: a back-end that maps while we wait for its
    /// answer is served.
    main: Arc<Mutex<Frontend>>,
    /// Where its mappings are shown to others (SHM-80).
    sharing: Option<Member>,
    /// The device's thread, which ends with the device.
    _watch: Watch,
    /// Who tells its back-end of other devices' mappings. Ended after the watch, which would see the back-end
    /// go.
    courier: Option<Courier>,
}

impl VhostUserDevice {
    /// Opens the backend channel of a back-end that is connected, and starts the device's thread. `member`:
    /// what it is among devices that see each other's mappings (SHM-80).
    pub fn new(
        spec: &DeviceSpec,
        handshake: Handshake,
        memory: MemoryTable,
        shmem: Arc<SharedMemory>,
        interrupt: Arc<Interrupt>,
        member: Option<Member>,
    ) -> Result<VhostUserDevice, DeviceError> {
        let Handshake { mut frontend, queues, config, memory_slots, .. } = handshake;
        let agreement = *frontend.agreement();
        let sharing = member.clone().filter(|_| spec.share_shmem);
        let (channel, theirs) = if agreement.has(protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            let (shmem, sharing) = (Arc::clone(&shmem), sharing.clone());
            let channel = BackendChannel::new(&spec.name, &agreement, ours, shmem, sharing)?;
            (Some(Arc::new(channel)), Some(theirs))
        } else {
            (None, None)
        };
        let main = frontend.as_fd().try_clone_to_owned()?;
        let link = Link::new(&spec.name, Arc::clone(&interrupt), main, channel);
        let link = Arc::new(link);
        let watch = Watch::start(Arc::clone(&link), spec.shmem_rate)?;
        if let Some(theirs) = theirs {
            frontend.set_backend_channel(theirs.as_fd())?;
        }
        let main = Arc::new(Mutex::new(frontend));
        let courier = match member.zip(memory_slots) {
            Some((member, slots)) => {
                let room = usize::try_from(slots).unwrap_or(usize::MAX);
                let room = room.saturating_sub(memory.regions().len());
                let (main, link) = (Arc::clone(&main), Arc::clone(&link));
                Some(Courier::start(&spec.name, member, room, main, link)?)
            }
            None => None,
        };
        Ok(VhostUserDevice {
            name: spec.name.clone(),
            device_type: spec.kind.id(),
            queue_sizes: vec![spec.queue_size; queues.into()],
            config,
            memory,
            shmem,
            interrupt,
            link,
            running: BTreeSet::new(),
            agreement,
            main,
            sharing,
            _watch: watch,
            courier,
        })
    }

    /// Talks to the back-end. One that breaks the protocol, or does not answer in time, is cut off.
    fn talk<T>(
        &mut self,
        conversation: impl FnOnce(&mut Self, &mut Frontend) -> Result<T, FrontendError>,
    ) -> Result<T, DeviceError> {
        let main = Arc::clone(&self.main);
        let mut frontend = main.lock().unwrap_or_else(PoisonError::into_inner);
        if self.link.is_lost() {
            return Err(BackendLost.into());
        }
        conversation(self, &mut frontend).map_err(|error| {
            if error.is_fatal() {
                self.link.give_up(&error);
            }
            error.into()
        })
    }

    fn start_ring(
        &mut self,
        frontend: &mut Frontend,
        queue: &QueueSetup<'_>,
        deadline: Deadline,
    ) -> Result<(), FrontendError> {
        // SAFETY: the interrupt owns the event, and outlives the call.
        let call = unsafe { BorrowedFd::borrow_raw(self.interrupt.call().as_raw_fd()) };
        let started = frontend.start_ring(queue, &self.memory, call, deadline);
        // A ring that is told of half way may run as well, and is to be stopped.
        if !matches!(started, Err(FrontendError::RingOutsideRam { .. })) {
            self.running.insert(queue.index);
        }
        started
    }
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u32 {
        self.device_type
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
        let Ok(start) = usize::try_from(offset) else {
            return Ok(());
        };
        let end = start.saturating_add(data.len());
        if self.config.get(start..end).is_none() || !self.agreement.has(protocol::CONFIG) {
            return Ok(());
        }
        self.talk(|device, frontend| {
            frontend.set_config(start as u32, data, Deadline::after(CONTROL_TIMEOUT))?;
            device.config[start..end].copy_from_slice(data);
            Ok(())
        })
    }

    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        self.shmem.region(id)
    }

    fn start(&mut self, features: u64, queues: &[QueueSetup<'_>]) -> Result<(), DeviceError> {
        // SHM-75: from the first of these messages on, and every one of them is answered before DRIVER_OK is
        // through where REPLY_ACK allows. So what the back-end maps when it is started is there for the
        // driver.
        self.talk(|device, frontend| {
            device.shmem.open_gate();
            let deadline = Deadline::after(START_TIMEOUT);
            frontend.set_up(features, &device.memory, deadline)?;
            if let Some(courier) = &device.courier {
                courier.restart(frontend, deadline)?;
            }
            for queue in queues {
                device.start_ring(frontend, queue, deadline)?;
            }
            frontend.set_status(STATUS_RUNNING, deadline)
        })
    }

    fn reset(&mut self) {
        self.shmem.close_gate();
        let deadline = Deadline::after(CONTROL_TIMEOUT);
        let running = std::mem::take(&mut self.running);
        if !self.link.is_lost() {
            let told = self.talk(|_, frontend| {
                for index in running {
                    frontend.stop_ring(index, deadline)?;
                }
                frontend.reset_device(deadline)
            });
            match told {
                // The back-end is cut off, and the log says so.
                Err(_) if self.link.is_lost() => {}
                Err(error) => {
                    log::warn!("{}: while the device is reset: {}", self.name, with_causes(&*error))
                }
                Ok(()) => {}
            }
        }
        self.link.drain_channel(deadline);
        match self.shmem.unmap_all() {
            Ok(0) => {}
            Ok(count) => log::info!("{}: the reset removed {count} mappings", self.name),
            Err(error) => log::error!("{}: mappings stay after a reset: {}", self.name, with_causes(&error)),
        }
        if let Some(sharing) = &self.sharing {
            sharing.withdraw_all();
        }
    }

    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        // SHM-74: this removes no mapping.
        self.running.remove(&index);
        self.talk(|_, frontend| frontend.stop_ring(index, Deadline::after(CONTROL_TIMEOUT)))
    }

    fn start_queue(&mut self, queue: QueueSetup<'_>) -> Result<(), DeviceError> {
        self.talk(|device, frontend| device.start_ring(frontend, &queue, Deadline::after(CONTROL_TIMEOUT)))
    }
}

impl Drop for VhostUserDevice {
    fn drop(&mut self) {
        if let Some(sharing) = &self.sharing {
            sharing.leave();
        }
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
