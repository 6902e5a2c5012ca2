//! The guest's CPUID: what KVM supports, with each processor's identity and the machine's topology filled in.
//!
//! The topology is one package of N cores with one thread each, which share the last-level cache only. Intel
//! SDM, volume 2, CPUID; AMD APM, volume 3, appendix E.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// "KVMKVMKVM\0\0\0" as EBX, ECX, EDX of the first hypervisor leaf.
const KVM_SIGNATURE: [u32; 3] =
    [u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), u32::from_le_bytes(*b"M\0\0\0")];

/// Leaf 1, ECX: local timers can run by the time stamp counter.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: this is a guest.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: the logical processors of a package are cores, not threads.
const CMP_LEGACY: u32 = 1 << 1;
/// The hypervisor leaf with KVM's features, EAX: the paravirtual clock, by its newer registers.
pub const KVM_FEATURE_CLOCKSOURCE2: u32 = 1 << 3;
/// Also in that EAX: while the host fetches a page, the guest runs something else (KVM_FEATURE_ASYNC_PF,
/// _VMEXIT, _INT). The guest does not get these: the instruction at which a vCPU waits must tell which page
/// it needs (SHM-87).
const KVM_FEATURES_ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;

/// The level types of leaves 0xb and 0x1f.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The processors of the machine.
#[derive(Clone, Copy, Debug)]
pub struct Topology {
    /// How many there are, at least 1. Their APIC ids are 0 to `vcpus` - 1.
    pub vcpus: u32,
    /// Whether KVM's local timers can run by the time stamp counter.
    pub tsc_deadline: bool,
}

impl Topology {
    /// The bits of an APIC id that tell the package's processors apart.
    fn id_bits(&self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

/// CPUID of the processor with APIC id `id`, out of what KVM `supported`.
pub fn of_vcpu(supported: &CpuId, topology: Topology, id: u32) -> CpuId {
    let mut entries = supported.as_slice().to_vec();
    // These leaves are lists of levels; where KVM has them, they are replaced as a whole.
    for leaf in [0xb, 0x1f] {
        if let Some(at) = entries.iter().position(|entry| entry.function == leaf) {
            entries.retain(|entry| entry.function != leaf);
            for (number, level) in levels(leaf, topology, id).into_iter().enumerate() {
                entries.insert(at + number, level);
            }
        }
    }
    for entry in &mut entries {
        patch(entry, topology, id);
    }
    if !entries.iter().any(|entry| entry.function == 0x4000_0000) {
        let features = (0x4000_0001, KVM_FEATURE_CLOCKSOURCE2, [0; 3]);
        for (function, eax, [ebx, ecx, edx]) in [(0x4000_0000, 0x4000_0001, KVM_SIGNATURE), features] {
            entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() });
        }
    }
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

/// The number of bits of a guest physical address. Without leaf 0x80000008: 36, the least of any 64-bit
/// processor.
pub fn physical_address_bits(supported: &CpuId) -> u32 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == 0x8000_0008);
    // Bits 23:16 are the guest's, where they are fewer than the host's (a nested machine).
    sizes.map_or(36, |entry| match entry.eax >> 16 & 0xff {
        0 => entry.eax & 0xff,
        guest => guest,
    })
}

fn patch(entry: &mut kvm_cpuid_entry2, topology: Topology, id: u32) {
    let Topology { vcpus, tsc_deadline } = topology;
    let many = vcpus > 1;
    match entry.function {
        // Feature information. EBX: APIC id 31:24, number of addressable ids 23:16.
        0x1 => {
            entry.ebx = entry.ebx & 0xffff | (1 << topology.id_bits()).min(255) << 16 | id << 24;
            entry.ecx |= HYPERVISOR;
            set(&mut entry.ecx, TSC_DEADLINE, tsc_deadline);
            set(&mut entry.edx, HTT, many);
        }
        // Caches, Intel's and AMD's. EAX: level 7:5, processors that share it - 1 in 25:14, and with Intel
        // cores in the package - 1 in 31:26. The first two levels are a core's own.
        0x4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let shared_by = if entry.eax >> 5 & 0x7 >= 3 { 1 << topology.id_bits() } else { 1 };
            entry.eax = entry.eax & 0x3fff | (shared_by - 1) << 14;
            if entry.function == 0x4 {
                entry.eax |= ((1 << topology.id_bits()) - 1_u32).min(63) << 26;
            }
        }
        0x4000_0001 => entry.eax &= !KVM_FEATURES_ASYNC_PF,
        0x8000_0001 => set(&mut entry.ecx, CMP_LEGACY, many),
        // Sizes. ECX: number of threads - 1 in 7:0, bits of the APIC id 15:12.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (vcpus - 1).min(255) | topology.id_bits() << 12,
        // AMD's topology. EAX: APIC id. EBX: core id 7:0, threads per core - 1 in 15:8. ECX: node id and
        // nodes - 1.
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
        _ => {}
    }
}

