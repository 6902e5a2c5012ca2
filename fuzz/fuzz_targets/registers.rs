//! A guest that writes to a virtio-mmio device's registers whatever it likes, and a device that fails, needs
//! a reset and changes its configuration when it likes.
//!
//! The input is a list of [`Driver::step`]s: writes to registers by name, writes of any width anywhere,
//! events.
//!
//! What must hold, beyond that nothing panics:
//!
//! - A read by memory and a read by exit are the same.
//! - Status goes only where VIRTIO section 2.1 lets it; a bit goes away only by a reset, after which it is 0;
//!   the driver alone sets FAILED, the device alone DEVICE_NEEDS_RESET.
//! - A queue that is ready has a size and addresses that are allowed, those that the driver wrote, and so has
//!   one with which the device is started.
//! - The device is called only as `VirtioDevice` says, with features that were offered and accepted.
//! - A changed configuration has another ConfigGeneration.
//! - Registers that depend on a selector show what is selected; an absent shared memory region is all-ones
//!   (SHM-20 to SHM-22).

#![no_main]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use hotslot::bus::BusDevice;
use hotslot::memory::GuestRange;
use hotslot::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use hotslot::virtio::interrupt::Interrupt;
use hotslot::virtio::mmio::MmioTransport;
use hotslot::virtio::register_page::{BLOCK_SIZE, CONFIG_START, Register, RegisterPage};
use hotslot_fuzz::{Input, descriptors, log_to_nobody};
use libfuzzer_sys::fuzz_target;

// Status bits (VIRTIO section 2.1).
const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

// Feature bits (VIRTIO section 6).
const VERSION_1: u64 = 1 << 32;
const RING_PACKED: u64 = 1 << 34;
const NOTIFICATION_DATA: u64 = 1 << 38;
const RING_RESET: u64 = 1 << 40;

/// What the device can; a transport over MMIO cannot carry the last one.
const FEATURES: u64 = 0x3f | VERSION_1 | RING_RESET | RING_PACKED | NOTIFICATION_DATA;
const OFFERED: u64 = FEATURES & !(NOTIFICATION_DATA | RING_PACKED);

/// The largest sizes; there is no queue 1.
const SIZES: [u16; 3] = [256, 0, 64];

/// Id, start, length.
const REGIONS: [(u32, u64, u64); 2] = [(0, 0x1_0000_0000, 0x4000_0000), (255, 0x2_4000_0000, 0x1000)];

/// Bytes of the configuration space that are looked at.
const CONFIG: usize = 32;

fuzz_target!(|data: &[u8]| {
    log_to_nobody();
    let before = descriptors();
    let mut driver = Driver::new();
    let mut input = Input::new(data);
    while input.has_more() {
        driver.step(&mut input);
    }
    driver.write(Register::Status, 0);
    drop(driver);
    assert_eq!(descriptors(), before, "a descriptor was kept");
});

/// A device of its own kind, which remembers what it was told.
struct Device {
    page: Arc<RegisterPage>,
    shared: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    config: Vec<u8>,
    /// The queues that run, once the device does.
    running: Option<BTreeMap<u16, QueueRegisters>>,
    /// What the driver accepted, at the last start.
    accepted: u64,
    /// The next call fails.
    fail: bool,
    /// A call failed, or DEVICE_NEEDS_RESET was asked for otherwise.
    broken: bool,
}

/// What the driver writes to a queue's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct QueueRegisters {
    size: u32,
    descriptors: u64,
    driver_area: u64,
    device_area: u64,
}

impl QueueRegisters {
    /// VIRTIO sections 2.6 and 2.7.
    fn is_good(&self, max: u16) -> bool {
        (1..=u32::from(max)).contains(&self.size)
            && self.size.is_power_of_two()
            && self.descriptors.is_multiple_of(16)
            && self.driver_area.is_multiple_of(2)
            && self.device_area.is_multiple_of(4)
    }
}

impl Device {
    fn answer(shared: &mut Shared) -> Result<(), DeviceError> {
        if std::mem::take(&mut shared.fail) {
            shared.broken = true;
            return Err("as the fuzzer wants".into());
        }
        Ok(())
    }

    fn start_one(shared: &mut Shared, queue: &QueueSetup) {
        let registers = QueueRegisters {
            size: queue.size.into(),
            descriptors: queue.descriptors,
            driver_area: queue.driver_area,
            device_area: queue.device_area,
        };
        assert!(registers.is_good(SIZES[usize::from(queue.index)]));
        let running = shared.running.as_mut().expect("it is stopped");
        assert_eq!(running.insert(queue.index, registers), None, "it runs already");
    }
}

