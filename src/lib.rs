//! hotslot.