/// The levels of leaf 0xb or 0x1f for the processor with APIC id `id`. EAX: bits of the id below the next
/// level. EBX: processors at this level. ECX: this level's number 7:0 and type 15:8. EDX: the id.
fn levels(leaf: u32, topology: Topology, id: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, eax, ebx, type_: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: index | type_ << 8,
        edx: id,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, topology.id_bits(), topology.vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

fn set(register: &mut u32, bit: u32, on: bool) {
    if on {
        *register |= bit;
    } else {
        *register &= !bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, eax: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn supported() -> CpuId {
        CpuId::from_entries(&[
            entry(0x1, 0, 0),
            entry(0x4, 0, 0xfc00_0000 | 1 << 5 | 1),
            entry(0x4, 3, 3 << 5 | 3),
            entry(0xb, 0, 9),
            entry(0x8000_0001, 0, 0),
            entry(0x8000_0008, 0, 0x3028),
            entry(0x8000_001d, 3, 3 << 5 | 3),
            entry(0x8000_001e, 0, 7),
        ])
        .unwrap()
    }

    fn of(vcpus: u32, id: u32) -> Vec<kvm_cpuid_entry2> {
        let topology = Topology { vcpus, tsc_deadline: true };
        of_vcpu(&supported(), topology, id).as_slice().to_vec()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn every_leaf_with_an_apic_id_names_the_same() {
        for id in 0..6 {
            let entries = of(6, id);
            assert_eq!(leaf(&entries, 0x1, 0).ebx >> 24, id);
            assert_eq!(leaf(&entries, 0xb, 0).edx, id);
            assert_eq!(leaf(&entries, 0xb, 1).edx, id);
            assert_eq!(leaf(&entries, 0x8000_001e, 0).eax, id);
        }
    }

    #[test]
    fn six_cores_in_one_package() {
        let entries = of(6, 5);
        let features = leaf(&entries, 0x1, 0);
        assert_eq!(features.ebx >> 16 & 0xff, 8);
        assert_ne!(features.edx & HTT, 0);
        assert_ne!(features.ecx & HYPERVISOR, 0);
        // L1: one processor; L3: all of them.
        assert_eq!(leaf(&entries, 0x4, 0).eax, 7 << 26 | 1 << 5 | 1);
        assert_eq!(leaf(&entries, 0x4, 3).eax, 7 << 26 | 7 << 14 | 3 << 5 | 3);
        assert_eq!(leaf(&entries, 0x8000_001d, 3).eax, 7 << 14 | 3 << 5 | 3);
        let levels: Vec<_> = (0..3)
            .map(|index| leaf(&entries, 0xb, index))
            .map(|level| (level.eax, level.ebx, level.ecx))
            .collect();
        assert_eq!(levels, [(0, 1, 0x100), (3, 6, 0x201), (0, 0, 2)]);
        assert_eq!(leaf(&entries, 0x8000_0008, 0).ecx & 0xf0ff, 0x3005);
        assert_eq!(entries.iter().filter(|entry| entry.function == 0x1f).count(), 0);
    }

    #[test]
    fn a_single_processor_is_alone() {
        let entries = of(1, 0);
        let features = leaf(&entries, 0x1, 0);
        assert_eq!((features.ebx >> 16 & 0xff, features.edx & HTT), (1, 0));
        assert_eq!(leaf(&entries, 0x4, 3).eax, 3 << 5 | 3);
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & CMP_LEGACY, 0);
        assert_eq!(leaf(&entries, 0xb, 1).eax, 0);
    }

    #[test]
    fn the_timer_and_the_clock_are_there_as_kvm_has_them() {
        assert_ne!(leaf(&of(1, 0), 0x1, 0).ecx & TSC_DEADLINE, 0);
        let without = Topology { vcpus: 1, tsc_deadline: false };
        let entries = of_vcpu(&supported(), without, 0);
        assert_eq!(leaf(entries.as_slice(), 0x1, 0).ecx & TSC_DEADLINE, 0);
        assert_eq!(leaf(entries.as_slice(), 0x4000_0000, 0).ebx.to_le_bytes(), *b"KVMK");
        assert_ne!(leaf(entries.as_slice(), 0x4000_0001, 0).eax & KVM_FEATURE_CLOCKSOURCE2, 0);
    }

    #[test]
    fn address_bits() {
        assert_eq!(physical_address_bits(&supported()), 40);
        let guest = CpuId::from_entries(&[entry(0x8000_0008, 0, 0x27_3030)]).unwrap();
        assert_eq!(physical_address_bits(&guest), 39);
        assert_eq!(physical_address_bits(&CpuId::from_entries(&[]).unwrap()), 36);
    }
}
