//! The buffers of a request, as the driver cut them: any framing is allowed (VIRTIO 1.2, section 2.7.4).
//!
//! Called by [`super`].

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// A request's buffers in their order: address and length.
pub struct Buffers(pub Vec<(GuestAddress, usize)>);

impl Buffers {
    pub fn len(&self) -> usize {
        // At most 2^32: the crate ends a chain of ring descriptors there.
        self.0.iter().map(|(_, len)| len).sum()
    }

    /// Cuts in two, at `at` bytes.
    pub fn split(self, at: usize) -> (Buffers, Buffers) {
        let (mut front, mut back, mut left) = (Vec::new(), Vec::new(), at);
        for (address, len) in self.0 {
            let here = len.min(left);
            left -= here;
            if here > 0 {
                front.push((address, here));
            }
            if here < len {
                // The driver's address plus the driver's length: what wraps around is in no memory.
                back.push((GuestAddress(address.0.wrapping_add(here as u64)), len - here));
            }
        }
        (Buffers(front), Buffers(back))
    }

    /// Copies one of the driver's own structures.
    pub fn read<const N: usize>(&self, memory: &GuestMemoryMmap) -> Result<[u8; N], GuestMemoryError> {
        let mut bytes = [0; N];
        let mut at = 0;
        for &(address, len) in &self.0 {
            let end = N.min(at + len);
            memory.read_slice(&mut bytes[at..end], address)?;
            at = end;
        }
        Ok(bytes)
    }

    /// Copies one of the device's, or as much of it as there is room for; returns how much.
    pub fn write(&self, memory: &GuestMemoryMmap, bytes: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut rest = bytes;
        for &(address, len) in &self.0 {
            let (here, behind) = rest.split_at(len.min(rest.len()));
            memory.write_slice(here, address)?;
            rest = behind;
        }
        Ok(bytes.len() - rest.len())
    }
}
