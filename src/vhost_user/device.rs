//! A virtio device whose back-end is another process: what the driver does, told to the back-end.
//!
//! The set-up makes one in two steps, since the place of the shared memory regions depends on all back-ends:
//! [`super::frontend::Frontend::connect`] learns what the back-end is, [`VhostUserDevice::new`] opens the backend
//! channel. From then on `virtio::mmio` calls it on vCPU threads; [`super::watch`] runs beside it.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::backend_channel::BackendChannel;
use super::connection::Deadline;
use super::frontend::{DeviceSpec, Frontend, FrontendError, Handshake};
use super::memory_table::MemoryTable;
use super::message::protocol_features as protocol;
use super::watch::{Link, Watch};
use crate::memory::GuestRange;
use crate::memory::shmem::SharedMemory;
use crate::report::with_causes;
use crate::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use crate::virtio::interrupt::Interrupt;

/// How long a vCPU that starts a device waits for its back-end, in all.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a vCPU that resets a device, or a queue, or writes to a configuration space waits for its back-end, in all.
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
    frontend: Frontend,
    /// The device's thread, which ends with the device.
    _watch: Watch,
}

impl VhostUserDevice {
    /// Opens the backend channel of a back-end that is connected, and starts the device's thread.
    pub fn new(
        spec: &DeviceSpec,
        handshake: Handshake,
        memory: MemoryTable,
        shmem: Arc<SharedMemory>,
        interrupt: Arc<Interrupt>,
    ) -> Result<VhostUserDevice, DeviceError> {
        let Handshake {
            mut frontend,
            queues,
            config,
            ..
        } = handshake;
        let (channel, theirs) = if frontend.agreement().has(protocol::BACKEND_REQ) {
            let (ours, theirs) = UnixStream::pair()?;
            let shmem = Arc::clone(&shmem);
            let channel = BackendChannel::new(&spec.name, frontend.agreement(), ours, shmem)?;
            (Some(Arc::new(channel)), Some(theirs))
        } else {
            (None, None)
        };
        let main = frontend.as_fd().try_clone_to_owned()?;
        let link = Link::new(&spec.name, Arc::clone(&interrupt), main, channel);
        let link = Arc::new(link);
        let watch = Watch::start(Arc::clone(&link))?;
        if let Some(theirs) = theirs {
            frontend.set_backend_channel(theirs.as_fd())?;
        }
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
            frontend,
            _watch: watch,
        })
    }

    /// Talks to the back-end. One that breaks the protocol, or does not answer in time, is cut off.
    fn talk<T>(
        &mut self,
        conversation: impl FnOnce(&mut Self) -> Result<T, FrontendError>,
    ) -> Result<T, DeviceError> {
        if self.link.is_lost() {
            return Err(BackendLost.into());
        }
        conversation(self).map_err(|error| {
            if error.is_fatal() {
                self.link.give_up(&error);
            }
            error.into()
        })
    }

    fn start_ring(&mut self, queue: &QueueSetup<'_>, deadline: Deadline) -> Result<(), FrontendError> {
        // SAFETY: the interrupt owns the event, and outlives the call.
        let call = unsafe { BorrowedFd::borrow_raw(self.interrupt.call().as_raw_fd()) };
        let started = self.frontend.start_ring(queue, &self.memory, call, deadline);
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
        self.frontend.agreement().guest_features
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
        if self.config.get(start..end).is_none() || !self.frontend.agreement().has(protocol::CONFIG) {
            return Ok(());
        }
        self.talk(|device| {
            device
                .frontend
                .set_config(start as u32, data, Deadline::after(CONTROL_TIMEOUT))?;
            device.config[start..end].copy_from_slice(data);
            Ok(())
        })
    }

    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        self.shmem.region(id)
    }

    fn start(&mut self, features: u64, queues: &[QueueSetup<'_>]) -> Result<(), DeviceError> {
        // SHM-75: from the first of these messages on, and every one of them is answered before DRIVER_OK is through
        // where REPLY_ACK allows. So what the back-end maps when it is started is there for the driver.
        self.talk(|device| {
            device.shmem.open_gate();
            let deadline = Deadline::after(START_TIMEOUT);
            device.frontend.set_up(features, &device.memory, deadline)?;
            for queue in queues {
                device.start_ring(queue, deadline)?;
            }
            device.frontend.set_status(STATUS_RUNNING, deadline)
        })
    }

    fn reset(&mut self) {
        self.shmem.close_gate();
        let deadline = Deadline::after(CONTROL_TIMEOUT);
        let running = std::mem::take(&mut self.running);
        if !self.link.is_lost() {
            let told = self.talk(|device| {
                for index in running {
                    device.frontend.stop_ring(index, deadline)?;
                }
                device.frontend.reset_device(deadline)
            });
            match told {
                // The back-end is cut off, and the log says so.
                Err(_) if self.link.is_lost() => {}
                Err(error) => log::warn!(
                    "{}: while the device is reset: {}",
                    self.name,
                    with_causes(&*error)
                ),
                Ok(()) => {}
            }
        }
        self.link.drain_channel(deadline);
        match self.shmem.unmap_all() {
            Ok(0) => {}
            Ok(count) => log::info!("{}: the reset removed {count} mappings", self.name),
            Err(error) => log::error!(
                "{}: mappings stay after a reset: {}",
                self.name,
                with_causes(&error)
            ),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        // SHM-74: this removes no mapping.
        self.running.remove(&index);
        self.talk(|device| device.frontend.stop_ring(index, Deadline::after(CONTROL_TIMEOUT)))
    }

    fn start_queue(&mut self, queue: QueueSetup<'_>) -> Result<(), DeviceError> {
        self.talk(|device| device.start_ring(&queue, Deadline::after(CONTROL_TIMEOUT)))
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
