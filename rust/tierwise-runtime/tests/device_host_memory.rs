//! Host slabs: alignment, contents, registration, forks and refusals.

mod device_support;

use device_support::in_forked_child;
use std::sync::{Arc, Mutex};
use tierwise_kernels::{AdamSegment, GradSpan};
use tierwise_runtime::device::{Addition, ComputeStream, Device, EventRef, Queue, Transfer};
use tierwise_runtime::emulated::{EmulatedConfig, EmulatedDevice};
use tierwise_runtime::error::{Error, Result};
use tierwise_runtime::host_memory::{HostSlab, SLAB_ALIGNMENT};

/// A device that notes what is registered with it.
struct Registrar {
    device: Arc<EmulatedDevice>,
    calls: Mutex<Vec<(&'static str, usize)>>,
    refuses: bool,
}

impl Registrar {
    fn new(refuses: bool) -> Arc<Registrar> {
        Arc::new(Registrar { device: EmulatedDevice::new(EmulatedConfig::default()), calls: Mutex::default(), refuses })
    }

    fn calls(&self) -> Vec<(&'static str, usize)> {
        self.calls.lock().unwrap().clone()
    }
}

impl Device for Registrar {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn now_ns(&self) -> u64 {
        self.device.now_ns()
    }
    fn is_asynchronous(&self) -> bool {
        self.device.is_asynchronous()
    }
    fn copy(&self, queue: Queue, transfers: &[Transfer]) -> Result<()> {
        self.device.copy(queue, transfers)
    }
    fn record(&self, queue: Queue) -> Result<EventRef> {
        self.device.record(queue)
    }
    fn record_compute(&self, stream: ComputeStream) -> Result<EventRef> {
        self.device.record_compute(stream)
    }
    fn queue_wait(&self, queue: Queue, event: &EventRef) -> Result<()> {
        self.device.queue_wait(queue, event)
    }
    fn compute_wait(&self, stream: ComputeStream, event: &EventRef) -> Result<()> {
        self.device.compute_wait(stream, event)
    }
    fn adam(&self, segments: &[AdamSegment]) -> Result<()> {
        self.device.adam(segments)
    }
    fn sum_squares(&self, spans: &[GradSpan], out: *mut f64) -> Result<()> {
        self.device.sum_squares(spans, out)
    }
    fn accumulate(&self, additions: &[Addition]) -> Result<()> {
        self.device.accumulate(additions)
    }
    fn register_host(&self, ptr: *mut u8, _bytes: usize) -> Result<()> {
        // SAFETY: the slab is mapped while it is registered; a range that is not would end the test here.
        assert_eq!(unsafe { ptr.read() }, 0);
        self.calls.lock().unwrap().push(("register", ptr as usize));
        if self.refuses { Err(Error::Usage("no more page-locked memory".into())) } else { Ok(()) }
    }
    fn unregister_host(&self, ptr: *mut u8) {
        // SAFETY: as above, also while it is unregistered.
        unsafe { ptr.read() };
        self.calls.lock().unwrap().push(("unregister", ptr as usize));
    }
    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }
}

/// `VmFlags` of the mapping that holds the address; `None` if nothing is mapped there.
fn vm_flags(address: usize) -> Option<Vec<String>> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let bounds = range.and_then(|(start, end)| Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?)));
        if let Some((start, end)) = bounds {
            inside = (start..end).contains(&address);
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return Some(flags.split_whitespace().map(str::to_owned).collect());
        }
    }
    None
}

#[test]
fn a_slab_is_aligned_zero_and_writable() {
    for bytes in [1, 4095, 4096, 4097, SLAB_ALIGNMENT - 1, SLAB_ALIGNMENT, SLAB_ALIGNMENT + 1, 5 * SLAB_ALIGNMENT + 12_345] {
        for threads in [0, 1, 3, 64] {
            let slab = HostSlab::new(bytes, None, threads).unwrap();
            assert_eq!((slab.bytes(), slab.as_ptr() as usize % SLAB_ALIGNMENT), (bytes, 0));
            // SAFETY: the slab is alive and nobody else has its address.
            let content = unsafe { std::slice::from_raw_parts_mut(slab.as_ptr(), bytes) };
            assert!(content.iter().all(|byte| *byte == 0), "{bytes} bytes, {threads} threads");
            content.fill(0xa5);
        }
    }
}

#[test]
fn a_slab_is_resident_from_the_start() {
    let pages = |bytes: usize| bytes / 4096;
    let slab = HostSlab::new(3 * SLAB_ALIGNMENT, None, 2).unwrap();
    let mut resident = vec![0_u8; pages(slab.bytes())];
    // SAFETY: the slab is alive, and the vector has a byte per page (of 4 KiB or more).
    assert_eq!(unsafe { libc::mincore(slab.as_ptr().cast(), slab.bytes(), resident.as_mut_ptr()) }, 0);
    assert!(resident.iter().all(|page| page & 1 == 1));
}

