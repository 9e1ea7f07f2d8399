//! The CUDA device against the CPU kernels, bit by bit. Skipped, with a printed reason, where there is no GPU.
#![allow(clippy::cast_ptr_alignment, reason = "arenas and slabs are aligned for every element type")]

mod device_support;

use cudarc::driver::sys;
use device_support::{Arena, Gate, accumulate_case, adam_case, differences, grad_case, in_forked_child, span_at, within_limit};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tierwise_kernels::{GradDtype, GradSpan, Pool, accumulate, adam, norm};
use tierwise_runtime::cuda::{CudaDevice, is_available};
use tierwise_runtime::device::{Addition, ComputeStream, Device, EventRef, Queue, Transfer};
use tierwise_runtime::error::Error;
use tierwise_runtime::host_memory::HostSlab;

/// The legacy default stream, which torch uses unless told otherwise.
const STREAM: ComputeStream = ComputeStream(0);
const SUCCESS: sys::CUresult = sys::CUresult::CUDA_SUCCESS;

fn cuda() -> Option<Arc<CudaDevice>> {
    if !is_available() {
        println!("skipped: no CUDA device");
        return None;
    }
    Some(CudaDevice::new(0).unwrap())
}

/// Makes the primary context current on this thread, as torch does, and keeps it for the process's life.
fn enter_primary_context() {
    static PRIMARY: OnceLock<usize> = OnceLock::new();
    let primary = *PRIMARY.get_or_init(|| {
        let mut context = std::ptr::null_mut();
        // SAFETY: the driver is initialised; the out pointer is a live local variable.
        assert_eq!(unsafe { sys::cuDevicePrimaryCtxRetain(&raw mut context, 0) }, SUCCESS);
        context.expose_provenance()
    });
    // SAFETY: the context is never released.
    assert_eq!(unsafe { sys::cuCtxSetCurrent(std::ptr::with_exposed_provenance_mut(primary)) }, SUCCESS);
}

fn current_context() -> sys::CUcontext {
    let mut context = std::ptr::null_mut();
    // SAFETY: the driver is initialised; the out pointer is a live local variable.
    assert_eq!(unsafe { sys::cuCtxGetCurrent(&raw mut context) }, SUCCESS);
    context
}

struct DeviceMemory(u64);

impl DeviceMemory {
    fn new(bytes: usize) -> DeviceMemory {
        enter_primary_context();
        let mut address = 0;
        // SAFETY: the context is current; the out pointer is a live local variable.
        assert_eq!(unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) }, SUCCESS);
        DeviceMemory(address)
    }

    fn at(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.0 as usize)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        enter_primary_context();
        // SAFETY: allocated by `new`; freeing waits for what uses it.
        unsafe { sys::cuMemFree_v2(self.0) };
    }
}

/// Copies an arena to the GPU, enqueues work on it there, and copies it back, all without the CPU waiting in between.
fn on_device(device: &Arc<CudaDevice>, arena: &mut Arena, enqueue: impl FnOnce(*mut u8)) {
    let bytes = arena.bytes();
    let slab = HostSlab::new(bytes, Some(device.clone()), 4).unwrap();
    let memory = DeviceMemory::new(bytes);
    // SAFETY: both are `bytes` long, alive, and apart.
    unsafe { arena.as_mut_ptr().copy_to_nonoverlapping(slab.as_ptr(), bytes) };
    device.copy(Queue::HostToDevice, &[Transfer { dst: memory.at(), src: slab.as_ptr(), bytes }]).unwrap();
    device.queue_wait(Queue::Optimizer, &device.record(Queue::HostToDevice).unwrap()).unwrap();
    enqueue(memory.at());
    device.queue_wait(Queue::DeviceToHost, &device.record(Queue::Optimizer).unwrap()).unwrap();
    device.copy(Queue::DeviceToHost, &[Transfer { dst: slab.as_ptr(), src: memory.at(), bytes }]).unwrap();
    device.record(Queue::DeviceToHost).unwrap().synchronize().unwrap();
    // SAFETY: as above, and the last copy is done.
    unsafe { slab.as_ptr().copy_to_nonoverlapping(arena.as_mut_ptr(), bytes) };
}

