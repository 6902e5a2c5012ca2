//! `/dev/kvm`, the capabilities that it must have, and the machine that it creates.
//!
//! Called by `vmm::build`. Documentation/virt/kvm/api.rst in the Linux sources is the reference.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_BINARY_STATS_FD, KVM_CAP_DISABLE_QUIRKS2, KVM_CAP_PRE_FAULT_MEMORY,
    KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_TSC_DEADLINE_TIMER, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_SINGLESTEP,
    KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap, kvm_sregs,
};
use kvm_ioctls::{Cap, IoEventAddress, VcpuFd, VmFd};
use thiserror::Error;
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;

use super::counters::VcpuCounters;
use super::slots::Slots;
use super::stats::{self, KvmStatistics};
use crate::report::{Failure, STATUS_ERROR, STATUS_USAGE, with_causes};

/// Why KVM cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum KvmError {
    #[error("/dev/kvm does not exist")]
    Missing,
    #[error("/dev/kvm may not be opened by this user")]
    NoPermission,
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// Another file or device has this name.
    #[error("/dev/kvm is not KVM: it does not know its own version")]
    NotKvm,
    /// The version is 12 since 2007.
    #[error("/dev/kvm speaks version {0} of the KVM interface, not {KVM_API_VERSION}")]
    ApiVersion(i32),
    #[error("this KVM lacks {0}, {1}")]
    Capability(&'static str, &'static str),
    #[error("{asked} vCPUs are more than the {most} that this KVM can do")]
    TooManyVcpus { asked: u32, most: u32 },
    #[error("KVM cannot {0}")]
    Ioctl(String, #[source] io::Error),
}

impl Failure for KvmError {
    /// An ioctl that failed is an error of ours; all else is the host's set-up, or more than this KVM can do.
    fn status(&self) -> u8 {
        if matches!(self, KvmError::Ioctl(..)) { STATUS_ERROR } else { STATUS_USAGE }
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            KvmError::Missing => {
                return Some(format!(
                    "load the module (`modprobe kvm_intel` or `kvm_amd`), switch virtualisation on in the firmware, or \
                     pass --device /dev/kvm to the container; {EMULATED_HOST}"
                ));
            }
            KvmError::NoPermission if group_may_use_it() => {
                "add yourself to the group that owns it: `sudo usermod -aG kvm $USER`, then log in again"
            }
            KvmError::NoPermission => {
                "only its owner may open it: `sudo chmod 660 /dev/kvm`, or be that user"
            }
            KvmError::Capability(..) => "Linux 4.11 or later on an x86-64 processor has all that is needed",
            _ => return None,
        };
        Some(text.into())
    }
}

/// What a host without a KVM that boots Linux can do instead.
pub const EMULATED_HOST: &str =
    "where there is no such KVM, scripts/lab.sh runs a command on an emulated host that has one";

fn group_may_use_it() -> bool {
    std::fs::metadata("/dev/kvm").is_ok_and(|file| file.permissions().mode() & 0o060 == 0o060)
}

/// Whether the processor has what KVM uses to run a guest. Without it KVM is software: a few small guests run
/// there, slowly, and Linux does not boot.
pub fn has_hardware() -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return true };
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_none_or(|flags| flags.split(' ').any(|flag| ["vmx", "svm"].contains(&flag)))
}

/// Whether the processor is QEMU's. Its virtualization hands KVM neither `int3` of a guest nor the exceptions
/// of debug registers (target/i386/tcg in QEMU's sources: `raise_interrupt2`, `helper_vmrun`).
pub fn is_emulated() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG CPU"))
}

/// Whether KVM reports accesses to memory that a debug register watches. A software KVM takes such a
/// register, and reports only instructions.
pub fn reports_watchpoints() -> bool {
    has_hardware() && !is_emulated()
}

/// For `map_err`: an ioctl that was to do `what`.
pub(super) fn failed_to(what: impl Into<String>) -> impl FnOnce(errno::Error) -> KvmError {
    |error| KvmError::Ioctl(what.into(), error.into())
}

