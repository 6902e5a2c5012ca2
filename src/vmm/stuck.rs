//! Finds vCPUs that wait in KVM for a page of a mapping that is permanently missing (SHM-45).
//!
//! With interrupts enabled in the guest, KVM fetches such a page asynchronously, fails, and lets the vCPU
//! retry without end and without an exit. The vCPU's statistics then show page faults that are not resolved.
//! That alone proves nothing: a slow disk looks the same. So the missing pages are only made inaccessible
//! (PROT_NONE): the vCPU's next access fails with EFAULT, and zeroes take the page's place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

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

/// The main loop's watch over the processors.
pub(super) struct StuckWatch {
    pages: Arc<MissingPages>,
    guarding: Arc<AtomicBool>,
    next: Option<Instant>,
    /// The processors' unresolved faults at the last look.
    faults: Vec<Option<u64>>,
}

impl StuckWatch {
    pub fn new(pages: Arc<MissingPages>) -> Self {
        StuckWatch { pages, guarding: Arc::default(), next: None, faults: Vec::new() }
    }

    /// Called by the main loop each time around. Looks if it is time to. The result is the number of
    /// milliseconds until the next look; -1 for none.
    pub fn look(&mut self, vcpus: &[Vcpu]) -> i32 {
        if !self.pages.are_possible() {
            return -1;
        }
        let now = Instant::now();
        let wait = match self.next.map(|next| next.saturating_duration_since(now)) {
            Some(wait) if !wait.is_zero() => wait,
            _ if self.pages.are_to_watch() => {
                self.pages.settle();
                if self.is_any_stuck(vcpus) {
                    self.guard();
                }
                LOOK
            }
            _ => LOOK_FOR_MAPPINGS,
        };
        self.next = Some(now + wait);
        // Rounded up, so that the time has passed by then.
        i32::try_from(wait.as_millis() + 1).unwrap_or(i32::MAX)
    }

    /// On a thread of its own, at most one at a time: a search for missing pages may wait for a disk.
    fn guard(&self) {
        if self.guarding.swap(true, Ordering::SeqCst) {
            return;
        }
        let (pages, guarding) = (Arc::clone(&self.pages), Arc::clone(&self.guarding));
        let started = thread::spawn("guard".into(), move || {
            pages.guard();
            guarding.store(false, Ordering::SeqCst);
        });
        if let Err(error) = started {
            log::debug!("cannot look for missing pages: {error}");
            self.guarding.store(false, Ordering::SeqCst);
        }
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
