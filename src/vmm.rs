//! The story of a machine: build, run, shut down.
//!
//! [`Vmm::build`] reads from top to bottom what [`crate`] describes module by module. Whatever can be refused
//! is refused there, before the guest's first instruction. [`Vmm::run`] starts a thread for each processor
//! and serves the rest from the main loop, until somebody says how the machine ends.

mod backends;
mod main_loop;
mod stuck;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::{self, AcpiError};
use crate::arch::x86_64::boot::{self, BootError, EntryPoint, Initramfs, Kernel};
use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::{layout, msr, regs};
use crate::bus::{Bus, BusDevice, BusError};
use crate::config::{Config, SerialLine};
use crate::devices::debug_exit::DebugExit;
use crate::devices::i8042::I8042;
use crate::devices::power::PowerControl;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::serial::{Output, SerialPort};
use crate::exit::{Exit, STATUS_ERROR, STATUS_USAGE};
use crate::kvm::slots::Slots;
use crate::kvm::vcpu::{BootRegisters, Machine, Unclaimed, Vcpu, VcpuState};
use crate::kvm::vm::{Kvm, KvmError, Vm};
use crate::memory::alloc::WindowAllocator;
use crate::memory::missing::MissingPages;
use crate::memory::ram::{Ram, RamError, RamRegion};
use crate::memory::{Access, GuestMapper};

use backends::{AttachError, Attached, Backend, BackendError};
use main_loop::{Console, ConsoleInput, End, EndWatch, Signals};
use stuck::StuckWatch;

/// Why a machine could not be built, or could not go on.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The kernel, the initramfs or the command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A back-end.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A device.
    #[error(transparent)]
    Attach(AttachError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// More processors than local APICs can have ids.
    #[error("{0} vCPUs are more than the {most} that a machine can have", most = layout::MAX_VCPUS)]
    TooManyVcpus(u32),
    /// More devices than there are interrupts for.
    #[error(
        "{0} devices are more than the {most} that a machine can have: each has an interrupt of its own, {first} to {last}",
        most = layout::MAX_DEVICES, first = layout::FIRST_DEVICE_GSI, last = layout::IOAPIC_INPUTS - 1
    )]
    TooManyDevices(usize),
    /// More RAM than the processor can address.
    #[error("guest memory up to {end:#x} is beyond this processor's {bits} bits of physical address")]
    AddressWidth {
        /// The first address after RAM.
        end: u64,
        /// The width.
        bits: u32,
    },
    /// The serial port's file.
    #[error("cannot open {0} for the serial port")]
    SerialFile(PathBuf, #[source] io::Error),
    /// Two devices at one address: our own mistake.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The host's kernel refused something.
    #[error("cannot {0}")]
    Os(&'static str, #[source] io::Error),
}

impl VmmError {
    /// The exit status for it.
    pub fn status(&self) -> u8 {
        match self {
            VmmError::Boot(_)
            | VmmError::Ram(_)
            | VmmError::Backend(_)
            | VmmError::TooManyVcpus(_)
            | VmmError::TooManyDevices(_)
            | VmmError::AddressWidth { .. }
            | VmmError::SerialFile(..) => STATUS_USAGE,
            VmmError::Kvm(error) if error.is_configuration() => STATUS_USAGE,
            _ => STATUS_ERROR,
        }
    }

    /// What the user could do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            VmmError::Boot(error) => error.hint(),
            VmmError::Ram(error) => error.hint(),
            VmmError::Kvm(error) => error.hint(),
            VmmError::Backend(error) => error.hint(),
            _ => None,
        }
    }
}

impl From<AttachError> for VmmError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Backend(error) => VmmError::Backend(error),
            error => VmmError::Attach(error),
        }
    }
}

fn os(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |error| VmmError::Os(what, error)
}

fn eventfd() -> Result<EventFd, VmmError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("make an eventfd"))
}

/// A machine that is ready to run.
pub struct Vmm {
    machine: Arc<Machine>,
    vcpus: Vec<(VcpuFd, VcpuState)>,
    console: Console,
    devices: Arc<Vec<Attached>>,
    missing_pages: Arc<MissingPages>,
    // What the machine uses without our help: it has to live as long.
    ram: Ram,
    vm: Vm,
    mapper: Arc<dyn GuestMapper>,
}

