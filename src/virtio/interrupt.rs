//! What a device says to its driver on its own: used buffers, a changed configuration, that it needs a reset.
//!
//! VIRTIO 1.3, sections 2.1, 2.3, 3.2.1 and 4.2.3.4. Shared by the transport, the device, and the threads
//! that listen to the device's back-end.
//!
//! ```text
//! InterruptStatus       set                                       cleared
//!   bit 0, used buffer  with DRIVER_OK                            by the reset
//!   bit 1, config       by config_changed, needs_reset            by the driver's acknowledgement, by the reset
//! ```
//!
//! Bit 0 is set all the time that a used buffer is possible, because the one who uses buffers is another
//! process, which signals the interrupt through KVM and knows no registers. What the driver does then (look
//! at each queue for used buffers) is right whether or not there are any. In return neither an interrupt nor
//! its acknowledgement costs an exit to user space.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::register_page::{Register, RegisterPage};
use super::status::{DEVICE_NEEDS_RESET, DRIVER_OK};

/// A device's one interrupt, and the registers that say what it means.
///
/// Every method may be called by any thread, at any time, also before the guest runs; none waits for
/// anything.
pub struct Interrupt {
    page: Arc<RegisterPage>,
    call: EventFd,
}

impl Interrupt {
    /// The interrupt of the device behind this page.
    pub fn new(page: Arc<RegisterPage>) -> io::Result<Arc<Interrupt>> {
        let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Interrupt { page, call }))
    }

    /// What interrupts the guest when it is written to: an irqfd for KVM, the call eventfd of each queue for
    /// a back-end.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// The configuration space is now `config`: shows it, under a new ConfigGeneration, and tells the driver.
    ///
    /// While Status is 0 there is no driver that could be told (section 2.4.1): it reads the configuration
    /// later anyway.
    ///
    /// The caller has updated what `VirtioDevice::config` returns before it calls this.
    pub fn config_changed(&self, config: &[u8]) {
        let mut registers = self.page.lock();
        registers.set_config(config);
        let driven = registers.get(Register::Status) != 0;
        if driven {
            registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_CONFIG);
        }
        drop(registers);
        if driven {
            self.signal();
        }
    }

    /// The device cannot go on: sets DEVICE_NEEDS_RESET and, if DRIVER_OK is set, tells the driver (section
    /// 2.1.2).
    ///
    /// Once more before the reset does nothing, so that what a back-end does cannot become a storm of
    /// interrupts.
    pub fn needs_reset(&self) {
        let mut registers = self.page.lock();
        let status = registers.get(Register::Status);
        registers.set_bits(Register::Status, DEVICE_NEEDS_RESET);
        let tell = status & DRIVER_OK != 0 && status & DEVICE_NEEDS_RESET == 0;
        if tell {
            registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_CONFIG);
        }
        drop(registers);
        if tell {
            self.signal();
        }
    }

    /// The driver set DRIVER_OK. Says whether the device can be started; it cannot if it needed a reset
    /// before.
    ///
    /// What the driver had to be told before that moment (when its interrupt handler may not have been there)
    /// is signalled now.
    pub(super) fn driver_ok(&self) -> bool {
        let mut registers = self.page.lock();
        let healthy = registers.get(Register::Status) & DEVICE_NEEDS_RESET == 0;
        registers.set_bits(Register::Status, DRIVER_OK);
        registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_VRING);
        if !healthy {
            registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_CONFIG);
        }
        let pending = registers.get(Register::InterruptStatus) & VIRTIO_MMIO_INT_CONFIG != 0;
        drop(registers);
        if pending {
            self.signal();
        }
        healthy
    }

    /// The driver wrote `bits` to InterruptACK.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.page.lock().clear_bits(Register::InterruptStatus, bits & VIRTIO_MMIO_INT_CONFIG);
    }

    /// Clears InterruptStatus and Status, as the last step of a reset.
    pub(super) fn reset(&self) {
        let mut registers = self.page.lock();
        registers.set(Register::InterruptStatus, 0);
        registers.set(Register::Status, 0);
    }

    fn signal(&self) {
        // The one error is EAGAIN, a counter that is full because nobody fetched it: then an interrupt is
        // pending anyway.
        let _ = self.call.write(1);
    }
}
