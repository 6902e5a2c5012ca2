//! The VMM's threads, and the calls that each kind of them may make.

use std::ffi::c_uint;
use std::sync::OnceLock;

use kvm_bindings::{
    KVMIO, kvm_cpuid2, kvm_fpu, kvm_guest_debug, kvm_msrs, kvm_pre_fault_memory, kvm_regs, kvm_sregs,
    kvm_userspace_memory_region,
};
use syscalls::Sysno;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::every_thread::{EVERY_THREAD, STARTS_THREADS};
use super::rule::{Argument, Rule, call, call_if, fcntl, ioctl, on_self};

/// A kind of thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The main thread, once the set-up is done.
    MainLoop,
    /// `vcpuN`: runs the guest, and serves its accesses to registers.
    Vcpu,
    /// The same, where gdb may set breakpoints.
    DebuggedVcpu,
    /// `gdb`: what gdb asks for.
    Debugger,
    /// `dump`: writes the machine into a file.
    Dumper,
    /// `vhost-NAME`: a device's thread, which serves the backend channel.
    Channel,
    /// `keep-NAME`: asks a device's back-end, and tells it, what no vCPU waits for.
    Keeper,
    /// The same, of a device with `reconnect=`: connects again to a back-end that died.
    Reconnector,
    /// `memory-picture`: writes the picture of the machine's memory.
    Painter,
    /// Any other: waits, looks, and tells.
    Helper,
}

/// Set when the main loop is confined. Until then no vCPU enters the guest.
static MAIN_IS_CONFINED: OnceLock<()> = OnceLock::new();

impl Kind {
    /// What a thread that this one starts does first: it confines itself, unless it inherits that.
    pub fn for_new_thread(self) -> impl FnOnce() + Send + 'static {
        let inherits = super::is_confined();
        move || if inherits { super::set_confined() } else { self.confine() }
    }

    /// Confines this thread. A vCPU's then waits until the main thread is confined, too.
    pub fn confine(self) {
        super::confine(self.tables());
        match self {
            Kind::MainLoop => _ = MAIN_IS_CONFINED.set(()),
            Kind::Vcpu | Kind::DebuggedVcpu if super::is_confined() => _ = MAIN_IS_CONFINED.wait(),
            _ => {}
        }
    }

    pub(super) fn tables(self) -> &'static [&'static [Rule]] {
        match self {
            Kind::MainLoop => &[EVERY_THREAD, MAIN_LOOP],
            Kind::Vcpu => &[VCPU, EVERY_THREAD, SOCKETS, FILES, TRACE],
            Kind::DebuggedVcpu => &[VCPU, EVERY_THREAD, SOCKETS, FILES, TRACE, DEBUGGED],
            Kind::Debugger => &[EVERY_THREAD, DEBUGGER],
            Kind::Dumper => &[EVERY_THREAD, DUMPER],
            Kind::Channel => &[EVERY_THREAD, CHANNEL, SOCKETS, FILES, TRACE],
            Kind::Keeper => &[EVERY_THREAD, SOCKETS, TRACE],
            Kind::Reconnector => &[EVERY_THREAD, SOCKETS, RECONNECT, TRACE],
            Kind::Painter => &[EVERY_THREAD, PAINTER],
            Kind::Helper => &[EVERY_THREAD, STARTS_THREADS, HELPER],
        }
    }
}

const fn kvm(direction: c_uint, number: c_uint, size: usize) -> u32 {
    ioctl_expr(direction, KVMIO, number, size as c_uint) as u32
}

