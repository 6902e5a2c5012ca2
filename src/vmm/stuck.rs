//! Finds vCPUs that wait in KVM for a page of a mapping that is permanently missing (SHM-45).
//!
//! With interrupts enabled in the guest, KVM fetches such a page asynchronously, fails, and lets the vCPU
//! retry without end and without an exit. The vCPU's statistics then show page faults that are not resolved.
//! That alone proves nothing: a slow disk looks the same. So the missing pages are only made inaccessible
//! (PROT_NONE): the vCPU's next access fails with EFAULT, and zeroes take the page's place.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::kvm::vcpu::Vcpu;
use crate::memory::missing::MissingPages;
use crate::thread;

/// Time between two looks at the processors while mappings exist.
const LOOK: Duration = Duration::from_millis(200);
/// Time between two checks for mappings while there are none.
const LOOK_FOR_MAPPINGS: Duration = Duration::from_secs(1);
/// The unresolved faults between two looks that are a reason to act. A stuck processor has thousands a
/// second.
const MANY: u64 = 20;

/// Starts the thread that looks, if there can be anything to look for. It never ends: nothing waits for it.
pub(super) fn spawn(mut watch: StuckWatch, processors: Arc<Vec<Vcpu>>) -> io::Result<()> {
    if watch.pages.are_possible() {
        thread::spawn("stuck".into(), move || {
            loop {
                std::thread::sleep(watch.look(&processors));
            }
        })?;
    }
    Ok(())
}

/// The watch over the processors.
pub(super) struct StuckWatch {
    pages: Arc<MissingPages>,
    /// Makes missing pages inaccessible, or did so. At most one at a time.
    guard: Option<JoinHandle<()>>,
    /// The processors' unresolved faults at the last look.
    faults: Vec<Option<u64>>,
}

impl StuckWatch {
    pub fn new(pages: Arc<MissingPages>) -> Self {
        StuckWatch { pages, guard: None, faults: Vec::new() }
    }

    /// Looks. The result is the time until the next look.
    fn look(&mut self, vcpus: &[Vcpu]) -> Duration {
        if !self.pages.are_to_watch() {
            return LOOK_FOR_MAPPINGS;
        }
        self.pages.settle();
        if self.is_any_stuck(vcpus) {
            self.guard();
        }
        LOOK
    }

    /// On a thread of its own: a search for missing pages may wait for a disk.
    fn guard(&mut self) {
        if self.guard.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let pages = Arc::clone(&self.pages);
        self.guard = thread::spawn("guard".into(), move || pages.guard())
            .inspect_err(|error| log::debug!("cannot look for missing pages: {error}"))
            .ok();
    }

    fn is_any_stuck(&mut self, vcpus: &[Vcpu]) -> bool {
        self.faults.resize(vcpus.len(), None);
        let mut any = false;
        for (vcpu, last) in vcpus.iter().zip(&mut self.faults) {
            let now = vcpu.unresolved_faults();
            if let (Some(before), Some(now)) = (std::mem::replace(last, now), now) {
                any |= now.saturating_sub(before) >= MANY;
            }
        }
        any
    }
}
