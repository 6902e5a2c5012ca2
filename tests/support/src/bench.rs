//! A device of the library in this process, its scripted back-end behind a real socket, and a machine that
//! records what its guest can see.
//!
//! This file is where the tests touch the library's types.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hotslot::config::device::DeviceSpec;
use hotslot::memory::alloc::WindowAllocator;
use hotslot::memory::shmem::{Limits, SharedMemory};
use hotslot::memory::{Access, GuestMapper};
use hotslot::vhost_user::connect::{self, ConnectError};
use hotslot::vhost_user::device::VhostUserDevice;
use hotslot::vhost_user::handshake::Handshake;
use hotslot::vhost_user::memory_table::MemoryTable;
use hotslot::vhost_user::sharing::Participant;
use hotslot::vhost_user::wire::message::MemoryRegion;
use hotslot::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use hotslot::virtio::interrupt::Interrupt;
pub use hotslot::virtio::register_page::Register;
use hotslot::virtio::register_page::RegisterPage;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backend::Script;
pub use crate::backend::{Answer, Backend, Connection, Offer, REGION, Seen, ids};
pub use crate::files::{PAGE, file_of, memfd};
pub use crate::names::*;
pub use crate::recorder::Guest;
pub use crate::wait::{PATIENCE, eventually};
use crate::wire::Message;
pub use crate::wire::{page_at, writable};

/// A device to be.
pub struct Setup {
    pub offer: Offer,
    pub kind: &'static str,
    /// Other keys of the device string, each after a comma.
    pub keys: String,
    pub shmem_bit: u32,
    pub quota: usize,
    /// How many bytes its back-end may map at a time.
    pub bytes: u64,
    /// Whether its back-end may map files of other processes' file systems.
    pub foreign_files: bool,
    /// The machine that the device is in.
    pub guest: Arc<Guest>,
    /// Where its windows may be.
    pub windows: WindowAllocator,
    /// Whether others see its mappings, and what it is among them.
    pub shares: bool,
    pub member: Option<Participant>,
    /// How many of its requests are served in a second.
    pub rate: Option<u32>,
    /// How many seconds its back-end may be away.
    reconnect: Option<u64>,
    script: Script,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            offer: Offer::default(),
            kind: "rng",
            keys: ",queues=2,queue-size=64".to_string(),
            shmem_bit: 22,
            quota: 4096,
            bytes: 64 << 30,
            foreign_files: false,
            guest: Arc::default(),
            windows: WindowAllocator::new(1 << 32, 1 << 40),
            shares: false,
            member: None,
            rate: None,
            reconnect: None,
            script: Box::new(|_, _| Answer::Usual),
        }
    }
}

impl Setup {
    /// Without some of the protocol features.
    pub fn without(mut self, protocol: u64) -> Setup {
        self.offer.protocol &= !protocol;
        self
    }

    /// Its back-end may be away for so many seconds.
    pub fn reconnect(mut self, seconds: u64) -> Setup {
        self.reconnect = Some(seconds);
        self
    }

    /// With a back-end that offers this.
    pub fn offering(mut self, offer: Offer) -> Setup {
        self.offer = offer;
        self
    }

    /// A back-end that does not always do what every back-end does.
    pub fn script(mut self, script: impl FnMut(&Message, &Connection) -> Answer + Send + 'static) -> Setup {
        self.script = Box::new(script);
        self
    }

    /// A back-end that acts before it answers request `id`.
    pub fn on(self, id: u32, mut act: impl FnMut(&Connection) -> Answer + Send + 'static) -> Setup {
        self.script(move |message, connection| match message.request == id {
            true => act(connection),
            false => Answer::Usual,
        })
    }

    /// Connects, and learns what the back-end is.
    pub fn connect(mut self) -> (Result<Handshake, ConnectError>, Unbuilt) {
        let script = std::mem::replace(&mut self.script, Box::new(|_, _| Answer::Usual));
        let backend = Backend::scripted(self.offer.clone(), script);
        let unbuilt = self.unbuilt(backend);
        (unbuilt.connect(), unbuilt)
    }

    /// A device whose back-end is not the scripted one, but what `listen` makes listen on the socket.
    pub fn foreign(self, listen: impl FnOnce(&Path)) -> Bench {
        let unbuilt = self.unbuilt(Backend::silent());
        listen(unbuilt.socket());
        let handshake = unbuilt.connect().unwrap();
        unbuilt.device(handshake).unwrap()
    }

