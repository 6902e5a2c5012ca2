//! Building a machine: [`Vmm::build`], and its steps in the order in which it takes them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::CpuId;

use super::Vmm;
use super::backends::{self, Backend};
use super::console::Console;
use super::dump::DumpFile;
use super::error::{VmmError, eventfd, failed_to};
use super::exit_once::ExitOnce;
use super::gdb::Gdb;
use super::memory_map::MemoryMap;
use super::picture::PictureFile;
use super::stats::{COM1, Stats, StatsFile};
use crate::arch::x86_64::boot::Boot;
use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::regs::Entry;
use crate::arch::x86_64::reset::Resets;
use crate::arch::x86_64::{acpi, layout, msr, regs};
use crate::bus::{Bus, BusDevice};
use crate::config::device::DeviceSpec;
use crate::config::{BackendLoss, Config, HugePages, SerialLine, UnavailablePage};
use crate::devices::debug_exit::DebugExit;
use crate::devices::i8042::I8042;
use crate::devices::pci_ports::PciPorts;
use crate::devices::power::PowerControl;
use crate::devices::pvpanic::Pvpanic;
use crate::kvm::pause::Pause;
use crate::kvm::slots::Slots;
use crate::kvm::vcpu::{BootRegisters, Machine, VcpuState};
use crate::kvm::vm::{EMULATED_HOST, Kvm, KvmError, Processor, Vm, has_hardware};
use crate::memory::alloc::WindowAllocator;
use crate::memory::missing::MissingPages;
use crate::memory::ram::Ram;
use crate::memory::{Access, GuestMapper};
use crate::report::Failure;
use crate::trace::recorder::Trace;

impl Vmm {
    /// Builds the machine. Nothing of it runs yet.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the configuration, its files or the host. Only RAM stays mapped
    /// then, until the process ends.
    pub fn build(config: &Config) -> Result<Vmm, Box<dyn Failure>> {
        let began = Instant::now();
        // The user's configuration: can such a machine exist?
        check_numbers(config)?;
        let hugetlb = config.hugepages == HugePages::Hugetlb;
        let ram = Ram::new(config.memory, hugetlb, layout::GAP, layout::GAP_END)?;
        let boot = Boot::plan(&config.kernel, &config.initramfs, &config.cmdline, &ram)?;
        let picture = config.memory_picture.as_deref().map(PictureFile::create).transpose()?;
        let stats_file = config.stats.as_deref().map(StatsFile::create).transpose()?;

        // The machine, with its memory.
        let kvm = Kvm::open()?;
        let is_hopeless = boot.is_linux() && !has_hardware();
        if is_hopeless {
            log::warn!(
                "KVM has no hardware virtualization here, and Linux does not boot so: {EMULATED_HOST}"
            );
        }
        kvm.check_vcpus(config.cpus)?;
        let supported = kvm.supported_cpuid()?;
        check_address_width(&ram, &supported)?;
        let vm = Vm::new(&kvm, layout::KVM_PAGES)?;
        map_ram(&vm.slots, &ram)?;

        // The back-ends: connect to each, negotiate, and place its windows.
        let trace = config.trace.as_deref().map(Trace::create).transpose()?;
        let windows = windows(&ram, &supported);
        let backends = backends::connect(config, &ram, windows, &vm.slots, trace.as_ref())?;

        // The devices.
        let machine = Arc::new(machine(config, &ram, &backends)?);
        let exit = Arc::new(ExitOnce::new()?);
        let console = attach_serial_port(&machine, &vm, &config.serial, &exit)?;
        attach_power(&machine.ports, config.debug_exit);
        insert(&machine.ports, layout::PCI_CONFIGURATION, "pci-ports", Arc::new(PciPorts::default()));
        let ends_at_loss = (config.backend_loss == BackendLoss::Exit).then_some(&exit);
        let devices = backends::attach(backends, &machine, &vm, &ram, ends_at_loss, trace.as_ref())?;

        // What the kernel finds in memory, and the processors that run it.
        put_huge_pages(config.hugepages, &boot, &ram);
        log::info!("kernel command line: {}", config.cmdline);
        let entry = boot.load(&ram, config.cpus, config.devices.len())?;
        let topology = Topology { vcpus: config.cpus, tsc_deadline: kvm.has_tsc_deadline() };
        let vcpus = create_vcpus(&vm, &supported, topology, entry)?;
        let prefaulting = config.devices.iter().filter(|device| device.prefault).count();
        vm.add_spare_vcpus(
            prefaulting,
            config.cpus..layout::MAX_VCPUS,
            &cpuid::of_vcpu(&supported, topology, 0),
        )?;

        // Last: a gdb that connects does not wait long.
        let gdb = config.gdb.as_ref().map(|address| Gdb::listen(address, vm.step_flags())).transpose()?;
        let dump = config.dump.as_ref().map(|path| DumpFile::open(path, &ram)).transpose()?;
        let ram = ram.regions.iter().map(|region| region.guest).collect();
        let crash_hint = is_hopeless.then_some(EMULATED_HOST);
        let resets = Resets::new(&config.cmdline, &machine.ram);
        let memory_map = Arc::new(MemoryMap { ram, devices });
        let counted =
            |(processor, _): &(Processor, _)| (Arc::clone(&processor.counters), processor.statistics.clone());
        let stats = Arc::new(Stats {
            began,
            machine: Arc::clone(&machine),
            vcpus: vcpus.iter().map(counted).collect(),
            memory_map: Arc::clone(&memory_map),
            serial_port: Arc::clone(&console.port),
            slots: Arc::clone(&vm.slots),
            kvm: vm.statistics(),
        });
        Ok(Vmm {
            vcpus,
            machine,
            console,
            memory_map,
            picture,
            stats,
            stats_file,
            resets,
            crash_hint,
            gdb,
            dump,
            exit,
        })
    }
}

