//! Shows a device's mappings to other back-ends (ADD_MEM_REG) and takes them back (REM_MEM_REG), SHM-80. With
//! `share-shmem=on` the guest can then hand pages of the mappings to the devices of those back-ends.
//!
//! `vmm::backends` makes one [`Sharing`] for the machine and a [`Participant`] for each device. As an owner,
//! a participant is used by `shmem_handler` (MAP, UNMAP) and by `device` (reset, end); as a recipient, by
//! `backend` (start) and by its keeper's thread. `state` has what each recipient knows and is to be told, as
//! data; `participant` waits and talks.
//!
//! # Waits between threads
//!
//! Recipients are told of a mapping before MAP is answered, and of its end before UNMAP is answered. So the
//! owner's device's thread waits for *another* back-end, never for its own. That back-end may be waiting for
//! us at that moment, on the thread that would answer. One case: it is started or reset, and a vCPU has its
//! main socket. Another: a request of its own is being handled, whose sharing waits for a third back-end, or
//! for the first. So:
//!
//! - A channel thread neither touches another device's main socket nor waits for its lock. It marks what is
//!   due, and waits, for a bounded time, until the recipient's keeper or a vCPU has told it.
//! - Before a channel thread waits, it looks whether that would close a circle of owners that wait for each
//!   other. If so it gives the others only `CIRCLE_TIMEOUT` (most back-ends have another thread for their
//!   main socket), and goes on: its answer is what the circle needs. What is due stays due, and is told when
//!   that back-end listens again.
//! - A vCPU that holds a main socket waits for that back-end alone. No thread waits for a vCPU except for
//!   that main socket.
//!
//! A recipient that leaves an ADD or a REM unanswered for `ANSWER_TIMEOUT` is given up, so it delays others
//! once. A recipient that is busy for longer than `MAP_TIMEOUT` learns of the mapping later, and the log says
//! so. One that cannot be told within `LET_GO_TIMEOUT` to let go is cut off: it must not keep what its owner
//! has taken back.

mod participant;
mod state;

pub use participant::{ANSWER_TIMEOUT, Owner, Participant, Sharing};
