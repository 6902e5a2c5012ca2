//! The set-up's part for virtio devices: connect to their back-ends and negotiate, place their windows,
//! attach them to the machine.

use std::sync::Arc;

use rustix::process::{Resource, Rlimit};
use thiserror::Error;

use super::error::failed_to;
use super::exit_once::ExitOnce;
use super::memory_map::DeviceMemory;
use crate::arch::x86_64::layout;
use crate::bus::BusDevice;
use crate::config::Config;
use crate::config::device::DeviceSpec;
use crate::exit::Exit;
use crate::kvm::slots::Slots;
use crate::kvm::vcpu::Machine;
use crate::kvm::vm::Vm;
use crate::memory::alloc::WindowAllocator;
use crate::memory::ram::Ram;
use crate::memory::shmem::{LayoutError, Limits, SharedMemory};
use crate::memory::{Access, GuestRange, PAGE_SIZE};
use crate::report::{Failure, STATUS_USAGE};
use crate::trace::recorder::Trace;
use crate::vhost_user::connect::{self, ConnectError};
use crate::vhost_user::device::VhostUserDevice;
use crate::vhost_user::handshake::Handshake;
use crate::vhost_user::memory_table::MemoryTable;
use crate::vhost_user::sharing::Sharing;
use crate::vhost_user::tracer::Tracer;
use crate::vhost_user::wire::message::MemoryRegion;
use crate::virtio::device::DeviceError;
use crate::virtio::interrupt::Interrupt;
use crate::virtio::mmio::MmioTransport;
use crate::virtio::register_page::RegisterPage;
use crate::virtio::traced::TracedRegisters;

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
    Connect(#[from] ConnectError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(
        "the back-end has room for {room} of the {regions} regions of memory that the guest's RAM has (GET_MAX_MEM_SLOTS)"
    )]
    MemoryRegions { room: u64, regions: usize },
    #[error(transparent)]
    Device(DeviceError),
}

impl BackendError {
    fn new(spec: &DeviceSpec, tracer: Option<&Arc<Tracer>>, source: Cause) -> Self {
        tracer.iter().for_each(|tracer| tracer.not_used(&source));
        BackendError { spec: Box::new(spec.clone()), source: Box::new(source) }
    }
}

impl Failure for BackendError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        match &*self.source {
            Cause::Connect(error) => error.hint(&self.spec),
            Cause::MemoryRegions { room: 1.., .. } => Some("up to --memory 3G RAM is one region".to_owned()),
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

/// For each back-end: connects, then places the windows of its shared memory regions.
pub fn connect(
    config: &Config,
    ram: &Ram,
    mut windows: WindowAllocator,
    slots: &Arc<Slots>,
    trace: Option<&Trace>,
) -> Result<Vec<Backend>, BackendError> {
    let specs = &config.devices;
    let quota = mapping_quota(slots.limit, specs.len());
    let regions = ram.regions.len();
    let mut backends = Vec::new();
    for (index, spec) in specs.iter().enumerate() {
        let sees_others = specs.iter().enumerate().any(|(other, spec)| other != index && spec.share_shmem);
        let tracer = trace.map(|trace| Tracer::new(trace.recorder(&spec.name), spec));
        let handshake =
            connect::connect(spec, config.connect_timeout, sees_others || regions > 1, tracer.clone())
                .map_err(|error| BackendError::new(spec, tracer.as_ref(), error.into()))?;
        if sees_others && handshake.memory_slots.is_none() {
            log::warn!(
                "{}: the back-end does not offer protocol feature CONFIGURE_MEM_SLOTS: it does not see what other devices \
                 share, and fails requests of the guest that use it",
                spec.name
            );
        }
        if let Some(room) = handshake.memory_slots.filter(|&room| room < regions as u64) {
            return Err(BackendError::new(spec, tracer.as_ref(), Cause::MemoryRegions { room, regions }));
        }
        let sizes = (0..=u8::MAX).zip(handshake.region_sizes.iter().copied());
        let &DeviceSpec { shmem_limit: bytes, foreign_files, prefault, .. } = spec;
        let limits = Limits { mappings: quota, bytes, foreign_files, prefault };
        let shmem = SharedMemory::new(&spec.name, sizes, &mut windows, slots.clone(), limits)
            .map_err(|error| BackendError::new(spec, tracer.as_ref(), error.into()))?;
        for (shmid, range) in shmem.regions() {
            log::info!("{}: shared memory region {shmid} is {range}", spec.name);
            let (id, start, size) = (shmid.into(), range.start(), range.len());
            let fields = [("shmid", id), ("guest_address", start), ("size", size)];
            tracer.iter().for_each(|tracer| tracer.event("region", &fields, None));
        }
        backends.push(Backend { spec: spec.clone(), handshake, shmem: Arc::new(shmem) });
    }
    Ok(backends)
}

/// How many mappings each device may have, so that none takes them from another, or from the VMM itself
/// (SHM-48). A mapping takes one slot, up to three areas of address space (the file, zeroes in place of its
/// end, and the hole behind), and one descriptor where it is the only one of its file (SHM-46).
fn mapping_quota(slots: u32, devices: usize) -> usize {
    // RAM has two slots, each device one for its registers.
    let slots = (slots as usize).saturating_sub(2 + devices);
    // A container may lack /proc: Linux' default then.
    let areas = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    let areas: usize = areas.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(65530);
    let most = slots.min(areas.saturating_sub(SPARE_AREAS) / 3).min(descriptor_limit() / 2);
    most / devices.max(1)
}

/// Raises the limit of file descriptors as far as this process may. Returns it.
fn descriptor_limit() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // If it fails, there are fewer mappings.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |limit| limit as usize)
}

