//! The emulated host, and the link between its two ends.
//!
//! ```text
//!   developer's machine                            emulated host (QEMU, TCG)
//!   lab.sh -> `init lab` (outside) == frames ==> PID 1 `init` (inside) -> COMMAND
//!              stdin, stdout, stderr   [link]      pipes or a pseudo-terminal
//! ```
//!
//! One virtio-serial port carries everything, in frames ([`link`]): the command and its input one way; its
//! output, the files it made and its exit status the other. One stream has one order, so that when the status
//! has arrived, every byte before it has: the outside can stop the machine at once, and nothing is lost in a
//! buffer.
//!
//! `scripts/run.sh` runs a command in a guest of hotslot by the same link: then a script starts the machine
//! ([`script`]), and the port is one of `hotslot-backend console`.

pub mod inside;
pub mod link;
mod log;
mod options;
pub mod outside;
mod qemu;
mod script;
mod signals;
mod standstill;
