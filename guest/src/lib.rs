//! What the guest's program shares with the tests on the host. The program itself is `main.rs`.

#[allow(missing_docs)] // One comment stands above a group of constants.
pub mod board;
