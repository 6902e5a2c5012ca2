//! Which mappings are shared, what each recipient was told, and what it is to be told next: data only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::super::wire::message::MemoryRegion;

#[derive(Default)]
pub(super) struct State {
    /// Mappings ever shared.
    made: u64,
    /// The mappings that are shared now, by guest address.
    pub(super) live: BTreeMap<u64, Shared>,
    pub(super) devices: Vec<Device>,
}

/// A mapping that others see.
#[derive(Clone)]
pub(super) struct Shared {
    /// Index of its owner in [`State::devices`].
    owner: usize,
    /// Of all mappings ever shared: no other has it.
    number: u64,
    pub(super) region: MemoryRegion,
    pub(super) file: Arc<OwnedFd>,
}

#[derive(Default)]
pub(super) struct Device {
    /// The files of its mappings, by device and inode: one open descriptor for each file, however many
    /// mappings it has.
    files: HashMap<(u64, u64), Weak<OwnedFd>>,
    /// Files that it no longer shares, for its own thread to close: that can wait.
    to_close: Vec<OwnedFd>,
    /// It is gone: it shares nothing any more.
    pub(super) has_left: bool,
    /// While a request of its back-end waits until a recipient was told: that recipient.
    pub(super) waits_for: Option<usize>,
    /// What it sees of others. `None` where its back-end cannot.
    pub(super) sees: Option<Recipient>,
}

#[derive(Default)]
pub(super) struct Recipient {
    /// How many mappings it can be told of.
    room: usize,
    /// From its first SET_MEM_TABLE on.
    is_started: bool,
    /// What it was told, as it was told: by guest address, with the mapping's number.
    told: BTreeMap<u64, (u64, MemoryRegion)>,
    /// Guest addresses where it may have to be told something.
    pub(super) due: BTreeSet<u64>,
    /// The address that it is being told about.
    under_way: Option<u64>,
    /// Guest addresses of mappings for which there was no room.
    left_out: BTreeSet<u64>,
}

/// What a recipient is to be told.
pub(super) enum Change {
    Add(Shared),
    Remove(MemoryRegion),
    /// Nothing: it knows `told` mappings, as many as it can.
    LeaveOut {
        address: u64,
        told: usize,
    },
}

impl Recipient {
    pub(super) fn new(room: usize) -> Self {
        Recipient { room, ..Recipient::default() }
    }

    /// It is lost: it knows of nothing, and is told of nothing.
    pub(super) fn forget(&mut self) {
        *self = Recipient::new(self.room);
    }
}

impl State {
    pub(super) fn recipient(&mut self, id: usize) -> Option<&mut Recipient> {
        self.devices.get_mut(id)?.sees.as_mut()
    }

    /// Marks what all recipients but the owner (SHM-79) are to be told.
    fn make_due(&mut self, owner: usize, addresses: &[u64]) {
        for (id, device) in self.devices.iter_mut().enumerate() {
            if let Some(recipient) = device.sees.as_mut().filter(|it| id != owner && it.is_started) {
                recipient.due.extend(addresses);
            }
        }
    }

    /// An owner shares a mapping of `file`, which has this device and inode number. False where it has
    /// `max_files` others open here already. The caller has the file, too, so that it is not closed here.
    pub(super) fn share(
        &mut self,
        owner: usize,
        region: MemoryRegion,
        inode: (u64, u64),
        file: &Arc<OwnedFd>,
        max_files: usize,
    ) -> bool {
        let device = &mut self.devices[owner];
        if device.has_left {
            return true;
        }
        let kept = device.files.get(&inode).and_then(Weak::upgrade);
        let file = kept.unwrap_or_else(|| Arc::clone(file));
        device.files.retain(|_, kept| kept.strong_count() > 0);
        if !device.files.contains_key(&inode) {
            if device.files.len() >= max_files {
                return false;
            }
            device.files.insert(inode, Arc::downgrade(&file));
        }
        self.live.insert(region.guest_addr, Shared { owner, number: self.made, region, file });
        self.made += 1;
        self.make_due(owner, &[region.guest_addr]);
        true
    }

    /// An owner's mapping is gone. False where it was not shared.
    pub(super) fn withdraw(&mut self, owner: usize, address: u64) -> bool {
        let Some(shared) = self.live.remove(&address) else { return false };
        self.put_away(shared);
        self.make_due(owner, &[address]);
        true
    }

    /// A mapping that is no longer shared, or a copy that a recipient was told of. The last to use a file
    /// does not close it here.
    fn put_away(&mut self, shared: Shared) {
        self.devices[shared.owner].to_close.extend(Arc::into_inner(shared.file));
    }

    /// What was put away of an owner: to be dropped by its own thread, without a lock.
    pub(super) fn take_files_to_close(&mut self, owner: usize) -> Vec<OwnedFd> {
        std::mem::take(&mut self.devices[owner].to_close)
    }

