//! A few aligned bytes for probes, measurements and tests; an engine uses its own pinned slabs.

use crate::buffer::Buffer;
use crate::error::{Error, Result};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// Memory at multiples of this is asked for in huge pages, as an engine's is.
const HUGE_PAGE: usize = 2 << 20;

/// Zeroed memory at a multiple of an alignment.
pub struct Pages {
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is owned and only its owner gives access to it.
unsafe impl Send for Pages {}
// SAFETY: shared, it gives only what does not change it; what an operation changes is its caller's promise.
unsafe impl Sync for Pages {}

impl Pages {
    /// `bytes`, rounded up to the alignment, a power of two.
    pub fn new(bytes: usize, alignment: usize) -> Result<Pages> {
        let refused = || Error::Usage(format!("cannot allocate {bytes} bytes aligned to {alignment}"));
        let rounded = bytes.max(1).checked_next_multiple_of(alignment.max(1)).ok_or_else(refused)?;
        let layout = Layout::from_size_align(rounded, alignment).map_err(|_| refused())?;
        // SAFETY: the layout has at least one byte.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        if alignment.is_multiple_of(HUGE_PAGE) {
            // A disk takes a few hundred ranges of physical memory per request: from small pages, a block goes out in many requests.
            // SAFETY: the range was just allocated; the call is advice, and refusing it changes nothing but speed.
            unsafe { libc::madvise(base.as_ptr().cast(), rounded, libc::MADV_HUGEPAGE) };
        }
        Ok(Pages { base, layout })
    }

    /// First byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes, padding included.
    pub fn bytes(&self) -> usize {
        self.layout.size()
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is owned, initialised and as long as the layout; `buffer`'s caller promised no transfer meanwhile.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.layout.size()) }
    }

    /// The bytes, to write.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for one writer.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.layout.size()) }
    }

    /// `len` bytes from `start` as a buffer for operations.
    ///
    /// # Safety
    /// As for [`Buffer::new`]: until every operation on it has ended the pages live, and their slices are not used against it.
    pub unsafe fn buffer(&self, start: usize, len: usize) -> Buffer {
        assert!(start + len <= self.bytes(), "bytes {start}..{} are not inside {}", start + len, self.bytes());
        // SAFETY: promised by the caller; the range is inside the allocation, whose length is a multiple of the alignment.
        unsafe { Buffer::new(self.base.as_ptr().add(start), len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}
