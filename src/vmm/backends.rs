//! The set-up's part for virtio devices: connect to their back-ends and negotiate, place their windows,
//! attach them to the machine.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::error::failed_to;
use super::memory_map::{DeviceMemory, show, total_filled};
use crate::arch::x86_64::layout;
use crate::config::Config;
use crate::kvm::slots::Slots;
use crate::kvm::vcpu::{FaultHandler, Machine};
use crate::kvm::vm::Vm;
use crate::memory::alloc::WindowAllocator;
use crate::memory::ram::Ram;
use crate::memory::shmem::{Filled, LayoutError, SharedMemory};
use crate::memory::{Access, GuestRange, PAGE_SIZE};
use crate::report::{Failure, MisuseLog, STATUS_USAGE};
use crate::vhost_user::device::VhostUserDevice;
use crate::vhost_user::frontend::{DeviceSpec, Frontend, FrontendError, Handshake};
use crate::vhost_user::memory_table::MemoryTable;
use crate::vhost_user::message::MemoryRegion;
use crate::vhost_user::sharing::Sharing;
use crate::virtio::device::DeviceError;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::register_page::RegisterPage;

/// Address space areas (vm.max_map_count) that mappings leave to the rest of this process.
const SPARE_AREAS: usize = 1024;

/// Why a device cannot be attached.
#[derive(Debug, Error)]
#[error("device {name} (back-end at {socket})", name = .spec.name, socket = .spec.socket.display())]
pub struct BackendError {
    spec: Box<DeviceSpec>,
    source: Box<Cause>,
}

#[derive(Debug, Error)]
enum Cause {
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Device(DeviceError),
}

impl BackendError {
    fn new(spec: &DeviceSpec, source: Cause) -> Self {
        BackendError { spec: Box::new(spec.clone()), source: Box::new(source) }
    }
}

impl Failure for BackendError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        match &*self.source {
            Cause::Frontend(FrontendError::NobodyListens { .. }) => Some(format!(
                "start the back-end on {}, or wait longer with --connect-timeout",
                self.spec.socket.display()
            )),
            Cause::Frontend(FrontendError::PathTooLong(_)) => {
                Some("a path relative to the working directory may be shorter".to_string())
            }
            Cause::Frontend(FrontendError::Negotiation(error)) => error.draft_bit().map(|bit| {
                format!("a back-end built from a draft may mean SHMEM by bit {bit}: try shmem-bit={bit}")
            }),
            Cause::Frontend(FrontendError::Queues { .. }) => Some("say how many with queues=N".to_string()),
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
    config: &Config,
    mut windows: WindowAllocator,
    slots: &Arc<Slots>,
) -> Result<Vec<Backend>, BackendError> {
    let specs = &config.devices;
    let quota = mapping_quota(slots.limit(), specs.len());
    let mut backends = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let sees_others = specs.iter().enumerate().any(|(other, spec)| other != index && spec.share_shmem);
        let handshake = Frontend::connect(spec, config.connect_timeout, sees_others)
            .map_err(|error| BackendError::new(spec, error.into()))?;
        if sees_others && handshake.memory_slots.is_none() {
            log::warn!(
                "{}: the back-end does not offer protocol feature CONFIGURE_MEM_SLOTS: it does not see what other devices \
                 share, and fails requests of the guest that use it",
                spec.name
            );
        }
        let sizes = (0..=u8::MAX).zip(handshake.region_sizes.iter().copied());
        let shmem = SharedMemory::new(sizes, &mut windows, slots.clone(), quota)
            .map_err(|error| BackendError::new(spec, error.into()))?;
        for (shmid, range) in shmem.regions() {
            log::info!("{}: shared memory region {shmid} is {}", spec.name, show(&range));
        }
        backends.push(Backend { spec: spec.clone(), handshake, shmem: Arc::new(shmem) });
    }
    Ok(backends)
}

/// How many mappings each device may have, so that none takes them from another, or from the VMM itself
/// (SHM-48). A mapping takes one slot and up to four areas of address space: the file, zeroes in place of its
/// end, that end at addresses of its own (SHM-45), and the hole behind.
fn mapping_quota(slots: u32, devices: usize) -> usize {
    // RAM has two slots, each device one for its registers.
    let slots = (slots as usize).saturating_sub(2 + devices);
    // A container may lack /proc: Linux' default then.
    let areas = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    let areas: usize = areas.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65530);
    slots.min(areas.saturating_sub(SPARE_AREAS) / 4) / devices.max(1)
}

/// Attaches the devices: registers, interrupt, doorbells. From here on their backend channels are served.
pub fn attach(
    backends: Vec<Backend>,
    machine: &Machine,
    vm: &Vm,
    ram: &Ram,
) -> Result<Vec<DeviceMemory>, Box<dyn Failure>> {
    let registers_failed = failed_to("make the registers of a device");
    let memory = memory_table(ram);
    let sharing = sharing(&backends);
    let mut attached = Vec::new();
    // `Vmm::build` has checked that there are as many places as devices.
    for (backend, (address, gsi)) in backends.into_iter().zip((0..).map_while(layout::virtio_device)) {
        let Backend { spec, handshake, shmem } = backend;
        let page = RegisterPage::new().map_err(&registers_failed)?;
        let interrupt = Interrupt::new(Arc::clone(&page)).map_err(&registers_failed)?;
        vm.register_irqfd(interrupt.call(), gsi)?;
        let member = sharing.as_ref().map(|sharing| sharing.join(&spec.name));
        let device = VhostUserDevice::new(
            &spec,
            handshake,
            memory.clone(),
            Arc::clone(&shmem),
            Arc::clone(&interrupt),
            member.clone(),
        )
        .map_err(|error| BackendError::new(&spec, Cause::Device(error)))?;
        let transport =
            MmioTransport::new(Arc::clone(&page), interrupt, Box::new(device)).map_err(&registers_failed)?;
        for bell in transport.doorbells() {
            vm.register_ioeventfd(bell.event, address + bell.offset, bell.value)?;
        }
        machine
            .mmio
            .insert(address, PAGE_SIZE, transport)
            .expect("invariant: `layout` gives each device a page of its own");
        let registers = GuestRange::new(address, PAGE_SIZE).expect("invariant: below 4 GiB");
        // SAFETY: the page is mapped until it is dropped; it is written through atomics only.
        unsafe { vm.slots().map_permanent(registers, page.host_ptr(), Access::ReadOnly, page.clone()) }
            .map_err(&registers_failed)?;
        attached.push(DeviceMemory { name: spec.name, registers, shmem, member });
    }
    Ok(attached)
}

/// The devices that see each other's mappings (SHM-80); `None` where none shares any, or none can see them.
fn sharing(backends: &[Backend]) -> Option<Arc<Sharing>> {
    let owners = backends.iter().filter(|backend| backend.spec.share_shmem).count();
    let can_see = |backend: &Backend| backend.handshake.memory_slots.is_some();
    if owners == 0 || !backends.iter().any(can_see) {
        return None;
    }
    // Half of the file descriptors that the process may have are for the files of mappings.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| limit as usize);
    Some(Sharing::new(limit / 2 / owners))
}

/// RAM, in the form for back-ends.
fn memory_table(ram: &Ram) -> MemoryTable {
    let regions = ram.regions().iter().map(|region| MemoryRegion {
        guest_addr: region.guest.start(),
        size: region.guest.len(),
        user_addr: region.host as u64,
        mmap_offset: region.file_offset,
    });
    MemoryTable::new(Arc::clone(ram.file()), regions.collect())
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
