//! The transport as a driver meets it: reads from the page's memory, writes through the bus.

use std::panic::{self, AssertUnwindSafe};
use std::thread;

use super::Register::*;
use super::*;
use crate::memory::GuestRange;
use crate::virtio::device::QueueSetup;
use crate::virtio::register_page::BLOCK_SIZE;
use crate::virtio::status::{ACKNOWLEDGE, DRIVER_OK, FAILED};

const BLK_SIZE: u64 = 1 << 6;
const OFFERED: u64 = VERSION_1 | RING_RESET | BLK_SIZE;
/// The largest sizes; there is no queue 1.
const SIZES: [u16; 3] = [256, 0, 64];
const REGIONS: [(u8, u64, u64); 3] =
    [(0, 0x1_0000_0000, 0x4000_0000), (1, 0xff_8000_0000, 0x20_0000_1000), (255, 0x2_4000_0000, 0x1000)];

#[derive(Clone, Debug, PartialEq)]
enum Call {
    Start(u64, Vec<Setup>),
    Reset,
    Stop(u16),
    StartQueue(Setup),
    Config(u64, Vec<u8>),
}
use Call::*;

/// index, size, descriptors, driver area, device area
type Setup = (u16, u16, u64, u64, u64);

fn setup(queue: &QueueSetup) -> Setup {
    (queue.index, queue.size, queue.descriptors, queue.driver_area, queue.device_area)
}

/// What the fake device did, and what it is to do.
#[derive(Default)]
struct Script {
    calls: Vec<Call>,
    config: Vec<u8>,
    /// The next call fails.
    fail: bool,
    /// Features that it does not take.
    refused: u64,
    /// Runs inside the next call, as another thread would meanwhile.
    meanwhile: Option<Box<dyn FnOnce() + Send>>,
    started: Option<Vec<u16>>,
}

type Shared = Arc<Mutex<Script>>;

struct Fake {
    script: Shared,
    features: u64,
    sizes: Vec<u16>,
}

impl Fake {
    fn call(&self, call: Call) -> Result<(), DeviceError> {
        let meanwhile = self.script.lock().unwrap().meanwhile.take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        let mut script = self.script.lock().unwrap();
        match &call {
            Start(features, queues) => {
                assert_eq!(script.started, None, "started twice");
                assert_eq!(features & !self.features, 0);
                assert_eq!(features & VERSION_1, VERSION_1);
                script.started = Some(Vec::new());
                for queue in queues {
                    self.start_one(&mut script, queue);
                }
            }
            StartQueue(queue) => self.start_one(&mut script, queue),
            Stop(index) => {
                let queues = script.started.as_mut().expect("running");
                assert!(queues.contains(index), "queue {index} is not started");
                queues.retain(|other| other != index);
            }
            Reset => script.started = None,
            Config(..) => {}
        }
        script.calls.push(call);
        if std::mem::take(&mut script.fail) { Err("the back-end left".into()) } else { Ok(()) }
    }

    fn start_one(&self, script: &mut Script, queue: &Setup) {
        let (index, size, descriptors, driver_area, device_area) = *queue;
        let queues = script.started.as_mut().expect("running");
        assert!(!queues.contains(&index), "queue {index} started twice");
        assert!(size > 0 && size <= self.sizes[usize::from(index)]);
        assert!(size.is_power_of_two());
        assert_eq!((descriptors % 16, driver_area % 2, device_area % 4), (0, 0, 0));
        queues.push(index);
    }
}

impl VirtioDevice for Fake {
    fn name(&self) -> &str {
        "fake0"
    }
    fn device_type(&self) -> u32 {
        27
    }
    fn features(&self) -> u64 {
        self.features
    }
    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }
    fn config(&self) -> Vec<u8> {
        self.script.lock().unwrap().config.clone()
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.call(Config(offset, data.to_vec()))?;
        let mut script = self.script.lock().unwrap();
        let start = offset as usize;
        if let Some(bytes) = script.config.get_mut(start..start + data.len()) {
            bytes.copy_from_slice(data);
        }
        Ok(())
    }
    fn shared_memory(&self, id: u8) -> Option<GuestRange> {
        let region = REGIONS.iter().find(|region| region.0 == id)?;
        GuestRange::new(region.1, region.2)
    }
    fn accept_features(&mut self, features: u64) -> Result<(), DeviceError> {
        let script = self.script.lock().unwrap();
        assert!(script.started.is_none(), "it runs");
        assert_eq!((features & !self.features, features & VERSION_1), (0, VERSION_1));
        if features & script.refused != 0 { Err("it has no use for them".into()) } else { Ok(()) }
    }
    fn start(&mut self, features: u64, queues: &[QueueSetup]) -> Result<(), DeviceError> {
        self.call(Start(features, queues.iter().map(setup).collect()))
    }
    fn reset(&mut self) {
        // It cannot fail.
        let _ = self.call(Reset);
    }
    fn stop_queue(&mut self, index: u16) -> Result<(), DeviceError> {
        self.call(Stop(index))
    }
    fn start_queue(&mut self, queue: QueueSetup) -> Result<(), DeviceError> {
        self.call(StartQueue(setup(&queue)))
    }
}

