//! A virtio device whose back-end is another process: passes the driver's start, stop and reset to it.
//!
//! The set-up makes one in two steps, since sharing and the search for missing pages need all devices first:
//! [`super::connect::connect`] learns what the back-end is, [`VhostUserDevice::new`] opens the backend
//! channel. From then on `virtio::mmio` calls it on vCPU threads; [`super::watch`] and [`super::keeper`] run
//! beside it. [`super::backend`] has what they share.

use std::sync::Arc;
use std::time::Duration;

use log::Level;

use super::backend::Backend;
use super::handshake::Handshake;
use super::keeper::Keeper;
use super::link::OnLoss;
use super::memory_table::MemoryTable;
use super::sharing::{Owner, Participant};
use super::shmem_handler::RequestCounters;
use super::watch::Watch;
use crate::config::device::DeviceSpec;
use crate::memory::GuestRange;
use crate::memory::shmem::SharedMemory;
use crate::report::with_causes;
use crate::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use crate::virtio::interrupt::Interrupt;

/// How long a reset then waits for the device's thread. Longer than the longest wait of a request that it may
/// be carrying out: the 5 s in which the back-ends that see a mapping let go of it (`sharing`).
const CLEAR_TIMEOUT: Duration = Duration::from_secs(6);

/// A virtio device behind vhost-user.
pub struct VhostUserDevice {
    backend: Arc<Backend>,

    // Dropped last, in this order:
    /// Where its mappings are shown to others (SHM-80): first of all they are withdrawn.
    sharing: Option<Owner>,
    /// Serves the backend channel. Before the keeper: that hangs up, which the watch would take for the
    /// back-end's end.
    _watch: Watch,
    _keeper: Keeper,
}

impl VhostUserDevice {
    /// Opens the backend channel of a back-end that is connected, and starts the device's threads.
    /// `participant`: what it is among devices that see each other's mappings (SHM-80). `on_loss` is told
    /// when the back-end is lost permanently.
    pub fn new(
        spec: &DeviceSpec,
        handshake: Handshake,
        memory: MemoryTable,
        shmem: Arc<SharedMemory>,
        interrupt: Arc<Interrupt>,
        participant: Option<Participant>,
        on_loss: OnLoss,
    ) -> Result<VhostUserDevice, DeviceError> {
        let (region_sizes, memory_slots) = (handshake.region_sizes.clone(), handshake.memory_slots);
        let warnings = handshake.warnings.clone();
        let (backend, channel, theirs) =
            Backend::new(spec, handshake, memory, shmem, interrupt, participant, on_loss)?;
        let backend = Arc::new(backend);
        let (link, shmem, owner) = (&backend.link, &backend.shmem, backend.owner.clone());
        let watch = Watch::start(
            backend.watch(),
            Arc::clone(link),
            channel,
            Arc::clone(shmem),
            owner,
            spec.shmem_rate,
        )?;
        backend.give_channel(&mut backend.main(), theirs)?;
        Ok(VhostUserDevice {
            sharing: backend.owner.clone().map(Owner),
            _watch: watch,
            _keeper: Keeper::start(&backend, region_sizes, memory_slots, warnings)?,
            backend,
        })
    }

    /// What came of its back-end's requests.
    pub fn requests(&self) -> &Arc<RequestCounters> {
        &self.backend.requests
    }
}

impl VirtioDevice for VhostUserDevice {
    fn name(&self) -> &str {
        &self.backend.link.name
    }

    fn device_type(&self) -> u32 {
        self.backend.spec.kind.id()
    }

    fn features(&self) -> u64 {
        self.backend.agreement.guest_features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.backend.queue_sizes
    }

    fn config(&self) -> Vec<u8> {
        self.backend.config_bytes()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.backend.write_config(offset as usize, data)
    }

    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        self.backend.shmem.region(id)
    }

    fn accept_features(&mut self, features: u64) -> Result<(), DeviceError> {
        self.backend.accept_features(features)
    }

    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> Result<(), DeviceError> {
        self.backend.start(features, queues)
    }

    fn reset(&mut self) {
        let Backend { link, shmem, .. } = &*self.backend;
        // Where the back-end is lost, the log says so already.
        if let Err(error) = self.backend.reset()
            && !link.is_lost()
        {
            let why = with_causes(&*error);
            link.log.warn(format_args!("while the device is reset: {why}"));
        }
        let cleared = self.backend.watch().clear(CLEAR_TIMEOUT);
        if let Ok(Ok(count)) = cleared {
            link.event("reset", &[("unmapped", count as u64)], None);
        }
        match cleared {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => {
                link.log.log(Level::Info, format_args!("the reset removed {count} mappings"));
            }
            Ok(Err(error)) => {
                let why = with_causes(&error);
                link.log.log(Level::Error, format_args!("mappings stay after a reset: {why}"));
            }
            Err(stuck) => {
                link.lose(&with_causes(&stuck));
                // Its thread is left behind. The guest must not see the mappings any more.
                if let Err(error) = shmem.hide_all() {
                    let why = with_causes(&error);
                    link.log.log(Level::Error, format_args!("mappings stay after a reset: {why}"));
                }
            }
        }
        if let Some(sharing) = &self.sharing {
            sharing.0.withdraw_all();
            self.backend.watch().close_files();
        }
    }

    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        // SHM-74: this removes no mapping.
        self.backend.stop_queue(index)
    }

    fn start_queue(&mut self, queue: QueueSetup) -> Result<(), DeviceError> {
        self.backend.start_queue(queue)
    }
}