impl Vmm {
    /// Builds the machine. Nothing of it runs yet.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the configuration, its files or the host. Nothing is left behind then.
    pub fn build(config: &Config) -> Result<Vmm, VmmError> {
        // What the user gave: can it be done at all?
        check_numbers(config)?;
        let mut kernel = Kernel::open(&config.kernel)?;
        let mut initramfs = config.initramfs.as_deref().map(Initramfs::open).transpose()?;
        let ram = Ram::new(config.memory, layout::HOLE, layout::HOLE_END)?;
        let placement = boot::place(&kernel, initramfs.as_ref(), &config.cmdline, &ram)?;

        // The machine, with its memory.
        let kvm = Kvm::open()?;
        kvm.check_vcpus(config.cpus)?;
        let supported = kvm.supported_cpuid()?;
        check_address_width(&ram, &supported)?;
        let vm = Vm::new(&kvm, layout::KVM_PAGES)?;
        let mapper: Arc<dyn GuestMapper> = Arc::new(Slots::new(Arc::clone(vm.fd()), kvm.max_slots()));
        map_ram(&*mapper, &ram)?;

        // The back-ends: connect and negotiate with each, then place the windows of their shared memory
        // regions.
        let address_limit = 1 << cpuid::physical_address_bits(&supported).min(63);
        let mut windows = WindowAllocator::new(layout::windows_start(ram.end()), address_limit);
        let backends = backends::connect(
            &config.devices,
            config.connect_timeout,
            &mut windows,
            &mapper,
            kvm.max_slots(),
        )?;
        let stopping = Arc::new(AtomicBool::new(false));
        let missing_pages = Arc::new(MissingPages::new(backends.iter().map(Backend::shared_memory)));
        let machine = Arc::new(Machine {
            ports: Bus::default(),
            mmio: Bus::default(),
            faults: missing_pages.clone(),
            unclaimed: Unclaimed::default(),
            stopping: Arc::clone(&stopping),
        });

        // The devices.
        let console = attach_serial_port(&machine, &vm, config, stopping)?;
        attach_power(&machine, config)?;
        let devices = backends::attach(backends, &machine, &vm, &*mapper, &ram)?;
        let virtio_devices: Vec<acpi::VirtioDevice> = devices.iter().map(|device| device.acpi).collect();

        // What the kernel finds in memory.
        let tables = acpi::tables(layout::ACPI, config.cpus, &virtio_devices)?;
        ram.memory().write_slice(&tables, GuestAddress(layout::ACPI)).map_err(|error| {
            VmmError::Os("write the ACPI tables to guest memory", io::Error::other(error))
        })?;
        log::info!("kernel command line: {}", config.cmdline);
        let entry = boot::load(&mut kernel, initramfs.as_mut(), &config.cmdline, &ram, placement)?;

        let topology = Topology { vcpus: config.cpus, tsc_deadline: kvm.has_tsc_deadline() };
        let vcpus = create_vcpus(&vm, &supported, topology, entry)?;
        Ok(Vmm { machine, vcpus, console, devices: Arc::new(devices), missing_pages, ram, vm, mapper })
    }

    /// Runs the machine until it ends.
    pub fn run(self) -> Result<Exit, VmmError> {
        let end = Arc::new(End::new()?);
        let (ram, devices) = (self.ram.regions().to_vec(), Arc::clone(&self.devices));
        let signals = Signals::new(Arc::clone(&end), Box::new(move || memory_map(&ram, &devices)))?;
        let mut events: EventManager<Box<dyn MutEventSubscriber>> =
            EventManager::new().map_err(|error| os("make the main loop")(io::Error::other(error)))?;
        events.add_subscriber(Box::new(EndWatch(Arc::clone(&end))));
        events.add_subscriber(Box::new(signals));
        let raw_terminal = self.console.make_raw()?;
        let serial_port = Arc::clone(&self.console.port);
        events.add_subscriber(Box::new(ConsoleInput::new(self.console, Arc::clone(&end))));

        let vcpus = start(self.vcpus, &self.machine, &end);
        let mut stuck = StuckWatch::new(Arc::clone(&self.missing_pages));
        let result = loop {
            if let Some(result) = end.take() {
                break result;
            }
            let until_next_look = stuck.look(&vcpus);
            if let Err(error) = events.run_with_timeout(until_next_look) {
                end.fail(os("wait for events")(io::Error::other(error)));
            }
        };
        stop(vcpus, &self.machine);

        serial_port.flush();
        drop(raw_terminal);
        log_unclaimed(&self.machine.unclaimed);
        self.missing_pages.log_total();
        // In this order, said aloud: the back-ends are let go and their mappings go, nobody can reach guest
        // memory any more, then that and the register pages go.
        drop((events, stuck, self.missing_pages, self.machine));
        drop((self.mapper, self.vm));
        drop((self.devices, self.ram));
        result
    }
}

/// The guest physical memory map, a line each: RAM, and what the devices have of it now.
fn memory_map(ram: &[RamRegion], devices: &[Attached]) -> Vec<String> {
    let ram = ram.iter().map(|region| format!("  {}  RAM", region.guest));
    let devices = devices.iter().flat_map(Attached::memory_map).map(|line| format!("  {line}"));
    ram.chain(devices).collect()
}

fn check_numbers(config: &Config) -> Result<(), VmmError> {
    if config.cpus > layout::MAX_VCPUS {
        return Err(VmmError::TooManyVcpus(config.cpus));
    }
    if config.devices.len() > layout::MAX_DEVICES {
        return Err(VmmError::TooManyDevices(config.devices.len()));
    }
    Ok(())
}

fn check_address_width(ram: &Ram, supported: &CpuId) -> Result<(), VmmError> {
    let (end, bits) = (ram.end(), cpuid::physical_address_bits(supported));
    if bits < 64 && end > 1 << bits {
        return Err(VmmError::AddressWidth { end, bits });
    }
    Ok(())
}

