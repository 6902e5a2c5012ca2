//! One virtqueue as the driver's register writes describe it (VIRTIO 1.3, sections 2.6, 2.7 and 4.2.3.2).

use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_ALIGN_SIZE, VRING_DESC_ALIGN_SIZE, VRING_USED_ALIGN_SIZE};
use vmm_sys_util::eventfd::EventFd;

use super::device::QueueSetup;

/// The largest size of any queue (section 2.7): 2^15.
pub(super) const MAX_QUEUE_SIZE: u16 = 1 << 15;

/// The registers of one queue. What the driver wrote is kept as it is until it sets QueueReady, and judged
/// then.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) index: u16,
    /// QueueSizeMax; 0 where the device has no such queue.
    pub(super) max: u16,
    pub(super) size: u32,
    pub(super) descriptors: u64,
    pub(super) driver_area: u64,
    pub(super) device_area: u64,
    pub(super) ready: bool,
}

/// Why a queue does not become ready.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum BadQueue {
    #[error("queue {index}'s QueueSize {size} is not between 1 and its maximum {max}")]
    Size { index: u16, size: u32, max: u16 },
    #[error("queue {index}'s QueueSize {size} is not a power of two")]
    NotAPowerOfTwo { index: u16, size: u32 },
    #[error("queue {index}'s {area} at {address:#x} is not aligned to {align} bytes")]
    Misaligned { index: u16, area: &'static str, address: u64, align: u32 },
}

impl Queue {
    pub(super) fn new(index: u16, max: u16) -> Self {
        Queue { index, max, size: 0, descriptors: 0, driver_area: 0, device_area: 0, ready: false }
    }

    /// Whether the driver may make it ready as it is now.
    pub(super) fn check(&self) -> Result<(), BadQueue> {
        let Queue { index, max, size, .. } = *self;
        if size == 0 || size > max.into() {
            return Err(BadQueue::Size { index, size, max });
        }
        if !size.is_power_of_two() {
            return Err(BadQueue::NotAPowerOfTwo { index, size });
        }
        for (area, address, align) in [
            ("descriptor area", self.descriptors, VRING_DESC_ALIGN_SIZE),
            ("driver area", self.driver_area, VRING_AVAIL_ALIGN_SIZE),
            ("device area", self.device_area, VRING_USED_ALIGN_SIZE),
        ] {
            if address % u64::from(align) != 0 {
                return Err(BadQueue::Misaligned { index, area, address, align });
            }
        }
        Ok(())
    }

    /// A queue that is ready, for the device.
    pub(super) fn setup(&self, kick: &Arc<EventFd>) -> QueueSetup {
        QueueSetup {
            index: self.index,
            // A queue becomes ready only with a size that its maximum, 16 bits, allows.
            size: self.size as u16,
            descriptors: self.descriptors,
            driver_area: self.driver_area,
            device_area: self.device_area,
            kick: Arc::clone(kick),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(size: u32) -> Queue {
        let mut queue = Queue::new(3, 256);
        queue.size = size;
        (queue.descriptors, queue.driver_area, queue.device_area) = (0x1000, 0x2002, 0x3004);
        queue
    }

    #[test]
    fn sizes() {
        for size in [1, 2, 128, 256] {
            assert_eq!(queue(size).check(), Ok(()));
        }
        for size in [0, 257, 512, 0x10080, u32::MAX] {
            assert_eq!(queue(size).check(), Err(BadQueue::Size { index: 3, size, max: 256 }));
        }
        assert_eq!(queue(96).check(), Err(BadQueue::NotAPowerOfTwo { index: 3, size: 96 }));
    }

    #[test]
    fn alignments() {
        for wrong in 1..16 {
            let mut queue = queue(8);
            queue.descriptors += wrong;
            assert!(queue.check().is_err());
        }
        for (driver_area, device_area, good) in [(2, 4, true), (1, 4, false), (2, 2, false)] {
            let queue = Queue { driver_area, device_area, ..queue(8) };
            assert_eq!(queue.check().is_ok(), good, "{driver_area} {device_area}");
        }
    }
}