#[test]
fn a_missing_gpu_is_a_readable_error() {
    let ordinal = if is_available() { 1000 } else { 0 };
    let Err(error) = CudaDevice::new(ordinal) else { panic!("opened cuda:{ordinal}") };
    let text = error.to_string();
    assert!(matches!(error, Error::Device { .. }) && text.contains(&format!("cuda:{ordinal}")), "{text}");
    let reasons = ["libcuda.so.1", "CUDA_VISIBLE_DEVICES", "CUDA_ERROR_"];
    assert!(reasons.iter().any(|reason| text.contains(reason)), "{text}");
    println!("{text}");
}

#[test]
fn adam_has_the_bits_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let (mut expected, segments) = adam_case(1, &[0, 1, 7, 8, 2049, 65_536, 300_001]);
    let (mut actual, before) = (expected.clone(), expected.clone());
    let base = expected.as_mut_ptr();
    let at_base: Vec<_> = segments.iter().map(|segment| segment.at(base)).collect();
    // SAFETY: the arena is alive and untouched by anyone else; the segments do not overlap.
    unsafe { adam::adam_segments(&Pool::try_new(None).unwrap(), &at_base) };
    on_device(&device, &mut actual, |base| {
        let at_base: Vec<_> = segments.iter().map(|segment| segment.at(base)).collect();
        device.adam(&at_base).unwrap();
    });
    let found = differences(&segments, &mut expected, &mut actual);
    assert!(found.is_empty(), "{found:#?}");
    assert!(actual == expected, "a byte outside the arrays was written");
    assert!(actual != before);
}

#[test]
fn norms_have_the_bits_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let pool = Pool::try_new(None).unwrap();
    // One layout twice with other values, then others, so that the scratch is reused, rewritten and outgrown.
    let many = vec![2048; 7000];
    let cases: [(u64, &[usize]); 5] = [(2, &[0, 1, 65_536]), (3, &[0, 1, 65_536]), (4, &[65_537, 7]), (5, &[5_000_000]), (6, &many)];
    for (seed, numels) in cases {
        let (mut arena, spans) = grad_case(seed, numels);
        let at = |base: *mut u8| spans.iter().map(|span| span_at(base, *span)).collect::<Vec<GradSpan>>();
        // SAFETY: the arena is alive and unwritten.
        let expected = unsafe { norm::sum_squares(&pool, &at(arena.as_mut_ptr())) };
        let out = HostSlab::new(size_of::<f64>() * spans.len(), Some(device.clone()), 1).unwrap();
        let mut plain = vec![f64::NAN; spans.len()];
        on_device(&device, &mut arena, |base| {
            device.sum_squares(&at(base), out.as_ptr().cast()).unwrap();
            device.sum_squares(&at(base), plain.as_mut_ptr()).unwrap();
        });
        // SAFETY: the slab is alive, and the work that writes it is done.
        let pinned = unsafe { std::slice::from_raw_parts(out.as_ptr().cast::<f64>(), spans.len()) };
        for (i, expected) in expected.iter().enumerate() {
            assert_eq!(pinned[i].to_bits(), expected.to_bits(), "span {i} of case {seed}: {} and {expected}", pinned[i]);
            assert_eq!(plain[i].to_bits(), expected.to_bits(), "span {i} of case {seed}, into pageable memory");
        }
    }
    device.sum_squares(&[], std::ptr::null_mut()).unwrap();
}