fn map_ram(mapper: &dyn GuestMapper, ram: &Ram) -> Result<(), VmmError> {
    for region in ram.regions() {
        // SAFETY: the region is mapped until `ram` is dropped, which `Vmm` does after the machine is gone;
        // guest memory is only ever accessed through vm-memory's volatile methods.
        let mapped = unsafe { mapper.map(region.guest, region.host, Access::ReadWrite) };
        mapped.map_err(os("give the guest its memory"))?;
    }
    Ok(())
}

fn attach_serial_port(
    machine: &Machine,
    vm: &Vm,
    config: &Config,
    stopping: Arc<AtomicBool>,
) -> Result<Console, VmmError> {
    let (interrupt, wants_input) = (eventfd()?, Arc::new(eventfd()?));
    vm.register_irqfd(&interrupt, layout::COM1_GSI)?;
    // A descriptor of our own, so that nothing of ours is buffered in between.
    let duplicate = |fd: io::Result<std::os::fd::OwnedFd>, what| fd.map(File::from).map_err(os(what));
    let (input, output) = match &config.serial {
        SerialLine::Off => (None, None),
        SerialLine::File(path) => {
            let file = File::create(path).map_err(|error| VmmError::SerialFile(path.clone(), error))?;
            (None, Some(file))
        }
        SerialLine::Stdio => (
            Some(duplicate(io::stdin().as_fd().try_clone_to_owned(), "use stdin")?),
            Some(duplicate(io::stdout().as_fd().try_clone_to_owned(), "use stdout")?),
        ),
    };
    let output = Output::new(output, stopping);
    let port = Arc::new(SerialPort::new(interrupt, output, Arc::clone(&wants_input)));
    insert(&machine.ports, layout::COM1, layout::COM1_LEN, port.clone())?;
    Ok(Console { port, input, wants_input })
}

/// All the ways out that a guest has.
fn attach_power(machine: &Machine, config: &Config) -> Result<(), VmmError> {
    let power = PowerControl { sleep_type_off: acpi::SLEEP_TYPE_S5, reset_value: acpi::RESET_VALUE };
    let ports = &machine.ports;
    insert(ports, layout::ACPI_POWER, layout::ACPI_POWER_LEN, Arc::new(power))?;
    insert(ports, layout::I8042, layout::I8042_LEN, Arc::new(I8042))?;
    insert(ports, layout::PVPANIC, 1, Arc::new(Pvpanic))?;
    if config.debug_exit {
        insert(ports, layout::DEBUG_EXIT, 1, Arc::new(DebugExit))?;
    }
    Ok(())
}

fn insert(ports: &Bus, first: u16, count: u16, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
    ports.insert(first.into(), count.into(), device)
}

/// The first processor starts at the kernel's entry point, the others wait until it starts them.
fn create_vcpus(
    vm: &Vm,
    supported: &CpuId,
    topology: Topology,
    entry: EntryPoint,
) -> Result<Vec<(VcpuFd, VcpuState)>, VmmError> {
    let create = |id| {
        let fd = vm.create_vcpu(id)?;
        let boot = if id == 0 {
            let reset = fd.get_sregs();
            let reset =
                reset.map_err(|error| KvmError::Ioctl("read system registers".into(), error.into()))?;
            Some(BootRegisters {
                regs: regs::general(entry.entry, entry.boot_params),
                sregs: regs::system(reset),
                fpu: regs::floating_point(),
            })
        } else {
            None
        };
        let state = VcpuState { cpuid: cpuid::of_vcpu(supported, topology, id), msrs: msr::initial(), boot };
        Ok((fd, state))
    };
    (0..topology.vcpus).map(create).collect()
}

/// Starts the processors' threads. One that cannot be started ends the machine, and those before it are still
/// to stop.
fn start(vcpus: Vec<(VcpuFd, VcpuState)>, machine: &Arc<Machine>, end: &Arc<End>) -> Vec<Vcpu> {
    let mut started = Vec::new();
    for (id, (fd, state)) in (0..).zip(vcpus) {
        let told = Arc::clone(end);
        match Vcpu::spawn(id, fd, state, Arc::clone(machine), move |outcome| told.tell(outcome)) {
            Ok(vcpu) => started.push(vcpu),
            Err(error) => {
                end.fail(os("start a vCPU's thread")(error));
                break;
            }
        }
    }
    started
}

/// Stops the processors' threads and waits for them.
fn stop(vcpus: Vec<Vcpu>, machine: &Machine) {
    machine.stopping.store(true, Ordering::SeqCst);
    // Again and again: a kick may fall just before a wait for whoever reads the serial port's output.
    while !vcpus.iter().all(Vcpu::has_ended) {
        vcpus.iter().for_each(Vcpu::kick);
        std::thread::sleep(Duration::from_millis(1));
    }
    vcpus.into_iter().for_each(Vcpu::join);
}

fn log_unclaimed(unclaimed: &Unclaimed) {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    log::info!(
        "nobody answered {} memory reads, {} memory writes and {} port accesses",
        count(&unclaimed.mmio_reads),
        count(&unclaimed.mmio_writes),
        count(&unclaimed.ports)
    );
}
