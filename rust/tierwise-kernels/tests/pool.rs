//! The queue: every grain once, on the pool's own threads, panics reported.

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use tierwise_kernels::Pool;

#[test]
fn every_grain_runs_once_on_a_named_thread() {
    for threads in [1, 3] {
        let pool = Pool::new(Some(threads));
        for grains in [0, 1, 2, 1000] {
            let counts: Vec<AtomicUsize> = (0..grains).map(|_| AtomicUsize::new(0)).collect();
            pool.for_each_grain(grains, |grain| {
                assert!(std::thread::current().name().unwrap().starts_with("tierwise-"));
                counts[grain].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
    }
}

#[test]
fn all_threads_take_part() {
    let threads = 3;
    // Only passes if three grains are in work at the same time.
    let barrier = Barrier::new(threads);
    Pool::new(Some(threads)).for_each_grain(threads, |_| {
        barrier.wait();
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_survives() {
    let pool = Pool::new(Some(2));
    for grains in [1, 10] {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.for_each_grain(grains, |grain| assert!(grain != grains - 1, "grain refused"));
        }));
        let message = result.unwrap_err();
        assert!(message.downcast_ref::<&str>().is_some_and(|message| message.contains("grain refused")));
    }
    let count = AtomicUsize::new(0);
    pool.for_each_grain(10, |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(count.into_inner(), 10);
}

#[test]
fn callers_may_share_a_pool() {
    let pool = Pool::new(Some(2));
    let count = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    pool.for_each_grain(7, |_| {
                        count.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(count.into_inner(), 4 * 50 * 7);
}
