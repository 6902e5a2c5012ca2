//! KVM's own statistics of a machine and of its vCPUs (KVM_GET_STATS_FD, Linux 5.14; those of page
//! faults are of 5.19).
//!
//! `vmm::stuck` and `vmm::stats` read them while the guest runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use crate::counter::Counts;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// The bytes of a struct kvm_stats_desc before its name: flags, exponent and size, offset, bucket_size.
const ENTRY_LEN: u64 = 16;

/// The faults that a vCPU took.
const TAKEN: &str = "pf_taken";
/// The faults that were resolved: a page was mapped, the access was emulated, or another vCPU had
/// resolved it. `pf_guest`, the faults that KVM passed on to the guest, is not among them: it also counts
/// each time that KVM tells Linux to run something else until a page is there (KVM_FEATURE_ASYNC_PF), which
/// may be never. Without nested page tables the guest's own faults therefore look unresolved, which only
/// causes needless searches for missing pages.
const RESOLVED: [&str; 4] = ["pf_fixed", "pf_emulate", "pf_spurious", "pf_fast"];

/// Those of a vCPU that are read here.
pub(super) const OF_VCPU: [&str; 12] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "signal_exits",
    "irq_exits",
    "halt_exits",
    "irq_injections",
    TAKEN,
    RESOLVED[0],
    RESOLVED[1],
    RESOLVED[2],
    RESOLVED[3],
];
/// Those of a machine.
pub(super) const OF_VM: [&str; 5] =
    ["mmu_shadow_zapped", "remote_tlb_flush", "pages_4k", "pages_2m", "pages_1g"];

/// `N` numbers of 32 bits, at this offset in the file.
fn numbers<const N: usize>(file: &File, offset: u64) -> io::Result<[u32; N]> {
    let mut bytes = [[0; 4]; N];
    file.read_exact_at(bytes.as_flattened_mut(), offset)?;
    Ok(bytes.map(u32::from_ne_bytes))
}

/// The statistics of a machine or of a vCPU.
pub struct KvmStatistics {
    file: File,
    /// The names that KVM has, and where the numbers are.
    places: Vec<(&'static str, u64)>,
}

impl KvmStatistics {
    /// Finds some by their names. KVM may lack them.
    pub(super) fn of(of: &impl AsRawFd, names: &[&'static str]) -> io::Result<KvmStatistics> {
        // SAFETY: the call takes no argument, and touches no memory of this process.
        let fd = unsafe { libc::ioctl(of.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has made the file descriptor, which has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        KvmStatistics::in_file(file, names)
    }

    fn in_file(file: File, names: &[&'static str]) -> io::Result<KvmStatistics> {
        let [_flags, name_len, count, _id, entries, data] = numbers(&file, 0)?;
        let mut bytes = vec![0; name_len as usize];
        let mut places = Vec::new();
        for index in 0..u64::from(count) {
            let entry = u64::from(entries) + index * (ENTRY_LEN + u64::from(name_len));
            let [_flags, _exponent_and_size, offset, _bucket_size] = numbers(&file, entry)?;
            file.read_exact_at(&mut bytes, entry + ENTRY_LEN)?;
            let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            if let Some(known) = names.iter().find(|known| known.as_bytes() == name) {
                places.push((*known, u64::from(data) + u64::from(offset)));
            }
        }
        Ok(KvmStatistics { file, places })
    }

    /// Their values now; empty if they cannot be read.
    pub fn counts(&self) -> Counts {
        let values = self.places.iter().map(|(name, place)| Some(((*name).to_owned(), self.read(*place)?)));
        values.collect::<Option<_>>().unwrap_or_default()
    }

    /// The faults so far that KVM could not resolve: it lets the vCPU wait and retry. `None` where KVM
    /// does not tell.
    pub fn unresolved_faults(&self) -> Option<u64> {
        let value = |name: &str| self.read(self.places.iter().find(|(known, _)| *known == name)?.1);
        // The resolved ones first: a fault between the reads may count as unresolved, but never hides one.
        let resolved = RESOLVED.into_iter().map(value).sum::<Option<u64>>()?;
        Some(value(TAKEN)?.saturating_sub(resolved))
    }

    fn read(&self, place: u64) -> Option<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, place).ok()?;
        Some(u64::from_ne_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The statistics that Documentation/virt/kvm/api.rst describes, with names of 16 bytes.
    fn statistics(values: &[(&str, u64)]) -> File {
        let (entries, count) = (24, values.len() as u32);
        let data = entries + count * 32;
        let mut bytes: Vec<u8> =
            [0, 16, count, 0, entries, data].iter().flat_map(|number| number.to_ne_bytes()).collect();
        for (offset, (name, _)) in (0..).step_by(8).zip(values) {
            bytes.extend([0, 0, offset, 0_u32].iter().flat_map(|number| number.to_ne_bytes()));
            bytes.extend(name.bytes().chain([0; 16]).take(16));
        }
        bytes.extend(values.iter().flat_map(|(_, value)| value.to_ne_bytes()));
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        file
    }

    #[test]
    fn unresolved_faults_are_those_taken_less_those_resolved() {
        let values = [
            ("exits", 7),
            ("pf_fast", 1),
            ("pf_taken", 100),
            ("pf_fixed", 20),
            ("pf_emulate", 3),
            ("pf_guest", 50),
        ];
        let all = [&values[..], &[("pf_spurious", 6)]].concat();
        let unresolved =
            |values| KvmStatistics::in_file(statistics(values), &OF_VCPU).unwrap().unresolved_faults();
        assert_eq!(unresolved(&all), Some(70));
        // A kernel before 5.19 lacks some.
        assert_eq!(unresolved(&values), None);
    }

    #[test]
    fn of_all_that_kvm_has_those_are_read_that_were_asked_for() {
        let file = statistics(&[("pf_guest", 1), ("exits", 2), ("exits_of_others", 3), ("halt_exits", 4)]);
        let read = KvmStatistics::in_file(file, &OF_VCPU).unwrap();
        assert_eq!(read.counts(), [("exits".to_owned(), 2), ("halt_exits".to_owned(), 4)]);
    }
}
