//! The kernels' own threads and the shared queue of grains they take work from.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Name of the environment variable that sets the number of threads.
pub const NUM_THREADS_ENV: &str = "TIERWISE_NUM_THREADS";

/// Elements of one grain of an element-wise kernel: long enough to hide the queue, short enough that no thread waits long for the last.
pub const GRAIN_NUMEL: usize = 65_536;

/// Threads that run kernels. Never rayon's global pool, which belongs to the application.
///
/// All work runs on these threads, also the smallest: a caller may have set its own floating-point mode (`torch.set_flush_denormal`),
/// which would change bits.
#[derive(Debug)]
pub struct Pool {
    pool: rayon::ThreadPool,
}

impl Pool {
    /// Starts the threads; see [`Pool::try_new`].
    ///
    /// # Panics
    /// Where [`Pool::try_new`] returns an error.
    pub fn new(threads: Option<usize>) -> Self {
        Self::try_new(threads).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Starts `threads` threads, else as many as `TIERWISE_NUM_THREADS` says, else one per CPU this process may run on.
    pub fn try_new(threads: Option<usize>) -> Result<Self, String> {
        let threads = Self::wanted(threads)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("tierwise-{index}"))
            .build()
            .map_err(|error| format!("cannot start {threads} kernel threads: {error}"))?;
        Ok(Self { pool })
    }

    /// How many threads [`Pool::try_new`] starts.
    pub fn wanted(threads: Option<usize>) -> Result<usize, String> {
        let env = match std::env::var(NUM_THREADS_ENV) {
            Ok(value) => Some(value),
            Err(std::env::VarError::NotPresent) => None,
            Err(std::env::VarError::NotUnicode(value)) => Some(value.to_string_lossy().into_owned()),
        };
        size(threads, env.as_deref())
    }

    /// Number of threads.
    pub fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// Calls `f` once for each of `0..grains` and returns when all calls have returned.
    ///
    /// Every thread takes the next grain from one counter, so a thread that is slowed down (by a copy, by a neighbour) takes fewer, and one
    /// that gets no CPU meanwhile takes none: nobody waits for it. One that loses its CPU in the middle of a grain is waited for; the others
    /// do what was asked for after this. A panic of `f` propagates to the caller.
    pub fn for_each_grain(&self, grains: usize, f: impl Fn(usize) + Sync) {
        let next = AtomicUsize::new(0);
        let work = || {
            loop {
                let grain = next.fetch_add(1, Ordering::Relaxed);
                if grain >= grains {
                    break;
                }
                f(grain);
            }
        };
        // Not a broadcast, which returns only when every thread has had a turn. Whoever is done takes the shares of those that are not there
        // yet, and finds no grains left. First in, first out: what others want from the threads comes after this, in its order. No more
        // threads are woken than have a grain: that costs more than a small parameter's step.
        self.pool.in_place_scope_fifo(|scope| {
            for _ in 0..self.threads().min(grains) {
                scope.spawn_fifo(|_| work());
            }
        });
    }
}

/// More are a mistake, not a machine.
const MAX_THREADS: usize = 1024;

fn size(argument: Option<usize>, env: Option<&str>) -> Result<usize, String> {
    match (argument, env) {
        (Some(0), _) => Err("a kernel pool needs at least 1 thread, got 0".to_owned()),
        (Some(threads), _) if threads > MAX_THREADS => Err(format!("a kernel pool has at most {MAX_THREADS} threads, got {threads}")),
        (Some(threads), _) => Ok(threads),
        (None, Some(value)) => match value.trim().parse() {
            Ok(threads) if (1..=MAX_THREADS).contains(&threads) => Ok(threads),
            _ => Err(format!(
                "{NUM_THREADS_ENV}='{value}' is not a number of threads: set a whole number from 1 to {MAX_THREADS}, or unset it"
            )),
        },
        (None, None) => {
            std::thread::available_parallelism().map(usize::from).map_err(|error| format!("cannot count this process's CPUs: {error}"))
        }
    }
}

/// Several ranges of elements cut into grains: which range and which of its elements the n-th grain is.
#[derive(Debug)]
pub(crate) struct Grains {
    numels: Vec<usize>,
    /// First grain of each range, and the number of grains at the end.
    first: Vec<usize>,
    grain_numel: usize,
}

impl Grains {
    pub(crate) fn new(numels: impl Iterator<Item = usize>, grain_numel: usize) -> Self {
        let numels: Vec<usize> = numels.collect();
        let mut first = Vec::with_capacity(numels.len() + 1);
        let mut grains = 0;
        for numel in &numels {
            first.push(grains);
            grains += numel.div_ceil(grain_numel);
        }
        first.push(grains);
        Self { numels, first, grain_numel }
    }

