//! Sums of squares of gradients, by one reduction tree that the GPU kernel follows too.
//!
//! A span is cut into blocks of [`BLOCK_NUMEL`] elements from its first. In a block, lane `j` of [`LANES`] starts at +0 and adds
//! `x[i] * x[i]` for every `i` with `i % LANES == j`, in order, in fp32 (multiply, then add; a lane without an element stays at +0).
//! Then for `s` in 1024, 512, ..., 1: `lane[j] += lane[j + s]` for `j < s`. Lane 0, widened to f64, is the block's value; the f64 sum
//! of the blocks' values, in order, starting at +0, is the span's.

use std::sync::atomic::{AtomicU32, Ordering};

use half::{bf16, f16};

use crate::dispatch::{self, Level, Supported, at_every_level};
use crate::element::Element;
use crate::pool::{Grains, Pool, Shared};
use crate::{GradDtype, GradSpan};

/// Elements of a block.
pub const BLOCK_NUMEL: usize = 65_536;

/// Running sums in a block.
pub const LANES: usize = 2048;

/// The sum of squares of each span.
///
/// # Safety
/// Until this returns, the caller keeps every span valid, naturally aligned and unwritten.
pub unsafe fn sum_squares(pool: &Pool, spans: &[GradSpan]) -> Vec<f64> {
    // SAFETY: promised by the caller.
    unsafe { sum_squares_at(pool, dispatch::level(), spans) }
}

/// [`sum_squares`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`sum_squares`].
pub unsafe fn sum_squares_at(pool: &Pool, level: Level, spans: &[GradSpan]) -> Vec<f64> {
    let supported = Supported::new(level);
    let blocks = Grains::new(spans.iter().map(|span| span.numel), BLOCK_NUMEL);
    let sums: Vec<AtomicU32> = (0..blocks.count()).map(|_| AtomicU32::new(0)).collect();
    pool.for_each_grain(blocks.count(), |block| {
        let (span, start, numel) = blocks.locate(block);
        let GradSpan { ptr, dtype, .. } = spans[span];
        // SAFETY: the caller keeps the span alive and unwritten; the dtype says what the address points to.
        let sum = unsafe {
            match dtype {
                GradDtype::Bf16 => block_sum::<bf16>(supported, Shared::from_const(ptr.cast()).slice(start, numel)),
                GradDtype::Fp16 => block_sum::<f16>(supported, Shared::from_const(ptr.cast()).slice(start, numel)),
                GradDtype::Fp32 => block_sum::<f32>(supported, Shared::from_const(ptr.cast()).slice(start, numel)),
            }
        };
        sums[block].store(sum.to_bits(), Ordering::Relaxed);
    });
    let sum_of = |span| blocks.of(span).fold(0.0, |sum, block: usize| sum + f32::from_bits(sums[block].load(Ordering::Relaxed)) as f64);
    (0..spans.len()).map(sum_of).collect()
}

/// The sum of squares of a span that comes in parts, in their order; the bits are those of the whole.
#[derive(Debug, Clone, Default)]
pub struct PartialSum {
    /// Of the blocks that are complete.
    sum: f64,
    /// Running sums in the block that is not, empty before its first element.
    lanes: Vec<f32>,
    /// Elements of it so far.
    filled: usize,
}

impl PartialSum {
    /// Adds the next part.
    ///
    /// # Safety
    /// As for [`sum_squares`].
    pub unsafe fn add(&mut self, pool: &Pool, part: GradSpan) {
        let mut at = 0;
        if self.filled > 0 {
            at = (BLOCK_NUMEL - self.filled).min(part.numel);
            // SAFETY: promised by the caller.
            unsafe { self.add_to_block(cut(part, 0, at)) };
        }
        let blocks: Vec<GradSpan> = (0..(part.numel - at) / BLOCK_NUMEL).map(|i| cut(part, at + i * BLOCK_NUMEL, BLOCK_NUMEL)).collect();
        // SAFETY: promised by the caller.
        for sum in unsafe { sum_squares(pool, &blocks) } {
            self.sum += sum;
        }
        at += blocks.len() * BLOCK_NUMEL;
        // SAFETY: promised by the caller.
        unsafe { self.add_to_block(cut(part, at, part.numel - at)) };
    }

    /// The sum over all parts.
    pub fn finish(mut self) -> f64 {
        self.end_block();
        self.sum
    }

    /// # Safety
    /// As for [`sum_squares`]; the span has no more elements than the block has room for.
    unsafe fn add_to_block(&mut self, part: GradSpan) {
        if part.numel == 0 {
            return;
        }
        self.lanes.resize(LANES, 0.0);
        let GradSpan { ptr, dtype, numel } = part;
        // SAFETY: promised by the caller; the dtype says what the address points to.
        unsafe {
            match dtype {
                GradDtype::Bf16 => self.add_elements::<bf16>(Shared::from_const(ptr.cast()).slice(0, numel)),
                GradDtype::Fp16 => self.add_elements::<f16>(Shared::from_const(ptr.cast()).slice(0, numel)),
                GradDtype::Fp32 => self.add_elements::<f32>(Shared::from_const(ptr.cast()).slice(0, numel)),
            }
        }
        self.filled += numel;
        if self.filled == BLOCK_NUMEL {
            self.end_block();
        }
    }

    fn add_elements<G: Element>(&mut self, part: &[G]) {
        let first = self.filled % LANES;
        let (head, rows) = part.split_at(part.len().min(LANES - first));
        for (lanes, row) in std::iter::once((first, head)).chain(rows.chunks(LANES).map(|row| (0, row))) {
            for (lane, x) in self.lanes[lanes..].iter_mut().zip(row) {
                let x = x.widen();
                *lane += x * x;
            }
        }
    }

    fn end_block(&mut self) {
        if self.filled > 0 {
            self.sum += f64::from(fold(&mut self.lanes));
        }
        self.lanes.clear();
        self.filled = 0;
    }
}

/// Elements of a span.
fn cut(span: GradSpan, first: usize, numel: usize) -> GradSpan {
    GradSpan { ptr: span.ptr.wrapping_add(first * span.dtype.bytes()), numel, ..span }
}

/// The lanes' sum, halving by halving.
#[inline(always)]
#[allow(clippy::inline_always, reason = "it is compiled at the level of its caller only where it is inlined")]
fn fold(lanes: &mut [f32]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        let (low, high) = lanes.split_at_mut(half);
        for (low, high) in low.iter_mut().zip(high) {
            *low += *high;
        }
        half /= 2;
    }
    lanes[0]
}

at_every_level! {
    fn block_sum<G: Element>(block: &[G]) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        for row in block.chunks(LANES) {
            for (lane, x) in lanes.iter_mut().zip(row) {
                let x = x.widen();
                *lane += x * x;
            }
        }
        fold(&mut lanes)
    }
}
