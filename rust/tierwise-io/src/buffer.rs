//! Bytes of a caller's slab that operations read or write without copying.

/// An address range that the caller lends to operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    address: usize,
    len: usize,
}

impl Buffer {
    /// `len` bytes from `ptr`, which has to be a multiple of the store's alignment.
    ///
    /// # Safety
    /// For every operation the buffer is given to, from its submission until its ticket resolves (also with an error, also after
    /// `cancel`, also if the ticket is dropped; [`crate::error::Error::Stalled`] does not resolve it):
    /// - the range, its length rounded up to the store's alignment, stays allocated, readable and writable;
    /// - during a write nobody writes to the range; during a read nobody reads or writes it.
    ///
    /// The bytes between `len` and the rounded length are written to disk as they are and overwritten by a read.
    pub unsafe fn new(ptr: *mut u8, len: usize) -> Buffer {
        Buffer { address: ptr.expose_provenance(), len }
    }

    /// Address of the first byte.
    pub fn address(&self) -> usize {
        self.address
    }

    /// Bytes of payload.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no payload.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
