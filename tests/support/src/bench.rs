//! A device with a scripted back-end behind a real socket, and a machine that remembers what its guest can
//! see.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use hotslot::memory::alloc::WindowAllocator;
use hotslot::memory::shmem::SharedMemory;
use hotslot::memory::{Access, GuestMapper};
use hotslot::vhost_user::device::VhostUserDevice;
use hotslot::vhost_user::frontend::{DeviceSpec, Frontend, FrontendError, Handshake};
use hotslot::vhost_user::memory_table::MemoryTable;
use hotslot::vhost_user::message::MemoryRegion;
use hotslot::vhost_user::sharing::Member;
use hotslot::virtio::device::{DeviceError, QueueSetup, VirtioDevice};
use hotslot::virtio::interrupt::Interrupt;
use hotslot::virtio::register_page::{Register, RegisterPage};
use tempfile::TempDir;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use crate::recorder::Guest;
use crate::wire::{self, MAP, MMap, Message, NEED_REPLY, PATIENCE, REPLY, UNMAP, VERSION_1, Wire, message};

pub const PAGE: u64 = 4096;

// Virtio feature bits.
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_PROTOCOL: u64 = 1 << 30;

// Protocol feature bits.
pub const MQ: u64 = 1 << 0;
pub const REPLY_ACK: u64 = 1 << 3;
pub const BACKEND_REQ: u64 = 1 << 5;
pub const CONFIG: u64 = 1 << 9;
pub const SEND_FD: u64 = 1 << 10;
pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
pub const RESET_DEVICE: u64 = 1 << 13;
pub const STATUS: u64 = 1 << 16;
pub const SHMEM: u64 = 1 << 22;

/// The size of regions 0 and 7 of the usual back-end.
pub const REGION: u64 = 64 * PAGE;

/// What a back-end offers.
#[derive(Clone)]
pub struct Offer {
    pub features: u64,
    pub protocol: u64,
    pub queues: u64,
    /// How many ranges of memory it can be told of.
    pub slots: u64,
    pub regions: Vec<(u8, u64)>,
}

impl Default for Offer {
    fn default() -> Self {
        Offer {
            features: F_VERSION_1 | F_PROTOCOL,
            protocol: MQ | REPLY_ACK | BACKEND_REQ | SEND_FD | RESET_DEVICE | STATUS | SHMEM,
            queues: 2,
            slots: 509,
            regions: vec![(0, REGION), (7, REGION)],
        }
    }
}

/// What a back-end does with a request.
pub enum Answer {
    /// What every back-end does.
    Usual,
    /// These bytes, and a descriptor.
    Bytes(Vec<u8>, Option<File>),
    /// Nothing.
    Silence,
    /// The end of both sockets.
    HangUp,
}

/// The back-end as its script sees it.
pub struct Peer {
    pub main: Wire,
    channel: Arc<Mutex<Option<Wire>>>,
    pub guest: Arc<Guest>,
}

impl Peer {
    /// The back-end's end of the backend channel.
    pub fn channel(&self) -> Wire {
        self.channel.lock().unwrap().as_ref().unwrap().try_clone()
    }
}

type Script = Box<dyn FnMut(&Message, &Peer) -> Answer + Send>;

/// A request of the front-end, as the back-end saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub request: u32,
    pub flags: u32,
    pub payload: Vec<u8>,
    pub fds: usize,
}

/// A device to be.
pub struct Setup {
    pub offer: Offer,
    pub kind: &'static str,
    pub shmem_bit: u32,
    pub quota: usize,
    /// The machine that the device is in.
    pub guest: Arc<Guest>,
    /// Where its windows may be.
    pub windows: WindowAllocator,
    /// Whether others see its mappings, and what it is among them.
    pub shares: bool,
    pub member: Option<Member>,
    /// How many of its requests are served in a second.
    pub rate: Option<u32>,
    script: Script,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            offer: Offer::default(),
            kind: "rng",
            shmem_bit: 22,
            quota: 4096,
            guest: Arc::default(),
            windows: WindowAllocator::new(1 << 32, 1 << 40),
            shares: false,
            member: None,
            rate: None,
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

    /// A back-end that does not always do what every back-end does.
    pub fn script(mut self, script: impl FnMut(&Message, &Peer) -> Answer + Send + 'static) -> Setup {
        self.script = Box::new(script);
        self
    }

    /// A back-end that acts before it answers request `id`.
    pub fn on(self, id: u32, mut act: impl FnMut(&Peer) -> Answer + Send + 'static) -> Setup {
        self.script(move |message, peer| match message.request == id {
            true => act(peer),
            false => Answer::Usual,
        })
    }

