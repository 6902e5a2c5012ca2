//! A processor's page fault statistics (KVM_GET_STATS_FD, Linux 5.14; those used here are of 5.19).
//!
//! `vmm::stuck` looks at them while the guest runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER_LEN: usize = 24;
/// struct kvm_stats_desc without the name: flags, exponent and size, offset, bucket_size.
const DESCRIPTOR_LEN: usize = 16;

/// The faults that the processor took.
const TAKEN: &str = "pf_taken";
/// What became of them: a page was mapped, the access was emulated, or it had been resolved meanwhile. None
/// of it counts the faults that are to be tried again. Nor is `pf_guest` among them, the faults that KVM
/// passed on to the guest: it also counts each time that KVM tells Linux to run something else until a page
/// is there (KVM_FEATURE_ASYNC_PF), which may be never. (Without nested page tables the guest's own faults
/// look unresolved then. It costs looks for missing pages, and nothing else.)
const RESOLVED: [&str; 4] = ["pf_fixed", "pf_emulate", "pf_spurious", "pf_fast"];

/// Counts the faults that KVM could not resolve: it lets the processor wait and try again.
pub struct FaultCount {
    file: File,
    taken: u64,
    resolved: Vec<u64>,
}

impl FaultCount {
    /// Finds out where the statistics are.
    pub fn of(vcpu: &VcpuFd) -> io::Result<FaultCount> {
        // SAFETY: the call takes no argument, and touches no memory of ours.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and has no other owner.
        let file = unsafe { File::from_raw_fd(fd) };
        let mut header = [0; HEADER_LEN];
        file.read_exact_at(&mut header, 0)?;
        let field = |bytes: &[u8], index: usize| {
            let bytes = bytes.get(4 * index..4 * index + 4)?;
            Some(u64::from(u32::from_ne_bytes(bytes.try_into().ok()?)))
        };
        let header = |index| field(&header, index).unwrap_or_default();
        let (name_len, count, descriptors, data) = (header(1), header(2), header(4), header(5));

        let mut descriptor = vec![0; DESCRIPTOR_LEN + name_len as usize];
        let mut places = Vec::new();
        for index in 0..count {
            let place = descriptors + index * descriptor.len() as u64;
            file.read_exact_at(&mut descriptor, place)?;
            let name = descriptor[DESCRIPTOR_LEN..].split(|byte| *byte == 0).next();
            let offset = field(&descriptor, 2).unwrap_or_default();
            places.push((name.unwrap_or_default().to_vec(), data + offset));
        }
        let place = |name: &str| {
            let found = places.iter().find(|(other, _)| other == name.as_bytes());
            found.map(|(_, place)| *place).ok_or(io::ErrorKind::NotFound)
        };
        Ok(FaultCount {
            taken: place(TAKEN)?,
            resolved: RESOLVED.into_iter().map(place).collect::<Result<_, _>>()?,
            file,
        })
    }

    /// How many there were so far.
    pub fn unresolved(&self) -> Option<u64> {
        let read = |place| {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, place).ok()?;
            Some(u64::from_ne_bytes(value))
        };
        // First those that are taken away, so that the difference is not too large by a fault in between.
        let resolved = self.resolved.iter().map(|place| read(*place)).sum::<Option<u64>>()?;
        Some(read(self.taken)?.saturating_sub(resolved))
    }
}
