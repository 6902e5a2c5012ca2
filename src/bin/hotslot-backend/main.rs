//! hotslot-backend.
fn main() {}