fn check_numbers(config: &Config) -> Result<(), VmmError> {
    if config.cpus > layout::MAX_VCPUS {
        return Err(VmmError::TooManyVcpus(config.cpus));
    }
    if config.devices.len() > layout::MAX_DEVICES {
        return Err(VmmError::TooManyDevices(config.devices.len()));
    }
    check_sockets(&config.devices)
}

/// A back-end serves one device. Most back-ends accept one connection at a time: the second device would wait
/// for the first one's end.
fn check_sockets(devices: &[DeviceSpec]) -> Result<(), VmmError> {
    // The socket may not be there yet.
    let path = |spec: &DeviceSpec| spec.socket.canonicalize().unwrap_or_else(|_| spec.socket.clone());
    let mut seen = BTreeMap::new();
    for spec in devices {
        if let Some(first) = seen.insert(path(spec), spec) {
            let [first, second] = [first, spec].map(|spec| spec.name.clone());
            return Err(VmmError::SameSocket { first, second, socket: spec.socket.clone() });
        }
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

fn map_ram(slots: &Slots, ram: &Ram) -> Result<(), VmmError> {
    for region in &ram.regions {
        // SAFETY: RAM stays mapped until the process ends; everything here accesses guest memory through
        // vm-memory's volatile methods only.
        unsafe { slots.map(region.guest, region.host, Access::ReadWrite) }
            .map_err(failed_to("give the guest its memory"))?;
    }
    Ok(())
}

/// What the processors share, before there are devices.
fn machine(config: &Config, ram: &Ram, backends: &[Backend]) -> Result<Machine, VmmError> {
    let end_at_unavailable = config.unavailable_page == UnavailablePage::Exit;
    let missing_pages = MissingPages::new(backends.iter().map(Backend::shared_memory), end_at_unavailable);
    let debugger = config.gdb.is_some().then(eventfd).transpose()?;
    Ok(Machine {
        pause: Pause::new(config.cpus as usize, debugger),
        ram: ram.memory().clone(),
        missing_pages: Arc::new(missing_pages),
        ..Machine::default()
    })
}

fn put_huge_pages(behind: HugePages, boot: &Boot, ram: &Ram) {
    match behind {
        HugePages::Off | HugePages::Hugetlb => {}
        HugePages::Kernel => boot.collapse_kernel(ram),
        HugePages::All => ram.collapse(0, ram.end()),
    }
}

/// The guest physical addresses for the windows of shared memory regions.
fn windows(ram: &Ram, supported: &CpuId) -> WindowAllocator {
    let limit = 1 << cpuid::physical_address_bits(supported).min(63);
    WindowAllocator::new(layout::windows_start(ram.end()), limit)
}

fn attach_serial_port(
    machine: &Machine,
    vm: &Vm,
    line: &SerialLine,
    exit: &Arc<ExitOnce>,
) -> Result<Console, Box<dyn Failure>> {
    let interrupt = eventfd()?;
    vm.register_irqfd(&interrupt, layout::COM1_GSI)?;
    let console = Console::open(line, interrupt, Arc::clone(&machine.stopping), Arc::clone(exit))?;
    insert(&machine.ports, layout::COM1, COM1, console.port.clone());
    Ok(console)
}

/// The devices with which a guest ends the machine.
fn attach_power(ports: &Bus, debug_exit: bool) {
    let power = PowerControl { sleep_type_off: acpi::SLEEP_TYPE_S5, reset_value: acpi::RESET_VALUE };
    insert(ports, layout::ACPI_POWER, "power", Arc::new(power));
    insert(ports, layout::I8042, "i8042", Arc::new(I8042));
    insert(ports, layout::PVPANIC, "pvpanic", Arc::new(Pvpanic));
    if debug_exit {
        insert(ports, layout::DEBUG_EXIT, "debug-exit", Arc::new(DebugExit));
    }
}

fn insert(ports: &Bus, range: Range<u16>, name: &str, device: Arc<dyn BusDevice>) {
    let len = range.len() as u64;
    ports
        .insert(range.start.into(), len, name, device)
        .expect("invariant: no two ranges in `layout` overlap");
}

/// The first processor starts at the kernel's entry point, the others wait until it starts them.
fn create_vcpus(
    vm: &Vm,
    supported: &CpuId,
    topology: Topology,
    entry: Entry,
) -> Result<Vec<(Processor, VcpuState)>, KvmError> {
    let create = |id| {
        let processor = vm.create_vcpu(id)?;
        let boot = match id {
            0 => Some(BootRegisters {
                regs: regs::general(entry),
                sregs: regs::system(entry, processor.system_registers()?),
                fpu: regs::floating_point(),
            }),
            _ => None,
        };
        let state = VcpuState { cpuid: cpuid::of_vcpu(supported, topology, id), msrs: msr::initial(), boot };
        Ok((processor, state))
    };
    (0..topology.vcpus).map(create).collect()
}