    pub(crate) fn count(&self) -> usize {
        self.first[self.numels.len()]
    }

    /// Grains of a range.
    pub(crate) fn of(&self, range: usize) -> std::ops::Range<usize> {
        self.first[range]..self.first[range + 1]
    }

    /// (range, first element in it, number of elements) of a grain.
    pub(crate) fn locate(&self, grain: usize) -> (usize, usize, usize) {
        let range = self.first.partition_point(|&first| first <= grain) - 1;
        let start = (grain - self.first[range]) * self.grain_numel;
        (range, start, self.grain_numel.min(self.numels[range] - start))
    }
}

/// An address that threads share; whoever makes one promises that the memory stays valid until the kernel has returned.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub(crate) *mut T);

// SAFETY: only an address; the functions below that turn it into references state who keeps the memory alive.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn from_const(ptr: *const T) -> Self {
        Self(ptr.cast_mut())
    }

    /// The address of an element.
    pub(crate) fn at(self, element: usize) -> *mut T {
        self.0.wrapping_add(element)
    }

    /// # Safety
    /// `numel` elements from `start` are valid, aligned for `T`, and not written while the slice lives.
    pub(crate) unsafe fn slice<'a>(self, start: usize, numel: usize) -> &'a [T] {
        // SAFETY: promised by the caller, who keeps the memory alive.
        unsafe { std::slice::from_raw_parts(self.0.add(start), numel) }
    }

    /// # Safety
    /// `numel` elements from `start` are valid, aligned for `T`, and not accessed by anyone else while the slice lives.
    pub(crate) unsafe fn slice_mut<'a>(self, start: usize, numel: usize) -> &'a mut [T] {
        if size_of::<T>() == 0 {
            // SAFETY: a slice of zero-sized elements has no memory; its address (null for a missing master) is not used.
            return unsafe { std::slice::from_raw_parts_mut(std::ptr::NonNull::dangling().as_ptr(), numel) };
        }
        // SAFETY: promised by the caller, who keeps the memory alive.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), numel) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_prefers_argument_then_environment_then_affinity() {
        assert_eq!(size(Some(3), Some("5")), Ok(3));
        assert_eq!(size(None, Some(" 5 ")), Ok(5));
        assert_eq!(size(None, None), Ok(std::thread::available_parallelism().unwrap().get()));
    }

    #[test]
    fn bad_thread_counts_are_named() {
        for value in ["", "0", "-1", "2.5", "many", "1025", "99999999999999999999999"] {
            let error = size(None, Some(value)).unwrap_err();
            assert!(error.contains(NUM_THREADS_ENV) && error.contains(&format!("'{value}'")), "{error}");
        }
        assert!(size(Some(0), None).unwrap_err().contains("got 0"));
        assert!(size(Some(1025), None).unwrap_err().contains("at most 1024 threads, got 1025"));
    }

    #[test]
    fn a_thread_that_is_held_up_holds_nobody_up() {
        let pool = Pool::new(Some(2));
        let (held, holds) = std::sync::mpsc::channel::<()>();
        let (release, released) = std::sync::mpsc::channel::<()>();
        let (done, is_done) = std::sync::mpsc::channel();
        let (released, pool) = (std::sync::Mutex::new(released), &pool);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                pool.for_each_grain(1, |_| {
                    held.send(()).unwrap();
                    released.lock().unwrap().recv().unwrap();
                });
            });
            holds.recv().unwrap();
            scope.spawn(move || {
                let seen = AtomicUsize::new(0);
                pool.for_each_grain(8, |_| _ = seen.fetch_add(1, Ordering::Relaxed));
                done.send(seen.into_inner()).unwrap();
            });
            // Far more than it takes; without an answer both are let go, so that the test ends.
            let seen = is_done.recv_timeout(std::time::Duration::from_secs(20));
            release.send(()).unwrap();
            assert_eq!(seen, Ok(8), "eight grains, with one of two threads held up");
        });
    }

    #[test]
    fn grains_cover_every_element_once() {
        let numels = [0, 1, 7, 8, 0, 9, 24, 0];
        let grains = Grains::new(numels.into_iter(), 8);
        let mut seen: Vec<Vec<u32>> = numels.iter().map(|&n| vec![0; n]).collect();
        for grain in 0..grains.count() {
            let (range, start, numel) = grains.locate(grain);
            assert!(numel > 0 && grains.of(range).contains(&grain));
            seen[range][start..start + numel].iter_mut().for_each(|count| *count += 1);
        }
        assert!(seen.iter().flatten().all(|&count| count == 1));
    }
}
