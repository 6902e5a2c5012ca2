//! The second level's page tables, filled before the guest asks (KVM_PRE_FAULT_MEMORY, Linux 6.10): for
//! devices with `prefault=on`.
//!
//! The ioctl is one of a vCPU, and waits while that vCPU runs. So each such device has a spare vCPU that
//! never runs: ACPI does not list it, and the guest cannot see it. KVM's page tables are those of the
//! machine, so what is filled through a spare vCPU serves all of them.

use std::ffi::c_ulong;
use std::io;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{_IOC_READ, _IOC_WRITE, ioctl_expr, ioctl_with_mut_ref};

use crate::memory::GuestRange;

const KVM_PRE_FAULT_MEMORY: c_ulong =
    ioctl_expr(_IOC_READ | _IOC_WRITE, KVMIO, 0xd5, size_of::<kvm_pre_fault_memory>() as u32);

/// The spare vCPUs of a machine.
#[derive(Default)]
pub struct SpareVcpus {
    /// Lock order: innermost. Held to take one or to put one back, never across the ioctl: that reads pages
    /// in, which can wait for a disk.
    idle: Mutex<Vec<VcpuFd>>,
}

impl SpareVcpus {
    /// Adds one, which has its CPUID already.
    pub fn add(&self, vcpu: VcpuFd) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(vcpu);
    }

    /// Fills the page tables of `guest`, as far as the host has its pages. Does nothing without a spare vCPU.
    ///
    /// Fails with KVM's errno: EINTR where a signal came first, ENOENT without a slot.
    pub fn prefault(&self, guest: GuestRange) -> io::Result<()> {
        let take = || self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let Some(vcpu) = take() else { return Ok(()) };
        let mut range = kvm_pre_fault_memory { gpa: guest.start(), size: guest.len(), ..Default::default() };
        let mut result = Ok(());
        // KVM moves the start of the range past what it has filled.
        while range.size > 0 && result.is_ok() {
            // SAFETY: the struct is the ioctl's, and this thread's own.
            let status = unsafe { ioctl_with_mut_ref(&vcpu, KVM_PRE_FAULT_MEMORY, &mut range) };
            result = if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
        }
        self.add(vcpu);
        result
    }
}
