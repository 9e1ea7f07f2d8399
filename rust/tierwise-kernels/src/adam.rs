//! Adam and `AdamW` in one pass over memory: gradient in, moments, master and parameter updated in place.
//!
//! All arithmetic is fp32, rounded to nearest after each operation, never contracted:
//!
//! ```text
//! g = grad * grad_scale
//! if l2 != 0: g = g + l2 * w
//! m = beta1 * m + one_minus_beta1 * g             |m| < 2^-126 becomes +0
//! v = beta2 * v + (one_minus_beta2 * g) * g       |v| < 2^-126 becomes +0
//! w = w * decay
//! w = w - step_size * (m / (sqrt(v) / bias_correction2_sqrt + eps))
//! ```
//!
//! Or in two passes that give the same bits: [`Pass::Params`] writes parameter and master and only reads the moments, [`Pass::Moments`]
//! writes those. Each moves 18 of the 26 bytes, so whoever waits for the parameters waits a third less. A step that may have to be undone
//! ([`adam_undoable`]) writes down what it overwrites, 12 bytes more.

use half::{bf16, f16};
use std::ops::Range;

use crate::dispatch::{self, Level, Supported, at_every_level, prefetch_read, prefetch_write};
use crate::element::{self, Element};
use crate::pool::{GRAIN_NUMEL, Grains, Pool, Shared};
use crate::{AdamConstants, AdamSegment, Format, GradDtype, UndoRecord, convert};

/// Elements per turn of the main loop: whole cache lines of every stream.
const BLOCK: usize = 64;

/// How far ahead lines are asked for: far enough to cover the latency of loaded DRAM, 26 KiB.
const PREFETCH_NUMEL: usize = 1024;

/// What a pass over memory writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Everything.
    Whole,
    /// Parameter and master; moments are read.
    Params,
    /// The moments, after [`Pass::Params`] with the same gradient and constants.
    Moments,
}

impl Pass {
    /// What it does to a parameter: where decay is added to the gradient, the moments depend on the old weight, so that everything is written
    /// by the first pass, and nothing is left for the second.
    pub fn of(self, constants: &AdamConstants) -> Option<Pass> {
        match self {
            Pass::Whole => Some(self),
            Pass::Params | Pass::Moments if constants.l2 == 0.0 => Some(self),
            Pass::Params => Some(Pass::Whole),
            Pass::Moments => None,
        }
    }
}

/// A pass that writes parameters, as a type.
trait Writes: 'static {
    /// Whether it writes the moments too.
    const MOMENTS: bool;
    /// Where what it overwrites of a segment is kept; nothing, if it is not.
    type Record: Copy;
    /// The same of some elements.
    type Kept<'a, S: Store>;

    /// # Safety
    /// The elements `start..start + numel` of a record's arrays are valid, naturally aligned, and untouched by anyone else while what this
    /// gives lives.
    unsafe fn kept<'a, S: Store>(record: Self::Record, start: usize, numel: usize) -> Self::Kept<'a, S>;

    /// Keeps `elements` of what is kept.
    ///
    /// # Safety
    /// Nobody accesses them before this thread has called [`convert::fence`].
    unsafe fn keep<S: Store>(kept: &mut Self::Kept<'_, S>, elements: Range<usize>, overwritten: &Overwritten<'_, S>);
}

/// Keeps nothing.
struct Plain<const MOMENTS: bool>;
type Whole = Plain<true>;
type Params = Plain<false>;

/// Keeps what it overwrites, which is everything.
struct Undoable;

/// What a step overwrites.
struct Overwritten<'a, S: Store> {
    param: &'a [S::Param],
    master: &'a [S::Master],
    exp_avg: &'a [f32],
    exp_avg_sq: &'a [f32],
}

/// What a step has overwritten.
struct Kept<'a, S: Store> {
    param: &'a mut [S::Param],
    master: &'a mut [S::Master],
    exp_avg: &'a mut [f32],
    exp_avg_sq: &'a mut [f32],
}