    /// All of the set-up.
    pub fn start(self) -> Bench {
        let (handshake, unbuilt) = self.connect();
        let bench = unbuilt.device(handshake.unwrap()).unwrap();
        if bench.device().shared_memory(0).is_some() {
            bench.channel();
        }
        bench
    }

    fn unbuilt(self, backend: Backend) -> Unbuilt {
        let text = format!(
            "{},type={},name=device,shmem-bit={}{}",
            backend.socket().display(),
            self.kind,
            self.shmem_bit,
            self.keys
        );
        let mut spec: DeviceSpec = text.parse().unwrap();
        spec.share_shmem = self.shares;
        spec.shmem_rate = self.rate.map(|rate| rate.try_into().unwrap());
        (spec.shmem_limit, spec.foreign_files) = (self.bytes, self.foreign_files);
        spec.reconnect = self.reconnect.map(Duration::from_secs);
        Unbuilt { spec, setup: self, backend }
    }
}

/// A back-end that runs, and the device that it is to be the back-end of.
pub struct Unbuilt {
    spec: DeviceSpec,
    setup: Setup,
    backend: Backend,
}

impl std::ops::Deref for Unbuilt {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.backend
    }
}

impl Unbuilt {
    fn connect(&self) -> Result<Handshake, ConnectError> {
        connect::connect(&self.spec, PATIENCE, self.setup.member.is_some(), None)
    }

    /// The device that the back-end makes.
    pub fn device(self, handshake: Handshake) -> Result<Bench, DeviceError> {
        let Unbuilt { spec, setup: Setup { guest, mut windows, quota, member, .. }, backend } = self;
        let sizes = (0..=255).zip(handshake.region_sizes.clone());
        let &DeviceSpec { shmem_limit: bytes, foreign_files, prefault, .. } = &spec;
        let limits = Limits { mappings: quota, bytes, foreign_files, prefault };
        let mapper: Arc<dyn GuestMapper> = guest.clone();
        let shmem = Arc::new(SharedMemory::new(&spec.name, sizes, &mut windows, mapper, limits)?);
        let page = RegisterPage::new()?;
        let interrupt = Interrupt::new(Arc::clone(&page))?;
        let ram = MemoryRegion { guest_addr: 0, size: 16 << 20, user_addr: 0x7000_0000_0000, mmap_offset: 0 };
        let file = Arc::new(memfd(ram.size));
        let memory = MemoryTable { file: Arc::clone(&file), regions: vec![ram] };
        let loss = Arc::new(Mutex::new(None));
        let told = Arc::clone(&loss);
        let on_loss = Box::new(move |why: &str| *told.lock().unwrap() = Some(why.to_owned()));
        let device = VhostUserDevice::new(
            &spec,
            handshake,
            memory,
            Arc::clone(&shmem),
            Arc::clone(&interrupt),
            member,
            Some(on_loss),
        )?;
        let kicks = [(); 2].map(|()| Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        Ok(Bench {
            device: Mutex::new(Some(device)),
            shmem,
            page,
            interrupt,
            kicks,
            ram: file,
            loss,
            guest,
            backend,
        })
    }
}

impl std::ops::Deref for Bench {
    type Target = Backend;

    fn deref(&self) -> &Backend {
        &self.backend
    }
}

/// A device, its back-end, and the machine that it is in.
pub struct Bench {
    device: Mutex<Option<VhostUserDevice>>,
    shmem: Arc<SharedMemory>,
    page: Arc<RegisterPage>,
    interrupt: Arc<Interrupt>,
    kicks: [Arc<EventFd>; 2],
    ram: Arc<File>,
    loss: Arc<Mutex<Option<String>>>,
    guest: Arc<Guest>,
    backend: Backend,
}

/// The device, locked.
pub struct DeviceGuard<'a>(std::sync::MutexGuard<'a, Option<VhostUserDevice>>);

impl std::ops::Deref for DeviceGuard<'_> {
    type Target = VhostUserDevice;

    fn deref(&self) -> &VhostUserDevice {
        self.0.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for DeviceGuard<'_> {
    fn deref_mut(&mut self) -> &mut VhostUserDevice {
        self.0.as_mut().unwrap()
    }
}

