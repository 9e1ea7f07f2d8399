//! The emulated device: queue order, waits, link speeds, failures and kernels.
#![allow(clippy::cast_ptr_alignment, reason = "arenas and slabs are aligned for every element type")]

mod device_support;

use device_support::{Gate, Rng, accumulate_case, adam_case, differences, grad_case, in_forked_child, span_at, within_limit};
use std::sync::Arc;
use tierwise_kernels::{GradDtype, Pool, accumulate, adam, norm};
use tierwise_runtime::device::{Addition, ComputeStream, Device, Event, EventRef, Queue, Transfer};
use tierwise_runtime::emulated::{EmulatedConfig, EmulatedDevice};
use tierwise_runtime::error::{Error, Result};

const STREAM: ComputeStream = ComputeStream(0);
const QUEUES: [Queue; 3] = [Queue::HostToDevice, Queue::DeviceToHost, Queue::Optimizer];
const MS: u64 = 1_000_000;

fn fast() -> Arc<EmulatedDevice> {
    EmulatedDevice::new(EmulatedConfig::default())
}

/// Both links at this speed, in pieces of 1 KiB.
fn slow(bytes_per_second: f64, latency_ns: u64) -> Arc<EmulatedDevice> {
    let speed = Some(bytes_per_second);
    EmulatedDevice::new(EmulatedConfig {
        h2d_bytes_per_second: speed,
        d2h_bytes_per_second: speed,
        latency_ns,
        piece_bytes: 1024,
        threads: 1,
    })
}

fn random_bytes(seed: u64, bytes: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    (0..bytes).map(|_| rng.next() as u8).collect()
}

fn transfer(dst: &mut [u8], src: &[u8]) -> Transfer {
    assert_eq!(dst.len(), src.len());
    Transfer { dst: dst.as_mut_ptr(), src: src.as_ptr(), bytes: src.len() }
}

fn time(event: &EventRef) -> u64 {
    event.synchronize().unwrap();
    event.time_ns().expect("a reached event has a time")
}

#[test]
fn copies_of_a_queue_run_in_order() {
    within_limit(|| {
        // Neighbours depend on each other, so any other order leaves other bytes at the end.
        let device = slow(50e6, 0);
        let source = random_bytes(1, 5000);
        let mut stages = vec![vec![0; 5000]; 20];
        let mut events = Vec::new();
        for i in 0..stages.len() {
            let (before, after) = stages.split_at_mut(i);
            let from = before.last().unwrap_or(&source);
            device.copy(Queue::HostToDevice, &[transfer(&mut after[0], from)]).unwrap();
            events.push(device.record(Queue::HostToDevice).unwrap());
        }
        device.synchronize().unwrap();
        assert!(stages.iter().all(|stage| *stage == source));
        assert!(events.iter().map(time).is_sorted());
    });
}

#[test]
fn every_byte_of_every_transfer_is_copied() {
    within_limit(|| {
        for bytes in [0, 1, 1023, 1024, 1025, 4096, 10_000] {
            let device = EmulatedDevice::new(EmulatedConfig { piece_bytes: 1024, ..EmulatedConfig::default() });
            let (first, second) = (random_bytes(2, bytes), random_bytes(3, 77));
            let (mut to_first, mut to_second) = (vec![0; bytes], vec![0; 77]);
            device.copy(Queue::DeviceToHost, &[transfer(&mut to_first, &first), transfer(&mut to_second, &second)]).unwrap();
            device.copy(Queue::DeviceToHost, &[]).unwrap();
            device.record(Queue::DeviceToHost).unwrap().synchronize().unwrap();
            assert!(to_first == first && to_second == second, "{bytes} bytes");
        }
    });
}

#[test]
fn a_queue_waits_for_another() {
    within_limit(|| {
        // The last kilobyte arrives 8 ms after the first, so a reader that does not wait sees zeros.
        let device = slow(1e6, 0);
        let source = random_bytes(4, 9 * 1024);
        let (mut on_device, mut back) = (vec![0; source.len()], vec![0; source.len()]);
        device.copy(Queue::HostToDevice, &[transfer(&mut on_device, &source)]).unwrap();
        let arrived = device.record(Queue::HostToDevice).unwrap();
        device.queue_wait(Queue::DeviceToHost, &arrived).unwrap();
        let started = device.record(Queue::DeviceToHost).unwrap();
        device.copy(Queue::DeviceToHost, &[transfer(&mut back, &on_device)]).unwrap();
        let returned = device.record(Queue::DeviceToHost).unwrap();
        returned.synchronize().unwrap();
        assert!(back == source);
        assert!(time(&arrived) <= time(&started) && time(&started) < time(&returned));
    });
}