impl<const MOMENTS: bool> Writes for Plain<MOMENTS> {
    const MOMENTS: bool = MOMENTS;
    type Record = ();
    type Kept<'a, S: Store> = ();

    unsafe fn kept<'a, S: Store>((): (), _: usize, _: usize) -> Self::Kept<'a, S> {}

    unsafe fn keep<S: Store>((): &mut (), _: Range<usize>, _: &Overwritten<'_, S>) {}
}

impl Writes for Undoable {
    const MOMENTS: bool = true;
    type Record = UndoRecord;
    type Kept<'a, S: Store> = Kept<'a, S>;

    unsafe fn kept<'a, S: Store>(record: UndoRecord, start: usize, numel: usize) -> Kept<'a, S> {
        // SAFETY: promised by the caller, who keeps the arrays alive.
        unsafe {
            Kept {
                param: Shared(record.param.cast()).slice_mut(start, numel),
                master: Shared(record.master.cast()).slice_mut(start, numel),
                exp_avg: Shared(record.exp_avg).slice_mut(start, numel),
                exp_avg_sq: Shared(record.exp_avg_sq).slice_mut(start, numel),
            }
        }
    }

    #[inline(always)]
    #[expect(clippy::inline_always, reason = "how many elements there are has to be known")]
    unsafe fn keep<S: Store>(kept: &mut Kept<'_, S>, elements: Range<usize>, overwritten: &Overwritten<'_, S>) {
        // SAFETY: parameters, masters and moments are numbers, or nothing; the caller promises the rest.
        unsafe {
            convert::past_caches(overwritten.param, &mut kept.param[elements.clone()]);
            convert::past_caches(overwritten.master, &mut kept.master[elements.clone()]);
            convert::past_caches(overwritten.exp_avg, &mut kept.exp_avg[elements.clone()]);
            convert::past_caches(overwritten.exp_avg_sq, &mut kept.exp_avg_sq[elements]);
        }
    }
}

/// A storage format: what a weight is read from and written to.
trait Store: 'static {
    type Param: Copy;
    type Master: Copy;
    fn load(param: Self::Param, master: Self::Master) -> f32;
    fn store(master: f32) -> (Self::Param, Self::Master);
}

struct SplitBf16;
struct Fp16Master;
struct Fp32;

impl Store for SplitBf16 {
    type Param = u16;
    type Master = i16;

    #[inline]
    fn load(param: u16, master: i16) -> f32 {
        element::join(param, master)
    }

    #[inline]
    fn store(master: f32) -> (u16, i16) {
        element::split(master)
    }
}

impl Store for Fp16Master {
    type Param = f16;
    type Master = f32;

    #[inline]
    fn load(_: f16, master: f32) -> f32 {
        master
    }

    #[inline]
    fn store(master: f32) -> (f16, f32) {
        (f16::round(master), master)
    }
}

impl Store for Fp32 {
    type Param = f32;
    type Master = ();

    #[inline]
    fn load(param: f32, (): ()) -> f32 {
        param
    }

    #[inline]
    fn store(master: f32) -> (f32, ()) {
        (master, ())
    }
}

/// Steps every segment, and returns when all are written.
///
/// # Safety
/// Until this returns, the caller keeps every array of every segment valid for `numel` elements, naturally aligned, and untouched by
/// anyone else; no two arrays overlap.
pub unsafe fn adam_segments(pool: &Pool, segments: &[AdamSegment]) {
    // SAFETY: promised by the caller.
    unsafe { adam_pass(pool, Pass::Whole, segments) }
}

/// One pass over every segment; returns when all is written.
///
/// # Safety
/// As for [`adam_segments`]; the second pass leaves parameters and masters to others.
pub unsafe fn adam_pass(pool: &Pool, pass: Pass, segments: &[AdamSegment]) {
    // SAFETY: promised by the caller.
    unsafe { adam_segments_at(pool, dispatch::level(), pass, segments) }
}

