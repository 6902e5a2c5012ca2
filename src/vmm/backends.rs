//! The part of the story in which devices come in: connect and negotiate, place their windows, attach them.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use crate::arch::x86_64::acpi;
use crate::arch::x86_64::layout;
use crate::bus::BusError;
use crate::kvm::vcpu::Machine;
use crate::kvm::vm::{KvmError, Vm};
use crate::memory::alloc::WindowAllocator;
use crate::memory::ram::Ram;
use crate::memory::shmem::{LayoutError, SharedMemory};
use crate::memory::{Access, GuestMapper, GuestRange, PAGE_SIZE};
use crate::vhost_user::device::VhostUserDevice;
use crate::vhost_user::frontend::{DeviceSpec, Frontend, FrontendError, Handshake};
use crate::vhost_user::memory_table::MemoryTable;
use crate::vhost_user::message::MemoryRegion;
use crate::vhost_user::sharing::{Member, Sharing};
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

    /// What the user could do about it.
    pub fn hint(&self) -> Option<String> {
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

impl Backend {
    /// The device's name, and its shared memory.
    pub fn shared_memory(&self) -> (String, Arc<SharedMemory>) {
        (self.spec.name.clone(), Arc::clone(&self.shmem))
    }
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
        let handshake = Frontend::connect(spec, patience, sees_others)
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
            log::info!("{}: shared memory region {shmid} is {}", spec.name, range);
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
    member: Option<Member>,
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
        let mut lines = vec![format!("{}  registers of {}", self.registers, self.name)];
        let mappings = self.shmem.mappings();
        for (shmid, region) in self.shmem.regions() {
            lines.push(format!("{}  {} shared memory region {shmid}", region, self.name));
            for mapping in mappings.iter().filter(|mapping| mapping.shmid == shmid) {
                let access = match mapping.access {
                    Access::ReadOnly => "read-only",
                    Access::ReadWrite => "read-write",
                };
                let filled = match mapping.filled {
                    0 => String::new(),
                    bytes => format!(", the last {bytes:#x} bytes are zeroes (the file became shorter)"),
                };
                let is_shared = |member: &Member| member.is_shared(mapping.guest.start());
                let shared = match self.member.as_ref().is_some_and(is_shared) {
                    true => ", shared",
                    false => "",
                };
                lines.push(format!(
                    "  {}  mapping, {access}{shared}, file offset {:#x}{filled}",
                    mapping.guest, mapping.file_offset
                ));
            }
        }
        let total = self.shmem.filled();
        if total.bytes > 0 {
            lines.push(format!("{}: {total}", self.name));
        }
        lines
    }
}