/// A driver and the device it drives.
struct Guest {
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    transport: Arc<MmioTransport>,
    script: Shared,
}

impl Guest {
    fn new() -> Guest {
        Guest::with(OFFERED, &SIZES).unwrap()
    }

    fn with(features: u64, sizes: &[u16]) -> io::Result<Guest> {
        let script = Shared::default();
        script.lock().unwrap().config = (1..=16).collect();
        let page = RegisterPage::new().unwrap();
        let interrupt = Interrupt::new(page.clone()).unwrap();
        let device = Box::new(Fake { script: script.clone(), features, sizes: sizes.to_vec() });
        let transport = MmioTransport::new(page.clone(), interrupt.clone(), device)?;
        Ok(Guest { page, interrupt, transport, script })
    }

    fn peek(&self, offset: usize) -> u32 {
        assert!(offset + 4 <= BLOCK_SIZE);
        // SAFETY: inside the page that `self` keeps alive, into which nobody has a reference.
        unsafe { self.page.host_ptr().wrapping_add(offset).cast::<u32>().read_volatile() }
    }

    fn read(&self, register: Register) -> u32 {
        let mut exited = [0; 4];
        self.transport.read(register.offset(), &mut exited);
        let value = self.peek(register.offset() as usize);
        assert_eq!(value, u32::from_le_bytes(exited), "by memory and by exit");
        value
    }

    fn read_pair(&self, low: Register, high: Register) -> u64 {
        u64::from(self.read(low)) | u64::from(self.read(high)) << 32
    }

    fn write(&self, register: Register, value: u32) {
        assert_eq!(self.transport.write(register.offset(), &value.to_le_bytes()), None);
    }

    fn write_pair(&self, low: Register, high: Register, value: u64) {
        self.write(low, value as u32);
        self.write(high, (value >> 32) as u32);
    }

    /// Sets status bits as Linux does: on top of what it reads.
    fn add_status(&self, bits: u32) {
        self.write(Status, self.read(Status) | bits);
    }

    fn accept(&self, features: u64) {
        self.write(DriverFeaturesSel, 1);
        self.write(DriverFeatures, (features >> 32) as u32);
        self.write(DriverFeaturesSel, 0);
        self.write(DriverFeatures, features as u32);
    }

    /// Reset to FEATURES_OK; false if the device refused.
    fn negotiate(&self, features: u64) -> bool {
        self.write(Status, 0);
        self.add_status(ACKNOWLEDGE);
        self.add_status(DRIVER);
        self.accept(features);
        self.add_status(FEATURES_OK);
        self.read(Status) & FEATURES_OK != 0
    }

    fn configure(&self, (index, size, descriptors, driver_area, device_area): Setup) {
        self.write(QueueSel, index.into());
        self.write(QueueSize, size.into());
        self.write_pair(QueueDescLow, QueueDescHigh, descriptors);
        self.write_pair(QueueDriverLow, QueueDriverHigh, driver_area);
        self.write_pair(QueueDeviceLow, QueueDeviceHigh, device_area);
    }

    /// True if QueueReady reads 1 then.
    fn enable(&self, queue: Setup) -> bool {
        self.configure(queue);
        self.write(QueueReady, 1);
        self.read(QueueReady) == 1
    }

    fn live(&self, features: u64) {
        assert!(self.negotiate(features));
        assert!(self.enable(FIRST));
        assert!(self.enable(SECOND));
        self.add_status(DRIVER_OK);
        self.calls();
    }

    /// The calls since the last look.
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.script.lock().unwrap().calls)
    }

    fn fail_next(&self) {
        self.script.lock().unwrap().fail = true;
    }

    fn meanwhile(&self, action: impl FnOnce() + Send + 'static) {
        self.script.lock().unwrap().meanwhile = Some(Box::new(action));
    }

    /// Interrupts since the last look.
    fn interrupts(&self) -> u64 {
        self.interrupt.call().read().unwrap_or(0)
    }

    fn kicks(&self, index: usize) -> u64 {
        self.transport.doorbells()[index].event.read().unwrap_or(0)
    }
}