    /// Connects, and learns what the back-end is.
    pub fn connect(self) -> (Result<Handshake, FrontendError>, Backend) {
        let backend = self.backend();
        let listener = UnixListener::bind(&backend.spec.socket).unwrap();
        let (seen, main, channel, guest) = (
            Arc::clone(&backend.seen),
            Arc::clone(&backend.main),
            Arc::clone(&backend.channel),
            Arc::clone(&backend.guest),
        );
        let (offer, mut script) = (self.offer, self.script);
        thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            let peer = Peer { main: Wire::new(socket), channel, guest };
            *main.lock().unwrap() = Some(peer.main.try_clone());
            serve(&offer, &mut script, &seen, &peer);
            *peer.channel.lock().unwrap() = None;
            *main.lock().unwrap() = None;
        });
        (Frontend::connect(&backend.spec, PATIENCE, backend.member.is_some()), backend)
    }

    fn backend(&self) -> Backend {
        let dir = tempfile::tempdir().unwrap();
        let spec = DeviceSpec {
            name: "device".to_string(),
            socket: dir.path().join("socket"),
            kind: self.kind.parse().unwrap(),
            queues: Some(2),
            queue_size: 64,
            shmem_bit: self.shmem_bit,
            share_shmem: self.shares,
            shmem_rate: self.rate.map(|rate| rate.try_into().unwrap()),
        };
        Backend {
            _dir: dir,
            spec,
            quota: self.quota,
            windows: self.windows.clone(),
            member: self.member.clone(),
            seen: Arc::default(),
            main: Arc::default(),
            channel: Arc::default(),
            guest: Arc::clone(&self.guest),
        }
    }

    /// A device whose back-end is not the scripted one, but what `listen` makes listen on the socket.
    pub fn foreign(self, listen: impl FnOnce(PathBuf)) -> Bench {
        let backend = self.backend();
        listen(backend.spec.socket.clone());
        let handshake = Frontend::connect(&backend.spec, PATIENCE, backend.member.is_some()).unwrap();
        backend.device(handshake).unwrap()
    }

    /// As [`Self::start`], with the back-end's end of the main socket.
    pub fn start_with_main_socket(self) -> (Bench, Wire) {
        let (tell, told) = mpsc::channel();
        // SET_BACKEND_REQ_FD, which comes once.
        let bench = self
            .on(21, move |peer| {
                let _ = tell.send(peer.main.try_clone());
                Answer::Usual
            })
            .start();
        (bench, told.recv_timeout(PATIENCE).unwrap())
    }

    /// All of the set-up.
    pub fn start(self) -> Bench {
        let (handshake, backend) = self.connect();
        let bench = backend.device(handshake.unwrap()).unwrap();
        if bench.device().shared_memory(0).is_some() {
            eventually("the back-end has its channel", || bench.channel.lock().unwrap().is_some());
        }
        bench
    }
}

/// What every back-end does, except where the script says otherwise.
fn serve(offer: &Offer, script: &mut Script, seen: &Mutex<Vec<Seen>>, peer: &Peer) {
    while let Ok(mut request) = peer.main.receive_within(None) {
        seen.lock().unwrap().push(Seen {
            request: request.request,
            flags: request.flags,
            payload: request.payload.clone(),
            fds: request.fds.len(),
        });
        if request.request == 21 {
            let fd = request.fds.pop().unwrap();
            *peer.channel.lock().unwrap() = Some(Wire::new(fd.into()));
        }
        let answer = match script(&request, peer) {
            Answer::Usual => usual(offer, &request).map(|payload| {
                let bytes = message(request.request, VERSION_1 | REPLY, &payload);
                (bytes, None)
            }),
            Answer::Bytes(bytes, file) => Some((bytes, file)),
            Answer::Silence => None,
            Answer::HangUp => {
                let _ = peer.main.socket().shutdown(std::net::Shutdown::Both);
                if let Some(channel) = peer.channel.lock().unwrap().take() {
                    let _ = channel.socket().shutdown(std::net::Shutdown::Both);
                }
                return;
            }
        };
        if let Some((bytes, file)) = answer {
            let fds: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
            // The device may be gone.
            let _ = peer.main.send_with(&bytes, &fds);
        }
    }
}

fn usual(offer: &Offer, request: &Message) -> Option<Vec<u8>> {
    Some(match request.request {
        1 => wire::quads([offer.features]),
        15 => wire::quads([offer.protocol]),
        17 => wire::quads([offer.queues]),
        36 => wire::quads([offer.slots]),
        44 => wire::shmem_config(offer.regions.len() as u32, 0, &offer.regions),
        24 | 11 => request.payload.clone(),
        _ if request.flags & NEED_REPLY != 0 => wire::quads([0]),
        _ => return None,
    })
}

/// A back-end that runs.
pub struct Backend {
    _dir: TempDir,
    spec: DeviceSpec,
    quota: usize,
    windows: WindowAllocator,
    member: Option<Member>,
    seen: Arc<Mutex<Vec<Seen>>>,
    main: Arc<Mutex<Option<Wire>>>,
    channel: Arc<Mutex<Option<Wire>>>,
    guest: Arc<Guest>,
}