#[test]
fn the_caller_waits_for_a_queue() {
    within_limit(|| {
        let device = slow(1e6, 0);
        let source = random_bytes(5, 9 * 1024);
        let mut on_device = vec![0; source.len()];
        device.copy(Queue::HostToDevice, &[transfer(&mut on_device, &source)]).unwrap();
        let arrived = device.record(Queue::HostToDevice).unwrap();
        device.compute_wait(STREAM, &arrived).unwrap();
        assert!(on_device == source && arrived.is_done().unwrap());
    });
}

#[test]
fn compute_is_done_when_it_is_recorded() {
    let device = fast();
    let before = device.now_ns();
    let event = device.record_compute(STREAM).unwrap();
    assert!(event.is_done().unwrap() && !device.is_asynchronous());
    assert!((before..=device.now_ns()).contains(&time(&event)));
}

#[test]
fn a_pending_event_has_no_time() {
    within_limit(|| {
        let device = fast();
        let gate = Arc::new(Gate::default());
        device.queue_wait(Queue::Optimizer, &(gate.clone() as EventRef)).unwrap();
        let event = device.record(Queue::Optimizer).unwrap();
        assert!(!event.is_done().unwrap() && event.time_ns().is_none());
        gate.open();
        time(&event);
    });
}

#[test]
fn a_copy_takes_latency_and_transport() {
    within_limit(|| {
        // 4,000 bytes at 100 kB/s and 5 ms: 45 ms. Twice, and once more with no byte: 95 ms.
        let device = slow(100e3, 5 * MS);
        let source = random_bytes(6, 4000);
        let mut to = vec![0; source.len()];
        for queue in [Queue::HostToDevice, Queue::DeviceToHost] {
            let start = device.record(queue).unwrap();
            device.copy(queue, &[transfer(&mut to, &source)]).unwrap();
            let first = device.record(queue).unwrap();
            device.copy(queue, &[transfer(&mut to, &source)]).unwrap();
            device.copy(queue, &[]).unwrap();
            let end = device.record(queue).unwrap();
            assert!(time(&first) - time(&start) >= 45 * MS);
            assert!(time(&end) - time(&start) >= 95 * MS);
        }
    });
}

#[test]
fn directions_overlap() {
    within_limit(|| {
        // Both queues start when the gate opens; each copy sleeps for at least 300 ms.
        let device = slow(10e3, 0);
        let source = random_bytes(7, 3000);
        let (mut up, mut down) = (vec![0; 3000], vec![0; 3000]);
        let gate = Arc::new(Gate::default());
        let spans = [(Queue::HostToDevice, &mut up), (Queue::DeviceToHost, &mut down)].map(|(queue, to)| {
            device.queue_wait(queue, &(gate.clone() as EventRef)).unwrap();
            let start = device.record(queue).unwrap();
            device.copy(queue, &[transfer(to, &source)]).unwrap();
            (start, device.record(queue).unwrap())
        });
        gate.open();
        let [(up_start, up_end), (down_start, down_end)] = spans.each_ref().map(|(start, end)| (time(start), time(end)));
        assert!(up_end - up_start >= 300 * MS && down_end - down_start >= 300 * MS);
        assert!(up_start < down_end && down_start < up_end, "{up_start}..{up_end} and {down_start}..{down_end} do not overlap");
    });
}

#[test]
fn a_slow_link_does_not_delay_the_others() {
    within_limit(|| {
        let gate = Arc::new(Gate::default());
        let device = fast();
        device.queue_wait(Queue::HostToDevice, &(gate.clone() as EventRef)).unwrap();
        for queue in [Queue::DeviceToHost, Queue::Optimizer] {
            device.record(queue).unwrap().synchronize().unwrap();
        }
        gate.open();
    });
}

#[test]
fn dropping_the_device_finishes_its_work() {
    within_limit(|| {
        let device = slow(1e6, 0);
        let source = random_bytes(8, 9 * 1024);
        let mut to = vec![0; source.len()];
        device.copy(Queue::HostToDevice, &[transfer(&mut to, &source)]).unwrap();
        let event = device.record(Queue::HostToDevice).unwrap();
        drop(device);
        assert!(event.is_done().unwrap() && to == source);
    });
}