const FIRST: Setup = (0, 256, 0x1_0000_1000, 0x1_0000_2002, 0x1_0000_3004);
const SECOND: Setup = (2, 64, 0x4010, 0x5000, 0x6000);

#[test]
fn a_stock_driver_finds_negotiates_and_starts_the_device() {
    let guest = Guest::new();
    assert_eq!(guest.read(MagicValue), 0x7472_6976);
    assert_eq!(guest.read(Version), 2);
    assert_eq!(guest.read(DeviceID), 27);
    assert_eq!(guest.read(Status), 0);
    guest.write(Status, 0);
    guest.add_status(ACKNOWLEDGE);
    guest.add_status(DRIVER);
    guest.write(DeviceFeaturesSel, 1);
    let high = guest.read(DeviceFeatures);
    guest.write(DeviceFeaturesSel, 0);
    let low = guest.read(DeviceFeatures);
    assert_eq!(u64::from(high) << 32 | u64::from(low), OFFERED);
    guest.write(DeviceFeaturesSel, 2);
    assert_eq!(guest.read(DeviceFeatures), 0);
    guest.accept(VERSION_1 | BLK_SIZE);
    // SHM-100
    guest.script.lock().unwrap().refused = BLK_SIZE;
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 3);
    guest.script.lock().unwrap().refused = 0;
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 11);
    assert_eq!(guest.peek(0x100), u32::from_le_bytes([1, 2, 3, 4]));
    for (index, max) in [(0, 256), (1, 0), (2, 64), (3, 0), (0x10000, 0), (u32::MAX, 0)] {
        guest.write(QueueSel, index);
        assert_eq!((guest.read(QueueReady), guest.read(QueueSizeMax)), (0, max), "queue {index}");
    }
    assert!(guest.enable(FIRST));
    assert!(guest.enable(SECOND));
    guest.write(QueueSel, 1);
    assert_eq!(guest.read(QueueReady), 0);
    guest.write(QueueSel, 0);
    assert_eq!(guest.read(QueueReady), 1);
    assert_eq!(guest.read(InterruptStatus), 0);
    assert_eq!(guest.calls(), [Reset]);
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.calls(), [Start(VERSION_1 | BLK_SIZE, vec![FIRST, SECOND])]);
    assert_eq!(guest.read(Status), 15);
    assert_eq!(guest.interrupts(), 0);
    guest.add_status(0);
    assert_eq!(guest.calls(), []);
}

#[test]
fn an_unload_as_linux_does_it_is_a_reset_and_queues_that_stay_unready() {
    let guest = Guest::new();
    guest.live(OFFERED);
    guest.write(Status, 0);
    for index in 0..3 {
        guest.write(QueueSel, index);
        guest.write(QueueReady, 0);
        assert_eq!(guest.read(QueueReady), 0);
    }
    assert_eq!(guest.calls(), [Reset]);
    assert_eq!(guest.read(Status), 0);
    guest.live(VERSION_1);
}

#[test]
fn features_that_are_not_offered_or_lack_version_1_leave_features_ok_clear() {
    let guest = Guest::new();
    for features in [0, BLK_SIZE, OFFERED | 1, OFFERED | 1 << 63, OFFERED | 1 << VIRTIO_F_NOTIFICATION_DATA] {
        assert!(!guest.negotiate(features), "{features:#x}");
        assert_eq!(guest.read(Status), 3);
        guest.add_status(FEATURES_OK | DRIVER_OK);
        assert_eq!(guest.read(Status), 3);
    }
    guest.accept(VERSION_1);
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 11, "the driver may accept less and try again");

    assert!(guest.negotiate(VERSION_1));
    guest.write(Status, 0);
    guest.write(Status, 3);
    guest.write(DriverFeaturesSel, 2);
    guest.write(DriverFeatures, 0);
    guest.accept(VERSION_1);
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 11, "zeroes above bit 63");
    guest.write(Status, 0);
    guest.write(Status, 3);
    guest.accept(VERSION_1);
    guest.write(DriverFeaturesSel, 3);
    guest.write(DriverFeatures, 1);
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 3, "a feature above bit 63");
}

#[test]
fn features_are_kept_as_negotiated() {
    let guest = Guest::new();
    guest.accept(OFFERED);
    assert!(!guest.negotiate(0), "what was written before DRIVER does not count");
    assert!(guest.negotiate(VERSION_1));
    guest.accept(OFFERED);
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.calls().last(), Some(&Start(VERSION_1, vec![])));
}

