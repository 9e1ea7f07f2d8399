//! Host slabs: anonymous 2 MiB-aligned memory, faulted in and page-locked once, invisible to forked children.

use crate::device::Device;
use crate::error::{Error, Result};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of a slab: one transparent huge page.
pub const SLAB_ALIGNMENT: usize = 2 << 20;

/// Host memory that lives until it is dropped.
///
/// The slab owns its mapping and nothing else refers to it: whoever reads or writes through [`HostSlab::as_ptr`] keeps the slab alive
/// and orders the accesses.
pub struct HostSlab {
    base: NonNull<u8>,
    bytes: usize,
    mapped_bytes: usize,
    device: Option<Arc<dyn Device>>,
    owner: u32,
}

// SAFETY: the slab is an address range that it owns; it reads or writes it only before anybody else has the address.
unsafe impl Send for HostSlab {}
// SAFETY: as above; a shared slab gives out the address and nothing else.
unsafe impl Sync for HostSlab {}

impl HostSlab {
    /// Maps `bytes` of zeros, faults them in with `threads` threads and registers them with the device.
    pub fn new(bytes: usize, device: Option<Arc<dyn Device>>, threads: usize) -> Result<HostSlab> {
        let owner = std::process::id();
        if bytes == 0 {
            let base = NonNull::new(std::ptr::without_provenance_mut(SLAB_ALIGNMENT)).unwrap_or(NonNull::dangling());
            return Ok(HostSlab { base, bytes, mapped_bytes: 0, device: None, owner });
        }
        let page = page_bytes();
        let mapped_bytes = bytes
            .checked_next_multiple_of(page)
            .filter(|rounded| rounded.checked_add(SLAB_ALIGNMENT).is_some())
            .ok_or_else(|| refused(bytes, "more than the address space holds"))?;
        check_available(bytes)?;
        let base = map_aligned(bytes, mapped_bytes)?;
        // From here on, dropping the slab unmaps it.
        let mut slab = HostSlab { base, bytes, mapped_bytes, device: None, owner };
        slab.advise()?;
        slab.fault_in(page, threads);
        if let Some(device) = device {
            device.register_host(slab.as_ptr(), mapped_bytes)?;
            slab.device = Some(device);
        }
        Ok(slab)
    }

    /// First byte, aligned to [`SLAB_ALIGNMENT`]; not to be read or written if the slab has no bytes.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    #[cfg(target_os = "linux")]
    fn advise(&self) -> Result<()> {
        let address = self.base.as_ptr().cast();
        // SAFETY: the range is the slab's own mapping, alive until it is dropped; the advice changes no content.
        // A kernel without transparent huge pages refuses, which costs speed only.
        unsafe { libc::madvise(address, self.mapped_bytes, libc::MADV_HUGEPAGE) };
        // The kernel would copy page-locked pages in a fork, and a DataLoader worker has no use for them.
        // SAFETY: as above; a forked child never touches the slab (its drop does nothing there).
        if unsafe { libc::madvise(address, self.mapped_bytes, libc::MADV_DONTFORK) } != 0 {
            return Err(refused(self.bytes, &format!("madvise(MADV_DONTFORK): {}", io::Error::last_os_error())));
        }
        Ok(())
    }

    #[cfg(not(target_os = "linux"))]
    #[expect(clippy::unnecessary_wraps, reason = "the Linux version can fail")]
    fn advise(&self) -> Result<()> {
        Ok(())
    }

    /// Page-locking faults pages in one by one on one thread; here every thread takes a share first.
    fn fault_in(&self, page: usize, threads: usize) {
        let start = self.base.as_ptr() as usize;
        let huge_pages = self.mapped_bytes.div_ceil(SLAB_ALIGNMENT);
        let share = huge_pages.div_ceil(threads.max(1)) * SLAB_ALIGNMENT;
        let touch = |offset: usize| {
            for at in (offset..(offset + share).min(self.mapped_bytes)).step_by(page) {
                let address: *mut u8 = std::ptr::with_exposed_provenance_mut(start + at);
                // SAFETY: `at` is inside the mapping, which `self` keeps alive; no two shares overlap and nobody else has the address.
                unsafe { address.write_volatile(0) };
            }
        };
        self.base.as_ptr().expose_provenance();
        std::thread::scope(|scope| {
            for offset in (share..self.mapped_bytes).step_by(share) {
                let spawned = std::thread::Builder::new().name("tierwise-fault".into()).spawn_scoped(scope, move || touch(offset));
                if spawned.is_err() {
                    touch(offset);
                }
            }
            touch(0);
        });
    }
}

impl Drop for HostSlab {
    fn drop(&mut self) {
        // In a forked child the range is not mapped (or holds something new), and the device belongs to the parent.
        if self.mapped_bytes == 0 || std::process::id() != self.owner {
            return;
        }
        if let Some(device) = &self.device {
            device.unregister_host(self.as_ptr());
        }
        // SAFETY: the range is the slab's own mapping; whoever got the address keeps the slab alive for as long as it is used.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_bytes) };
    }
}

/// Maps `mapped_bytes` at a multiple of [`SLAB_ALIGNMENT`] by mapping more and giving the ends back.
fn map_aligned(bytes: usize, mapped_bytes: usize) -> Result<NonNull<u8>> {
    let padded = mapped_bytes + SLAB_ALIGNMENT;
    // SAFETY: a new private anonymous mapping at an address of the kernel's choice touches no other memory.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), padded, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return Err(refused(bytes, &format!("mmap: {}", io::Error::last_os_error())));
    }
    let start: *mut u8 = start.cast();
    let head = start.align_offset(SLAB_ALIGNMENT);
    let tail = SLAB_ALIGNMENT - head;
    let base = start.wrapping_add(head);
    // SAFETY: head and tail are whole pages of the mapping made above, outside the part that is returned; nobody has their address.
    unsafe {
        if head > 0 {
            libc::munmap(start.cast(), head);
        }
        if tail > 0 {
            libc::munmap(base.wrapping_add(mapped_bytes).cast(), tail);
        }
    }
    NonNull::new(base).ok_or_else(|| refused(bytes, "mmap returned the null page"))
}

/// Refuses what cannot be backed: Linux grants the mapping and later kills the process that touches it.
fn check_available(bytes: usize) -> Result<()> {
    match available_bytes() {
        Some((available, source)) if bytes as u64 > available => {
            Err(refused(bytes, &format!("only {available} bytes are available ({source})")))
        }
        _ => Ok(()),
    }
}

/// Memory that the system can still give this process, and who says so; `None` where it does not say.
fn available_bytes() -> Option<(u64, &'static str)> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: u64 = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?.split_whitespace().next()?.parse().ok()?;
    let system = (kib * 1024, "MemAvailable of /proc/meminfo");
    // The limit without its usage: cached files count as usage there and would be dropped.
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Some(limit.map_or(system, |limit: u64| system.min((limit, "memory.max of the control group"))))
}

fn page_bytes() -> usize {
    // SAFETY: sysconf reads a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

fn refused(bytes: usize, reason: &str) -> Error {
    let remedy = "lower the host budget, free memory, or raise the limit (ulimit -v, vm.overcommit_memory, the container's memory)";
    Error::HostMemory { bytes, message: format!("{reason}; {remedy}") }
}