#[test]
fn norms_of_two_threads_do_not_mix() {
    let Some(device) = cuda() else { return };
    std::thread::scope(|scope| {
        for seed in [20, 21] {
            let device = &device;
            scope.spawn(move || {
                let (mut arena, spans) = grad_case(seed, &[seed as usize * 10_000, 3]);
                let at = |base: *mut u8| spans.iter().map(|span| span_at(base, *span)).collect::<Vec<GradSpan>>();
                // SAFETY: the arena is alive and unwritten.
                let expected = unsafe { norm::sum_squares(&Pool::try_new(Some(1)).unwrap(), &at(arena.as_mut_ptr())) };
                let rounds = 200;
                let mut sums = vec![f64::NAN; rounds * spans.len()];
                on_device(device, &mut arena, |base| {
                    for out in sums.chunks_mut(spans.len()) {
                        device.sum_squares(&at(base), out.as_mut_ptr()).unwrap();
                    }
                });
                let bits = |sums: &[f64]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                assert!(sums.chunks(spans.len()).all(|sums| bits(sums) == bits(&expected)));
            });
        }
    });
}

#[test]
fn accumulation_has_the_bits_of_the_cpu() {
    let Some(device) = cuda() else { return };
    let pool = Pool::try_new(None).unwrap();
    for (overwrite, own) in [(true, false), (false, false), (true, true), (false, true)] {
        let sums = |dtype| if own { dtype } else { GradDtype::Fp32 };
        let (mut expected, pairs) = accumulate_case(7, &[0, 1, 9, 65_536, 300_001], sums);
        let mut actual = expected.clone();
        let at = |base: *mut u8, (dst, offset, dtype, numel)| (base.wrapping_add(dst), span_at(base, (offset, dtype, numel)));
        let base = expected.as_mut_ptr();
        for pair in &pairs {
            let (dst, span) = at(base, *pair);
            // SAFETY: the arena is alive and untouched by anyone else; accumulator and gradient do not overlap.
            unsafe { accumulate::add(&pool, &[Addition { dst, sums: sums(span.dtype), src: span, overwrite }]) };
        }
        on_device(&device, &mut actual, |base| {
            for pair in &pairs {
                let (dst, span) = at(base, *pair);
                device.accumulate(&[Addition { dst, sums: sums(span.dtype), src: span, overwrite }]).unwrap();
            }
        });
        assert!(actual == expected, "overwrite: {overwrite}, sums in the gradients' type: {own}");
    }
}

#[test]
fn copies_make_the_round_trip() {
    let Some(device) = cuda() else { return };
    // More than three pieces, and no multiple of one.
    let (mut arena, _) = grad_case(8, &[10_000_001]);
    let before = arena.clone();
    on_device(&device, &mut arena, |_| {});
    assert!(arena == before);
    device.copy(Queue::HostToDevice, &[]).unwrap();
    assert!(matches!(device.copy(Queue::Optimizer, &[]), Err(Error::Internal(_))));
}

#[test]
fn the_compute_stream_waits_for_a_copy() {
    let Some(device) = cuda() else { return };
    let bytes = 256 << 20;
    let (slab, memory) = (HostSlab::new(bytes, Some(device.clone()), 4).unwrap(), DeviceMemory::new(bytes));
    // SAFETY: the slab is alive and nobody else has its address.
    unsafe { slab.as_ptr().write_bytes(7, bytes) };
    device.copy(Queue::HostToDevice, &[Transfer { dst: memory.at(), src: slab.as_ptr(), bytes }]).unwrap();
    let arrived = device.record(Queue::HostToDevice).unwrap();
    device.compute_wait(STREAM, &arrived).unwrap();
    let last = HostSlab::new(1, Some(device.clone()), 1).unwrap();
    // SAFETY: both ends are alive until the event below is done.
    let code = unsafe { sys::cuMemcpyDtoHAsync_v2(last.as_ptr().cast(), memory.0 + bytes as u64 - 1, 1, std::ptr::null_mut()) };
    assert_eq!(code, SUCCESS);
    let computed = device.record_compute(STREAM).unwrap();
    computed.synchronize().unwrap();
    // SAFETY: the copy is done.
    assert_eq!(unsafe { last.as_ptr().read() }, 7);
    assert!(arrived.is_done().unwrap() && arrived.time_ns() <= computed.time_ns());
}