impl VirtioDevice for Device {
    fn name(&self) -> &str {
        "fuzz"
    }

    fn device_type(&self) -> u32 {
        27
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn config(&self) -> Vec<u8> {
        self.shared.lock().unwrap().config.clone()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        assert_ne!(self.page.get(Register::Status) & FEATURES_OK, 0, "too early");
        let mut shared = self.shared.lock().unwrap();
        let start = offset as usize;
        if let Some(bytes) = shared.config.get_mut(start..start + data.len()) {
            bytes.copy_from_slice(data);
        }
        Device::answer(&mut shared)
    }

    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        let (_, start, len) = REGIONS.into_iter().find(|region| region.0 == u32::from(id))?;
        GuestRange::new(start, len)
    }

    fn accept_features(&mut self, features: u64) -> Result<(), DeviceError> {
        assert_eq!((features & !OFFERED, features & VERSION_1), (0, VERSION_1));
        Ok(())
    }

    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> Result<(), DeviceError> {
        assert_ne!(self.page.get(Register::Status) & DRIVER_OK, 0);
        assert_eq!((features & !OFFERED, features & VERSION_1), (0, VERSION_1));
        let mut shared = self.shared.lock().unwrap();
        assert!(shared.running.is_none(), "it runs already");
        shared.accepted = features;
        shared.running = Some(BTreeMap::new());
        queues.iter().for_each(|queue| Device::start_one(&mut shared, queue));
        Device::answer(&mut shared)
    }

    fn reset(&mut self) {
        let mut shared = self.shared.lock().unwrap();
        shared.running = None;
        shared.broken = false;
    }

    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        let mut shared = self.shared.lock().unwrap();
        let running = shared.running.as_mut().expect("it is stopped");
        running.remove(&index).expect("the queue does not run");
        Device::answer(&mut shared)
    }

    fn start_queue(&mut self, queue: QueueSetup) -> Result<(), DeviceError> {
        let mut shared = self.shared.lock().unwrap();
        assert_ne!(shared.accepted & RING_RESET, 0);
        Device::start_one(&mut shared, &queue);
        let answer = Device::answer(&mut shared);
        if let (Err(_), Some(running)) = (&answer, &mut shared.running) {
            running.remove(&queue.index);
        }
        answer
    }
}

/// The driver, and what it knows of what it wrote.
struct Driver {
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    transport: Arc<MmioTransport>,
    shared: Arc<Mutex<Shared>>,
    accepted: u64,
    accepted_beyond: bool,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    shm_sel: u32,
    queues: [(QueueRegisters, bool); SIZES.len()],
    status: u32,
    generation: u32,
    config: [u8; CONFIG],
}

impl Driver {
    fn new() -> Driver {
        let page = RegisterPage::new().unwrap();
        let interrupt = Interrupt::new(Arc::clone(&page)).unwrap();
        let shared = Arc::new(Mutex::new(Shared { config: (1..=16).collect(), ..Shared::default() }));
        let device = Box::new(Device { page: Arc::clone(&page), shared: Arc::clone(&shared) });
        let transport = MmioTransport::new(Arc::clone(&page), Arc::clone(&interrupt), device).unwrap();
        let mut driver = Driver {
            page,
            interrupt,
            transport,
            shared,
            accepted: 0,
            accepted_beyond: false,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            shm_sel: 0,
            queues: Default::default(),
            status: 0,
            generation: 0,
            config: [0; CONFIG],
        };
        (driver.generation, driver.config) = driver.configuration();
        driver.check(0);
        driver
    }

