//! Random requests against the plainest model of the contract.

use std::collections::BTreeSet;

use super::*;

/// xorshift64*: enough to be different each step, and the same each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % limit
    }
}

/// What the contract says of one region, page by page: which request's mapping is there, if any.
#[derive(Default)]
struct Model {
    pages: [Option<usize>; 16],
    /// Offset, length, page of the file, access.
    requests: Vec<(u64, u64, u64, Access)>,
}

impl Model {
    fn map(&mut self, request: (u64, u64, u64, Access), allowed: bool) -> bool {
        let (offset, len, ..) = request;
        let last = offset.saturating_add(len);
        let fits = allowed && len > 0 && offset % PAGE == 0 && last <= 16 * PAGE;
        let range = (offset / PAGE) as usize..last.div_ceil(PAGE) as usize;
        if !fits || self.pages[range.clone()].iter().any(Option::is_some) {
            return false;
        }
        self.pages[range].fill(Some(self.requests.len()));
        self.requests.push(request);
        true
    }

    fn unmap(&mut self, offset: u64, len: u64) -> bool {
        let found = self.pages.iter().flatten().copied().find(|&index| {
            let (its_offset, its_len, ..) = self.requests[index];
            (its_offset, its_len) == (offset, len)
        });
        let Some(found) = found else { return false };
        for page in self.pages.iter_mut().filter(|page| **page == Some(found)) {
            *page = None;
        }
        true
    }

    fn mappings(&self) -> Vec<(u64, u64, Access)> {
        let live: BTreeSet<usize> = self.pages.iter().flatten().copied().collect();
        let mut list: Vec<_> = live
            .into_iter()
            .map(|index| {
                let (offset, len, _, access) = self.requests[index];
                (offset, len.next_multiple_of(PAGE), access)
            })
            .collect();
        list.sort_by_key(|&(offset, ..)| offset);
        list
    }
}

#[test]
fn thousands_of_random_requests_do_what_an_array_of_pages_says() {
    // SHM-29 to SHM-37, SHM-43, SHM-48 to SHM-52, SHM-55
    for seed in 1..=4 {
        let bench = bench();
        let mut random = Random(seed);
        let mut models = [Model::default(), Model::default()];
        let (mut mapped, mut unmapped) = (0, 0);
        for step in 0..3000 {
            let which = random.below(2) as usize;
            let shmid = [0, 7][which];
            let model = &mut models[which];
            // Mostly small and aligned, so that much succeeds; sometimes odd, too far, or absurd.
            let offset = match random.below(20) {
                0 => random.below(20 * PAGE),
                1 => u64::MAX - random.below(2 * PAGE),
                _ => random.below(17) * PAGE,
            };
            let len = match random.below(20) {
                0 => u64::MAX - random.below(2 * PAGE),
                1..4 => random.below(4 * PAGE),
                _ => random.below(5) * PAGE,
            };
            let what =
                format!("seed {seed}, step {step}: region {shmid}, {len:#x} bytes from {offset:#x} on");
            match random.below(100) {
                0 => {
                    bench.shmem.unmap_all().unwrap();
                    for model in &mut models {
                        model.pages = Default::default();
                    }
                }
                1..55 => {
                    let slots = random.below(10) > 0;
                    bench.guest.no_slots.store(!slots, Ordering::Relaxed);
                    let file_page = random.below(16);
                    let access = [Access::ReadOnly, Access::ReadWrite][random.below(2) as usize];
                    let request = MapRequest {
                        access,
                        ..bench.request(shmid, offset, len, file_page * PAGE)
                    };
                    let done = bench.shmem.map(&request).is_ok();
                    assert_eq!(
                        done,
                        model.map((offset, len, file_page, access), slots),
                        "map, {what}"
                    );
                    mapped += usize::from(done);
                }
                _ => {
                    // Half of the time one that exists.
                    let live = bench.shmem.lock().regions[&shmid]
                        .mappings
                        .iter()
                        .nth(random.below(5) as usize)
                        .map(|(&offset, mapping)| (offset, mapping.len));
                    let (offset, len) = live.filter(|_| random.below(2) == 0).unwrap_or((offset, len));
                    let done = bench.shmem.unmap(shmid, offset, len).is_ok();
                    assert_eq!(done, model.unmap(offset, len), "unmap, {what}");
                    unmapped += usize::from(done);
                }
            }
            for (model, shmid) in models.iter().zip([0, 7]) {
                assert_eq!(bench.guest.sees(bench.region(shmid)), model.mappings(), "{what}");
                if step % 8 != 0 {
                    continue;
                }
                for (page, &holder) in (0u64..).zip(&model.pages) {
                    let expected = holder.map(|index| {
                        let (offset, _, file_page, _) = model.requests[index];
                        (file_page + page - offset / PAGE + 1) as u8
                    });
                    assert_eq!(bench.reads(shmid, page * PAGE), expected, "page {page}, {what}");
                }
            }
        }
        assert!(
            mapped > 300 && unmapped > 100,
            "{mapped} mapped, {unmapped} unmapped"
        );
    }
}
