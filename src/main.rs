//! hotslot.
fn main() {}
