//! The trait through which a transport calls a virtio device (VIRTIO 1.3, section 2).
//!
//! `super::mmio::MmioTransport` owns a device and calls it; `vhost_user::device` implements it.
//!
//! ```text
//!                    start(features, queues)
//!        ┌─────────┐ ─────────── DRIVER_OK ──────────▶ ┌─────────┐ ◀┐ stop_queue / start_queue
//!   ──▶  │ stopped │                                   │ running │  │ (VIRTIO_F_RING_RESET)
//!        └─────────┘ ◀── reset(), Status = 0 ───────── └─────────┘ ─┘
//! ```

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestRange;

/// One virtqueue as the driver set it up. Addresses are guest physical and not yet checked against RAM.
#[derive(Clone, Debug)]
pub struct QueueSetup {
    /// The queue's index.
    pub index: u16,
    /// The number of descriptor table entries: a power of two, at most what the device allows.
    pub size: u16,
    /// The descriptor table's address (a multiple of 16).
    pub descriptors: u64,
    /// The driver area's (available ring's) address (a multiple of 2).
    pub driver_area: u64,
    /// The device area's (used ring's) address (a multiple of 4).
    pub device_area: u64,
    /// Signalled by the guest's QueueNotify writes, also before the start. Non-blocking; the same one at each
    /// start.
    pub kick: Arc<EventFd>,
}

/// Why a device could not carry out its driver's request. The transport logs it and sets DEVICE_NEEDS_RESET.
pub type DeviceError = Box<dyn std::error::Error + Send + Sync>;

/// A virtio device behind a transport.
///
/// All methods are called by a vCPU thread inside a guest's register write (or by the set-up, before the
/// first), with the transport's lock held: one at a time for each device. They may wait for a back-end,
/// always with a deadline. None may call back into the transport. A device interrupts its driver through
/// `interrupt::Interrupt`.
pub trait VirtioDevice: Send {
    /// The device's name in messages, as the user gave it.
    fn name(&self) -> &str;

    /// The virtio device type (VIRTIO section 5).
    fn device_type(&self) -> u32;

    /// The feature bits to offer to the driver, VIRTIO_F_VERSION_1 among them. They do not change. The
    /// transport leaves out those that it cannot carry, such as VIRTIO_F_NOTIFICATION_DATA.
    fn features(&self) -> u64;

    /// The largest size of each queue, at most 32768, 0 for one that is not there; its length is the number
    /// of queues. It does not change.
    fn queue_sizes(&self) -> &[u16];

    /// A copy of the configuration space; at most 0xf00 bytes (what fits in the register block). It does not
    /// wait for a back-end. A thread that changes it calls `Interrupt::config_changed` afterwards.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space, after FEATURES_OK. `offset + data.len()` may be beyond
    /// its end: such a write does nothing. The transport shows [`Self::config`] anew afterwards.
    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError>;

    /// Where a shared memory region is (VIRTIO section 2.10); `None` for an id that is absent. It does not
    /// change.
    fn shared_memory(&self, id: u8) -> Option<GuestRange>;

    /// The driver sets FEATURES_OK, with these features, a subset of those offered with VIRTIO_F_VERSION_1.
    /// Stopped only. On an error FEATURES_OK stays clear, and the driver may accept others.
    fn accept_features(&mut self, features: u64) -> Result<(), DeviceError>;

    /// The driver set DRIVER_OK, after it accepted `features`, a subset of those offered with
    /// VIRTIO_F_VERSION_1; `queues` are those that it enabled, maybe none. Stopped → running. The driver can
    /// already be interrupted. On an error the device is still running for the sake of the diagram: a `reset`
    /// follows before any `start`.
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> Result<(), DeviceError>;

    /// The driver wrote 0 to Status. Any state, also stopped → stopped. When it returns every mapping in the
    /// device's shared memory is gone (SHM-69), unless KVM refused to delete its slot, and no other thread
    /// reports anything about the time before (Status would show it to the next driver). It cannot fail: a
    /// device that no longer answers is cut off. The transport shows [`Self::config`] anew afterwards.
    fn reset(&mut self);

    /// The driver reset one queue (VIRTIO section 2.6.1), or set its QueueReady to 0, which it may do without
    /// VIRTIO_F_RING_RESET too. Running only, and only for a queue that was started; when it returns, with an
    /// error or not, the device no longer uses the queue. Mappings stay (SHM-74).
    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError>;

    /// The driver enabled a queue, again after its reset or for the first time. Running only, with
    /// VIRTIO_F_RING_RESET negotiated. After an error the queue is not in use, and none is started until a
    /// `reset`.
    fn start_queue(&mut self, queue: QueueSetup) -> Result<(), DeviceError>;
}
