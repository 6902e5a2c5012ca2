//! What a vCPU's thread counts: why KVM_RUN returned, and how long the vCPU waited for memory.
//!
//! `super::vcpu` counts, `vmm::stats` reads. Each vCPU has its own: no two threads add to one counter.

use std::time::Instant;

use kvm_ioctls::VcpuExit;
use vmm_sys_util::errno::{Error, Result};

use crate::counter::Counter;
use crate::counters;

counters! {
    /// The counters of one vCPU.
    VcpuCounters {
        /// Exits by `in`.
        port_reads,
        /// Exits by `out`.
        port_writes,
        /// Exits by a read of a memory address without a slot, or by one that KVM could not carry out.
        mmio_reads,
        /// The same of writes; also of writes to read-only slots.
        mmio_writes,
        /// KVM_RUN returned for a signal, or had only to complete an access.
        interruptions,
        /// KVM_RUN failed with EFAULT: the host could not provide a page.
        memory_faults,
        /// Breakpoints, watchpoints, single steps.
        debug_events,
        /// KVM could not emulate an instruction, or had another error of its own.
        internal_errors,
        /// All other exits.
        other_exits,
        /// Waits for a page that the host cannot provide (SHM-87).
        page_waits,
        /// The longest of them.
        longest_page_wait_us,
        /// Waits at a hole whose back-end may come back (SHM-77).
        hole_waits,
        /// The longest of them.
        longest_hole_wait_us,
    }
}

impl VcpuCounters {
    /// Counts one return of KVM_RUN, by its reason.
    pub(super) fn exit(&self, exit: &Result<VcpuExit<'_>>) {
        let counter = match exit {
            Ok(VcpuExit::IoIn(..)) => &self.port_reads,
            Ok(VcpuExit::IoOut(..)) => &self.port_writes,
            Ok(VcpuExit::MmioRead(..)) => &self.mmio_reads,
            Ok(VcpuExit::MmioWrite(..)) => &self.mmio_writes,
            Ok(VcpuExit::Intr) => &self.interruptions,
            Ok(VcpuExit::MemoryFault { .. }) => &self.memory_faults,
            Ok(VcpuExit::Debug(_)) => &self.debug_events,
            Ok(VcpuExit::InternalError) => &self.internal_errors,
            Ok(_) => &self.other_exits,
            Err(error) if *error == Error::new(libc::EINTR) => &self.interruptions,
            Err(error) if *error == Error::new(libc::EFAULT) => &self.memory_faults,
            Err(_) => &self.other_exits,
        };
        counter.count();
    }
}

/// A wait that a vCPU's thread may be in, which it notices again and again.
#[derive(Default)]
pub(super) struct Wait(Option<Instant>);

impl Wait {
    /// Counts the wait at its first call; later calls update the longest time, so the part after the last
    /// call is missing.
    pub fn goes_on(&mut self, count: &Counter, longest: &Counter) {
        match self.0 {
            Some(began) => longest.keep_longest(began.elapsed()),
            None => {
                count.count();
                self.0 = Some(Instant::now());
            }
        }
    }

    /// It waits no longer.
    pub fn ends(&mut self) {
        self.0 = None;
    }
}
