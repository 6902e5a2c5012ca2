//! The part of the story in which devices come in: connect and negotiate, place their windows, attach them.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::arch::x86_64::acpi;
use crate::arch::x86_64::layout;
use crate::bus::BusError;
use crate::config::device::DeviceSpec;
use crate::kvm::vcpu::{FaultHandler, Machine};
use crate::kvm::vm::{KvmError, Vm};
use crate::memory::alloc::WindowAllocator;
use crate::memory::ram::Ram;
use crate::memory::shmem::{Filled, FilledTotal, LayoutError, SharedMemory};
use crate::memory::{Access, GuestMapper, GuestRange, PAGE_SIZE};
use crate::report::MisuseLog;
use crate::vhost_user::connect::{self, ConnectError};
use crate::vhost_user::device::VhostUserDevice;
use crate::vhost_user::memory_table::MemoryTable;
use crate::vhost_user::sharing::{Participant, Sharing};
use crate::vhost_user::wire::frontend::{FrontendError, Handshake};
use crate::vhost_user::wire::message::MemoryRegion;
use crate::virtio::device::DeviceError;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::register_page::RegisterPage;

/// Address space areas (vm.max_map_count) that mappings leave to everything else in this process.
const SPARE_AREAS: usize = 1024;

/// Why a device cannot be had.
#[derive(Debug, Error)]
#[error("device {name} (back-end at {socket})", name = .spec.name, socket = .spec.socket.display())]
pub struct BackendError {
    spec: Box<DeviceSpec>,
    source: Box<Cause>,
}

/// What went wrong with it.
#[derive(Debug, Error)]
enum Cause {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Device(DeviceError),
}

impl BackendError {
    fn new(spec: &DeviceSpec, source: Cause) -> Self {
        BackendError { spec: Box::new(spec.clone()), source: Box::new(source) }
    }

    /// What the user could do about it.
    pub fn hint(&self) -> Option<String> {
        match &*self.source {
            Cause::Connect(ConnectError::NobodyListens { .. }) => Some(format!(
                "start the back-end on {}, or wait longer with --connect-timeout",
                self.spec.socket.display()
            )),
            Cause::Connect(ConnectError::PathTooLong(_)) => {
                Some("a path relative to the working directory may be shorter".to_string())
            }
            Cause::Connect(ConnectError::Frontend(FrontendError::Negotiation(error))) => {
                error.draft_bit().map(|bit| {
                    format!("a back-end built from a draft may mean SHMEM by bit {bit}: try shmem-bit={bit}")
                })
            }
            Cause::Connect(ConnectError::Frontend(FrontendError::Queues { .. })) => {
                Some("say how many with queues=N".to_string())
            }
            _ => None,
        }
    }
}

/// A back-end that is connected, and the guest addresses of its shared memory.
pub struct Backend {
    spec: DeviceSpec,
    handshake: Handshake,
    shmem: Arc<SharedMemory>,
}

/// Connects to all back-ends, then places the windows of their shared memory regions.
pub fn connect(
    specs: &[DeviceSpec],
    patience: Duration,
    windows: &mut WindowAllocator,
    mapper: &Arc<dyn GuestMapper>,
    slots: u32,
) -> Result<Vec<Backend>, BackendError> {
    let quota = mapping_quota(slots, specs.len());
    let mut backends = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let mut others = specs.iter().enumerate().filter(|(other, _)| *other != index);
        let sees_others = others.any(|(_, other)| other.share_shmem);
        let handshake = connect::connect(spec, patience, sees_others)
            .map_err(|error| BackendError::new(spec, error.into()))?;
        if sees_others && handshake.memory_slots.is_none() {
            log::warn!(
                "{}: the back-end does not offer protocol feature CONFIGURE_MEM_SLOTS: it does not see what other devices \
                 share, and fails requests of the guest that use it",
                spec.name
            );
        }
        let sizes = (0..=u8::MAX).zip(handshake.region_sizes.iter().copied());
        let shmem = SharedMemory::new(sizes, windows, Arc::clone(mapper), quota)
            .map_err(|error| BackendError::new(spec, error.into()))?;
        for (shmid, range) in shmem.regions() {
            log::info!("{}: shared memory region {shmid} is {}", spec.name, show(&range));
        }
        backends.push(Backend { spec: spec.clone(), handshake, shmem: Arc::new(shmem) });
    }
    Ok(backends)
}

/// How many mappings each device may have, so that none takes them from another, or from the VMM itself
/// (SHM-48): each costs a slot and up to four areas of address space: the file, zeroes in place of its end,
/// that end set aside (SHM-45), and the hole behind.
fn mapping_quota(slots: u32, devices: usize) -> usize {
    // RAM has two slots, each device one for its registers.
    let slots = (slots as usize).saturating_sub(2 + devices);
    // Linux' default; /proc is there wherever KVM is, but not always in a container.
    let areas = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    let areas: usize = areas.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65530);
    slots.min(areas.saturating_sub(SPARE_AREAS) / 4) / devices.max(1)
}

