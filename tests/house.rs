//! The house keeps its shape: which module of the library may use which others, as the tour in `lib.rs` says.

// The lint's exception for tests does not see the helpers of an integration test.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module, and those of ours that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("arch", &["memory", "report"]),
    ("bus", &["exit"]),
    ("cli", &["config", "size"]),
    ("config", &["size", "virtio"]),
    ("devices", &["bus", "exit"]),
    ("exit", &[]),
    ("kvm", &["bus", "exit", "memory", "report", "thread"]),
    ("memory", &["report"]),
    ("report", &[]),
    ("size", &[]),
    ("terminal", &[]),
    ("thread", &[]),
    ("vhost_user", &["config", "memory", "report", "thread", "virtio"]),
    ("virtio", &["bus", "exit", "memory", "report"]),
    (
        "vmm",
        &[
            "arch",
            "bus",
            "config",
            "devices",
            "exit",
            "kvm",
            "memory",
            "report",
            "terminal",
            "thread",
            "vhost_user",
            "virtio",
        ],
    ),
];

#[test]
fn dependencies_run_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = BTreeSet::new();
    for file in rust_files(&src) {
        let path = file.strip_prefix(&src).unwrap();
        let first = path.iter().next().unwrap().to_str().unwrap();
        if matches!(first, "main.rs" | "lib.rs" | "bin") {
            continue;
        }
        let module = first.strip_suffix(".rs").unwrap_or(first);
        seen.insert(module.to_string());
        let (_, allowed) = MAY_USE
            .iter()
            .find(|(name, _)| *name == module)
            .unwrap_or_else(|| panic!("{module} is new: add it to the tour in lib.rs and to this table"));
        for used in uses(&fs::read_to_string(&file).unwrap()) {
            assert!(
                used == module || allowed.contains(&used.as_str()),
                "{} uses crate::{used}, which {module} may not",
                path.display()
            );
        }
    }
    let listed: BTreeSet<_> = MAY_USE.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(seen, listed);
}

/// The modules that a file names, outside its comments and its tests.
fn uses(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>())
        .filter(|name| !name.is_empty())
        .collect()
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