/// Attaches the devices: registers, interrupt, doorbells. From here on their backend channels are served.
/// `ends_at_loss`: set when one loses its back-end permanently.
pub fn attach(
    backends: Vec<Backend>,
    machine: &Machine,
    vm: &Vm,
    ram: &Ram,
    ends_at_loss: Option<&Arc<ExitOnce>>,
    trace: Option<&Trace>,
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
        let tracer = handshake.tracer.clone();
        let participant = sharing.as_ref().map(|sharing| sharing.join());
        let device = VhostUserDevice::new(
            &spec,
            handshake,
            memory.clone(),
            Arc::clone(&shmem),
            Arc::clone(&interrupt),
            participant.clone(),
            ends_at_loss.map(|exit| end_at_loss(&spec.name, exit)),
        )
        .map_err(|error| BackendError::new(&spec, tracer.as_ref(), Cause::Device(error)))?;
        let requests = Arc::clone(device.requests());
        let transport =
            MmioTransport::new(Arc::clone(&page), interrupt, Box::new(device)).map_err(&registers_failed)?;
        for bell in transport.doorbells() {
            vm.register_ioeventfd(bell.event, address + bell.offset, bell.value)?;
        }
        let on_bus: Arc<dyn BusDevice> = match trace {
            Some(trace) => TracedRegisters::new(Arc::clone(&transport), trace.recorder(&spec.name)),
            None => transport.clone(),
        };
        machine
            .mmio
            .insert(address, PAGE_SIZE, &spec.name, on_bus)
            .expect("invariant: `layout` gives each device a page of its own");
        let registers = GuestRange::new(address, PAGE_SIZE).expect("invariant: below 4 GiB");
        // SAFETY: the page is mapped until it is dropped; it is written through atomics only.
        unsafe { vm.slots.map_permanent(registers, page.host_ptr(), Access::ReadOnly, page.clone()) }
            .map_err(&registers_failed)?;
        attached.push(DeviceMemory { name: spec.name, registers, shmem, requests, transport, participant });
    }
    Ok(attached)
}

fn end_at_loss(name: &str, exit: &Arc<ExitOnce>) -> Box<dyn Fn(&str) + Send + Sync> {
    let (name, exit) = (name.to_owned(), Arc::clone(exit));
    Box::new(move |why| exit.set((&Exit::BackendLost(format!("{name}: {why}"))).into()))
}

/// The devices that see each other's mappings (SHM-80); `None` where none shares any, or none can see them.
fn sharing(backends: &[Backend]) -> Option<Arc<Sharing>> {
    let owners = backends.iter().filter(|backend| backend.spec.share_shmem).count();
    let can_see = |backend: &Backend| backend.handshake.memory_slots.is_some();
    if owners == 0 || !backends.iter().any(can_see) {
        return None;
    }
    // Half of the file descriptors that the process may have are for mappings, a quarter for those to be
    // sent.
    Some(Sharing::new(descriptor_limit() / 4 / owners))
}

/// RAM, in the form for back-ends.
fn memory_table(ram: &Ram) -> MemoryTable {
    let regions = ram.regions.iter().map(|region| MemoryRegion {
        guest_addr: region.guest.start(),
        size: region.guest.len(),
        user_addr: region.host as u64,
        mmap_offset: region.file_offset,
    });
    MemoryTable { file: Arc::clone(&ram.file), regions: regions.collect() }
}
