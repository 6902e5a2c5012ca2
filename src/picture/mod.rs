//! Pictures as SVG: what they are drawn on ([`canvas`]), and guest physical memory ([`memory`]).
//!
//! A picture is 800 pixels wide, for a page of a forge or of documentation. Its colours follow the reader's
//! choice of light or dark (`prefers-color-scheme`). Nothing is told by colour alone.
//!
//! `vmm` draws the memory, `trace` what passed between guest, hotslot and back-ends.

pub mod canvas;
pub mod memory;
