//! Loads the kernel modules that the image brings.
//!
//! `scripts/image.sh` wrote down which, and in which order: one line per named module, the name first, then
//! the files to load for it, dependencies first. There is no `modprobe` here, and no `modules.dep`.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::outcome::{Outcome, failed};
use crate::sys;

/// Where the image lists its modules.
pub const LIST: &str = "/etc/hotslot/modules";

/// Loads the image's modules, or only those named in `wanted`. Returns one sentence for each that failed.
pub fn load(wanted: Option<&[String]>) -> Vec<String> {
    let list = match fs::read_to_string(LIST) {
        Ok(list) => list,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return vec![format!("cannot read {LIST}: {error}")],
    };
    let (files, mut complaints) = choose(&list, wanted);
    complaints.extend(files.into_iter().filter_map(|file| load_file(file).err()));
    complaints
}

/// The files to load, each once and in order, and a sentence for each wanted module that the image lacks.
fn choose<'a>(list: &'a str, wanted: Option<&[String]>) -> (Vec<&'a str>, Vec<String>) {
    let mut files: Vec<&str> = Vec::new();
    let mut present: Vec<&str> = Vec::new();
    for line in list.lines() {
        let mut words = line.split_whitespace();
        let Some(name) = words.next() else { continue };
        present.push(name);
        if wanted.is_none_or(|wanted| wanted.iter().any(|one| same_module(one, name))) {
            for file in words {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
    }
    let missing =
        wanted.unwrap_or_default().iter().filter(|one| !present.iter().any(|name| same_module(one, name)));
    let complaints = missing
        .map(|name| {
            format!("the module {name} is not in this image (scripts/image.sh --module {name} puts it there)")
        })
        .collect();
    (files, complaints)
}

/// Linux takes `-` and `_` in a module's name for the same.
fn same_module(one: &str, other: &str) -> bool {
    one.replace('-', "_") == other.replace('-', "_")
}

fn load_file(path: &str) -> Outcome<()> {
    let file = File::open(path).map_err(failed("open the module", Path::new(path)))?;
    match sys::load_module(&file, !path.ends_with(".ko")) {
        // Built in, or loaded already.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(failed("load the module", Path::new(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "kvm-amd /m/kvm.ko /m/ccp.ko /m/kvm-amd.ko\nnd_pmem /m/libnvdimm.ko /m/nd_pmem.ko\nvirtio_pmem /m/libnvdimm.ko /m/virtio_pmem.ko\n";

    #[test]
    fn everything_is_loaded_unless_told_otherwise_and_nothing_twice() {
        let (files, complaints) = choose(LIST, None);
        assert_eq!(
            files,
            [
                "/m/kvm.ko",
                "/m/ccp.ko",
                "/m/kvm-amd.ko",
                "/m/libnvdimm.ko",
                "/m/nd_pmem.ko",
                "/m/virtio_pmem.ko"
            ]
        );
        assert!(complaints.is_empty());
    }

    #[test]
    fn the_named_ones_come_with_what_they_need() {
        let (files, complaints) = choose(LIST, Some(&["kvm_amd".to_owned()]));
        assert_eq!(files, ["/m/kvm.ko", "/m/ccp.ko", "/m/kvm-amd.ko"]);
        assert!(complaints.is_empty());
    }

    #[test]
    fn a_module_that_is_not_there_is_named() {
        let (files, complaints) = choose(LIST, Some(&["e1000".to_owned()]));
        assert!(files.is_empty());
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].contains("e1000"));
    }
}