#[test]
fn event_times_are_on_the_clock_of_the_device() {
    let Some(device) = cuda() else { return };
    let slack = 1_000_000;
    let start = (Instant::now(), device.now_ns());
    let mut last = 0;
    // 5 seconds, so that the clock's base is replaced.
    while start.0.elapsed() < Duration::from_secs(5) {
        let before = device.now_ns();
        let events = [Queue::HostToDevice, Queue::Optimizer, Queue::DeviceToHost].map(|queue| {
            let event = device.record(queue).unwrap();
            event.synchronize().unwrap();
            event
        });
        let after = device.now_ns();
        for time in events.map(|event| event.time_ns().expect("a reached event has a time")) {
            assert!(time + 2_000 >= last, "{time} comes after {last}");
            assert!(time + slack > before && time < after + slack, "{time} is not between {before} and {after}");
            last = time;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let (host, clock) = (start.0.elapsed().as_nanos() as u64, device.now_ns() - start.1);
    assert!(host.abs_diff(clock) < slack, "{clock} ns on the device's clock, {host} on the host's");
}

#[test]
fn a_pending_event_has_no_time() {
    let Some(device) = cuda() else { return };
    let bytes = 512 << 20;
    let (slab, memory) = (HostSlab::new(bytes, Some(device.clone()), 4).unwrap(), DeviceMemory::new(bytes));
    device.copy(Queue::HostToDevice, &[Transfer { dst: memory.at(), src: slab.as_ptr(), bytes }]).unwrap();
    let event = device.record(Queue::HostToDevice).unwrap();
    assert!(event.time_ns().is_none() && !event.is_done().unwrap(), "half a gigabyte takes longer than this");
    device.synchronize().unwrap();
    assert!(event.is_done().unwrap() && event.time_ns().is_some());
}

#[test]
fn calls_leave_the_current_context_alone() {
    let Some(device) = cuda() else { return };
    // A fresh thread has none; the calls below enter the context and leave it.
    let thread = std::thread::spawn(move || {
        assert!(current_context().is_null());
        device.record(Queue::Optimizer).unwrap().synchronize().unwrap();
        let (free, total) = device.memory_info().unwrap();
        assert!(0 < free && free < total);
        assert!(!device.name().is_empty() && device.is_asynchronous());
        assert!(current_context().is_null());
    });
    thread.join().unwrap();
}

#[test]
fn events_outlive_the_device() {
    let Some(device) = cuda() else { return };
    let event = device.record(Queue::Optimizer).unwrap();
    drop(device);
    event.synchronize().unwrap();
    assert!(event.is_done().unwrap());
}

#[test]
fn a_foreign_event_is_refused() {
    let Some(device) = cuda() else { return };
    let gate: EventRef = Arc::new(Gate::default());
    assert!(matches!(device.queue_wait(Queue::Optimizer, &gate), Err(Error::Internal(_))));
    assert!(matches!(device.compute_wait(STREAM, &gate), Err(Error::Internal(_))));
}

#[test]
fn a_forked_child_is_refused_and_may_drop_the_device() {
    let Some(device) = cuda() else { return };
    let device = std::mem::ManuallyDrop::new(device);
    let event = std::mem::ManuallyDrop::new(device.record(Queue::HostToDevice).unwrap());
    let code = in_forked_child(|| {
        assert!(matches!(device.copy(Queue::HostToDevice, &[]), Err(Error::Forked { .. })));
        assert!(matches!(device.synchronize(), Err(Error::Forked { .. })));
        // SAFETY: the child's copies of the only references are dropped once, here.
        unsafe {
            std::ptr::drop_in_place((&raw const *event).cast_mut());
            std::ptr::drop_in_place((&raw const *device).cast_mut());
        }
    });
    assert_eq!(code, 0);
    let (device, event) = (std::mem::ManuallyDrop::into_inner(device), std::mem::ManuallyDrop::into_inner(event));
    within_limit(move || {
        event.synchronize().unwrap();
        device.synchronize().unwrap();
    });
}
