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
//! What a driver must not do is answered as the specification says: FEATURES_OK that stays clear, QueueReady
//! that reads 0. Where it says nothing the write changes nothing, except the log, which says so (`Misuse`).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;
use virtio_bindings::virtio_config::*;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{DeviceError, VirtioDevice};
use super::interrupt::Interrupt;
use super::queue::{BadQueue, MAX_QUEUE_SIZE, Queue};
use super::register_page::{CONFIG_MAX, CONFIG_START, Register, RegisterPage};
use super::status::{self, DEVICE_NEEDS_RESET, DRIVER, DRIVER_OK, FAILED, FEATURES_OK};
use crate::bus::{BusDevice, MachineEvent};
use crate::report::{MisuseLog, with_causes};

/// MagicValue: "virt".
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// Version: not the legacy interface.
const VERSION: u32 = 2;
/// VendorID: anything; this one says who wrote the device's registers.
const VENDOR: u32 = u32::from_le_bytes(*b"hslt");

/// What SHMLen and SHMBase read where there is no region (table 4.1, and SHM-21).
const NO_REGION: u64 = u64::MAX;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

/// Features that need something of the transport, or of the machine, which this one does not have; they are not
/// offered (section 2.2.2).
///
/// - ACCESS_PLATFORM: there is no IOMMU.
/// - NOTIFICATION_DATA: a kick is an eventfd that KVM signals; the rest of the written value does not reach the
///   back-end.
/// - NOTIF_CONFIG_DATA, SR_IOV and ADMIN_VQ are for PCI.
/// - RING_PACKED: only split virtqueues are checked here, and started by `vhost_user::device`.
const NOT_CARRIED: u64 = 1 << VIRTIO_F_ACCESS_PLATFORM
    | 1 << VIRTIO_F_NOTIFICATION_DATA
    | 1 << VIRTIO_F_NOTIF_CONFIG_DATA
    | 1 << VIRTIO_F_SR_IOV
    | 1 << VIRTIO_F_ADMIN_VQ
    | 1 << VIRTIO_F_RING_PACKED;

/// How often a configuration is shown again because it changed meanwhile; see [`MmioTransport::show_config`].
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
    kicks: Vec<EventFd>,
    used_acknowledged: EventFd,
    /// Lock order: before the page's, and before whatever the device locks. A device that waits for its
    /// back-end does so under this lock: the guest's other writes to this one device wait with it, except
    /// QueueNotify and InterruptACK, which do without. Threads that the back-end waits for never come here.
    state: Mutex<State>,
}

/// What the driver's writes add up to since the last reset, and the device that hears of it.
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