    fn step(&mut self, input: &mut Input) {
        match input.byte() % 16 {
            0..10 => {
                let register = input.pick(&Register::ALL);
                let value = match input.byte() {
                    value @ ..0xc0 => value.into(),
                    value @ 0xc0..0xd0 => 1 << (value - 0xc0 + 8),
                    _ => input.word(),
                };
                self.write(register, value);
            }
            10 => {
                let offset = input.word() % (BLOCK_SIZE as u32 + 16);
                let len = usize::from(input.byte() % 8) + 1;
                let mut data = input.bytes(len);
                data.resize(len, 0);
                self.write_any(offset.into(), &data);
            }
            11 => self.shared.lock().unwrap().fail = true,
            12 => {
                self.shared.lock().unwrap().broken = true;
                self.interrupt.needs_reset();
                self.check(NEEDS_RESET);
            }
            13 => {
                let len = usize::from(input.byte()) % CONFIG;
                let config = input.bytes(len);
                self.shared.lock().unwrap().config = config.clone();
                self.interrupt.config_changed(&config);
                self.check(0);
            }
            // Every queue's registers, as a driver looks at them.
            14 => (0..4).for_each(|queue| self.write(Register::QueueSel, queue)),
            _ => {
                let region = input.pick(&[0, 255, 1, 256, 257, u32::MAX]);
                self.write(Register::SHMSel, region);
            }
        }
    }

    fn write(&mut self, register: Register, value: u32) {
        self.write_any(register.offset(), &value.to_le_bytes());
    }

    /// Writes, and follows what a driver may believe afterwards.
    fn write_any(&mut self, offset: u64, data: &[u8]) {
        let before = self.read(Register::Status);
        assert_eq!(self.transport.write(offset, data), None);
        let written = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        let (Some(register), Ok(value)) = (Register::at(offset), written) else {
            return self.check(0);
        };
        match register {
            Register::Status if value == 0 => {
                self.check_reset();
                return;
            }
            Register::DeviceFeaturesSel => self.device_features_sel = value,
            Register::DriverFeaturesSel => self.driver_features_sel = value,
            Register::QueueSel => self.queue_sel = value,
            Register::SHMSel => self.shm_sel = value,
            Register::DriverFeatures if before & (DRIVER | FEATURES_OK) == DRIVER => {
                match self.driver_features_sel {
                    0 => set_low(&mut self.accepted, value),
                    1 => set_high(&mut self.accepted, value),
                    _ => self.accepted_beyond |= value != 0,
                }
            }
            _ => self.follow_queue(register, value, before),
        }
        let set_now = if register == Register::Status { value } else { 0 };
        self.check(set_now & !NEEDS_RESET);
    }

    fn follow_queue(&mut self, register: Register, value: u32, status: u32) {
        let ready_now = self.read(Register::QueueReady) == 1;
        let Some((queue, ready)) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        match register {
            Register::QueueReady if value == 0 => assert!(!ready_now, "it cannot be disabled"),
            Register::QueueReady => *ready |= value == 1 && ready_now,
            Register::QueueReset if value == 1 && *ready && !ready_now => *queue = Default::default(),
            _ if *ready || status & FEATURES_OK == 0 => {}
            Register::QueueSize => queue.size = value,
            Register::QueueDescLow => set_low(&mut queue.descriptors, value),
            Register::QueueDescHigh => set_high(&mut queue.descriptors, value),
            Register::QueueDriverLow => set_low(&mut queue.driver_area, value),
            Register::QueueDriverHigh => set_high(&mut queue.driver_area, value),
            Register::QueueDeviceLow => set_low(&mut queue.device_area, value),
            Register::QueueDeviceHigh => set_high(&mut queue.device_area, value),
            _ => {}
        }
        if matches!(register, Register::QueueReady | Register::QueueReset) {
            *ready &= ready_now;
        }
    }

    fn check_reset(&mut self) {
        assert_eq!((self.read(Register::Status), self.read(Register::InterruptStatus)), (0, 0));
        assert!(self.shared.lock().unwrap().running.is_none());
        (self.accepted, self.accepted_beyond) = (0, false);
        (self.device_features_sel, self.driver_features_sel) = (0, 0);
        (self.queue_sel, self.shm_sel) = (0, 0);
        self.queues = Default::default();
        self.status = 0;
        self.check(0);
    }

    /// What the driver sees is right, after something that may have added `added` to Status.
    fn check(&mut self, added: u32) {
        self.check_status(added);
        self.check_selected();
        let (generation, config) = self.configuration();
        assert!(
            config == self.config || generation != self.generation,
            "the configuration changed, and not its generation"
        );
        (self.generation, self.config) = (generation, config);
        for register in Register::ALL {
            let mut exited = [0; 4];
            self.transport.read(register.offset(), &mut exited);
            assert_eq!(self.read(register), u32::from_le_bytes(exited), "{register:?}");
        }
        let constant =
            [Register::MagicValue, Register::Version, Register::DeviceID].map(|register| self.read(register));
        assert_eq!(constant, [0x7472_6976, 2, 27]);
    }