/// The needed capabilities, and what each is for. Linux 4.11 has all of them.
const NEEDED: [(Cap, &str, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "which is guest memory"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM", "without which a read-only mapping could be written"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "which are the interrupt controllers"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "which lets another process interrupt the guest"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "which lets the guest wake another process"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "without which a vCPU cannot be stopped for sure"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "which says what processor the guest can have"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "without which KVM's own pages have no place"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "without which KVM's own pages have no place"),
];

/// What is of use where KVM has it.
const OPTIONAL: [(u32, &str); 4] = [
    (KVM_CAP_TSC_DEADLINE_TIMER, "timers by the time stamp counter"),
    (KVM_CAP_DISABLE_QUIRKS2, "slots whose deletion keeps the other page tables"),
    (KVM_CAP_PRE_FAULT_MEMORY, "page tables that are filled before the guest asks (`prefault=on`)"),
    (KVM_CAP_BINARY_STATS_FD, "statistics, by which a vCPU is found that waits in KVM"),
];

/// What this host's KVM can do, in lines for a user.
pub fn describe() -> String {
    let kvm = match Kvm::open() {
        Ok(Kvm { kvm }) => kvm,
        Err(error) => return format!("KVM: {}\n", with_causes(&error)),
    };
    let hardware = if has_hardware() { "in hardware" } else { "in software: Linux does not boot" };
    let (vcpus, slots) = (kvm.get_max_vcpus(), kvm.get_nr_memslots());
    let mut text = format!("KVM: {hardware}; at most {vcpus} vCPUs and {slots} memory slots in a machine\n");
    for (capability, what) in OPTIONAL {
        let has = if kvm.check_extension_raw(capability.into()) > 0 { "has" } else { "lacks" };
        text += &format!("KVM {has} {what}\n");
    }
    text
}

/// An open `/dev/kvm` with all needed capabilities.
pub struct Kvm {
    kvm: kvm_ioctls::Kvm,
}

impl Kvm {
    /// Opens `/dev/kvm` and checks its capabilities.
    pub fn open() -> Result<Kvm, KvmError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
            libc::EACCES | libc::EPERM => KvmError::NoPermission,
            _ => KvmError::Open(error.into()),
        })?;
        let version = kvm.get_api_version();
        if version < 0 {
            return Err(KvmError::NotKvm);
        }
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion(version));
        }
        for (capability, name, purpose) in NEEDED {
            if !kvm.check_extension(capability) {
                return Err(KvmError::Capability(name, purpose));
            }
        }
        Ok(Kvm { kvm })
    }

    /// The processor features that a guest can have here.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(failed_to("say which processor features it supports"))
    }

    /// Whether local timers can run by the time stamp counter. KVM's supported CPUID leaves this bit out.
    pub fn has_tsc_deadline(&self) -> bool {
        self.kvm.check_extension(Cap::TscDeadlineTimer)
    }

    /// Refuses a number of vCPUs that is beyond this KVM.
    pub fn check_vcpus(&self, asked: u32) -> Result<(), KvmError> {
        // Ids count from 0, so both limits bound the number.
        let most = self.kvm.get_max_vcpus().min(self.kvm.get_max_vcpu_id()) as u32;
        if asked > most {
            return Err(KvmError::TooManyVcpus { asked, most });
        }
        Ok(())
    }
}

/// A machine with interrupt controllers and memory slots; processors can be added.
pub struct Vm {
    /// Its memory slots, which own it.
    pub slots: Arc<Slots>,
    /// Whether the deletion of a slot keeps the page tables of the others.
    keeps_page_tables: bool,
}

impl Vm {
    /// Creates the machine. `own_pages` is where KVM may put the four pages that Intel's processors need to
    /// run real-mode code: the identity-map page, then three for a TSS. No RAM may be there.
    ///
    /// The machine has no PIT: a kernel with hardware-reduced ACPI does not look for one, and uses the KVM
    /// clock and the local timers. The emulation would cost a host thread.
    pub fn new(kvm: &Kvm, own_pages: u64) -> Result<Vm, KvmError> {
        let vm = loop {
            match kvm.kvm.create_vm() {
                // Documented: a signal may interrupt it.
                Err(error) if error.errno() == libc::EINTR => continue,
                result => break result.map_err(failed_to("create a machine"))?,
            }
        };
        vm.set_identity_map_address(own_pages)
            .map_err(failed_to(format!("use the page at {own_pages:#x} for its identity map")))?;
        let tss = own_pages + 0x1000;
        vm.set_tss_address(tss as usize)
            .map_err(failed_to(format!("use the pages at {tss:#x} for its TSS")))?;
        vm.create_irq_chip().map_err(failed_to("create the interrupt controllers"))?;
        let keeps_page_tables = keep_page_tables_on_slot_deletion(&vm)?;
        let limit = kvm.kvm.get_nr_memslots() as u32;
        Ok(Vm { slots: Arc::new(Slots::new(Arc::new(vm), limit)), keeps_page_tables })
    }

    /// Adds the processor with this id, which is its APIC id too.
    pub fn create_vcpu(&self, id: u32) -> Result<Processor, KvmError> {
        let fd = self.slots.vm.create_vcpu(u64::from(id));
        let fd = fd.map_err(failed_to(format!("create vCPU {id}")))?;
        let statistics = statistics(&format!("vCPU {id}"), &fd, &stats::OF_VCPU).map(Arc::new);
        Ok(Processor { id, statistics, fd, counters: Arc::default(), _slots: Arc::clone(&self.slots) })
    }

