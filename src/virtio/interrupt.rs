//! A device's interrupt: used buffers, configuration changes, DEVICE_NEEDS_RESET.
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
//! Bit 0 stays set from DRIVER_OK to reset: the back-end signals the irqfd but cannot set a register. The
//! driver then looks at each queue for used buffers, which is right whether or not there are any. In return
//! neither an interrupt nor its acknowledgement costs an exit to user space.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::register_page::{Register, RegisterPage, Registers};
use super::status::{DEVICE_NEEDS_RESET, DRIVER_OK};
use crate::counter::Counter;

/// A device's one interrupt, and the registers that say what it means.
///
/// Every method may be called by any thread, at any time, also before the guest runs; none waits.
pub struct Interrupt {
    page: Arc<RegisterPage>,
    call: EventFd,
    /// How often hotslot, and not the back-end, interrupted the driver.
    pub sent: Counter,
}

impl Interrupt {
    /// The interrupt of the device behind this page.
    pub fn new(page: Arc<RegisterPage>) -> io::Result<Arc<Interrupt>> {
        let call = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Arc::new(Interrupt { page, call, sent: Counter::default() }))
    }

    /// The eventfd that interrupts the guest: an irqfd for KVM, the call eventfd of each queue for a
    /// back-end.
    pub fn call(&self) -> &EventFd {
        &self.call
    }

    /// Interrupts the driver: a back-end that died may have used a buffer and not said so.
    pub fn signal(&self) {
        self.sent.count();
        // The only error is EAGAIN, a full counter: then an interrupt is pending anyway.
        let _ = self.call.write(1);
    }

    /// The configuration space is now `config`: shows it, under a new ConfigGeneration, and tells the driver.
    ///
    /// While Status is 0 there is no driver to tell (section 2.4.1); the next one reads the configuration
    /// anyway. The caller has updated what `VirtioDevice::config` returns before it calls this.
    pub fn config_changed(&self, config: &[u8]) {
        self.change(|registers| {
            registers.set_config(config);
            let driven = registers.get(Register::Status) != 0;
            if driven {
                registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_CONFIG);
            }
            driven
        });
    }

    /// The device cannot go on: sets DEVICE_NEEDS_RESET and, if DRIVER_OK is set, tells the driver (section
    /// 2.1.2).
    ///
    /// Does nothing if called again before the reset, so that a back-end cannot cause a storm of interrupts.
    pub fn needs_reset(&self) {
        self.change(|registers| {
            let status = registers.get(Register::Status);
            registers.set_bits(Register::Status, DEVICE_NEEDS_RESET);
            let is_new = status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK;
            if is_new {
                registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_CONFIG);
            }
            is_new
        });
    }

    /// The driver set DRIVER_OK. Whether the device can be started; it cannot if it needed a reset before.
    ///
    /// A pending configuration bit is signalled now: the driver's interrupt handler may not have been there
    /// when the bit was set.
    pub(super) fn driver_ok(&self) -> bool {
        let mut healthy = true;
        self.change(|registers| {
            healthy = registers.get(Register::Status) & DEVICE_NEEDS_RESET == 0;
            let failed = if healthy { 0 } else { VIRTIO_MMIO_INT_CONFIG };
            registers.set_bits(Register::Status, DRIVER_OK);
            registers.set_bits(Register::InterruptStatus, VIRTIO_MMIO_INT_VRING | failed);
            registers.get(Register::InterruptStatus) & VIRTIO_MMIO_INT_CONFIG != 0
        });
        healthy
    }

    /// The driver wrote `bits` to InterruptACK.
    pub(super) fn acknowledge(&self, bits: u32) {
        let mut registers = self.page.lock();
        let pending = registers.get(Register::InterruptStatus) & !(bits & VIRTIO_MMIO_INT_CONFIG);
        registers.set(Register::InterruptStatus, pending);
    }

    /// Clears InterruptStatus and Status, as the last step of a reset.
    pub(super) fn reset(&self) {
        let mut registers = self.page.lock();
        registers.set(Register::InterruptStatus, 0);
        registers.set(Register::Status, 0);
    }

    /// Changes registers all at once, then interrupts the driver if `action` says so.
    fn change(&self, action: impl FnOnce(&mut Registers<'_>) -> bool) {
        let is_new = action(&mut self.page.lock());
        if is_new {
            self.signal();
        }
    }
}
