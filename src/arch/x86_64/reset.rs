//! Why Linux reset the machine: after a panic, or because it was asked to.
//!
//! Before each reset Linux writes to the BIOS data area how it is to boot next (the reset flag, at 0x472).
//! `reboot=panic_warm` on its command line makes that a warm boot after a panic and leaves it a cold boot
//! otherwise. So a panic needs no driver in the guest to be told from a reset.

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::exit::Exit;

/// The words of the kernel command line that make it so.
pub const PANIC_IS_WARM: &str = "reboot=panic_warm";

const RESET_FLAG: GuestAddress = GuestAddress(0x472);
const WARM: u16 = 0x1234;

/// Tells a panic from a reset.
pub struct Resets {
    /// `None` where the kernel was not asked to tell.
    ram: Option<GuestMemoryMmap>,
}

impl Resets {
    /// Of a machine whose kernel has this command line.
    pub fn new(cmdline: &str, ram: &GuestMemoryMmap) -> Self {
        let words = || cmdline.split_whitespace();
        // Without it, or where every reset is to be warm, the flag says nothing.
        let tells =
            words().any(|word| word == PANIC_IS_WARM) && !words().any(|word| word.starts_with("reboot=w"));
        Resets { ram: tells.then(|| ram.clone()) }
    }

    /// How the machine ended, where a vCPU reports this end.
    pub fn look_at(&self, exit: Exit) -> Exit {
        let flag = self.ram.as_ref().map(|ram| ram.read_obj::<u16>(RESET_FLAG));
        match (exit, flag) {
            (Exit::Reset, Some(Ok(WARM))) => Exit::Panicked,
            (exit, _) => exit,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warm_reset_is_a_panic_where_linux_was_asked_to_make_it_so() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let end = |cmdline, exit| Resets::new(cmdline, &ram).look_at(exit);
        let asked = format!("console=ttyS0 {PANIC_IS_WARM} quiet");
        assert_eq!(end(&asked, Exit::Reset), Exit::Reset);
        ram.write_obj(WARM, RESET_FLAG).unwrap();
        assert_eq!(end(&asked, Exit::Reset), Exit::Panicked);
        assert_eq!(end(&asked, Exit::PowerOff), Exit::PowerOff);
        for cmdline in ["quiet", &format!("{asked} reboot=w"), &format!("{asked} reboot=warm,k")] {
            assert_eq!(end(cmdline, Exit::Reset), Exit::Reset, "{cmdline}");
        }
    }
}