/// [`adam_pass`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`adam_segments`].
pub unsafe fn adam_segments_at(pool: &Pool, level: Level, pass: Pass, segments: &[AdamSegment]) {
    let supported = Supported::new(level);
    let grains = Grains::new(segments.iter().map(|segment| segment.numel), GRAIN_NUMEL);
    pool.for_each_grain(grains.count(), |grain| {
        let (segment, start, numel) = grains.locate(grain);
        let segment = &segments[segment];
        // SAFETY: the caller keeps the arrays alive and to us; grains do not overlap, and each is taken by one thread.
        unsafe {
            match pass.of(&segment.constants) {
                Some(Pass::Whole) => step_grain::<Whole>(supported, segment, (), start, numel),
                Some(Pass::Params) => step_grain::<Params>(supported, segment, (), start, numel),
                Some(Pass::Moments) => moments_of_grain(supported, segment, start, numel),
                None => {}
            }
        }
    });
}

/// A whole step that may have to be undone: what it overwrites goes to the records, past the caches, so that memory is read once for both.
///
/// # Safety
/// As for [`adam_segments`], of the records' arrays too.
pub unsafe fn adam_undoable(pool: &Pool, segments: &[(AdamSegment, UndoRecord)]) {
    // SAFETY: promised by the caller.
    unsafe { adam_undoable_at(pool, dispatch::level(), segments) }
}

/// [`adam_undoable`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`adam_undoable`].
pub unsafe fn adam_undoable_at(pool: &Pool, level: Level, segments: &[(AdamSegment, UndoRecord)]) {
    let supported = Supported::new(level);
    let grains = Grains::new(segments.iter().map(|(segment, _)| segment.numel), GRAIN_NUMEL);
    pool.for_each_grain(grains.count(), |grain| {
        let (segment, start, numel) = grains.locate(grain);
        let (segment, record) = &segments[segment];
        // SAFETY: the caller keeps the arrays alive and to us; grains do not overlap, and each is taken by one thread.
        unsafe { step_grain::<Undoable>(supported, segment, *record, start, numel) };
        convert::fence();
    });
}

/// # Safety
/// The elements `start..start + numel` of every array are valid and untouched by anyone else.
unsafe fn step_grain<W: Writes>(supported: Supported, segment: &AdamSegment, record: W::Record, start: usize, numel: usize) {
    // SAFETY: promised by the caller, who keeps the arrays alive.
    unsafe {
        match segment.format {
            Format::SplitBf16 => step_grain_as::<W, SplitBf16>(supported, segment, record, start, numel),
            Format::Fp16Master => step_grain_as::<W, Fp16Master>(supported, segment, record, start, numel),
            Format::Fp32 => step_grain_as::<W, Fp32>(supported, segment, record, start, numel),
        }
    }
}

/// # Safety
/// As for [`step_grain`]; the segment's format is `S`.
#[expect(clippy::cast_ptr_alignment, reason = "the caller promises natural alignment")]
unsafe fn step_grain_as<W: Writes, S: Store>(supported: Supported, segment: &AdamSegment, record: W::Record, start: usize, numel: usize) {
    let c = &segment.constants;
    // SAFETY: promised by the caller, who keeps the arrays alive; format and dtype say what the addresses point to.
    unsafe {
        let param = Shared(segment.param.cast::<S::Param>()).slice_mut(start, numel);
        let master = Shared(segment.master.cast::<S::Master>()).slice_mut(start, numel);
        let exp_avg = Shared(segment.exp_avg).slice_mut(start, numel);
        let exp_avg_sq = Shared(segment.exp_avg_sq).slice_mut(start, numel);
        let kept = W::kept::<S>(record, start, numel);
        match segment.grad_dtype {
            GradDtype::Bf16 => {
                let grad = Shared::from_const(segment.grad.cast::<bf16>()).slice(start, numel);
                step::<W, S, bf16>(supported, param, master, exp_avg, exp_avg_sq, grad, kept, c);
            }
            GradDtype::Fp16 => {
                let grad = Shared::from_const(segment.grad.cast::<f16>()).slice(start, numel);
                step::<W, S, f16>(supported, param, master, exp_avg, exp_avg_sq, grad, kept, c);
            }
            GradDtype::Fp32 => {
                let grad = Shared::from_const(segment.grad.cast::<f32>()).slice(start, numel);
                step::<W, S, f32>(supported, param, master, exp_avg, exp_avg_sq, grad, kept, c);
            }
        }
    }
}

