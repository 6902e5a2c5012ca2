//! Guest linear addresses to guest physical ones, by the guest's page tables. Intel SDM, volume 3, chapter 4.
//!
//! Not by KVM_TRANSLATE: it acts as the guest's kernel would, which may not read a program's pages while SMAP
//! is on. Rights are not looked at: the processor has done so. Called by [`super::vcpu`], and by what shows a
//! user the guest's memory: `vmm::gdb`, `vmm::dump`.

use kvm_bindings::kvm_sregs;

const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
/// EFER: the processor runs in long mode.
pub const EFER_LMA: u64 = 1 << 10;

/// Bits of an entry: it is in use; it is a large page, not a table.
const PRESENT: u64 = 1 << 0;
const LARGE: u64 = 1 << 7;
/// The bits of an entry, and of CR3, that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What a level of the tables takes from the linear address: the lowest bit, and how many.
type Level = (u32, u32);

const LONG: [Level; 5] = [(48, 9), (39, 9), (30, 9), (21, 9), (12, 9)];
const PAE: [Level; 3] = [(30, 2), (21, 9), (12, 9)];
const LEGACY: [Level; 2] = [(22, 10), (12, 10)];

/// Whether the processor translates linear addresses.
pub fn is_on(sregs: &kvm_sregs) -> bool {
    sregs.cr0 & CR0_PG != 0
}

/// A processor's tables.
struct Tables {
    levels: &'static [Level],
    /// Bytes.
    entry_len: usize,
    has_large_pages: bool,
    /// Where the first one is.
    root: u64,
}

/// What an entry of a table leads to.
enum Entry {
    Nothing,
    /// The page at this address.
    Page(u64),
    /// The table at this address.
    Table(u64),
}

impl Tables {
    fn of(sregs: &kvm_sregs) -> Tables {
        let has = |bit| sregs.cr4 & bit != 0;
        let (levels, entry_len) = match (sregs.efer & EFER_LMA != 0, has(CR4_PAE)) {
            (true, _) if has(CR4_LA57) => (&LONG[..], 8),
            (true, _) => (&LONG[1..], 8),
            (false, true) => (&PAE[..], 8),
            (false, false) => (&LEGACY[..], 4),
        };
        // The first table of PAE has 32 bytes, and need not be at a page.
        let root = if levels.len() == PAE.len() { sregs.cr3 & 0xffff_ffe0 } else { sregs.cr3 & ADDRESS };
        Tables { levels, entry_len, has_large_pages: entry_len == 8 || has(CR4_PSE), root }
    }

    /// What an entry means, in a table of the level with this lowest bit.
    fn entry(&self, shift: u32, bytes: &[u8]) -> Entry {
        let mut entry = [0; 8];
        entry[..bytes.len()].copy_from_slice(bytes);
        match u64::from_le_bytes(entry) {
            entry if entry & PRESENT == 0 => Entry::Nothing,
            entry if shift == 12 || entry & LARGE != 0 && self.has_large_pages => {
                Entry::Page(entry & ADDRESS & !((1 << shift) - 1))
            }
            entry => Entry::Table(entry & ADDRESS),
        }
    }
}

/// The guest physical address; `None` where nothing is mapped, or a table is not in memory. `read` reads
/// guest physical memory: whether it could.
pub fn physical(sregs: &kvm_sregs, linear: u64, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
    if !is_on(sregs) {
        return Some(linear);
    }
    let tables = Tables::of(sregs);
    let mut table = tables.root;
    for &(shift, bits) in tables.levels {
        let index = linear >> shift & ((1 << bits) - 1);
        let entry = &mut [0; 8][..tables.entry_len];
        if !read(table + index * tables.entry_len as u64, entry) {
            return None;
        }
        match tables.entry(shift, entry) {
            Entry::Nothing => return None,
            Entry::Page(page) => return Some(page | linear & ((1 << shift) - 1)),
            Entry::Table(next) => table = next,
        }
    }
    None
}

/// Linear addresses, and the physical ones behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Mapped {
    pub linear: u64,
    pub physical: u64,
    pub len: u64,
}

