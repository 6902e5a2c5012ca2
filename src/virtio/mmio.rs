//! A virtio device behind memory-mapped registers, version 2 (VIRTIO 1.3, section 4.2).
//!
//! A guest's read is a read of the [`RegisterPage`]. A guest's write exits, and a vCPU thread brings it here
//! through the bus: the register has a name, its handler tells the device, and the page is rewritten, all
//! before the vCPU goes on.
//!
//! ```text
//! write of     the driver means            what happens                                the page shows
//! ───────────  ──────────────────────────  ──────────────────────────────────────────  ────────────────────────────
//! ...Sel       which word, queue, region                                               that one's registers
//! DriverFeat.  these features, please      kept for FEATURES_OK
//! Status       how far it is (`status`)    features checked, device started or reset   Status, InterruptStatus
//! Queue...     where a queue is            kept for QueueReady
//! QueueReady   use it / leave it           checked; on a running device start, stop    QueueReady
//! QueueReset   forget it                   device stopped using it                     QueueReset 1, then both 0
//! QueueNotify  look at a queue             (KVM signals its kick eventfd)
//! Interrupt-   seen                        (KVM swallows it for used buffers)          InterruptStatus
//! ACK
//! Config       device-specific             device told                                 Config, ConfigGeneration
//! ```
//!
//! A wrong write is answered as the specification says: FEATURES_OK stays clear, QueueReady reads 0. Where
//! the specification is silent the write changes nothing. Both are logged (`Misuse`).

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{DeviceError, VirtioDevice};
use super::interrupt::Interrupt;
use super::kick;
use super::misuse::Misuse;
use super::queue::{MAX_QUEUE_SIZE, Queue};
use super::register_page::{CONFIG_MAX, CONFIG_START, Register, RegisterPage};
use super::status::{self, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use crate::bus::BusDevice;
use crate::counter::Counts;
use crate::counters;
use crate::exit::Exit;
use crate::report::{MisuseLog, with_causes};

/// MagicValue: "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version: not the legacy interface.
const VERSION: u32 = 2;
/// VendorID: any value is fine; this is ours.
const VENDOR: u32 = u32::from_le_bytes(*b"hslt");

/// What SHMLen and SHMBase read where there is no region (table 4.1, and SHM-21).
const NO_REGION: u64 = u64::MAX;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

/// Features that need something of the transport, or of the machine, which this one does not have; they are
/// not offered (section 2.2.2).
///
/// - ACCESS_PLATFORM: there is no IOMMU.
/// - NOTIFICATION_DATA: a kick is an eventfd that KVM signals; the rest of the written value does not reach
///   the back-end.
/// - NOTIF_CONFIG_DATA, SR_IOV and ADMIN_VQ are for PCI.
/// - RING_PACKED: only split virtqueues are checked here, and started by `vhost_user::device`.
pub const NOT_CARRIED: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_ADMIN_VQ
    | 1 << VIRTIO_F_RING_PACKED;

/// How often a configuration is shown again because it has changed meanwhile.
const CONFIG_ATTEMPTS: usize = 16;

/// A write that KVM turns into a signal instead of an exit to user space.
pub struct Doorbell<'a> {
    /// Where in the block; the write is 4 bytes wide.
    pub offset: u64,
    /// Only a write of this value.
    pub value: u32,
    /// What is signalled.
    pub event: &'a EventFd,
}

/// One device's register block: [`super::register_page::BLOCK_SIZE`] bytes on the bus.
pub struct MmioTransport {
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    log: MisuseLog,
    /// What the driver may accept.
    offered: u64,
    /// One for each queue.
    kicks: Vec<Arc<EventFd>>,
    used_acknowledged: EventFd,
    counters: Counters,
    /// Lock order: before the page's, and before all locks of the device. A device waits for its back-end
    /// under this lock: the guest's other writes to this device then wait, too, except QueueNotify and
    /// InterruptACK, which do not take it. Threads that the back-end waits for never take it.
    state: Mutex<State>,
}

counters! {
    /// What the driver's accesses cost, as far as they come here.
    Counters {
        /// Writes of QueueNotify that were exits: KVM signals a kick without one.
        kicks,
        /// The longest time that a vCPU spent in a write to a register.
        longest_write_us,
    }
}