/// A write that the driver must not make, and what is wrong with it. It changed nothing, or it set the one
/// thing that says so to the driver.
#[derive(Debug, Error)]
enum Misuse {
    #[error("a control register takes aligned writes of 4 bytes, not {0}")]
    Width(usize),
    #[error("no register is there")]
    NoRegister,
    #[error("the register is read-only")]
    ReadOnly,
    #[error("{0}")]
    Status(#[from] status::Refused),
    #[error("features are accepted between DRIVER and FEATURES_OK")]
    FeaturesNotNow,
    #[error("FEATURES_OK stays clear: the accepted features {accepted:#x}{} are not all among {offered:#x}", if *.beyond { " and some above bit 63" } else { "" })]
    NotOffered { accepted: u64, beyond: bool, offered: u64 },
    #[error("FEATURES_OK stays clear: VIRTIO_F_VERSION_1 is not among the accepted features {0:#x}")]
    NoVersion1(u64),
    #[error("the device needs a reset; until then neither FEATURES_OK nor QueueReady can be set")]
    Broken,
    #[error("the driver gave up on the device")]
    GaveUp,
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queues are set up after FEATURES_OK")]
    QueueTooEarly,
    #[error("after DRIVER_OK a queue is enabled only where VIRTIO_F_RING_RESET was negotiated")]
    QueueTooLate,
    #[error("queue {0} is ready, so it cannot be changed")]
    QueueIsReady(u16),
    #[error("QueueReady stays 0: {0}")]
    Queue(#[from] BadQueue),
    #[error("the register takes 0 or 1")]
    NotABit,
    #[error("VIRTIO_F_RING_RESET was not negotiated")]
    NoRingReset,
    #[error("queue {0} is not enabled, so there is nothing to reset")]
    QueueNotEnabled(u16),
    #[error("the bits {0:#x} are not defined")]
    UndefinedBits(u32),
    #[error("the configuration space is written after FEATURES_OK")]
    ConfigTooEarly,
}

impl MmioTransport {
    /// Puts `device` behind the registers on `page`. It made its own use of `interrupt` already.
    ///
    /// Fails with InvalidInput for a device that does not keep to [`VirtioDevice`]'s limits, and with what
    /// `eventfd` fails with.
    pub fn new(
        page: Arc<RegisterPage>,
        interrupt: Arc<Interrupt>,
        device: Box<dyn VirtioDevice>,
    ) -> io::Result<Arc<MmioTransport>> {
        check_device(&*device).map_err(|why| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("the device {} {why}", device.name()))
        })?;
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let queues: Vec<_> =
            (0..).zip(device.queue_sizes()).map(|(index, &max)| Queue::new(index, max)).collect();
        let transport = MmioTransport {
            log: MisuseLog::new(device.name()),
            offered: device.features() & !NOT_CARRIED,
            kicks: queues.iter().map(|_| event()).collect::<io::Result<_>>()?,
            used_acknowledged: event()?,
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
        transport.with_state(|transport, state| {
            let mut registers = transport.page.lock();
            registers.set(Register::MagicValue, MAGIC);
            registers.set(Register::Version, VERSION);
            registers.set(Register::DeviceID, state.device.device_type());
            registers.set(Register::VendorID, VENDOR);
            drop(registers);
            transport.show_config(state);
            transport.show_selected(state);
        });
        Ok(Arc::new(transport))
    }

    /// The writes that need not exit to user space, for KVM (ioeventfd, with data match). All are optional:
    /// [`BusDevice::write`] does the same when KVM does not.
    ///
    /// One for each queue signals the queue's kick. One more swallows the acknowledgement of a used buffer,
    /// which has nothing to clear (see [`super::interrupt`]). Nobody reads that eventfd's counter: KVM adds
    /// to it without ever waiting, and leaves it at its maximum if it gets there.
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

    fn with_state<T>(&self, action: impl FnOnce(&Self, &mut State) -> T) -> T {
        action(self, &mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_register(&self, register: Register, value: u32) -> Result<(), Misuse> {
        use Register::*;
        match register {
            MagicValue | Version | DeviceID | VendorID | DeviceFeatures | QueueSizeMax | InterruptStatus
            | SHMLenLow | SHMLenHigh | SHMBaseLow | SHMBaseHigh | ConfigGeneration => Err(Misuse::ReadOnly),

            QueueNotify => self.notify(value),
            InterruptACK => self.acknowledge(value),
            Status => self.with_state(|transport, state| transport.write_status(state, value)),

            DeviceFeaturesSel => self.select(|state| state.device_features_sel = value),
            DriverFeaturesSel => self.select(|state| state.driver_features_sel = value),
            QueueSel => self.select(|state| state.queue_sel = value),
            SHMSel => self.select(|state| state.shm_sel = value),

            DriverFeatures => self.with_state(|transport, state| transport.accept_features(state, value)),

            QueueSize => self.configure_queue(|queue| queue.size = value),
            QueueDescLow => self.configure_queue(|queue| set_low(&mut queue.descriptors, value)),
            QueueDescHigh => self.configure_queue(|queue| set_high(&mut queue.descriptors, value)),
            QueueDriverLow => self.configure_queue(|queue| set_low(&mut queue.driver_area, value)),
            QueueDriverHigh => self.configure_queue(|queue| set_high(&mut queue.driver_area, value)),
            QueueDeviceLow => self.configure_queue(|queue| set_low(&mut queue.device_area, value)),
            QueueDeviceHigh => self.configure_queue(|queue| set_high(&mut queue.device_area, value)),

            QueueReady => self.with_state(|transport, state| match value {
                0 => transport.disable_queue(state),
                1 => transport.enable_queue(state),
                _ => Err(Misuse::NotABit),
            }),
            QueueReset => self.with_state(|transport, state| match value {
                0 => Ok(()),
                1 => transport.reset_queue(state),
                _ => Err(Misuse::NotABit),
            }),
        }
    }

    // Status: sections 2.1, 2.4, 3.1.

    fn status(&self) -> u32 {
        self.page.get(Register::Status)
    }

    fn write_status(&self, state: &mut State, value: u32) -> Result<(), Misuse> {
        let steps = match status::request(self.status(), value)? {
            status::Request::Reset => {
                self.reset(state);
                return Ok(());
            }
            status::Request::Add(steps) => steps,
        };
        for step in steps {
            match step.bit {
                FEATURES_OK => self.check_features(state)?,
                DRIVER_OK => {
                    self.start(state);
                    continue;
                }
                _ => {}
            }
            self.page.lock().set_bits(Register::Status, step.bit);
            if step.bit == FAILED {
                return Err(Misuse::GaveUp);
            }
        }
        Ok(())
    }

    /// Whether FEATURES_OK may be set. The driver can accept other features and try again.
    fn check_features(&self, state: &State) -> Result<(), Misuse> {
        let State { features: accepted, features_beyond: beyond, .. } = *state;
        if self.status() & DEVICE_NEEDS_RESET != 0 {
            // Better that the driver's probe fails now than that it waits for a queue that nobody serves.
            return Err(Misuse::Broken);
        }
        if accepted & !self.offered != 0 || beyond {
            return Err(Misuse::NotOffered { accepted, beyond, offered: self.offered });
        }
        if accepted & VERSION_1 == 0 {
            return Err(Misuse::NoVersion1(accepted));
        }
        Ok(())
    }

    fn start(&self, state: &mut State) {
        // First the registers: what happens to the device while it starts must find DRIVER_OK set, or the
        // driver would not be told.
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
        for kick in &self.kicks {
            // A kick from before must not be the first of the next driver's. No kick is no error.
            let _ = kick.read();
        }
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
        self.with_state(|transport, state| {
            store(state);
            transport.show_selected(state);
        });
        Ok(())
    }

    fn show_selected(&self, state: &State) {
        let features = match state.device_features_sel {
            0 => self.offered as u32,
            1 => (self.offered >> 32) as u32,
            _ => 0,
        };
        let region = u8::try_from(state.shm_sel).ok().and_then(|id| state.device.shared_memory(id));
        let (base, len) = region.map_or((NO_REGION, NO_REGION), |range| (range.start(), range.len()));
        let queue = state.selected();
        let mut registers = self.page.lock();
        registers.set(Register::DeviceFeatures, features);
        registers.set_pair(Register::SHMBaseLow, Register::SHMBaseHigh, base);
        registers.set_pair(Register::SHMLenLow, Register::SHMLenHigh, len);
        registers.set(Register::QueueSizeMax, queue.map_or(0, |queue| queue.max.into()));
        registers.set(Register::QueueReady, queue.is_some_and(|queue| queue.ready).into());
        // A queue's reset is over before another write gets here.
        registers.set(Register::QueueReset, 0);
    }

    // Queues: sections 2.6 and 4.2.3.2.

    fn configure_queue(&self, store: impl FnOnce(&mut Queue)) -> Result<(), Misuse> {
        self.with_state(|transport, state| {
            let queue = state.selected_mut()?;
            if queue.ready {
                return Err(Misuse::QueueIsReady(queue.index));
            }
            if transport.status() & FEATURES_OK == 0 {
                return Err(Misuse::QueueTooEarly);
            }
            store(queue);
            Ok(())
        })
    }

    fn enable_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let (features, running) = (state.features, state.running);
        let status = self.status();
        let queue = state.selected_mut()?;
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
            state.selected_mut()?.ready = started.is_ok();
            self.fail_on_error("start a queue", started);
        }
        self.show_selected(state);
        Ok(())
    }

    /// QueueReady = 0. In any state, as drivers do that to all their queues after a reset.
    fn disable_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let running = state.running;
        let Ok(queue) = state.selected_mut() else {
            return Ok(());
        };
        if queue.ready {
            let index = queue.index;
            if running {
                let stopped = state.device.stop_queue(index);
                self.fail_on_error("stop a queue", stopped);
            }
            state.selected_mut()?.ready = false;
            self.show_selected(state);
        }
        Ok(())
    }