impl Mapped {
    /// Whether `next` begins where this ends, in both kinds of addresses.
    pub fn is_right_before(&self, next: &Mapped) -> bool {
        let end = |start: u64| start.wrapping_add(self.len);
        end(self.linear) == next.linear && end(self.physical) == next.physical
    }
}

/// Calls `each` with each page that is mapped, from the highest address down, until that returns false; then
/// the result is false. Of neighbours in a table that are the same only the last counts: KASAN's shadow is
/// one page, and one table, many millions of times.
pub fn each_page(
    sregs: &kvm_sregs,
    read: &impl Fn(u64, &mut [u8]) -> bool,
    each: &mut impl FnMut(Mapped) -> bool,
) -> bool {
    let tables = Tables::of(sregs);
    !is_on(sregs) || tables.walk(tables.levels, tables.root, 0, read, each)
}

impl Tables {
    /// The table at `table`, of the first of these levels, is for the addresses from `base` on.
    fn walk(
        &self,
        levels: &[Level],
        table: u64,
        base: u64,
        read: &impl Fn(u64, &mut [u8]) -> bool,
        each: &mut impl FnMut(Mapped) -> bool,
    ) -> bool {
        let Some((&(shift, bits), rest)) = levels.split_first() else { return true };
        let mut entries = vec![0; self.entry_len << bits];
        if !read(table, &mut entries) {
            return true;
        }
        let mut above: &[u8] = &[];
        for (index, bytes) in entries.chunks_exact(self.entry_len).enumerate().rev() {
            if std::mem::replace(&mut above, bytes) == bytes {
                continue;
            }
            let linear = self.canonical(base | (index as u64) << shift);
            let goes_on = match self.entry(shift, bytes) {
                Entry::Nothing => true,
                Entry::Page(physical) => each(Mapped { linear, physical, len: 1 << shift }),
                Entry::Table(next) => self.walk(rest, next, linear, read, each),
            };
            if !goes_on {
                return false;
            }
        }
        true
    }

