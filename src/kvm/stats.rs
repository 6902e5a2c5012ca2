//! A processor's page fault statistics (KVM_GET_STATS_FD, Linux 5.14; those used here are of 5.19).
//!
//! `vmm::stuck` reads them while the guest runs.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// The bytes of a struct kvm_stats_desc before its name: flags, exponent and size, offset, bucket_size.
const ENTRY_LEN: u64 = 16;

/// The faults that the processor took.
const TAKEN: &str = "pf_taken";
/// The faults that were resolved: a page was mapped, the access was emulated, or another processor had
/// resolved it. `pf_guest`, the faults that KVM passed on to the guest, is not among them: it also counts
/// each time that KVM tells Linux to run something else until a page is there (KVM_FEATURE_ASYNC_PF), which
/// may be never. Without nested page tables the guest's own faults therefore look unresolved, which only
/// causes needless searches for missing pages.
const RESOLVED: [&str; 4] = ["pf_fixed", "pf_emulate", "pf_spurious", "pf_fast"];

/// `N` numbers of 32 bits, at this offset in the file.
fn numbers<const N: usize>(file: &File, offset: u64) -> io::Result<[u32; N]> {
    let mut bytes = [[0; 4]; N];
    file.read_exact_at(bytes.as_flattened_mut(), offset)?;
    Ok(bytes.map(u32::from_ne_bytes))
}

/// Counts the faults that KVM could not resolve: it lets the processor wait and retry.
pub struct FaultCount {
    file: File,
    taken: u64,
    resolved: Vec<u64>,
}

impl FaultCount {
    /// Finds the two kinds of faults among the processor's statistics.
    pub fn of(vcpu: &VcpuFd) -> io::Result<FaultCount> {
        // SAFETY: the call takes no argument, and touches no memory of this process.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has made the file descriptor, which has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        FaultCount::in_file(file)
    }

    fn in_file(file: File) -> io::Result<FaultCount> {
        let [_flags, name_len, count, _id, entries, data] = numbers(&file, 0)?;
        let mut name = vec![0; name_len as usize];
        let mut places = HashMap::new();
        for index in 0..u64::from(count) {
            let entry = u64::from(entries) + index * (ENTRY_LEN + u64::from(name_len));
            let [_flags, _exponent_and_size, offset, _bucket_size] = numbers(&file, entry)?;
            file.read_exact_at(&mut name, entry + ENTRY_LEN)?;
            let name: Vec<u8> = name.iter().copied().take_while(|byte| *byte != 0).collect();
            places.insert(name, u64::from(data) + u64::from(offset));
        }
        let place = |name: &str| places.get(name.as_bytes()).copied().ok_or(io::ErrorKind::NotFound);
        let resolved = RESOLVED.into_iter().map(place).collect::<Result<_, _>>()?;
        Ok(FaultCount { taken: place(TAKEN)?, resolved, file })
    }

    /// The number of them so far; `None` if the statistics cannot be read.
    pub fn unresolved(&self) -> Option<u64> {
        let read = |place| {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, place).ok()?;
            Some(u64::from_ne_bytes(value))
        };
        // The resolved ones first: a fault between the reads may count as unresolved, but never hides one.
        let resolved = self.resolved.iter().map(|place| read(*place)).sum::<Option<u64>>()?;
        Some(read(self.taken)?.saturating_sub(resolved))
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
        assert_eq!(FaultCount::in_file(statistics(&all)).unwrap().unresolved(), Some(70));
        // A kernel before 5.19 lacks some.
        assert!(FaultCount::in_file(statistics(&values)).is_err());
    }
}