impl Bench {
    pub fn device(&self) -> DeviceGuard<'_> {
        DeviceGuard(self.device.lock().unwrap())
    }

    /// The driver's DRIVER_OK, with both queues.
    pub fn start(&self) -> Result<(), DeviceError> {
        let queues = [self.queue(0), self.queue(1)];
        self.device().start(VIRTIO_F_VERSION_1, &queues)
    }

    pub fn queue(&self, index: u16) -> QueueSetup {
        let base = 0x1_0000 * (u64::from(index) + 1);
        QueueSetup {
            index,
            size: 64,
            descriptors: base,
            driver_area: base + 0x4000,
            device_area: base + 0x8000,
            kick: Arc::clone(&self.kicks[usize::from(index)]),
        }
    }

    /// The driver's write of 0 to Status.
    pub fn reset(&self) {
        self.device().reset();
    }

    /// What the back-end was asked since `action` began.
    pub fn asked(&self, action: impl FnOnce()) -> Vec<Seen> {
        let before = self.seen().len();
        action();
        self.seen().split_off(before)
    }

    /// The back-end dies, and the device knows it.
    pub fn kill(&self) {
        self.hang_up();
        eventually("the back-end is away", || self.shmem.is_expecting());
    }

    /// Waits until a back-end that came back goes on, and has made its mappings.
    pub fn wait_until_back(&self) {
        eventually("the back-end is back", || !self.shmem.is_expecting());
        assert_eq!(self.loss(), None);
    }

    /// Why the back-end is lost permanently; `None` as long as it is not.
    pub fn loss(&self) -> Option<String> {
        self.loss.lock().unwrap().clone()
    }

    /// Waits until the back-end is lost permanently.
    pub fn wait_for_loss(&self) -> String {
        self.wait_until_failed();
        eventually("the loss is told", || self.loss().is_some());
        self.loss().unwrap()
    }

    /// The used index of a queue, in RAM.
    pub fn set_used_index(&self, index: u16, used: u16) {
        let place = self.queue(index).device_area + 2;
        self.ram.write_all_at(&used.to_le_bytes(), place).unwrap();
    }

    /// The guest's RAM, as the file that the back-end gets.
    pub fn ram(&self) -> &File {
        &self.ram
    }

    /// How often a queue was kicked since the last look.
    pub fn kicks(&self, index: u16) -> u64 {
        self.kicks[usize::from(index)].read().unwrap_or(0)
    }

    /// How often the driver was interrupted since the last look.
    pub fn interrupts(&self) -> u64 {
        self.interrupt.call().read().unwrap_or(0)
    }

    /// A register of the device, as the driver reads it.
    pub fn register(&self, register: Register) -> u32 {
        self.page.get(register)
    }

    /// Whether the driver is told that the device needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.page.get(Register::Status) & 0x40 != 0
    }

    pub fn wait_until_failed(&self) {
        eventually("the device needs a reset", || self.needs_reset());
    }

    pub fn shmem(&self) -> &SharedMemory {
        &self.shmem
    }

    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Drops the device, and everything of ours that it could live on in.
    pub fn end(self) -> Backend {
        self.device.lock().unwrap().take();
        self.backend
    }

    /// What the guest sees of a region: offset, length, access.
    pub fn sees(&self, shmid: u8) -> Vec<(u64, u64, Access)> {
        let region = self.shmem.region(shmid).unwrap();
        self.guest().sees(region)
    }

    /// What the guest reads at an offset of a region; `None` where nothing is mapped.
    pub fn reads(&self, shmid: u8, offset: u64) -> Option<u8> {
        let start = self.shmem.region(shmid).unwrap().start();
        self.guest().read(start + offset)
    }

    /// The guest writes a byte; false where it cannot.
    pub fn writes(&self, shmid: u8, offset: u64, byte: u8) -> bool {
        let start = self.shmem.region(shmid).unwrap().start();
        self.guest().write(start + offset, byte)
    }

    /// SHMEM_MAP of one page of a file full of `byte`, at a page of region 0.
    pub fn map_page(&self, page: u64, byte: u8) -> i64 {
        self.map(page_at(page), &file_of(1, byte))
    }

    /// The channel still does its work: something is mapped, seen and unmapped.
    pub fn assert_works(&self) {
        let last = REGION / PAGE - 1;
        assert_eq!(self.map_page(last, 0xa5), 0);
        assert_eq!(self.reads(0, last * PAGE), Some(0xa5));
        assert_eq!(self.unmap(page_at(last)), 0);
        assert_eq!(self.reads(0, last * PAGE), None);
        assert!(!self.needs_reset());
    }
}