#[test]
fn features_that_need_another_transport_are_not_offered() {
    let guest = Guest::with(VERSION_1 | NOT_CARRIED, &SIZES).unwrap();
    guest.write(DeviceFeaturesSel, 1);
    assert_eq!(guest.read(DeviceFeatures), 1);
    for bit in (33..64).filter(|bit| NOT_CARRIED & 1 << bit != 0) {
        assert!(!guest.negotiate(VERSION_1 | 1 << bit), "{bit}");
    }
}

#[test]
fn status_bits_in_the_wrong_order_or_cleared_change_nothing() {
    let guest = Guest::new();
    for (good, bad) in [(0, 2), (0, 4), (1, 8), (3, 7), (3, 2), (3, 0x13), (3, 0x103)] {
        guest.write(Status, 0);
        guest.write(Status, good);
        guest.write(Status, bad);
        assert_eq!(guest.read(Status), good, "{bad:#x}");
    }
    guest.live(VERSION_1);
    guest.write(Status, 11);
    guest.write(Status, 0x40);
    assert_eq!(guest.read(Status), 15);
    guest.add_status(FAILED);
    assert_eq!(guest.read(Status), 0x8f);
    assert_eq!(guest.calls(), []);
    guest.write(Status, 0);
    assert_eq!(guest.read(Status), 0);
    guest.write(Status, 3 | FAILED);
    guest.accept(VERSION_1);
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 0x83, "only a reset goes on from FAILED");
}

#[test]
fn a_misconfigured_queue_does_not_become_ready() {
    let guest = Guest::new();
    let good = FIRST;
    let bad: [(Setup, &str); 8] = [
        ((0, 0, good.2, good.3, good.4), "size 0"),
        ((0, 100, good.2, good.3, good.4), "not a power of two"),
        ((0, 512, good.2, good.3, good.4), "above its maximum"),
        ((0, 256, good.2 + 8, good.3, good.4), "descriptors"),
        ((0, 256, good.2, good.3 + 1, good.4), "driver area"),
        ((0, 256, good.2, good.3, good.4 + 2), "device area"),
        ((1, 256, good.2, good.3, good.4), "not there"),
        ((3, 256, good.2, good.3, good.4), "beyond the last"),
    ];
    assert!(guest.negotiate(VERSION_1 | RING_RESET));
    for (queue, what) in bad {
        assert!(!guest.enable(queue), "{what}");
    }
    guest.configure(good);
    for value in [2, u32::MAX] {
        guest.write(QueueReady, value);
        assert_eq!(guest.read(QueueReady), 0);
    }
    guest.write(QueueSize, 0x1_0100);
    guest.write(QueueReady, 1);
    assert_eq!(guest.read(QueueReady), 0, "no size is cut to 16 bits");
    assert!(guest.enable(good));
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.calls().last(), Some(&Start(VERSION_1 | RING_RESET, vec![good])));
}

#[test]
fn a_queue_that_is_ready_or_comes_before_features_ok_is_not_configured() {
    let guest = Guest::new();
    guest.write(Status, 3);
    assert!(!guest.enable(FIRST));
    assert!(guest.negotiate(VERSION_1));
    guest.write(QueueSel, 0);
    guest.write(QueueReady, 1);
    assert_eq!(guest.read(QueueReady), 0, "nothing of what came too early was kept");
    assert!(guest.enable(FIRST));
    guest.configure((0, 8, 0x70, 0x80, 0x90));
    guest.write(QueueReady, 1);
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.calls().last(), Some(&Start(VERSION_1, vec![FIRST])));
    assert!(!guest.enable(SECOND), "too late without VIRTIO_F_RING_RESET");
    assert_eq!(guest.calls(), []);
}

#[test]
fn queue_ready_0_stops_one_queue() {
    let guest = Guest::new();
    assert!(guest.negotiate(VERSION_1));
    assert!(guest.enable(FIRST));
    guest.write(QueueReady, 0);
    assert_eq!(guest.read(QueueReady), 0);
    assert!(guest.enable(FIRST));
    guest.add_status(DRIVER_OK);
    guest.calls();
    guest.write(QueueReady, 0);
    guest.write(QueueReady, 0);
    assert_eq!(guest.read(QueueReady), 0);
    assert_eq!(guest.calls(), [Stop(0)]);
}

