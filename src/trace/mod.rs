//! A record of what passes between the guest, hotslot and the back-ends (`--trace-vhost-user FILE`), and its
//! readable forms (`hotslot trace FILE`).
//!
//! Reading order: [`record`] (what a line says), [`recorder`] (writes lines), [`descriptor`] (what a file
//! descriptor is), [`read`] (a file to records), [`text`], [`mermaid`], [`sequence`] and [`timeline`]
//! (records to what people read), [`show`] (the command).

pub mod descriptor;
pub mod mermaid;
pub mod read;
pub mod record;
pub mod recorder;
pub mod sequence;
pub mod show;
pub mod text;
pub mod timeline;