/// What the driver's writes add up to since the last reset, and the device.
struct State {
    device: Box<dyn VirtioDevice>,
    /// `device` was started, without an error, and not reset since.
    running: bool,
    queues: Vec<Queue>,
    features: u64,
    /// The driver accepted features above bit 63, where none is offered.
    features_beyond: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    shm_sel: u32,
}

impl MmioTransport {
    /// Puts `device`, which has a share of `interrupt`, behind the registers on `page`.
    ///
    /// Fails with InvalidInput for a device beyond [`VirtioDevice`]'s limits, else with the errno of
    /// eventfd(2).
    pub fn new(
        page: Arc<RegisterPage>,
        interrupt: Arc<Interrupt>,
        device: Box<dyn VirtioDevice>,
    ) -> io::Result<Arc<MmioTransport>> {
        check_device(&*device).map_err(|why| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("the device {} {why}", device.name()))
        })?;
        for (register, value) in [
            (Register::MagicValue, MAGIC),
            (Register::Version, VERSION),
            (Register::DeviceID, device.device_type()),
            (Register::VendorID, VENDOR),
        ] {
            page.lock().set(register, value);
        }
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let queues: Vec<_> =
            (0..).zip(device.queue_sizes()).map(|(index, &max)| Queue::new(index, max)).collect();
        let transport = MmioTransport {
            log: MisuseLog::new(device.name()),
            offered: device.features() & !NOT_CARRIED,
            kicks: queues.iter().map(|_| event().map(Arc::new)).collect::<io::Result<_>>()?,
            used_acknowledged: event()?,
            counters: Counters::default(),
            state: Mutex::new(State {
                device,
                running: false,
                queues,
                features: 0,
                features_beyond: false,
                device_features_sel: 0,
                driver_features_sel: 0,
                queue_sel: 0,
                shm_sel: 0,
            }),
            page,
            interrupt,
        };
        transport.show_config(&transport.state());
        transport.show_selected(&mut transport.state());
        Ok(Arc::new(transport))
    }

    /// The writes that need not exit to user space, for KVM (ioeventfd, with data match). All are optional:
    /// [`BusDevice::write`] does the same when KVM does not.
    ///
    /// One for each queue signals the queue's kick. One more swallows the acknowledgement of a used buffer,
    /// which has nothing to clear (see [`super::interrupt`]). That eventfd's counter is never read: KVM adds
    /// to it without waiting, and leaves it at its maximum if it gets there.
    pub fn doorbells(&self) -> Vec<Doorbell<'_>> {
        let kicks = (0..).zip(&self.kicks).map(|(index, event)| Doorbell {
            offset: Register::QueueNotify.offset(),
            value: index,
            event,
        });
        let acknowledgement = Doorbell {
            offset: Register::InterruptACK.offset(),
            value: VIRTIO_MMIO_INT_VRING,
            event: &self.used_acknowledged,
        };
        kicks.chain([acknowledgement]).collect()
    }

    /// What is counted here, and the interrupts that hotslot itself sent.
    pub fn counts(&self) -> Counts {
        let mut counts = self.counters.counts();
        counts.push(("interrupts".to_owned(), self.interrupt.sent.get()));
        counts
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_register(&self, register: Register, value: u32) -> Result<(), Misuse> {
        use Register::*;
        match register {
            MagicValue | Version | DeviceID | VendorID | DeviceFeatures | QueueSizeMax | InterruptStatus
            | SHMLenLow | SHMLenHigh | SHMBaseLow | SHMBaseHigh | ConfigGeneration => Err(Misuse::ReadOnly),

            QueueNotify => self.notify(value),
            InterruptACK => self.acknowledge(value),
            Status => self.write_status(&mut self.state(), value),

            DeviceFeaturesSel => self.select(|state| state.device_features_sel = value),
            DriverFeaturesSel => self.select(|state| state.driver_features_sel = value),
            QueueSel => self.select(|state| state.queue_sel = value),
            SHMSel => self.select(|state| state.shm_sel = value),

            DriverFeatures => self.accept_features(&mut self.state(), value),

            QueueSize => self.configure_queue(|queue| queue.size = value),
            QueueDescLow => self.configure_queue(|queue| set_low(&mut queue.descriptors, value)),
            QueueDescHigh => self.configure_queue(|queue| set_high(&mut queue.descriptors, value)),
            QueueDriverLow => self.configure_queue(|queue| set_low(&mut queue.driver_area, value)),
            QueueDriverHigh => self.configure_queue(|queue| set_high(&mut queue.driver_area, value)),
            QueueDeviceLow => self.configure_queue(|queue| set_low(&mut queue.device_area, value)),
            QueueDeviceHigh => self.configure_queue(|queue| set_high(&mut queue.device_area, value)),

            QueueReady if value == 0 => self.disable_queue(&mut self.state()),
            QueueReady if value == 1 => self.enable_queue(&mut self.state()),
            QueueReset if value == 0 => Ok(()),
            QueueReset if value == 1 => self.reset_queue(&mut self.state()),
            QueueReady | QueueReset => Err(Misuse::NotABit),
        }
    }

    // Status: sections 2.1, 2.4, 3.1.

    fn status(&self) -> u32 {
        self.page.get(Register::Status)
    }

    fn write_status(&self, state: &mut State, value: u32) -> Result<(), Misuse> {
        if value == 0 {
            self.reset(state);
            return Ok(());
        }
        for bit in status::added(self.status(), value)? {
            match bit {
                FEATURES_OK => self.check_features(state)?,
                DRIVER_OK => {
                    self.start(state);
                    continue;
                }
                _ => {}
            }
            self.page.lock().set_bits(Register::Status, bit);
            if bit == FAILED {
                return Err(Misuse::GaveUp);
            }
        }
        Ok(())
    }

    /// Whether FEATURES_OK may be set. The driver can accept other features and try again.
    fn check_features(&self, state: &mut State) -> Result<(), Misuse> {
        let State { features: accepted, features_beyond: beyond, .. } = *state;
        if self.status() & DEVICE_NEEDS_RESET != 0 {
            // The driver's probe fails now, instead of waiting later for a queue that is not served.
            return Err(Misuse::Broken);
        }
        if accepted & !self.offered != 0 || beyond {
            return Err(Misuse::NotOffered { accepted, beyond, offered: self.offered });
        }
        if accepted & VERSION_1 == 0 {
            return Err(Misuse::NoVersion1(accepted));
        }
        state.device.accept_features(accepted).map_err(|error| Misuse::NotTaken(with_causes(&*error)))
    }

    fn start(&self, state: &mut State) {
        // Set DRIVER_OK before starting: `needs_reset` interrupts the driver only after it.
        if !self.interrupt.driver_ok() {
            return;
        }
        let State { device, queues, features, .. } = state;
        let ready = queues.iter().zip(&self.kicks).filter(|(queue, _)| queue.ready);
        let setups: Vec<_> = ready.map(|(queue, kick)| queue.setup(kick)).collect();
        let started = device.start(*features, &setups);
        state.running = started.is_ok();
        self.fail_on_error("start", started);
    }

    fn reset(&self, state: &mut State) {
        state.running = false;
        state.device.reset();
        for queue in &mut state.queues {
            *queue = Queue::new(queue.index, queue.max);
        }
        (state.features, state.features_beyond) = (0, false);
        (state.device_features_sel, state.driver_features_sel) = (0, 0);
        (state.queue_sel, state.shm_sel) = (0, 0);
        // The next driver's device must not see a kick from before.
        self.kicks.iter().for_each(|kick| kick::forget(kick));
        self.show_config(state);
        self.show_selected(state);
        self.interrupt.reset();
    }

    // Features: section 2.2.

    fn accept_features(&self, state: &mut State, value: u32) -> Result<(), Misuse> {
        if self.status() & (DRIVER | FEATURES_OK) != DRIVER {
            return Err(Misuse::FeaturesNotNow);
        }
        match state.driver_features_sel {
            0 => set_low(&mut state.features, value),
            1 => set_high(&mut state.features, value),
            _ => state.features_beyond |= value != 0,
        }
        Ok(())
    }

    // Selectors, and the registers that show what they select.

    fn select(&self, store: impl FnOnce(&mut State)) -> Result<(), Misuse> {
        let mut state = self.state();
        store(&mut state);
        self.show_selected(&mut state);
        Ok(())
    }

    fn show_selected(&self, state: &mut State) {
        let features = match state.device_features_sel {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        };
        let region = u8::try_from(state.shm_sel).ok().and_then(|id| state.device.shared_memory(id));
        let (base, len) = region.map_or((NO_REGION, NO_REGION), |range| (range.start(), range.len()));
        let (max, ready) = state.selected().map_or((0, false), |queue| (queue.max, queue.ready));
        let mut registers = self.page.lock();
        registers.set(Register::DeviceFeatures, features);
        registers.set_pair(Register::SHMBaseLow, Register::SHMBaseHigh, base);
        registers.set_pair(Register::SHMLenLow, Register::SHMLenHigh, len);
        registers.set(Register::QueueSizeMax, max.into());
        registers.set(Register::QueueReady, ready.into());
        // A queue's reset is over before the next write is handled.
        registers.set(Register::QueueReset, 0);
    }

    // Queues: sections 2.6 and 4.2.3.2.

    fn configure_queue(&self, store: impl FnOnce(&mut Queue)) -> Result<(), Misuse> {
        let mut state = self.state();
        let queue = state.selected()?;
        if queue.ready {
            return Err(Misuse::QueueIsReady(queue.index));
        }
        if self.status() & FEATURES_OK == 0 {
            return Err(Misuse::QueueTooEarly);
        }
        store(queue);
        Ok(())
    }

    fn enable_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let status = self.status();
        let State { features, running, .. } = *state;
        let queue = state.selected()?;
        if queue.ready {
            return Ok(());
        }
        if status & FEATURES_OK == 0 {
            return Err(Misuse::QueueTooEarly);
        }
        if status & DEVICE_NEEDS_RESET != 0 {
            return Err(Misuse::Broken);
        }
        if status & DRIVER_OK != 0 && features & RING_RESET == 0 {
            return Err(Misuse::QueueTooLate);
        }
        queue.check()?;
        queue.ready = true;
        if let (true, Some(kick)) = (running, self.kicks.get(usize::from(queue.index))) {
            let setup = queue.setup(kick);
            let started = state.device.start_queue(setup);
            state.selected()?.ready = started.is_ok();
            self.fail_on_error("start a queue", started);
        }
        self.show_selected(state);
        Ok(())
    }

    /// QueueReady = 0. In any state, as drivers do that to all their queues after a reset.
    fn disable_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let running = state.running;
        let Ok(queue) = state.selected() else {
            return Ok(());
        };
        if queue.ready {
            let index = queue.index;
            if running {
                let stopped = state.device.stop_queue(index);
                self.fail_on_error("stop a queue", stopped);
            }
            state.selected()?.ready = false;
            self.show_selected(state);
        }
        Ok(())
    }

    /// QueueReset = 1: section 2.6.1. No mapping goes away with a queue (SHM-74).
    fn reset_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let negotiated = self.status() & FEATURES_OK != 0 && state.features & RING_RESET != 0;
        let queue = state.selected()?;
        if !negotiated {
            return Err(Misuse::NoRingReset);
        }
        if !queue.ready {
            return Err(Misuse::QueueNotEnabled(queue.index));
        }
        // What other vCPUs read while the device stops using the queue.
        self.page.lock().set(Register::QueueReset, 1);
        self.disable_queue(state)?;
        let queue = state.selected()?;
        *queue = Queue::new(queue.index, queue.max);
        Ok(())
    }

    // Notifications: sections 4.2.3.3 and 4.2.3.4. Without the transport's lock.

    fn notify(&self, value: u32) -> Result<(), Misuse> {
        self.counters.kicks.count();
        let kick = usize::try_from(value).ok().and_then(|index| self.kicks.get(index));
        kick::signal(kick.ok_or(Misuse::NoQueue(value))?);
        Ok(())
    }

    fn acknowledge(&self, value: u32) -> Result<(), Misuse> {
        self.interrupt.acknowledge(value);
        match value & !(VIRTIO_MMIO_INT_VRING | VIRTIO_MMIO_INT_CONFIG) {
            0 => Ok(()),
            undefined => Err(Misuse::UndefinedBits(undefined)),
        }
    }

    // Configuration: section 2.5.

    fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), Misuse> {
        let mut state = self.state();
        if self.status() & FEATURES_OK == 0 {
            return Err(Misuse::ConfigTooEarly);
        }
        let written = state.device.write_config(offset, data);
        self.fail_on_error("take a configuration write", written);
        self.show_config(&state);
        Ok(())
    }

    /// Shows the device's configuration.
    ///
    /// Another thread of the device may change it meanwhile and show it with [`Interrupt::config_changed`];
    /// ours, older, would then be shown last. So it is read again after it was shown. A device that has
    /// changed it [`CONFIG_ATTEMPTS`] times in a row is still changing it, and shows the next one itself.
    /// (Reading it under the page's lock would do, too, but then a lock of the device would be taken inside
    /// the page's here, and outside it in `config_changed`.)
    fn show_config(&self, state: &State) {
        for _ in 0..CONFIG_ATTEMPTS {
            let config = state.device.config();
            self.page.lock().set_config(&config);
            if state.device.config() == config {
                return;
            }
        }
    }

    /// A device that answers with an error cannot go on: it needs a reset.
    fn fail_on_error(&self, what: &str, answer: Result<(), DeviceError>) {
        if let Err(error) = answer {
            let why = with_causes(&*error);
            self.log.warn(format_args!("the device did not {what} and needs a reset: {why}"));
            self.interrupt.needs_reset();
        }
    }
}