/// The second pass over a grain. What it does not write it does not look at: the new parameters may be on their way to the device.
///
/// # Safety
/// As for [`step_grain`], for moments and gradient.
#[expect(clippy::cast_ptr_alignment, reason = "the caller promises natural alignment")]
unsafe fn moments_of_grain(supported: Supported, segment: &AdamSegment, start: usize, numel: usize) {
    let c = &segment.constants;
    // SAFETY: promised by the caller, who keeps the arrays alive; the dtype says what the address points to.
    unsafe {
        let exp_avg = Shared(segment.exp_avg).slice_mut(start, numel);
        let exp_avg_sq = Shared(segment.exp_avg_sq).slice_mut(start, numel);
        match segment.grad_dtype {
            GradDtype::Bf16 => {
                moments(supported, exp_avg, exp_avg_sq, Shared::from_const(segment.grad.cast::<bf16>()).slice(start, numel), c);
            }
            GradDtype::Fp16 => {
                moments(supported, exp_avg, exp_avg_sq, Shared::from_const(segment.grad.cast::<f16>()).slice(start, numel), c);
            }
            GradDtype::Fp32 => {
                moments(supported, exp_avg, exp_avg_sq, Shared::from_const(segment.grad.cast::<f32>()).slice(start, numel), c);
            }
        }
    }
}

at_every_level! {
    fn moments<G: Element>(exp_avg: &mut [f32], exp_avg_sq: &mut [f32], grad: &[G], c: &AdamConstants) {
        let numel = grad.len();
        let (exp_avg, exp_avg_sq) = (&mut exp_avg[..numel], &mut exp_avg_sq[..numel]);
        let mut start = 0;
        while numel - start >= BLOCK {
            let ahead = start + PREFETCH_NUMEL;
            if ahead < numel {
                prefetch_block(&raw const exp_avg[ahead], prefetch_write);
                prefetch_block(&raw const exp_avg_sq[ahead], prefetch_write);
                prefetch_block(&raw const grad[ahead], prefetch_read);
            }
            let end = start + BLOCK;
            let (exp_avg, exp_avg_sq, grad) = (&mut exp_avg[start..end], &mut exp_avg_sq[start..end], &grad[start..end]);
            for i in 0..BLOCK {
                (exp_avg[i], exp_avg_sq[i]) = moments_of(exp_avg[i], exp_avg_sq[i], grad[i].widen() * c.grad_scale, c);
            }
            start = end;
        }
        for i in start..numel {
            (exp_avg[i], exp_avg_sq[i]) = moments_of(exp_avg[i], exp_avg_sq[i], grad[i].widen() * c.grad_scale, c);
        }
    }
}

