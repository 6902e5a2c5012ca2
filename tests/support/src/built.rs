//! The programs that cargo builds for the tests, and room for the tests' files.
//!
//! `env!("CARGO_BIN_EXE_hotslot")` exists in the tests of the package alone, not in this crate. So the
//! programs are found from where the test program is: `target/PROFILE/deps/TEST`.

use std::path::PathBuf;

/// The program `hotslot`.
pub fn hotslot() -> PathBuf {
    program("hotslot")
}

/// The program `hotslot-backend`.
pub fn hotslot_backend() -> PathBuf {
    program("hotslot-backend")
}

/// A program of `examples/`. Cargo builds these with all tests, and not with a test that is named.
pub fn example(name: &str) -> PathBuf {
    let path = profile().join("examples").join(name);
    assert!(
        path.exists(),
        "no {}: `cargo build --examples` builds it, as scripts/test.sh does",
        path.display()
    );
    path
}

fn program(name: &str) -> PathBuf {
    let path = profile().join(name);
    assert!(path.exists(), "cargo builds {} with the package's tests", path.display());
    path
}

/// A directory on the same disk as the build: files there are written back, unlike those of a tmpfs.
pub fn scratch() -> PathBuf {
    let path = profile().with_file_name("tmp");
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// `target/PROFILE`.
fn profile() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().and_then(|deps| deps.parent()).unwrap().to_path_buf()
}
