//! How each part of this program reports an error. Uses nothing of ours.

use std::fmt::Display;
use std::path::Path;

/// A value, or one sentence that says what went wrong.
pub type Outcome<T> = Result<T, String>;

/// For `map_err`: "cannot WHAT PATH: error".
pub fn failed<E: Display>(what: &str, path: &Path) -> impl FnOnce(E) -> String {
    let sentence = format!("cannot {what} {}", path.display());
    move |error| format!("{sentence}: {error}")
}
