//! Finds vCPUs that wait in KVM for a page of a mapping that the host cannot provide (SHM-45, SHM-87).
//!
//! With interrupts enabled in the guest, KVM fetches such a page asynchronously, fails, and lets the vCPU
//! retry without end and without an exit. The vCPU's statistics then show page faults that are not resolved.
//! That alone proves nothing: a slow disk looks the same. So the vCPU is only interrupted: its thread looks
//! at the pages that its instruction needs. A vCPU that is known to wait is interrupted, too, so that its
//! thread notices when the page is there.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::kvm::vcpu::Vcpu;
use crate::memory::missing::MissingPages;
use crate::sandbox::vmm::Kind;
use crate::thread;

/// Time between two looks at the vCPUs while mappings exist.
const LOOK: Duration = Duration::from_millis(200);
/// Time between two checks for mappings while there are none.
const LOOK_FOR_MAPPINGS: Duration = Duration::from_secs(1);
/// The unresolved faults between two looks that are a reason to act. A stuck vCPU has thousands a
/// second.
const MANY: u64 = 20;

/// Starts the thread that looks, if there can be anything to look for. It never ends: nothing waits for it.
pub(super) fn spawn(mut watch: StuckWatch, vcpus: Arc<Vec<Vcpu>>) -> io::Result<()> {
    if watch.pages.are_possible() {
        thread::spawn("stuck".into(), Kind::Helper, move || {
            loop {
                std::thread::sleep(watch.look(&vcpus));
            }
        })?;
    }
    Ok(())
}

/// The watch over the vCPUs.
pub(super) struct StuckWatch {
    pages: Arc<MissingPages>,
    /// The vCPUs' unresolved faults at the last look.
    faults: Vec<Option<u64>>,
}

impl StuckWatch {
    pub fn new(pages: Arc<MissingPages>) -> Self {
        StuckWatch { pages, faults: Vec::new() }
    }

    /// Looks. The result is the time until the next look.
    fn look(&mut self, vcpus: &[Vcpu]) -> Duration {
        if !self.pages.are_to_watch() {
            return LOOK_FOR_MAPPINGS;
        }
        self.interrupt_stuck(vcpus);
        LOOK
    }

    fn interrupt_stuck(&mut self, vcpus: &[Vcpu]) {
        self.faults.resize(vcpus.len(), None);
        for (vcpu, last) in vcpus.iter().zip(&mut self.faults) {
            let now = vcpu.unresolved_faults();
            let before = std::mem::replace(last, now);
            let has_many = before.zip(now).is_some_and(|(before, now)| now.saturating_sub(before) >= MANY);
            if has_many || vcpu.is_waiting() {
                vcpu.interrupt();
            }
        }
    }
}
