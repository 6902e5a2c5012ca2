//! The Rust files of the project: the test programs, and where their modules are.

use std::fs;
use std::path::{Path, PathBuf};

use crate::message::Result;

/// The project's directory.
pub struct Sources<'a> {
    root: &'a Path,
}

/// A test program, and the file in which its crate begins.
#[derive(Debug, PartialEq)]
pub struct Program {
    /// `lib`, or the name of an integration test.
    pub name: String,
    pub file: PathBuf,
}

impl Sources<'_> {
    pub fn new(root: &Path) -> Sources<'_> {
        Sources { root }
    }

    /// The library's unit tests, `tests/NAME.rs` and `tests/NAME/main.rs`, as cargo finds them.
    pub fn programs(&self) -> Result<Vec<Program>> {
        let mut programs = vec![Program { name: "lib".to_owned(), file: "src/lib.rs".into() }];
        let tests = self.root.join("tests");
        let failed = |error| format!("cannot list {}: {error}", tests.display());
        for entry in fs::read_dir(&tests).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            let (name, file) = match name.strip_suffix(".rs") {
                Some(stem) => (stem.to_owned(), format!("tests/{name}")),
                None => (name.clone(), format!("tests/{name}/main.rs")),
            };
            if self.exists(Path::new(&file)) {
                programs.push(Program { name, file: file.into() });
            }
        }
        Ok(programs)
    }

    /// `path` is relative to the project's directory.
    pub fn read(&self, path: &Path) -> Result<String> {
        fs::read_to_string(self.root.join(path))
            .map_err(|error| format!("cannot read {}: {error}", path.display()))
    }

    pub fn exists(&self, path: &Path) -> bool {
        self.root.join(path).is_file()
    }
}