    fn check_status(&mut self, added: u32) {
        let status = self.read(Register::Status);
        let shared = self.shared.lock().unwrap();
        let (lost, gained) = (self.status & !status, status & !self.status);
        assert_eq!(lost, 0, "bits went away without a reset");
        assert_eq!(gained & !(added | NEEDS_RESET), 0, "nobody set that");
        assert!(status & NEEDS_RESET == 0 || shared.broken, "the device did not say so");
        let in_order = [
            0,
            ACKNOWLEDGE,
            ACKNOWLEDGE | DRIVER,
            ACKNOWLEDGE | DRIVER | FEATURES_OK,
            ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
        ];
        assert!(in_order.contains(&(status & !(FAILED | NEEDS_RESET))), "{status:#x}");
        if status & FEATURES_OK != 0 {
            assert!(self.accepted & !OFFERED == 0 && !self.accepted_beyond);
            assert_eq!(self.accepted & VERSION_1, VERSION_1);
        }
        assert!(gained & !NEEDS_RESET == 0 || self.status & FAILED == 0, "only a reset goes on from FAILED");
        assert!(gained & FEATURES_OK == 0 || self.status & NEEDS_RESET == 0);
        let interrupts = self.read(Register::InterruptStatus);
        assert_eq!((interrupts & !3, interrupts & 1 != 0), (0, status & DRIVER_OK != 0));
        assert!(status != 0 || interrupts == 0);
        match &shared.running {
            Some(running) => {
                assert_eq!((status & DRIVER_OK, shared.accepted), (DRIVER_OK, self.accepted));
                // One that failed was not told of everything since.
                let known = running.iter().filter(|_| !shared.broken);
                for (&index, queue) in known {
                    assert_eq!(*queue, self.queues[usize::from(index)].0);
                }
            }
            None => assert!(status & DRIVER_OK == 0 || status & NEEDS_RESET != 0),
        }
        self.status = status;
    }

    fn check_selected(&mut self) {
        let features = match self.device_features_sel {
            0 => OFFERED as u32,
            1 => (OFFERED >> 32) as u32,
            _ => 0,
        };
        assert_eq!(self.read(Register::DeviceFeatures), features);

        let region = REGIONS.into_iter().find(|region| region.0 == self.shm_sel);
        let (_, start, len) = region.unwrap_or((0, u64::MAX, u64::MAX));
        let pair = |low, high| u64::from(self.read(low)) | u64::from(self.read(high)) << 32;
        assert_eq!(pair(Register::SHMBaseLow, Register::SHMBaseHigh), start);
        assert_eq!(pair(Register::SHMLenLow, Register::SHMLenHigh), len);

        let max = SIZES.get(self.queue_sel as usize).copied().unwrap_or(0);
        assert_eq!(self.read(Register::QueueSizeMax), u32::from(max));
        assert_eq!(self.read(Register::QueueReset), 0);
        let ready = self.read(Register::QueueReady);
        match self.queues.get(self.queue_sel as usize) {
            Some((queue, known)) => {
                assert_eq!(ready, u32::from(*known), "it became ready, or not, by itself");
                assert!(ready == 0 || queue.is_good(max));
                assert!(ready == 0 || self.status & FEATURES_OK != 0);
            }
            None => assert_eq!(ready, 0),
        }
    }

    /// ConfigGeneration, and what it is the generation of.
    fn configuration(&self) -> (u32, [u8; CONFIG]) {
        let mut config = [0; CONFIG];
        let words = (CONFIG_START as u64..).step_by(4);
        for (bytes, offset) in config.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&self.peek(offset).to_le_bytes());
        }
        (self.read(Register::ConfigGeneration), config)
    }

    /// Reads a register as the guest does.
    fn read(&self, register: Register) -> u32 {
        self.peek(register.offset())
    }

    fn peek(&self, offset: u64) -> u32 {
        assert!(offset + 4 <= BLOCK_SIZE as u64);
        let register = self.page.host_ptr().wrapping_add(offset as usize).cast::<u32>();
        // SAFETY: inside the page that `self` keeps alive, into which nobody has a reference.
        unsafe { register.read_volatile() }
    }
}

fn set_low(whole: &mut u64, low: u32) {
    *whole = *whole >> 32 << 32 | u64::from(low);
}

fn set_high(whole: &mut u64, high: u32) {
    *whole = u64::from(*whole as u32) | u64::from(high) << 32;
}