fn assert_failed(result: Result<()>, message: &str) {
    let error = result.expect_err(message).to_string();
    assert!(error.contains(message) && error.contains("emulated"), "{error}");
}

#[test]
fn a_failure_reaches_everything_after_it_and_nothing_hangs() {
    for failing in QUEUES {
        within_limit(move || {
            let device = fast();
            let gate = Arc::new(Gate::default());
            let mut sum = 0.0;
            let (source, mut to) = (random_bytes(9, 100), vec![0; 100]);
            let earlier = device.record(failing).unwrap();
            earlier.synchronize().unwrap();

            device.queue_wait(failing, &(gate.clone() as EventRef)).unwrap();
            device.fail_next(failing, "the link is down");
            match failing {
                Queue::Optimizer => device.sum_squares(&[], &raw mut sum).unwrap(),
                queue => device.copy(queue, &[transfer(&mut to, &source)]).unwrap(),
            }
            let failed = device.record(failing).unwrap();
            for queue in QUEUES.into_iter().filter(|queue| *queue != failing) {
                device.queue_wait(queue, &failed).unwrap();
            }
            let waiting = QUEUES.map(|queue| device.record(queue).unwrap());
            gate.open();

            for event in waiting.iter().chain([&failed]) {
                assert_failed(event.synchronize(), "the link is down");
                assert_failed(event.is_done().map(|_| ()), "the link is down");
                assert_eq!(event.time_ns(), None);
            }
            assert!(earlier.is_done().unwrap(), "what was done before the failure stays done");
            assert!(to.iter().all(|byte| *byte == 0), "a failed copy copies nothing");

            assert_failed(device.synchronize(), "the link is down");
            assert_failed(device.copy(Queue::HostToDevice, &[]), "the link is down");
            assert_failed(device.adam(&[]), "the link is down");
            assert_failed(device.record(Queue::HostToDevice).unwrap().synchronize(), "the link is down");
            assert_failed(device.record_compute(STREAM).unwrap().synchronize(), "the link is down");
            assert_failed(device.compute_wait(STREAM, &failed), "the link is down");
        });
    }
}

/// An event whose wait panics.
struct Broken;
impl Event for Broken {
    fn is_done(&self) -> Result<bool> {
        Ok(false)
    }
    fn synchronize(&self) -> Result<()> {
        panic!("broken on purpose")
    }
    fn time_ns(&self) -> Option<u64> {
        None
    }
}