#[test]
fn an_empty_slab_is_fine() {
    let registrar = Registrar::new(true);
    let slab = HostSlab::new(0, Some(registrar.clone()), 4).unwrap();
    assert_eq!((slab.bytes(), slab.as_ptr() as usize % SLAB_ALIGNMENT), (0, 0));
    assert!(!slab.as_ptr().is_null());
    drop(slab);
    assert!(registrar.calls().is_empty());
}

#[test]
fn a_slab_is_hidden_from_forks() {
    let slab = HostSlab::new(3 * SLAB_ALIGNMENT, None, 2).unwrap();
    for address in [slab.as_ptr() as usize, slab.as_ptr() as usize + slab.bytes() - 1] {
        let flags = vm_flags(address).expect("the slab is mapped");
        assert!(flags.iter().any(|flag| flag == "dc"), "{flags:?}");
    }
    let read = || {
        // SAFETY: the child reads a page of its own address space that is not mapped, and dies.
        unsafe { slab.as_ptr().read_volatile() };
    };
    assert_eq!(in_forked_child(read), -libc::SIGSEGV);
}

#[test]
fn a_dropped_slab_is_unmapped() {
    // In a child, where no other thread can map something at the address meanwhile.
    let code = in_forked_child(|| {
        let slab = HostSlab::new(3 * SLAB_ALIGNMENT + 1, None, 1).unwrap();
        let (first, last) = (slab.as_ptr() as usize, slab.as_ptr() as usize + slab.bytes() - 1);
        assert!(vm_flags(first).is_some() && vm_flags(last).is_some());
        drop(slab);
        assert!(vm_flags(first).is_none() && vm_flags(last).is_none());
    });
    assert_eq!(code, 0);
}

#[test]
fn a_slab_is_registered_once_and_unregistered_before_it_is_unmapped() {
    let registrar = Registrar::new(false);
    let slab = HostSlab::new(3 * SLAB_ALIGNMENT, Some(registrar.clone()), 2).unwrap();
    let address = slab.as_ptr() as usize;
    assert_eq!(registrar.calls(), [("register", address)]);
    drop(slab);
    assert_eq!(registrar.calls(), [("register", address), ("unregister", address)]);
}

#[test]
fn a_refused_registration_is_the_error() {
    let registrar = Registrar::new(true);
    let Err(error) = HostSlab::new(SLAB_ALIGNMENT, Some(registrar.clone()), 2) else { panic!("registered") };
    assert!(error.to_string().contains("page-locked"), "{error}");
    assert_eq!(registrar.calls().len(), 1, "what was not registered is not unregistered");
}

#[test]
fn a_forked_child_drops_a_slab_without_touching_anything() {
    let registrar = Registrar::new(false);
    let slab = HostSlab::new(2 * SLAB_ALIGNMENT, Some(registrar.clone()), 1).unwrap();
    let address = slab.as_ptr();
    // SAFETY: the slab is alive and nobody else has its address.
    unsafe { address.write(42) };
    let moved = std::mem::ManuallyDrop::new(slab);
    let code = in_forked_child(|| {
        // The child has something of its own at the address that the slab has in the parent.
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: MADV_DONTFORK left nothing mapped there.
        let own = unsafe { libc::mmap(address.cast(), SLAB_ALIGNMENT, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_eq!(own, address.cast());
        // SAFETY: the child's copy of the value is dropped once, here.
        unsafe { std::ptr::drop_in_place((&raw const *moved).cast_mut()) };
        // SAFETY: the child's own mapping; if the drop unmapped it, the child dies here.
        assert_eq!(unsafe { address.read_volatile() }, 0);
        assert_eq!(registrar.calls().len(), 1);
    });
    assert_eq!(code, 0);
    // SAFETY: the slab is still alive in the parent.
    assert_eq!(unsafe { address.read() }, 42);
    drop(std::mem::ManuallyDrop::into_inner(moved));
    assert_eq!(registrar.calls().len(), 2);
}

fn assert_refused(bytes: usize) {
    let Err(error) = HostSlab::new(bytes, None, 2) else { panic!("mapped {bytes} bytes") };
    assert!(matches!(error, Error::HostMemory { bytes: named, .. } if named == bytes), "{error:?}");
    let text = error.to_string();
    assert!(text.contains(&bytes.to_string()) && text.contains("lower the host budget"), "{text}");
}

#[test]
fn more_than_there_is_is_refused() {
    for bytes in [usize::MAX, usize::MAX - SLAB_ALIGNMENT, 1 << 62, 1 << 46] {
        assert_refused(bytes);
    }
}

#[test]
fn an_address_space_limit_is_an_error() {
    let code = in_forked_child(|| {
        let limit = libc::rlimit { rlim_cur: 64 << 20, rlim_max: 64 << 20 };
        // SAFETY: lowers a limit of the child, from a live local variable.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
        assert_refused(128 << 20);
    });
    assert_eq!(code, 0);
}
