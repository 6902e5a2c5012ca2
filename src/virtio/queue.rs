//! One virtqueue as the driver's register writes describe it (VIRTIO 1.3, sections 2.6 to 2.8 and 4.2.3.2).

use thiserror::Error;
use virtio_bindings::virtio_ring::{VRING_AVAIL_ALIGN_SIZE, VRING_DESC_ALIGN_SIZE, VRING_USED_ALIGN_SIZE};
use vmm_sys_util::eventfd::EventFd;

use super::device::QueueSetup;

/// The largest size of any queue (sections 2.7 and 2.8.10.1): 2^15.
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

/// The alignment of the driver's and the device's area in a packed queue (section 2.8.10.1).
const PACKED_EVENT_ALIGN: u32 = 4;

impl Queue {
    pub(super) fn new(index: u16, max: u16) -> Self {
        Queue { index, max, size: 0, descriptors: 0, driver_area: 0, device_area: 0, ready: false }
    }

    /// Whether the driver may make it ready as it is now.
    pub(super) fn check(&self, packed: bool) -> Result<(), BadQueue> {
        let Queue { index, max, size, .. } = *self;
        if size == 0 || size > max.into() {
            return Err(BadQueue::Size { index, size, max });
        }
        if !packed && !size.is_power_of_two() {
            return Err(BadQueue::NotAPowerOfTwo { index, size });
        }
        let [driver_align, device_align] =
            if packed { [PACKED_EVENT_ALIGN; 2] } else { [VRING_AVAIL_ALIGN_SIZE, VRING_USED_ALIGN_SIZE] };
        for (area, address, align) in [
            ("descriptor area", self.descriptors, VRING_DESC_ALIGN_SIZE),
            ("driver area", self.driver_area, driver_align),
            ("device area", self.device_area, device_align),
        ] {
            if address % u64::from(align) != 0 {
                return Err(BadQueue::Misaligned { index, area, address, align });
            }
        }
        Ok(())
    }

    /// What the device has to know of a queue that is ready.
    pub(super) fn setup<'a>(&self, kick: &'a EventFd) -> QueueSetup<'a> {
        QueueSetup {
            index: self.index,
            // A queue becomes ready only with a size that its maximum, 16 bits, allows.
            size: self.size as u16,
            descriptors: self.descriptors,
            driver_area: self.driver_area,
            device_area: self.device_area,
            kick,
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
            assert_eq!(queue(size).check(false), Ok(()));
        }
        for size in [0, 257, 512, 0x10080, u32::MAX] {
            assert_eq!(queue(size).check(false), Err(BadQueue::Size { index: 3, size, max: 256 }));
        }
        assert_eq!(queue(96).check(false), Err(BadQueue::NotAPowerOfTwo { index: 3, size: 96 }));
        let mut packed = queue(96);
        packed.driver_area = 0x2004;
        assert_eq!(packed.check(true), Ok(()));
    }

    #[test]
    fn alignments() {
        for wrong in 1..16 {
            let mut queue = queue(8);
            queue.descriptors += wrong;
            assert!(queue.check(false).is_err());
        }
        for (packed, driver_area, device_area, good) in [
            (false, 2, 4, true),
            (false, 1, 4, false),
            (false, 2, 2, false),
            (true, 4, 4, true),
            (true, 2, 4, false),
            (true, 4, 2, false),
        ] {
            let queue = Queue { driver_area, device_area, ..queue(8) };
            assert_eq!(queue.check(packed).is_ok(), good, "{packed} {driver_area} {device_area}");
        }
    }
}