// From linux/kvm.h; what is there as 0x4008ae89 is here a direction, a number and a size.
const KVM_SET_USER_MEMORY_REGION: u32 = kvm(_IOC_WRITE, 0x46, size_of::<kvm_userspace_memory_region>());
const KVM_RUN: u32 = kvm(_IOC_NONE, 0x80, 0);
const KVM_GET_REGS: u32 = kvm(_IOC_READ, 0x81, size_of::<kvm_regs>());
const KVM_SET_REGS: u32 = kvm(_IOC_WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: u32 = kvm(_IOC_READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: u32 = kvm(_IOC_WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_SET_MSRS: u32 = kvm(_IOC_WRITE, 0x89, size_of::<kvm_msrs>());
const KVM_GET_FPU: u32 = kvm(_IOC_READ, 0x8c, size_of::<kvm_fpu>());
const KVM_SET_FPU: u32 = kvm(_IOC_WRITE, 0x8d, size_of::<kvm_fpu>());
const KVM_SET_CPUID2: u32 = kvm(_IOC_WRITE, 0x90, size_of::<kvm_cpuid2>());
const KVM_SET_GUEST_DEBUG: u32 = kvm(_IOC_WRITE, 0x9b, size_of::<kvm_guest_debug>());
const KVM_PRE_FAULT_MEMORY: u32 = kvm(_IOC_READ | _IOC_WRITE, 0xd5, size_of::<kvm_pre_fault_memory>());

const MAIN_LOOP: &[Rule] = &[
    call(Sysno::epoll_wait, "waits for events"),
    call(Sysno::epoll_ctl, "waits for serial input only while the guest has room"),
    call(Sysno::pread64, "KVM's statistics, at the end with `-v`"),
];

const VCPU: &[Rule] = &[
    // First, as it is the most frequent.
    ioctl(KVM_RUN, "runs the guest"),
    ioctl(KVM_SET_CPUID2, "the vCPU's state, before it runs"),
    ioctl(KVM_SET_MSRS, "the same"),
    ioctl(KVM_SET_SREGS, "the same"),
    ioctl(KVM_SET_REGS, "the same"),
    ioctl(KVM_SET_FPU, "the same"),
    ioctl(KVM_GET_REGS, "which pages does an instruction need; the registers in a debug message"),
    ioctl(KVM_GET_SREGS, "the same"),
    ioctl(KVM_GET_FPU, "the registers for a debugger or a dump"),
    ioctl(KVM_SET_USER_MEMORY_REGION, "a reset takes the slots of a device whose thread is stuck"),
    call(Sysno::preadv2, "forgets a kick at a reset"),
    call(Sysno::memfd_create, "a record for requests in flight, at a start with `reconnect=`"),
    call(Sysno::ftruncate, "the same"),
    on_self(Sysno::process_vm_readv, "reads a page of a mapping for the guest, if it is there"),
    on_self(Sysno::process_vm_writev, "writes to one"),
];

const DEBUGGED: &[Rule] = &[ioctl(KVM_SET_GUEST_DEBUG, "breakpoints and single steps")];

const DEBUGGER: &[Rule] = &[
    call(Sysno::accept4, "a debugger connects, to the socket that was made in the set-up"),
    on_self(Sysno::process_vm_readv, "reads a page of a mapping for it, if the page is there"),
];

const DUMPER: &[Rule] = &[
    call(Sysno::lseek, "which parts of RAM are more than zeroes"),
    call(Sysno::pread64, "reads RAM"),
    call(Sysno::ftruncate, "the length of the dump"),
    call(Sysno::pwrite64, "writes it"),
];

const CHANNEL: &[Rule] = &[
    ioctl(KVM_SET_USER_MEMORY_REGION, "a mapping's slot"),
    ioctl(KVM_PRE_FAULT_MEMORY, "a mapping's page tables, with `prefault=on`"),
    fcntl(libc::F_GET_SEALS, "is a descriptor a file of memory"),
    call(Sysno::lseek, "the table of mounts, from its beginning"),
    call(Sysno::fstat, "which file is it, for other devices' back-ends"),
];

/// To a socket of any name, which no filter can see: only for a device whose user asked for it.
const RECONNECT: &[Rule] = &[
    call_if(Sysno::socket, Argument::Is(0, libc::AF_UNIX as u32), "a new main socket"),
    call(Sysno::connect, "the same"),
    call_if(Sysno::socketpair, Argument::Is(0, libc::AF_UNIX as u32), "a new backend channel"),
    call(Sysno::pread64, "where a ring stands: the used index in RAM"),
];

const PAINTER: &[Rule] =
    &[call(Sysno::ftruncate, "empties the file of the picture"), call(Sysno::pwrite64, "writes the picture")];

const HELPER: &[Rule] = &[call(Sysno::pread64, "KVM's statistics")];

/// The sockets to a back-end.
const SOCKETS: &[Rule] = &[
    call(Sysno::sendmsg, "a message, with its descriptors"),
    call(Sysno::recvmsg, "the same"),
    ioctl(libc::FIONREAD as u32, "how much is there to read"),
    call(Sysno::shutdown, "hangs up on a back-end"),
];

/// What is a descriptor that is sent or that came, for `--trace-vhost-user`.
const TRACE: &[Rule] = &[
    fcntl(libc::F_GET_SEALS, "is it a file of memory"),
    fcntl(libc::F_GETFL, "for reading, for writing"),
    call(Sysno::statx, "what is it, and how long"),
];

/// A file of a back-end's.
const FILES: &[Rule] = &[
    call(Sysno::statx, "what is it, on which mount, and how long"),
    call(Sysno::fstatfs, "the size of its pages; how full is its file system"),
];