    /// KVM's statistics of the machine, where it has some.
    pub fn statistics(&self) -> Option<KvmStatistics> {
        statistics("the machine", &*self.slots.vm, &stats::OF_VM)
    }

    /// Adds up to `count` vCPUs that never run, through which [`GuestMapper::prefault`] fills page tables.
    /// `cpuid` is that of the vCPUs that run: what depends on it is the same then, the depth of the page
    /// tables above all.
    ///
    /// Adds none where KVM cannot fill page tables, nor before Linux 6.12: where the deletion of a slot drops
    /// all page tables, the ioctl can wait for a vCPU to run that never does.
    ///
    /// [`GuestMapper::prefault`]: crate::memory::GuestMapper::prefault
    pub fn add_spare_vcpus(&self, count: usize, ids: Range<u32>, cpuid: &CpuId) -> Result<(), KvmError> {
        let can_fill = self.slots.vm.check_extension_raw(u64::from(KVM_CAP_PRE_FAULT_MEMORY)) > 0;
        if count > 0 && !(can_fill && self.keeps_page_tables) {
            log::warn!(
                "this KVM cannot fill its page tables ahead: prefault=on fills those of the host only"
            );
            return Ok(());
        }
        if count > ids.len() {
            let most = ids.len();
            log::warn!(
                "of {count} devices with prefault=on only {most} can fill page tables at a time: there is no vCPU left"
            );
        }
        for id in ids.take(count) {
            let vcpu = self.slots.vm.create_vcpu(u64::from(id));
            let vcpu = vcpu.map_err(failed_to(format!("create vCPU {id}, which fills page tables")))?;
            vcpu.set_cpuid2(cpuid).map_err(failed_to(format!("set CPUID of vCPU {id}")))?;
            self.slots.spare_vcpus.add(vcpu);
        }
        Ok(())
    }

    /// The flags with which a processor runs for one instruction; without an interrupt, where KVM can do that
    /// (Linux 5.15).
    pub fn step_flags(&self) -> u32 {
        let supported = self.slots.vm.check_extension_raw(u64::from(KVM_CAP_SET_GUEST_DEBUG2)).max(0) as u32;
        KVM_GUESTDBG_SINGLESTEP | supported & KVM_GUESTDBG_BLOCKIRQ
    }

    /// A write to `event`, by any process, pulses interrupt line `gsi`.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.slots
            .vm
            .register_irqfd(event, gsi)
            .map_err(failed_to(format!("connect an eventfd to interrupt {gsi}")))
    }

    /// A guest's write of `value`, 4 bytes wide, to `address` signals `event` instead of causing an exit.
    pub fn register_ioeventfd(&self, event: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.slots
            .vm
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(failed_to(format!("connect an eventfd to writes of {value:#x} at {address:#x}")))
    }
}

/// A processor that does not run yet.
///
/// Fields are dropped in their order here: KVM keeps a machine as long as it has a processor, and the memory
/// behind its slots must outlive it.
pub struct Processor {
    pub(super) id: u32,
    pub(super) fd: VcpuFd,
    /// What its thread counts.
    pub counters: Arc<VcpuCounters>,
    /// KVM's statistics of it, where it has some.
    pub statistics: Option<Arc<KvmStatistics>>,
    _slots: Arc<Slots>,
}

impl Processor {
    /// The system registers: their reset values, before it runs.
    pub fn system_registers(&self) -> Result<kvm_sregs, KvmError> {
        self.fd.get_sregs().map_err(failed_to("read system registers"))
    }
}

fn statistics(of: &str, fd: &impl AsRawFd, names: &[&'static str]) -> Option<KvmStatistics> {
    let statistics = KvmStatistics::of(fd, names);
    statistics.inspect_err(|error| log::debug!("KVM has no statistics of {of}: {error}")).ok()
}

/// Lets KVM keep the page tables of all other slots when one is deleted. Linux 6.12 and later can do this;
/// before, each deletion slows the guest down for a moment. Tells whether KVM does.
fn keep_page_tables_on_slot_deletion(vm: &VmFd) -> Result<bool, KvmError> {
    let quirks = vm.check_extension_raw(u64::from(KVM_CAP_DISABLE_QUIRKS2)).max(0) as u32;
    if quirks & KVM_X86_QUIRK_SLOT_ZAP_ALL == 0 {
        log::debug!("this KVM always drops all page tables when it deletes a memory slot");
        return Ok(false);
    }
    let mut capability = kvm_enable_cap { cap: KVM_CAP_DISABLE_QUIRKS2, ..Default::default() };
    capability.args[0] = u64::from(KVM_X86_QUIRK_SLOT_ZAP_ALL);
    vm.enable_cap(&capability).map_err(failed_to("disable KVM_X86_QUIRK_SLOT_ZAP_ALL"))?;
    Ok(true)
}