impl BusDevice for MmioTransport {
    /// For reads that exit all the same, such as those of instructions that KVM emulates.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        // The log says what was wrong with it.
        let _misuse = self.carry_out(offset, data);
        None
    }
}

impl MmioTransport {
    /// Carries out a write of the guest, and logs what is wrong with it.
    pub(super) fn carry_out(&self, offset: u64, data: &[u8]) -> Result<(), Misuse> {
        let began = Instant::now();
        let written = self.write_at(offset, data);
        self.counters.longest_write_us.keep_longest(began.elapsed());
        written
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Misuse> {
        if let Some(offset) = offset.checked_sub(CONFIG_START as u64) {
            return self.write_config(offset, data).inspect_err(|misuse| {
                self.log
                    .warn(format_args!("the driver wrote {data:02x?} at {offset:#x} of Config: {misuse}"));
            });
        }
        let register = Register::at(offset);
        let written = match (register, <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(value)) => self.write_register(register, u32::from_le_bytes(value)),
            (None, Ok(_)) if offset.is_multiple_of(4) => Err(Misuse::NoRegister),
            _ => Err(Misuse::Width(data.len())),
        };
        written.inspect_err(|misuse| {
            let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
            let place = register.map_or(format!("at {offset:#x}"), |register| format!("to {register:?}"));
            self.log.warn(format_args!("the driver wrote {value:#x} {place}: {misuse}"));
        })
    }
}