#[test]
fn the_first_failure_is_reported_and_later_work_is_skipped() {
    within_limit(|| {
        let device = fast();
        let gate = Arc::new(Gate::default());
        let (source, mut to) = (random_bytes(10, 100), vec![0; 100]);
        device.queue_wait(Queue::HostToDevice, &(gate.clone() as EventRef)).unwrap();
        device.fail_next(Queue::HostToDevice, "first");
        device.copy(Queue::HostToDevice, &[]).unwrap();
        device.queue_wait(Queue::HostToDevice, &(Arc::new(Broken) as EventRef)).unwrap();
        device.copy(Queue::HostToDevice, &[transfer(&mut to, &source)]).unwrap();
        gate.open();
        assert_failed(device.synchronize(), "first");
        assert!(to.iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_panic_in_a_worker_fails_the_device() {
    within_limit(|| {
        let device = fast();
        device.queue_wait(Queue::DeviceToHost, &(Arc::new(Broken) as EventRef)).unwrap();
        assert_failed(device.synchronize(), "broken on purpose");
    });
}

#[test]
fn copies_do_not_go_to_the_optimizer_queue() {
    assert!(matches!(fast().copy(Queue::Optimizer, &[]), Err(Error::Internal(_))));
}

#[test]
fn adam_on_the_queue_equals_adam_on_the_pool() {
    let (mut expected, segments) = adam_case(11, &[1, 7, 4096, 70_001]);
    let mut actual = expected.clone();
    let before = expected.clone();
    let base = expected.as_mut_ptr();
    let at_base: Vec<_> = segments.iter().map(|segment| segment.at(base)).collect();
    // SAFETY: the arena is alive and untouched by anyone else; the segments do not overlap.
    unsafe { adam::adam_segments(&Pool::try_new(Some(2)).unwrap(), &at_base) };

    let device = fast();
    let base = actual.as_mut_ptr();
    let at_base: Vec<_> = segments.iter().map(|segment| segment.at(base)).collect();
    device.adam(&at_base).unwrap();
    device.record(Queue::Optimizer).unwrap().synchronize().unwrap();
    let found = differences(&segments, &mut expected, &mut actual);
    assert!(found.is_empty(), "{found:#?}");
    assert!(actual == expected, "a byte outside the arrays was written");
    assert!(actual != before);
}

#[test]
fn norms_and_accumulation_on_the_queue_equal_the_pool() {
    let numels = [0, 1, 2049, 65_536, 131_073];
    let device = EmulatedDevice::new(EmulatedConfig { threads: 2, ..EmulatedConfig::default() });
    let pool = Pool::try_new(Some(1)).unwrap();

    let (mut grads, spans) = grad_case(12, &numels);
    let base = grads.as_mut_ptr();
    let spans: Vec<_> = spans.into_iter().map(|span| span_at(base, span)).collect();
    let mut sums = vec![f64::NAN; spans.len()];
    device.sum_squares(&spans, sums.as_mut_ptr()).unwrap();
    device.record(Queue::Optimizer).unwrap().synchronize().unwrap();
    // SAFETY: the arena is alive and unwritten.
    let expected = unsafe { norm::sum_squares(&pool, &spans) };
    assert_eq!(sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>(), expected.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>());
    assert!(expected.iter().any(|sum| *sum > 0.0));

    for (overwrite, own) in [(true, false), (false, false), (true, true), (false, true)] {
        let sums = |dtype| if own { dtype } else { GradDtype::Fp32 };
        let (mut expected, pairs) = accumulate_case(13, &numels, sums);
        let mut actual = expected.clone();
        let (expected_base, actual_base) = (expected.as_mut_ptr(), actual.as_mut_ptr());
        for (dst, offset, dtype, numel) in pairs {
            let at = |base: *mut u8| (base.wrapping_add(dst), span_at(base, (offset, dtype, numel)));
            let (to, span) = at(expected_base);
            // SAFETY: the arena is alive and untouched by anyone else; accumulator and gradient do not overlap.
            unsafe { accumulate::add(&pool, &[Addition { dst: to, sums: sums(dtype), src: span, overwrite }]) };
            let (to, span) = at(actual_base);
            device.accumulate(&[Addition { dst: to, sums: sums(dtype), src: span, overwrite }]).unwrap();
        }
        device.synchronize().unwrap();
        assert!(actual == expected, "overwrite: {overwrite}, sums in the gradients' type: {own}");
    }
}

#[test]
fn kernels_run_after_the_copies_they_wait_for() {
    within_limit(|| {
        let device = slow(1e6, 0);
        let source: Vec<u8> = [1.0_f32; 2048].into_iter().flat_map(f32::to_ne_bytes).collect();
        let mut on_device = vec![0.0_f32; 2048];
        let mut sum = 0.0;
        device
            .copy(Queue::HostToDevice, &[Transfer { dst: on_device.as_mut_ptr().cast(), src: source.as_ptr(), bytes: source.len() }])
            .unwrap();
        device.queue_wait(Queue::Optimizer, &device.record(Queue::HostToDevice).unwrap()).unwrap();
        device.sum_squares(&[span_at(on_device.as_mut_ptr().cast(), (0, GradDtype::Fp32, 2048))], &raw mut sum).unwrap();
        device.record(Queue::Optimizer).unwrap().synchronize().unwrap();
        assert_eq!(sum.to_bits(), 2048.0_f64.to_bits());
    });
}

#[test]
fn a_forked_child_is_refused_and_may_drop_the_device() {
    let device = std::mem::ManuallyDrop::new(fast());
    let event = device.record(Queue::HostToDevice).unwrap();
    event.synchronize().unwrap();
    let owner = std::process::id();
    let code = in_forked_child(|| {
        for result in [device.copy(Queue::HostToDevice, &[]), device.synchronize(), device.queue_wait(Queue::Optimizer, &event)] {
            assert!(matches!(result, Err(Error::Forked { owner: o, .. }) if o == owner));
        }
        // SAFETY: the child's copy of the only reference is dropped once, here.
        unsafe { std::ptr::drop_in_place((&raw const *device).cast_mut()) };
    });
    assert_eq!(code, 0);
    let device = std::mem::ManuallyDrop::into_inner(device);
    device.record(Queue::HostToDevice).unwrap().synchronize().unwrap();
}