/// SHM-74: only a reset of the device removes mappings, not one of a queue.
#[test]
fn a_ring_reset_stops_the_queue_and_it_can_be_enabled_again() {
    let guest = Guest::new();
    guest.live(VERSION_1 | RING_RESET);
    guest.write(QueueSel, 2);
    let (page, before) = (guest.page.clone(), guest.read(QueueReset));
    let seen = Arc::new(Mutex::new(0));
    let (in_call, interrupt) = (seen.clone(), guest.interrupt.clone());
    guest.meanwhile(move || {
        *in_call.lock().unwrap() = page.get(QueueReset);
        interrupt.config_changed(&[7]);
    });
    guest.write(QueueReset, 1);
    assert_eq!((before, *seen.lock().unwrap()), (0, 1), "1 as long as it goes on");
    assert_eq!((guest.read(QueueReset), guest.read(QueueReady)), (0, 0));
    assert_eq!(guest.calls(), [Stop(2)]);
    guest.write(QueueReady, 1);
    assert_eq!(guest.read(QueueReady), 0, "its registers are as after a reset");
    let changed = (2, 16, 0x4000, 0x5000, 0x6000);
    assert!(guest.enable(changed));
    assert_eq!(guest.calls(), [StartQueue(changed)]);
    guest.write(QueueReset, 0);
    guest.write(QueueReset, 2);
    assert_eq!(guest.calls(), []);
    guest.write(QueueReset, 1);
    guest.write(QueueReset, 1);
    assert_eq!(guest.calls(), [Stop(2)], "a queue that is not enabled is left alone");
}

#[test]
fn a_ring_reset_that_was_not_negotiated_or_of_no_queue_does_nothing() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    guest.write(QueueSel, 0);
    guest.write(QueueReset, 1);
    assert_eq!((guest.read(QueueReset), guest.read(QueueReady)), (0, 1));
    guest.live(VERSION_1 | RING_RESET);
    for index in [1, 3, u32::MAX] {
        guest.write(QueueSel, index);
        guest.write(QueueReset, 1);
        assert_eq!(guest.read(QueueReset), 0);
    }
    assert_eq!(guest.calls(), []);
}

/// SHM-20, SHM-21.
#[test]
fn shared_memory_regions_have_their_exact_length_and_base_and_absent_ones_all_ones() {
    let guest = Guest::new();
    let expect = |id: u32, base: u64, len: u64| {
        guest.write(SHMSel, id);
        assert_eq!(guest.read_pair(SHMBaseLow, SHMBaseHigh), base, "base of {id}");
        assert_eq!(guest.read_pair(SHMLenLow, SHMLenHigh), len, "length of {id}");
    };
    for (id, base, len) in REGIONS {
        expect(id.into(), base, len);
    }
    for absent in [2, 254, 256, 257, 0x1_00ff, u32::MAX] {
        expect(absent, u64::MAX, u64::MAX);
    }
}

/// SHM-22.
#[test]
fn shared_memory_regions_stay_where_they_are_across_a_reset() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    guest.write(SHMSel, 256);
    guest.write(Status, 0);
    for (id, base, len) in REGIONS {
        if id > 0 {
            guest.write(SHMSel, id.into());
        }
        assert_eq!(guest.read_pair(SHMBaseLow, SHMBaseHigh), base);
        assert_eq!(guest.read_pair(SHMLenLow, SHMLenHigh), len);
    }
}

#[test]
fn a_reset_clears_everything_before_the_write_returns() {
    let guest = Guest::new();
    guest.live(OFFERED);
    guest.interrupt.config_changed(&[9; 20]);
    guest.script.lock().unwrap().config = vec![5; 8];
    guest.write(DeviceFeaturesSel, 1);
    guest.write(QueueSel, 2);
    guest.write(SHMSel, 255);
    guest.write(QueueNotify, 2);
    guest.interrupt.needs_reset();
    assert_eq!((guest.read(Status), guest.read(InterruptStatus)), (0x4f, 3));
    let page = guest.page.clone();
    let during = Arc::new(Mutex::new((0, 0)));
    let seen = during.clone();
    guest.meanwhile(move || *seen.lock().unwrap() = (page.get(Status), page.get(QueueReady)));
    guest.write(Status, 0);
    assert_eq!(*during.lock().unwrap(), (0x4f, 1), "the device is reset first, then the registers");
    assert_eq!(guest.calls(), [Reset]);
    assert_eq!((guest.read(Status), guest.read(InterruptStatus)), (0, 0));
    assert_eq!(guest.read(DeviceFeatures), OFFERED as u32, "the selectors are back at 0");
    assert_eq!((guest.read(QueueSizeMax), guest.read(QueueReady), guest.read(QueueReset)), (256, 0, 0));
    assert_eq!(guest.read_pair(SHMBaseLow, SHMBaseHigh), REGIONS[0].1);
    assert_eq!(guest.peek(0x100), 0x0505_0505, "and the configuration is the device's");
    assert_eq!(guest.kicks(2), 0);
    guest.write(Status, 3);
    guest.write(DriverFeaturesSel, 1);
    guest.write(DriverFeatures, 1);
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 11);
    for index in [0, 2] {
        guest.write(QueueSel, index);
        guest.write(QueueReady, 1);
        assert_eq!(guest.read(QueueReady), 0, "no address or size is left");
    }
}