    /// A recipient is started, and was told of nothing: all that others share is due. Returns how much.
    pub(super) fn restart(&mut self, id: usize) -> usize {
        let others = self.live.iter().filter(|(_, shared)| shared.owner != id);
        let due: BTreeSet<u64> = others.map(|(&address, _)| address).collect();
        let count = due.len();
        if let Some(recipient) = self.recipient(id) {
            recipient.forget();
            (recipient.is_started, recipient.due) = (true, due);
        }
        count
    }

    /// Takes all mappings of an owner away. Returns their guest addresses.
    pub(super) fn withdraw_all(&mut self, owner: usize) -> Vec<u64> {
        let owned = self.live.iter().filter(|(_, shared)| shared.owner == owner);
        let addresses: Vec<u64> = owned.map(|(&address, _)| address).collect();
        addresses.iter().for_each(|&address| _ = self.withdraw(owner, address));
        addresses
    }

    pub(super) fn is_being_told(&self, id: usize, addresses: &[u64]) -> bool {
        let recipient = self.devices.get(id).and_then(|device| device.sees.as_ref());
        let is_open = |it: &Recipient, at| it.due.contains(at) || it.under_way == Some(*at);
        recipient.is_some_and(|recipient| addresses.iter().any(|address| is_open(recipient, address)))
    }

    /// Whether `recipient` waits, over however many others, for `owner`.
    pub(super) fn waits_for(&self, recipient: usize, owner: usize) -> bool {
        let mut at = Some(recipient);
        // It ends: no thread begins to wait where that would close a circle.
        while let Some(id) = at {
            if id == owner {
                return true;
            }
            at = self.devices.get(id).and_then(|device| device.waits_for);
        }
        false
    }

    /// The next thing that a recipient is to be told.
    pub(super) fn next_change(&mut self, id: usize) -> Option<Change> {
        let recipient = self.devices.get_mut(id)?.sees.as_mut()?;
        while let Some(address) = recipient.due.pop_first() {
            let told = recipient.told.len();
            let change = match (recipient.told.get(&address), self.live.get(&address)) {
                (Some((number, _)), Some(shared)) if *number == shared.number => continue,
                // The mapping that is there now comes next: `record` makes it due.
                (Some((_, region)), _) => Change::Remove(*region),
                (None, Some(_)) if told >= recipient.room => {
                    recipient.left_out.insert(address);
                    return Some(Change::LeaveOut { address, told });
                }
                (None, Some(shared)) => Change::Add(shared.clone()),
                (None, None) => continue,
            };
            recipient.under_way = Some(address);
            return Some(change);
        }
        None
    }

    /// A recipient was told, and may have refused.
    pub(super) fn record(&mut self, id: usize, change: &Change, is_refused: bool) {
        let Some(recipient) = self.devices[id].sees.as_mut() else { return };
        recipient.under_way = None;
        match change {
            Change::Add(shared) if !is_refused => {
                recipient.told.insert(shared.region.guest_addr, (shared.number, shared.region));
            }
            Change::Add(_) | Change::LeaveOut { .. } => {}
            Change::Remove(MemoryRegion { guest_addr, .. }) => {
                recipient.told.remove(guest_addr);
                recipient.due.extend(recipient.left_out.pop_first());
                recipient.due.extend(self.live.contains_key(guest_addr).then_some(*guest_addr));
            }
        }
    }

    /// Puts away what a recipient was told, whatever came of it.
    pub(super) fn discard(&mut self, change: Change) {
        if let Change::Add(shared) = change {
            self.put_away(shared);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_left_for_its_owner_to_close() {
        // An owner and a recipient, which is started.
        let mut state = State { devices: vec![Device::default(), Device::default()], ..State::default() };
        state.devices[1].sees = Some(Recipient::new(8));
        state.restart(1);
        let file: Arc<OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        let region = MemoryRegion { guest_addr: 0x1000, size: 0x1000, user_addr: 0, mmap_offset: 0 };
        assert!(state.share(0, region, (0, 0), &file, 1));
        drop(file);

        // While the recipient is told of the mapping, its owner takes it back.
        let change = state.next_change(1).unwrap();
        assert!(state.withdraw(0, 0x1000) && !state.withdraw(0, 0x1000));
        assert!(state.take_files_to_close(0).is_empty());
        state.record(1, &change, false);
        state.discard(change);
        assert_eq!(state.take_files_to_close(0).len(), 1);
        assert!(matches!(state.next_change(1), Some(Change::Remove(told)) if told.guest_addr == 0x1000));

        // A recipient that is started again and again leaves nothing behind.
        let file: Arc<OwnedFd> = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
        assert!(state.share(0, region, (0, 0), &file, 1));
        drop(file);
        for _ in 0..3 {
            state.restart(1);
            let change = state.next_change(1).unwrap();
            state.record(1, &change, false);
            state.discard(change);
        }
        assert!(state.take_files_to_close(0).is_empty());
        assert_eq!(state.withdraw_all(0), [0x1000]);
        assert_eq!(state.take_files_to_close(0).len(), 1);
    }
}
