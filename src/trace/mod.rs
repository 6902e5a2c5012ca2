//! A record of what passes between the guest, hotslot and the back-ends (`--trace-vhost-user FILE`), and its
//! readable forms (`hotslot trace FILE`).
//!
//! Reading order: [`record`] (what a line says), [`recorder`] (writes them), [`descriptor`] (what a file
//! descriptor is).

pub mod descriptor;
pub mod record;
pub mod recorder;
