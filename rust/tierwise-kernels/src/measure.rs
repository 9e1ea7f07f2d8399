//! How fast this machine runs the kernels of a host step: a safe entry for calibration.

use std::alloc::{Layout, alloc, dealloc};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::pool::{GRAIN_NUMEL, Pool, Shared};
use crate::{AdamConstants, AdamHyper, AdamSegment, Addition, Format, GradDtype, GradSpan, UndoRecord, accumulate, adam, convert, norm};

/// Bytes per parameter: bf16 parameter, 16-bit low half, two fp32 moments, bf16 gradient.
const BYTES_PER_PARAM: usize = 2 + 2 + 4 + 4 + 2;
/// Huge pages, as the engine's slab has.
const ALIGNMENT: usize = 2 << 20;

/// A kernel that the host runs during a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKernel {
    /// Split-master `AdamW`: elements are parameters, 26 bytes of memory traffic each.
    Adam,
    /// The first pass of the same in two: 18 bytes each.
    ParamsFirst,
    /// The second: 18 bytes each.
    Moments,
    /// A whole step that may be undone: 38 bytes each, 12 of them the record of what it overwrites.
    Undoable,
    /// A bf16 gradient added into an fp32 accumulator: 10 bytes each.
    Accumulate,
    /// The sum of squares of bf16 gradients: 2 bytes each.
    Norm,
    /// A copy: elements are bytes, read once and written once.
    Copy,
}

/// Memory that the kernels are measured on. Everything in it is written once before, so that no page fault is measured.
#[derive(Debug)]
pub struct HostBench {
    base: NonNull<u8>,
    layout: Layout,
    numel: usize,
    step: u64,
}

// SAFETY: the memory is owned, and only `&mut self` methods use it.
unsafe impl Send for HostBench {}