#[test]
fn a_configuration_change_has_a_new_generation_and_an_interrupt() {
    let guest = Guest::new();
    let generation = guest.read(ConfigGeneration);
    guest.interrupt.config_changed(&[1, 1]);
    assert_ne!(guest.read(ConfigGeneration), generation);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (0, 0), "nobody drives the device");
    guest.live(VERSION_1);
    assert_eq!(guest.read(InterruptStatus), VIRTIO_MMIO_INT_VRING);
    for acknowledgement in [2, 3] {
        let generation = guest.read(ConfigGeneration);
        guest.interrupt.config_changed(&[acknowledgement as u8, 2, 3]);
        assert_ne!(guest.read(ConfigGeneration), generation);
        assert_eq!(guest.peek(0x100), 0x0003_0200 + acknowledgement);
        assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (3, 1));
        guest.write(InterruptACK, 1);
        assert_eq!(guest.read(InterruptStatus), 3);
        guest.write(InterruptACK, acknowledgement);
        assert_eq!(guest.read(InterruptStatus), VIRTIO_MMIO_INT_VRING);
    }
    guest.write(InterruptACK, 0xffff_fffc);
    assert_eq!(guest.read(InterruptStatus), VIRTIO_MMIO_INT_VRING);
}

#[test]
fn a_configuration_change_during_the_set_up_is_signalled_again_with_driver_ok() {
    let guest = Guest::new();
    assert!(guest.negotiate(VERSION_1));
    guest.interrupt.config_changed(&[1]);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (2, 1));
    guest.add_status(DRIVER_OK);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (3, 1));
}

#[test]
fn the_configuration_space_takes_writes_of_any_width_once_features_are_ok() {
    let guest = Guest::new();
    let write = |offset: u64, data: &[u8]| guest.transport.write(0x100 + offset, data);
    write(0, &[0xaa]);
    guest.write(Status, 3);
    write(0, &[0xaa]);
    assert_eq!(guest.calls(), []);
    assert!(guest.negotiate(VERSION_1));
    guest.calls();
    let generation = guest.read(ConfigGeneration);
    write(1, &[0xbb]);
    write(5, &[1, 2, 3]);
    write(8, &[9; 8]);
    assert_ne!(guest.read(ConfigGeneration), generation);
    assert_eq!(guest.calls(), [Config(1, vec![0xbb]), Config(5, vec![1, 2, 3]), Config(8, vec![9; 8])]);
    let mut shown = [0; 17];
    guest.transport.read(0x100, &mut shown);
    assert_eq!(shown, [1, 0xbb, 3, 4, 5, 1, 2, 3, 9, 9, 9, 9, 9, 9, 9, 9, 0]);
    write(14, &[7; 4]);
    write(0xefc, &[7; 4]);
    assert_eq!(guest.read(Status), 11, "beyond the end nothing happens");
    assert_eq!(guest.interrupts(), 0);
    guest.fail_next();
    write(0, &[1]);
    assert_eq!(guest.read(Status), 11 | DEVICE_NEEDS_RESET);
}

#[test]
fn what_a_device_says_while_it_takes_a_configuration_write_is_not_overwritten() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    let (script, interrupt) = (guest.script.clone(), guest.interrupt.clone());
    guest.meanwhile(move || {
        script.lock().unwrap().config = vec![0x77; 4];
        interrupt.config_changed(&[0x77; 4]);
    });
    guest.transport.write(0x100, &[1]);
    assert_eq!(guest.peek(0x100), 0x7777_7701);
}

#[test]
fn needs_reset_from_another_thread_is_told_once_to_a_live_driver() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    let interrupt = guest.interrupt.clone();
    thread::spawn(move || (0..3).for_each(|_| interrupt.needs_reset())).join().unwrap();
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (3, 1));
    guest.write(Status, 15);
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET, "the driver cannot clear it");
    guest.write(InterruptACK, 3);
    assert_eq!(guest.read(InterruptStatus), 1);
    guest.live(VERSION_1);
    assert_eq!(guest.read(Status), 15);
}