impl Backend {
    /// What it was asked, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The ids of what it was asked.
    pub fn ids(&self) -> Vec<u32> {
        self.seen().iter().map(|seen| seen.request).collect()
    }

    /// The end of both sockets, as when the back-end's process dies.
    pub fn hang_up(&self) {
        for wire in [&self.main, &self.channel] {
            if let Some(wire) = &*wire.lock().unwrap() {
                // The device may have been faster.
                let _ = wire.socket().shutdown(std::net::Shutdown::Both);
            }
        }
    }

    /// The device that the back-end makes.
    pub fn device(self, handshake: Handshake) -> Result<Bench, DeviceError> {
        let sizes = (0..=255).zip(handshake.region_sizes.clone());
        let mut windows = self.windows.clone();
        let mapper: Arc<dyn GuestMapper> = Arc::clone(&self.guest) as _;
        let shmem = Arc::new(SharedMemory::new(sizes, &mut windows, mapper, self.quota)?);
        let page = RegisterPage::new()?;
        let interrupt = Interrupt::new(Arc::clone(&page))?;
        let ram = MemoryRegion { guest_addr: 0, size: 16 << 20, user_addr: 0x7000_0000_0000, mmap_offset: 0 };
        let memory = MemoryTable::new(Arc::new(memfd(ram.size)), vec![ram]);
        let device = VhostUserDevice::new(
            &self.spec,
            handshake,
            memory,
            Arc::clone(&shmem),
            interrupt,
            self.member.clone(),
        )?;
        Ok(Bench {
            device: Mutex::new(Some(device)),
            shmem,
            page,
            kicks: [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap()),
            backend: self,
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
    kicks: [EventFd; 2],
    backend: Backend,
}

/// The device, while nobody else calls it.
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
        self.device().start(F_VERSION_1, &queues)
    }

    pub fn queue(&self, index: u16) -> QueueSetup<'_> {
        let base = 0x1_0000 * (u64::from(index) + 1);
        QueueSetup {
            index,
            size: 64,
            descriptors: base,
            driver_area: base + 0x4000,
            device_area: base + 0x8000,
            kick: &self.kicks[usize::from(index)],
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

    /// Whether the driver is told that the device needs a reset.
    pub fn needs_reset(&self) -> bool {
        self.page.get(Register::Status) & 0x40 != 0
    }

    pub fn wait_until_failed(&self) {
        eventually("the device needs a reset", || self.needs_reset());
    }

    /// The back-end's end of the backend channel.
    pub fn channel(&self) -> Wire {
        self.backend.channel.lock().unwrap().as_ref().unwrap().try_clone()
    }

    pub fn shmem(&self) -> &SharedMemory {
        &self.shmem
    }

    pub fn guest(&self) -> &Guest {
        &self.backend.guest
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

    /// Sends a MAP with one descriptor and NEED_REPLY, and returns the answer.
    pub fn map(&self, request: MMap, file: &impl AsRawFd) -> i64 {
        map(&self.channel(), request, file)
    }

    pub fn unmap(&self, request: MMap) -> i64 {
        unmap(&self.channel(), request)
    }

    /// A MAP of one page of a file full of `byte`, at a page of region 0.
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

/// One page of region 0.
pub fn page_at(page: u64) -> MMap {
    MMap { shm_offset: page * PAGE, len: PAGE, ..MMap::default() }
}

pub fn map(channel: &Wire, request: MMap, file: &impl AsRawFd) -> i64 {
    let bytes = message(MAP, VERSION_1 | NEED_REPLY, &request.bytes());
    channel.send_with(&bytes, &[file.as_raw_fd()]).unwrap();
    answer(channel, MAP)
}

pub fn unmap(channel: &Wire, request: MMap) -> i64 {
    channel.send(&message(UNMAP, VERSION_1 | NEED_REPLY, &request.bytes()));
    answer(channel, UNMAP)
}

/// The answer to a request, which must be well formed (SHM-57): 0, or -errno.
pub fn answer(channel: &Wire, request: u32) -> i64 {
    let reply = channel.receive().unwrap();
    assert_eq!((reply.request, reply.flags), (request, 0x5));
    assert_eq!((reply.payload.len(), reply.fds.len()), (8, 0));
    let value = reply.quad(0) as i64;
    assert!((-4095..=0).contains(&value), "{value} is neither 0 nor -errno");
    value
}

/// Waits for something that another thread does.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < end, "not so: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

pub fn memfd(len: u64) -> File {
    // SAFETY: the name is a C string, and the new descriptor is nobody else's.
    let file = unsafe {
        let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.set_len(len).unwrap();
    file
}

/// A file of `pages` pages full of `byte`.
pub fn file_of(pages: u64, byte: u8) -> File {
    let mut file = memfd(0);
    file.write_all(&vec![byte; (pages * PAGE) as usize]).unwrap();
    file
}