/// A device of the machine.
pub struct Attached {
    name: String,
    registers: GuestRange,
    shmem: Arc<SharedMemory>,
    member: Option<Participant>,
    _page: Arc<RegisterPage>,
    /// What its driver has to be told.
    pub acpi: acpi::VirtioDevice,
}

/// Why a device could not be attached.
#[derive(Debug, Error)]
pub enum AttachError {
    /// The back-end.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Two devices at one address: our own mistake.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The host.
    #[error("cannot make the registers of a device")]
    Registers(#[source] io::Error),
}

/// Attaches the devices: registers, interrupt, doorbells. From here on their backend channels are served.
pub fn attach(
    backends: Vec<Backend>,
    machine: &Machine,
    vm: &Vm,
    mapper: &dyn GuestMapper,
    ram: &Ram,
) -> Result<Vec<Attached>, AttachError> {
    let memory = memory_table(ram);
    let sharing = sharing(&backends);
    let mut attached = Vec::new();
    // `Vmm::build` has checked that there are as many places as devices.
    for (backend, (address, gsi)) in backends.into_iter().zip((0..).map_while(layout::virtio_device)) {
        let Backend { spec, handshake, shmem } = backend;
        let page = RegisterPage::new().map_err(AttachError::Registers)?;
        let interrupt = Interrupt::new(Arc::clone(&page)).map_err(AttachError::Registers)?;
        vm.register_irqfd(interrupt.call(), gsi)?;
        let member = sharing.as_ref().map(|sharing| sharing.join());
        let device = VhostUserDevice::new(
            &spec,
            handshake,
            memory.clone(),
            Arc::clone(&shmem),
            Arc::clone(&interrupt),
            member.clone(),
        )
        .map_err(|error| BackendError::new(&spec, Cause::Device(error)))?;
        let transport = MmioTransport::new(Arc::clone(&page), interrupt, Box::new(device))
            .map_err(AttachError::Registers)?;
        for bell in transport.doorbells() {
            vm.register_ioeventfd(bell.event, address + bell.offset, bell.value)?;
        }
        machine.mmio.insert(address, PAGE_SIZE, transport)?;
        let registers = GuestRange::new(address, PAGE_SIZE)
            .ok_or_else(|| AttachError::Registers(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: `Attached` keeps the page until the machine is gone; it is written through atomics only.
        unsafe { mapper.map(registers, page.host_ptr(), Access::ReadOnly) }
            .map_err(AttachError::Registers)?;
        attached.push(Attached {
            name: spec.name,
            registers,
            shmem,
            member,
            _page: page,
            acpi: acpi::VirtioDevice { registers: address, gsi },
        });
    }
    Ok(attached)
}

/// What devices see of each other's mappings (SHM-80); `None` where nobody shows any, or nobody can see them.
fn sharing(backends: &[Backend]) -> Option<Arc<Sharing>> {
    let owners = backends.iter().filter(|backend| backend.spec.share_shmem).count();
    let can_see = |backend: &Backend| backend.handshake.memory_slots.is_some();
    if owners == 0 || !backends.iter().any(can_see) {
        return None;
    }
    // Half of what the process may have is for the files of mappings.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| limit as usize);
    Some(Sharing::new(limit / 2 / owners))
}

/// RAM as back-ends are told of it.
fn memory_table(ram: &Ram) -> MemoryTable {
    let region = |region: &crate::memory::ram::RamRegion| MemoryRegion {
        guest_addr: region.guest.start(),
        size: region.guest.len(),
        user_addr: region.host as u64,
        mmap_offset: region.file_offset,
    };
    MemoryTable::new(Arc::clone(ram.file()), ram.regions().iter().map(region).collect())
}

impl Attached {
    /// The device's lines of the guest physical memory map.
    pub fn memory_map(&self) -> Vec<String> {
        let mut lines = vec![format!("{}  registers of {}", show(&self.registers), self.name)];
        let mappings = self.shmem.mappings();
        for (shmid, region) in self.shmem.regions() {
            lines.push(format!("{}  {} shared memory region {shmid}", show(&region), self.name));
            for mapping in mappings.iter().filter(|mapping| mapping.shmid == shmid) {
                let access = match mapping.access {
                    Access::ReadOnly => "read-only",
                    Access::ReadWrite => "read-write",
                };
                let filled = match mapping.filled {
                    0 => String::new(),
                    bytes => format!(", the last {bytes:#x} bytes are zeroes (the file became shorter)"),
                };
                let is_shared = |member: &Participant| member.is_shared(mapping.guest.start());
                let shared = match self.member.as_ref().is_some_and(is_shared) {
                    true => ", shared",
                    false => "",
                };
                lines.push(format!(
                    "  {}  mapping, {access}{shared}, file offset {:#x}{filled}",
                    show(&mapping.guest),
                    mapping.file_offset
                ));
            }
        }
        let total = total_filled(&self.shmem);
        lines.extend(total.map(|total| format!("{}: {total}", self.name)));
        lines
    }
}

/// A range as the memory map shows it.
pub fn show(range: &GuestRange) -> String {
    format!("{:#014x}-{:#014x}", range.start(), range.last())
}

/// Puts zeroes under mappings whose file became shorter (SHM-45).
pub struct MissingPages {
    devices: Vec<Shared>,
    /// When something was first filled for now.
    ///
    /// Lock order: before `SharedMemory`'s; held by a vCPU while it looks for what is missing.
    filled: Mutex<Option<Instant>>,
}

/// The shared memory of one device.
struct Shared {
    name: String,
    shmem: Arc<SharedMemory>,
    log: MisuseLog,
}

/// How long a vCPU has, after something was filled for it, to touch what it wanted.
const SETTLE: Duration = Duration::from_millis(500);

/// How often an access is looked at again because what it found there changed meanwhile.
const ATTEMPTS: usize = 8;

impl MissingPages {
    /// Looks in these devices' shared memory.
    pub fn of(backends: &[Backend]) -> Self {
        MissingPages {
            devices: backends
                .iter()
                .map(|backend| Shared {
                    name: backend.spec.name.clone(),
                    shmem: Arc::clone(&backend.shmem),
                    log: MisuseLog::new(&backend.spec.name),
                })
                .collect(),
            filled: Mutex::new(None),
        }
    }

    /// Whether any of the devices may ever have a mapping.
    pub fn are_possible(&self) -> bool {
        self.devices.iter().any(|device| !device.shmem.regions().is_empty())
    }

    /// Whether any of the devices has a mapping now.
    pub fn are_to_watch(&self) -> bool {
        self.devices.iter().any(|device| device.shmem.has_mappings())
    }

    /// Keeps what the guest really needed of what was filled, some time after that. Does nothing before, or
    /// while something is being filled: the vCPU would find it missing again.
    pub fn settle(&self) {
        let Ok(mut filled) = self.filled.try_lock() else {
            return;
        };
        if filled.is_some_and(|when| when.elapsed() >= SETTLE) {
            *filled = None;
            for device in &self.devices {
                device.report(&device.shmem.settle());
            }
        }
    }

    /// Makes accesses to missing pages fail instead of wait.
    pub fn guard(&self) {
        self.devices.iter().for_each(|device| device.shmem.guard_missing());
    }

    /// Logs, for each device that it happened to, what was missing in all.
    pub fn log_total(&self) {
        for device in &self.devices {
            if let Some(total) = total_filled(&device.shmem) {
                log::info!("{}: {total}", device.name);
            }
        }
    }
}

impl Shared {
    /// Once for a mapping, however many of its pages are found missing one after the other.
    fn report<'a>(&self, filled: impl IntoIterator<Item = &'a Filled>) {
        for filled in filled.into_iter().filter(|filled| filled.is_first) {
            self.log.warn(format_args!(
                "the file under the mapping {} of region {} became shorter: its last {:#x} bytes, or more of them later, \
                 read as zeroes from now on",
                show(&filled.guest),
                filled.shmid,
                filled.len
            ));
        }
    }
}

impl FaultHandler for MissingPages {
    fn mend(&self, address: Option<u64>) -> bool {
        if let Some(address) = address {
            return self.devices.iter().any(|device| {
                let filled = device.shmem.fill_missing(address);
                device.report(&filled);
                filled.is_some()
            });
        }
        let mut since = self.filled.lock().unwrap_or_else(PoisonError::into_inner);
        let mut any = false;
        for device in &self.devices {
            if let Some(kept) = device.shmem.fill_all_for_now() {
                device.report(&kept);
                any = true;
            }
        }
        if any {
            since.get_or_insert_with(Instant::now);
        }
        any
    }

    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        for _ in 0..ATTEMPTS {
            let here = |device: &&Shared| device.shmem.access_at(address).is_some();
            let Some(device) = self.devices.iter().find(here) else {
                return false;
            };
            if device.shmem.read(address, data) {
                return true;
            }
            device.report(&device.shmem.fill_missing(address));
        }
        // It is cut short faster than we can look.
        data.fill(0);
        true
    }

    fn write(&self, address: u64) {
        for device in &self.devices {
            // To what is read-only, every write comes here.
            if device.shmem.access_at(address) == Some(Access::ReadWrite) {
                device.report(&device.shmem.fill_missing(address));
            }
        }
    }
}

/// What was missing of a device's mappings in all; `None` where nothing was.
fn total_filled(shmem: &SharedMemory) -> Option<String> {
    let FilledTotal { mappings, bytes } = shmem.filled();
    (bytes > 0).then(|| {
        format!("zeroes took the place of {bytes:#x} bytes of {mappings} mappings so far (files that became shorter)")
    })
}