    /// In long mode the highest bit that a table takes stands for those above it, too.
    fn canonical(&self, linear: u64) -> u64 {
        let (shift, bits) = self.levels[0];
        let unused = 64 - (shift + bits);
        if unused > 16 { linear } else { ((linear << unused) as i64 >> unused) as u64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory of 64 KiB with these entries.
    fn memory(entries: &[(u64, &[u8])]) -> impl Fn(u64, &mut [u8]) -> bool + use<> {
        let mut bytes = vec![0; 0x1_0000];
        for (at, entry) in entries {
            bytes[*at as usize..][..entry.len()].copy_from_slice(entry);
        }
        move |at, data| {
            let part = bytes.get(at as usize..).and_then(|rest| rest.get(..data.len()));
            part.is_some_and(|part| {
                data.copy_from_slice(part);
                true
            })
        }
    }

    #[test]
    fn four_levels_small_and_large_pages() {
        let sregs =
            kvm_sregs { cr0: CR0_PG, cr3: 0x1018, cr4: CR4_PAE, efer: EFER_LMA, ..Default::default() };
        // The top bit is "no execute", bit 2 "user".
        let entry = |address: u64, flags: u64| (address | flags | 1 << 63 | 1 << 2).to_le_bytes();
        let entries = [
            (0x1000 + 8 * 0xff, entry(0x2000, PRESENT)),
            (0x2000, entry(0x3000, PRESENT)),
            (0x2000 + 8, entry(0x4000_0000, PRESENT | LARGE)),
            (0x3000 + 8, entry(0x4000, PRESENT)),
            (0x3000 + 16, entry(0x60_0000, PRESENT | LARGE)),
            (0x4000 + 8 * 3, entry(0x1_2345_6000, PRESENT)),
            (0x3000 + 24, entry(0xff_0000, PRESENT)),
        ];
        let entries: Vec<(u64, &[u8])> = entries.iter().map(|(at, entry)| (*at, &entry[..])).collect();
        let memory = memory(&entries);
        let base = 0xff << 39;
        let physical = |linear| physical(&sregs, linear, &memory);
        assert_eq!(physical(base + 0x20_3abc), Some(0x1_2345_6abc));
        assert_eq!(physical(base + 0x41_2345), Some(0x61_2345));
        assert_eq!(physical(base + 0x4000_0000 + 0x123_4567), Some(0x4123_4567));
        assert_eq!([base, base + 0x20_4000, 0].map(physical), [None; 3], "nothing there");
        assert_eq!(physical(base + 0x60_0000), None, "a table that is not in memory");
    }

    #[test]
    fn all_pages_from_the_highest_down() {
        let sregs =
            kvm_sregs { cr0: CR0_PG, cr3: 0x1000, cr4: CR4_PAE, efer: EFER_LMA, ..Default::default() };
        let entry = |address: u64, flags: u64| (address | flags | PRESENT).to_le_bytes();
        let entries = [
            // The same table for two neighbours, and for one in the lower half.
            (0x1000, entry(0x2000, 0)),
            (0x1000 + 8 * 510, entry(0x2000, 0)),
            (0x1000 + 8 * 511, entry(0x2000, 0)),
            (0x2000, entry(0x3000, 0)),
            (0x3000, entry(0x20_0000, LARGE)),
            (0x3000 + 8, entry(0x4000, 0)),
            (0x4000, entry(0x40_0000, 0)),
            (0x4000 + 8, entry(0x40_1000, 0)),
            (0x3000 + 16, entry(0xff_0000, 0)),
        ];
        let entries: Vec<(u64, &[u8])> = entries.iter().map(|(at, entry)| (*at, &entry[..])).collect();
        let memory = memory(&entries);
        let mut pages = Vec::new();
        assert!(each_page(&sregs, &memory, &mut |page| {
            pages.push((page.linear, page.physical, page.len));
            true
        }));
        let high = 0xffff_ff80_0000_0000;
        let of = |base| {
            [
                (base + 0x20_1000, 0x40_1000, 0x1000),
                (base + 0x20_0000, 0x40_0000, 0x1000),
                (base, 0x20_0000, 0x20_0000),
            ]
        };
        assert_eq!(pages, [of(high), of(0)].concat());
        let mut seen = 0;
        let is_all = each_page(&sregs, &memory, &mut |_| {
            seen += 1;
            seen < 2
        });
        assert!(!is_all && seen == 2);
        let page = |linear, physical, len| Mapped { linear, physical, len };
        assert!(page(0x1000, 0x5000, 0x2000).is_right_before(&page(0x3000, 0x7000, 1)));
        assert!(!page(0x1000, 0x5000, 0x2000).is_right_before(&page(0x3000, 0x8000, 1)));
    }

    #[test]
    fn older_kinds_of_tables() {
        let off = kvm_sregs { cr3: 0x1000, ..Default::default() };
        assert_eq!(physical(&off, 0xf_1234, memory(&[])), Some(0xf_1234));
        let legacy = kvm_sregs { cr0: CR0_PG, cr3: 0x1000, cr4: CR4_PSE, ..Default::default() };
        let tables = memory(&[
            (0x1000, &0x2001_u32.to_le_bytes()),
            (0x1004, &0x0080_0081_u32.to_le_bytes()),
            (0x2004, &0x7001_u32.to_le_bytes()),
        ]);
        assert_eq!(physical(&legacy, 0x1234, &tables), Some(0x7234));
        assert_eq!(physical(&legacy, 0x40_1234, &tables), Some(0x80_1234));
        let pae = kvm_sregs { cr0: CR0_PG, cr3: 0x1020, cr4: CR4_PAE, ..Default::default() };
        let tables = memory(&[
            (0x1038, &0x2001_u64.to_le_bytes()),
            (0x2000, &0x3001_u64.to_le_bytes()),
            (0x3008, &0x7001_u64.to_le_bytes()),
        ]);
        assert_eq!(physical(&pae, 0xc000_1234, &tables), Some(0x7234));
    }
}