    /// QueueReset = 1: section 2.6.1. No mapping goes away with a queue (SHM-74).
    fn reset_queue(&self, state: &mut State) -> Result<(), Misuse> {
        let negotiated = self.status() & FEATURES_OK != 0 && state.features & RING_RESET != 0;
        let queue = state.selected_mut()?;
        if !negotiated {
            return Err(Misuse::NoRingReset);
        }
        if !queue.ready {
            return Err(Misuse::QueueNotEnabled(queue.index));
        }
        // What other vCPUs read while the device lets go of the queue.
        self.page.lock().set(Register::QueueReset, 1);
        self.disable_queue(state)?;
        let queue = state.selected_mut()?;
        *queue = Queue::new(queue.index, queue.max);
        Ok(())
    }

    // Notifications: sections 4.2.3.3 and 4.2.3.4. Without the transport's lock.

    fn notify(&self, value: u32) -> Result<(), Misuse> {
        let kick = usize::try_from(value).ok().and_then(|index| self.kicks.get(index));
        // The one error is a counter that is full: the queue's user has much to look at already.
        let _ = kick.ok_or(Misuse::NoQueue(value))?.write(1);
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
        self.with_state(|transport, state| {
            if transport.status() & FEATURES_OK == 0 {
                return Err(Misuse::ConfigTooEarly);
            }
            let written = state.device.write_config(offset, data);
            transport.fail_on_error("take a configuration write", written);
            transport.show_config(state);
            Ok(())
        })
    }

