// The tour of the code, with its reading order, five stories and glossary, is tour.md.
#![doc = include_str!("tour.md")]

pub mod arch;
pub mod bus;
pub mod cli;
pub mod config;
pub mod counter;
pub mod devices;
pub mod exit;
pub mod kvm;
pub mod memory;
pub mod picture;
pub mod report;
pub mod sandbox;
pub mod size;
pub mod terminal;
pub mod thread;
pub mod trace;
pub mod vhost_user;
pub mod virtio;
pub mod vmm;

#[doc = include_str!("contract.md")]
pub mod contract {}

#[doc = include_str!("design.md")]
pub mod design {}

#[doc = include_str!("drawings.md")]
pub mod drawings {}

#[doc = include_str!("manual/links.md")]
#[doc = include_str!("lessons.md")]
pub mod lessons {}

/// The manual: what hotslot, its back-ends and its scripts do, page by page.
///
/// Each page links to others by file names, which lead somewhere on a forge. `manual/links.md` comes first
/// here: it gives the same links their places in this documentation.
pub mod manual {
    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/backends.md")]
    pub mod backends {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/emulated.md")]
    pub mod emulated {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/hotslot.md")]
    pub mod hotslot {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/interop.md")]
    pub mod interop {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/loss.md")]
    pub mod loss {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/many.md")]
    pub mod many {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/proof.md")]
    pub mod proof {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/run.md")]
    pub mod run {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/sandbox.md")]
    pub mod sandbox {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/share.md")]
    pub mod share {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/speed.md")]
    pub mod speed {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/statistics.md")]
    pub mod statistics {}

    #[doc = include_str!("manual/links.md")]
    #[doc = include_str!("manual/testing.md")]
    pub mod testing {}
}
