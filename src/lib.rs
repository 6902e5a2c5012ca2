//! hotslot.

pub mod size;
