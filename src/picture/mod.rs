//! Pictures of a machine, as SVG: its guest physical memory.
//!
//! A picture is 800 pixels wide, for a page of a forge or of documentation. Its colours follow the reader's
//! choice of light or dark (`prefers-color-scheme`). Nothing is told by colour alone.
//!
//! `vmm` draws the memory.

mod canvas;
pub mod memory;