    /// Shows the device's configuration.
    ///
    /// The device may change it meanwhile and say so with [`Interrupt::config_changed`]; then ours, older,
    /// can be the last one shown. So look again. (Asking the device under the page's lock would do, but a
    /// lock of the device's would have to go inside it then, and outside it in `config_changed`.) Who is
    /// faster than we are so many times in a row is not done changing, and shows its next one itself.
    fn show_config(&self, state: &State) {
        for _ in 0..CONFIG_ATTEMPTS {
            let config = state.device.config();
            self.page.lock().set_config(&config);
            if state.device.config() == config {
                return;
            }
        }
    }

    /// What to do with a device's answer: an error means that it cannot go on.
    fn fail_on_error(&self, what: &str, answer: Result<(), DeviceError>) {
        if let Err(error) = answer {
            let why = with_causes(&*error);
            self.log.warn(format_args!("the device did not {what} and needs a reset: {why}"));
            self.interrupt.needs_reset();
        }
    }
}

impl BusDevice for MmioTransport {
    /// For reads that exit nevertheless, such as those of instructions that KVM emulates.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.page.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<MachineEvent> {
        if let Some(offset) = offset.checked_sub(CONFIG_START as u64) {
            if let Err(misuse) = self.write_config(offset, data) {
                self.log
                    .warn(format_args!("the driver wrote {data:02x?} at {offset:#x} of Config: {misuse}"));
            }
            return None;
        }
        let register = Register::at(offset);
        let written = match (register, <[u8; 4]>::try_from(data)) {
            (Some(register), Ok(value)) => self.write_register(register, u32::from_le_bytes(value)),
            (None, Ok(_)) if offset.is_multiple_of(4) => Err(Misuse::NoRegister),
            _ => Err(Misuse::Width(data.len())),
        };
        if let Err(misuse) = written {
            let mut value = [0; 8];
            value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            let value = u64::from_le_bytes(value);
            match register {
                Some(register) => {
                    self.log.warn(format_args!("the driver wrote {value:#x} to {register:?}: {misuse}"))
                }
                None => self.log.warn(format_args!("the driver wrote {value:#x} at {offset:#x}: {misuse}")),
            }
        }
        None
    }
}

impl State {
    fn selected(&self) -> Option<&Queue> {
        let queue = self.queues.get(usize::try_from(self.queue_sel).ok()?)?;
        (queue.max > 0).then_some(queue)
    }

    fn selected_mut(&mut self) -> Result<&mut Queue, Misuse> {
        let missing = Misuse::NoQueue(self.queue_sel);
        let queue = usize::try_from(self.queue_sel).ok().and_then(|index| self.queues.get_mut(index));
        queue.filter(|queue| queue.max > 0).ok_or(missing)
    }
}

/// What the transport relies on, and what is wrong with a device that does not keep to it.
fn check_device(device: &dyn VirtioDevice) -> Result<(), String> {
    let (queues, config) = (device.queue_sizes(), device.config().len());
    if device.features() & VERSION_1 == 0 {
        return Err(
            "does not offer VIRTIO_F_VERSION_1, without which there is no virtio-mmio version 2".into()
        );
    }
    if queues.len() > usize::from(u16::MAX) + 1 {
        return Err(format!("has {} queues; there can be 65536", queues.len()));
    }
    if let Some(size) = queues.iter().find(|size| **size > MAX_QUEUE_SIZE) {
        return Err(format!("has a queue of size {size}; the largest is {MAX_QUEUE_SIZE}"));
    }
    if config > CONFIG_MAX {
        return Err(format!("has {config} bytes of configuration space; there is room for {CONFIG_MAX}"));
    }
    Ok(())
}

fn set_low(whole: &mut u64, low: u32) {
    *whole = *whole >> 32 << 32 | u64::from(low);
}

fn set_high(whole: &mut u64, high: u32) {
    *whole = u64::from(*whole as u32) | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
