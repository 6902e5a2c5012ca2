//! Zeroes in place of what is missing because the file under a mapping became shorter (SHM-45).

mod fill;

pub use self::fill::Filled;