impl State {
    /// The queue that QueueSel names.
    fn selected(&mut self) -> Result<&mut Queue, Misuse> {
        let queue = usize::try_from(self.queue_sel).ok().and_then(|index| self.queues.get_mut(index));
        queue.filter(|queue| queue.max > 0).ok_or(Misuse::NoQueue(self.queue_sel))
    }
}

/// The limits of [`VirtioDevice`] that the transport relies on; an error says which one `device` exceeds.
fn check_device(device: &dyn VirtioDevice) -> Result<(), String> {
    let (queues, config) = (device.queue_sizes(), device.config().len());
    if device.features() & VERSION_1 == 0 {
        Err("does not offer VIRTIO_F_VERSION_1, without which there is no virtio-mmio version 2".into())
    } else if let Some(size) = queues.iter().find(|size| **size > MAX_QUEUE_SIZE) {
        Err(format!("has a queue of size {size}; the largest is {MAX_QUEUE_SIZE}"))
    } else if config > CONFIG_MAX {
        Err(format!("has {config} bytes of configuration space; there is room for {CONFIG_MAX}"))
    } else {
        Ok(())
    }
}

fn set_low(whole: &mut u64, low: u32) {
    *whole = *whole >> 32 << 32 | u64::from(low);
}

fn set_high(whole: &mut u64, high: u32) {
    *whole = u64::from(*whole as u32) | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