#[test]
fn needs_reset_before_driver_ok_fails_the_probe_or_is_told_when_it_is_live() {
    let guest = Guest::new();
    guest.write(Status, 3);
    guest.accept(VERSION_1);
    guest.interrupt.needs_reset();
    guest.add_status(FEATURES_OK);
    assert_eq!(guest.read(Status), 3 | DEVICE_NEEDS_RESET);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (0, 0));

    assert!(guest.negotiate(VERSION_1));
    guest.interrupt.needs_reset();
    assert_eq!(guest.interrupts(), 0);
    guest.calls();
    guest.write(Status, 15);
    assert_eq!(guest.calls(), [], "it is not started");
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (3, 1));
}

#[test]
fn status_bits_of_driver_and_device_do_not_lose_each_other() {
    for _ in 0..300 {
        let guest = Guest::new();
        let interrupt = guest.interrupt.clone();
        let other = thread::spawn(move || interrupt.needs_reset());
        guest.write(Status, 1);
        guest.write(Status, 3);
        other.join().unwrap();
        assert_eq!(guest.read(Status), 3 | DEVICE_NEEDS_RESET);
    }
}

#[test]
fn a_device_that_fails_needs_a_reset_and_says_so() {
    let guest = Guest::new();
    assert!(guest.negotiate(VERSION_1 | RING_RESET));
    assert!(guest.enable(FIRST));
    guest.fail_next();
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert_eq!((guest.read(InterruptStatus), guest.interrupts()), (3, 1));
    guest.calls();
    guest.write(QueueReset, 1);
    assert_eq!(guest.calls(), [], "a device that did not start is not asked to stop");

    guest.live(VERSION_1 | RING_RESET);
    guest.write(QueueSel, 0);
    guest.fail_next();
    guest.write(QueueReset, 1);
    assert_eq!((guest.read(QueueReset), guest.read(QueueReady)), (0, 0));
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert_eq!(guest.interrupts(), 1);

    guest.live(VERSION_1 | RING_RESET);
    guest.write(QueueSel, 0);
    guest.write(QueueReset, 1);
    guest.fail_next();
    assert!(!guest.enable(FIRST));
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert!(!guest.enable(FIRST), "not before a reset");
    assert_eq!(guest.calls(), [Stop(0), StartQueue(FIRST)]);
}

#[test]
fn needs_reset_while_the_device_starts_is_told() {
    let guest = Guest::new();
    assert!(guest.negotiate(VERSION_1));
    let interrupt = guest.interrupt.clone();
    guest.meanwhile(move || interrupt.needs_reset());
    guest.add_status(DRIVER_OK);
    assert_eq!(guest.read(Status), 15 | DEVICE_NEEDS_RESET);
    assert_eq!(guest.interrupts(), 1);
}

#[test]
fn a_notification_signals_its_queue() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    guest.write(QueueNotify, 2);
    guest.write(QueueNotify, 2);
    for nobody in [3, 0x1_0000, 0x1_0002, u32::MAX] {
        guest.write(QueueNotify, nobody);
    }
    assert_eq!([guest.kicks(0), guest.kicks(1), guest.kicks(2)], [0, 0, 2]);
    let full = guest.transport.doorbells()[0].event.try_clone().unwrap();
    full.write(u64::MAX - 1).unwrap();
    guest.write(QueueNotify, 0);
    assert_eq!(guest.kicks(0), u64::MAX - 1, "a full counter holds up nobody");
}

#[test]
fn notifications_and_acknowledgements_do_not_wait_for_a_slow_device() {
    let guest = Arc::new(Guest::new());
    guest.live(VERSION_1);
    let other = guest.clone();
    guest.meanwhile(move || {
        thread::spawn(move || {
            other.write(QueueNotify, 0);
            other.write(InterruptACK, 3);
        })
        .join()
        .unwrap();
    });
    guest.write(Status, 0);
    assert_eq!(guest.calls(), [Reset]);
}

#[test]
fn the_doorbells() {
    let guest = Guest::new();
    let doorbells = guest.transport.doorbells();
    let places: Vec<_> = doorbells.iter().map(|doorbell| (doorbell.offset, doorbell.value)).collect();
    assert_eq!(places, [(0x50, 0), (0x50, 1), (0x50, 2), (0x64, 1)]);
}