at_every_level! {
    #[expect(clippy::too_many_arguments, reason = "as arguments the compiler knows of the arrays that it computes with that none overlaps another")]
    fn step<W: Writes, S: Store, G: Element>(
        param: &mut [S::Param],
        master: &mut [S::Master],
        exp_avg: &mut [f32],
        exp_avg_sq: &mut [f32],
        grad: &[G],
        kept: W::Kept<'_, S>,
        c: &AdamConstants,
    ) {
        let mut kept = kept;
        let numel = grad.len();
        let (param, master) = (&mut param[..numel], &mut master[..numel]);
        let (exp_avg, exp_avg_sq) = (&mut exp_avg[..numel], &mut exp_avg_sq[..numel]);
        let mut start = 0;
        while numel - start >= BLOCK {
            let ahead = start + PREFETCH_NUMEL;
            if ahead < numel {
                prefetch_block(&raw const param[ahead], prefetch_write);
                prefetch_block(&raw const master[ahead], prefetch_write);
                let prefetch = if W::MOMENTS { prefetch_write } else { prefetch_read };
                prefetch_block(&raw const exp_avg[ahead], prefetch);
                prefetch_block(&raw const exp_avg_sq[ahead], prefetch);
                prefetch_block(&raw const grad[ahead], prefetch_read);
            }
            let end = start + BLOCK;
            let (param, master) = (&mut param[start..end], &mut master[start..end]);
            let (exp_avg, exp_avg_sq, grad) = (&mut exp_avg[start..end], &mut exp_avg_sq[start..end], &grad[start..end]);
            // SAFETY: `adam_undoable_at` fences when it is through a grain.
            unsafe { W::keep::<S>(&mut kept, start..end, &Overwritten { param, master, exp_avg, exp_avg_sq }) };
            for i in 0..BLOCK {
                step_element::<W, S, G>(&mut param[i], &mut master[i], &mut exp_avg[i], &mut exp_avg_sq[i], grad[i], c);
            }
            start = end;
        }
        let (param_left, master_left) = (&param[start..], &master[start..]);
        let left = Overwritten { param: param_left, master: master_left, exp_avg: &exp_avg[start..], exp_avg_sq: &exp_avg_sq[start..] };
        // SAFETY: as above.
        unsafe { W::keep::<S>(&mut kept, start..numel, &left) };
        for i in start..numel {
            step_element::<W, S, G>(&mut param[i], &mut master[i], &mut exp_avg[i], &mut exp_avg_sq[i], grad[i], c);
        }
    }
}

/// Asks for a block of a stream from `first` on, a cache line at a time.
#[inline(always)]
#[expect(clippy::inline_always, reason = "one instruction per cache line")]
fn prefetch_block<T>(first: *const T, prefetch: impl Fn(*const u8)) {
    for offset in (0..BLOCK * size_of::<T>()).step_by(64) {
        prefetch(first.cast::<u8>().wrapping_add(offset));
    }
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "must be compiled with the features of its caller")]
#[expect(clippy::many_single_char_names, reason = "the names of the definition above")]
fn step_element<W: Writes, S: Store, G: Element>(
    param: &mut S::Param,
    master: &mut S::Master,
    exp_avg: &mut f32,
    exp_avg_sq: &mut f32,
    grad: G,
    c: &AdamConstants,
) {
    let w = S::load(*param, *master);
    let mut g = grad.widen() * c.grad_scale;
    if W::MOMENTS && c.l2 != 0.0 {
        g += c.l2 * w;
    }
    let (m, v) = moments_of(*exp_avg, *exp_avg_sq, g, c);
    let denom = v.sqrt() / c.bias_correction2_sqrt + c.eps;
    let w = w * c.decay - c.step_size * (m / denom);
    if W::MOMENTS {
        (*exp_avg, *exp_avg_sq) = (m, v);
    }
    (*param, *master) = S::store(w);
}

/// The moments after a step.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must be compiled with the features of its caller")]
fn moments_of(exp_avg: f32, exp_avg_sq: f32, g: f32, c: &AdamConstants) -> (f32, f32) {
    (flush(c.beta1 * exp_avg + c.one_minus_beta1 * g), flush(c.beta2 * exp_avg_sq + (c.one_minus_beta2 * g) * g))
}

/// Denormal to +0, by comparison: a moment would stick at 6e-45 and slow every later step.
#[inline(always)]
#[expect(clippy::inline_always, reason = "must be compiled with the features of its caller")]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}