impl HostBench {
    /// Room for `numel` parameters, at least one grain: 14 bytes each. An error names a number that no memory holds.
    pub fn new(pool: &Pool, numel: usize) -> Result<Self, String> {
        let refused = || format!("cannot measure on {numel} parameters: no memory has {BYTES_PER_PARAM} bytes for each");
        let numel = numel.max(GRAIN_NUMEL).checked_next_multiple_of(64).ok_or_else(refused)?;
        let bytes = numel.checked_mul(BYTES_PER_PARAM).ok_or_else(refused)?;
        let layout = Layout::from_size_align(bytes, ALIGNMENT).map_err(|_| refused())?;
        // SAFETY: the layout has at least one byte.
        let base = NonNull::new(unsafe { alloc(layout) }).ok_or_else(refused)?;
        // Advice only: without huge pages the figures are those of small ones.
        // SAFETY: the range is what was allocated.
        unsafe { libc::madvise(base.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        let words = Shared(base.cast::<u32>().as_ptr());
        let count = layout.size() / 4;
        pool.for_each_grain(count.div_ceil(GRAIN_NUMEL), |grain| {
            let start = grain * GRAIN_NUMEL;
            // SAFETY: grains do not overlap and end inside the allocation, whose alignment is more than a word's.
            let part = unsafe {
                std::slice::from_raw_parts_mut(words.at(start).cast::<std::mem::MaybeUninit<u32>>(), GRAIN_NUMEL.min(count - start))
            };
            for (i, word) in part.iter_mut().enumerate() {
                // Small normal numbers in every format.
                word.write(0x3c00_3c00 + (i as u32 & 0x7f) * 0x0001_0001);
            }
        });
        Ok(HostBench { base, layout, numel, step: 0 })
    }

    /// Parameters that there is room for.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// Runs a kernel over all of the memory again and again for about `time`, at least once after a run that is not counted; gives elements
    /// per second of the median run.
    pub fn rate(&mut self, pool: &Pool, kernel: HostKernel, time: Duration) -> f64 {
        self.run(pool, kernel);
        let begun = Instant::now();
        let mut runs = Vec::new();
        while runs.is_empty() || begun.elapsed() < time {
            let start = Instant::now();
            let elements = self.run(pool, kernel);
            runs.push(elements as f64 / start.elapsed().as_secs_f64().max(1e-9));
        }
        runs.sort_by(f64::total_cmp);
        runs[runs.len() / 2]
    }

    /// One pass; gives its elements.
    fn run(&mut self, pool: &Pool, kernel: HostKernel) -> usize {
        let n = self.numel;
        // SAFETY: the offset is inside the allocation.
        let at = |offset: usize| unsafe { self.base.as_ptr().add(offset) };
        match kernel {
            HostKernel::Adam | HostKernel::ParamsFirst | HostKernel::Moments => {
                let pass = match kernel {
                    HostKernel::ParamsFirst => adam::Pass::Params,
                    HostKernel::Moments => adam::Pass::Moments,
                    _ => adam::Pass::Whole,
                };
                self.step += 1;
                let segment = segment(at, n, n, self.step);
                // SAFETY: five arrays side by side in memory that this borrows alone.
                unsafe { adam::adam_pass(pool, pass, &[segment]) };
                n
            }
            HostKernel::Undoable => {
                // The second half of every array takes what is overwritten of the first: all of it stays normal numbers.
                self.step += 1;
                let (exp_avg, exp_avg_sq) = (at(2 * n).cast(), at(6 * n).cast());
                let record = UndoRecord { param: at(9 * n), master: at(11 * n), exp_avg, exp_avg_sq };
                // SAFETY: halves of four arrays side by side, and a fifth, in memory that this borrows alone.
                unsafe { adam::adam_undoable(pool, &[(segment(at, n, n / 2, self.step), record)]) };
                n / 2
            }
            HostKernel::Accumulate => {
                let src = GradSpan { ptr: at(12 * n), dtype: GradDtype::Bf16, numel: n };
                let sum = |overwrite| Addition { dst: at(0), sums: GradDtype::Fp32, src, overwrite };
                // SAFETY: two arrays side by side in memory that this borrows alone.
                unsafe { accumulate::add(pool, &[sum(true)]) };
                // SAFETY: as above.
                unsafe { accumulate::add(pool, &[sum(false)]) };
                2 * n
            }
            HostKernel::Norm => {
                let span = GradSpan { ptr: at(12 * n), dtype: GradDtype::Bf16, numel: n };
                // SAFETY: memory that this borrows alone.
                let sums = unsafe { norm::sum_squares(pool, &[span]) };
                std::hint::black_box(sums);
                n
            }
            HostKernel::Copy => {
                // Second moments become first ones: both stay normal numbers, so no later pass is slowed down by what this one left.
                // SAFETY: two arrays side by side in memory that this borrows alone.
                unsafe { convert::copy(pool, at(4 * n), at(0), 4 * n) };
                4 * n
            }
        }
    }
}

/// A step of the first `numel` of `n` parameters, whose arrays lie side by side from `at(0)` on.
fn segment(at: impl Fn(usize) -> *mut u8, n: usize, numel: usize, step: u64) -> AdamSegment {
    let hyper = AdamHyper { lr: 1e-5, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };
    AdamSegment {
        format: Format::SplitBf16,
        grad_dtype: GradDtype::Bf16,
        numel,
        exp_avg: at(0).cast(),
        exp_avg_sq: at(4 * n).cast(),
        param: at(8 * n),
        master: at(10 * n),
        grad: at(12 * n),
        constants: AdamConstants::new(&hyper, step, 1.0),
    }
}

impl Drop for HostBench {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_kernel_leaves_numbers_that_slow_the_next_one_down() {
        const ALL: [HostKernel; 7] = [
            HostKernel::Adam,
            HostKernel::ParamsFirst,
            HostKernel::Moments,
            HostKernel::Undoable,
            HostKernel::Accumulate,
            HostKernel::Norm,
            HostKernel::Copy,
        ];
        let pool = Pool::new(Some(2));
        for kernel in ALL {
            let mut bench = HostBench::new(&pool, 70_000).unwrap();
            for _ in 0..3 {
                assert!(bench.run(&pool, kernel) >= bench.numel / 2, "{kernel:?}");
                bench.run(&pool, HostKernel::Adam);
            }
            let n = bench.numel;
            // SAFETY: two arrays of floats, then three of halves, side by side in memory that nobody else uses now.
            let (moments, halves) = unsafe {
                (Shared(bench.base.cast::<f32>().as_ptr()).slice(0, 2 * n), Shared(bench.base.cast::<u16>().as_ptr()).slice(4 * n, 3 * n))
            };
            assert!(moments.iter().all(|x| x.is_normal()), "{kernel:?}");
            let bf16 = |bits: &u16| half::bf16::from_bits(*bits).is_normal();
            assert!(halves[..n].iter().chain(&halves[2 * n..]).all(bf16), "{kernel:?}");
        }
    }
}