#[test]
fn other_widths_read_only_registers_and_gaps_change_nothing() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    guest.write(QueueSel, 0);
    let snapshot = || (0..0x140).step_by(4).map(|offset| guest.peek(offset)).collect::<Vec<_>>();
    let before = snapshot();
    for register in [
        MagicValue,
        Version,
        DeviceID,
        VendorID,
        DeviceFeatures,
        QueueSizeMax,
        InterruptStatus,
        SHMLenLow,
        SHMLenHigh,
        SHMBaseLow,
        SHMBaseHigh,
        ConfigGeneration,
    ] {
        guest.write(register, 0);
        guest.write(register, u32::MAX);
    }
    for register in Register::ALL {
        for width in [1, 2, 3, 8] {
            guest.transport.write(register.offset(), &[0; 8][..width]);
        }
        for shift in 1..4 {
            guest.transport.write(register.offset() + shift, &[0; 4]);
        }
    }
    for gap in [0x18, 0x28, 0x3c, 0x40, 0x68, 0xc4, 0xf8] {
        guest.transport.write(gap, &[1, 0, 0, 0]);
    }
    assert_eq!(snapshot(), before);
    assert_eq!(guest.calls(), []);
}

#[test]
fn a_device_beyond_the_limits_is_refused() {
    let error = |features, sizes: &[u16]| Guest::with(features, sizes).err().unwrap().to_string();
    assert!(error(BLK_SIZE, &SIZES).contains("device fake0 does not offer VIRTIO_F_VERSION_1"));
    assert!(error(VERSION_1, &[8, 32769]).contains("a queue of size 32769"));
    assert!(Guest::with(VERSION_1, &[]).is_ok());
}

/// Xorshift (Marsaglia 2003): the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }
}

/// The fake device checks what it is asked (see [`Fake::call`]); this checks what the guest sees.
#[test]
fn whatever_the_guest_writes_nothing_panics_and_the_registers_stay_true() {
    let guest = Guest::new();
    let mut random = Random(0x243f_6a88_85a3_08d3);
    let values = [0, 1, 2, 3, 4, 8, 11, 15, 16, 64, 128, 255, 256, 0x1000, 0x8000_0000, u32::MAX];
    let (mut starts, mut queue_starts, mut queue_stops) = (0, 0, 0);
    for step in 0..40_000 {
        match random.next() % 16 {
            // Random bytes of any width at any place.
            0..3 => {
                let data = random.next().to_le_bytes();
                let width = random.next() as usize % 8 + 1;
                guest.transport.write(random.next() % (BLOCK_SIZE as u64 + 16), &data[..width]);
            }
            // Registers, with values that mean something somewhere.
            3..10 => {
                let register = random.pick(&Register::ALL);
                let value =
                    if random.next().is_multiple_of(4) { random.next() as u32 } else { random.pick(&values) };
                guest.write(register, value);
            }
            10 => guest.fail_next(),
            11 => guest.interrupt.needs_reset(),
            12 => guest.interrupt.config_changed(&random.next().to_le_bytes()),
            // A regular start, so that random writes also reach a running device.
            13 => {
                let optional = random.next() & RING_RESET;
                if guest.negotiate(VERSION_1 | optional) {
                    guest.enable(FIRST);
                    guest.add_status(DRIVER_OK);
                }
            }
            _ => {
                guest.enable(random.pick(&[FIRST, SECOND]));
                guest.write(QueueReset, (random.next() % 2) as u32);
            }
        }
        let status = guest.read(Status);
        let driver_bits = status & !(DEVICE_NEEDS_RESET | FAILED);
        assert!([0, 1, 3, 11, 15].contains(&driver_bits), "step {step}: Status {status:#x}");
        let interrupts = guest.read(InterruptStatus);
        assert_eq!(interrupts & !3, 0);
        assert_eq!(interrupts & 1 != 0, status & DRIVER_OK != 0, "step {step}");
        assert!(status != 0 || interrupts == 0);
        assert!(guest.read(QueueReady) <= 1);
        assert_eq!(guest.read(QueueReset), 0);
        assert_eq!((guest.read(MagicValue), guest.read(Version)), (0x7472_6976, 2));
        for call in guest.calls() {
            match call {
                Start(..) => starts += 1,
                StartQueue(_) => queue_starts += 1,
                Stop(_) => queue_stops += 1,
                Reset | Config(..) => {}
            }
        }
    }
    assert!(starts > 100 && queue_starts > 100 && queue_stops > 100, "{starts} {queue_starts} {queue_stops}");
}

/// A device that panics (it must not) leaves registers that still answer.
#[test]
fn a_poisoned_lock_is_no_end() {
    let guest = Guest::new();
    guest.live(VERSION_1);
    guest.meanwhile(|| panic!("on purpose"));
    assert!(panic::catch_unwind(AssertUnwindSafe(|| guest.write(Status, 0))).is_err());
    guest.write(Status, 0);
    assert_eq!(guest.read(Status), 0);
    assert!(guest.negotiate(VERSION_1));
}
