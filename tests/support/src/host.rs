//! What is in use of the whole host: to see whether machines that have ended leave something in the kernel.
//! Other programs of the host change these figures, too.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

/// Lines of `/proc/meminfo`, in KiB.
const MEMORY: [&str; 7] =
    ["MemAvailable", "Slab", "SUnreclaim", "KernelStack", "PageTables", "Percpu", "Shmem"];

/// Figures by their names.
pub struct Host(BTreeMap<String, i64>);

impl Host {
    pub fn now() -> Host {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let number = |word: Option<&str>| word.and_then(|word| word.parse::<i64>().ok());
        let mut figures = BTreeMap::new();
        for line in read("/proc/meminfo").lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            if MEMORY.contains(&name) {
                let kib = number(value.split_whitespace().next());
                kib.map(|kib| figures.insert(format!("{name}, KiB"), kib));
            }
        }
        // Only root may read it. A line: name, objects in use, and more.
        for line in read("/proc/slabinfo").lines().filter(|line| line.starts_with("kvm")) {
            let mut words = line.split_whitespace();
            let name = format!("slab {}", words.next().unwrap());
            number(words.next()).map(|objects| figures.insert(name, objects));
        }
        let files = read("/proc/sys/fs/file-nr");
        number(files.split_whitespace().next()).map(|files| figures.insert("open files".into(), files));
        figures.insert("Unix sockets".into(), read("/proc/net/unix").lines().count() as i64);
        // "0.00 0.01 0.05 2/345 6789": threads that could run, and all.
        let load = read("/proc/loadavg");
        let threads = load.split_whitespace().nth(3).and_then(|word| word.split('/').nth(1));
        number(threads).map(|threads| figures.insert("threads".into(), threads));
        Host(figures)
    }

    /// Both, a line for each figure.
    pub fn compare(&self, after: &Host) -> String {
        let mut table = String::new();
        for (name, after) in &after.0 {
            let before = self.0.get(name).copied().unwrap_or_default();
            writeln!(table, "{name:28}{before:12}{after:12}{:+12}", after - before).unwrap();
        }
        table
    }
}

/// The processes whose environment has this variable with this value; those of the same user, or all for
/// root.
pub fn processes_with(variable: &str, value: &str) -> Vec<i32> {
    let entry = format!("{variable}={value}");
    let of_process = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&byte| byte == 0).any(|variable| variable == entry.as_bytes())
    };
    let names = fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).filter(of_process).collect()
}
