//! How each part of this program reports an error. Uses nothing of ours.

/// A value, or one sentence that says what failed.
pub type Result<T> = std::result::Result<T, String>;

/// A message on standard error, under the name of the script that the user started.
pub fn say(sentence: &str) {
    eprintln!("contract.sh: {sentence}");
}
