//! Splitting and joining fp32 masters, rounding to fp16, and copying, with all threads.

use half::f16;

use crate::dispatch::{self, Level, Supported, at_every_level};
use crate::element::{self, Element};
use crate::pool::{GRAIN_NUMEL, Grains, Pool, Shared};

/// Bytes of one grain of a copy.
const COPY_GRAIN_BYTES: usize = 1 << 20;

/// Bytes of a store past the caches; the processor joins four of them to a line.
const WORD: usize = 16;

/// An fp32 master as a bf16 parameter (nearest, halves away from zero) and a signed low half.
///
/// Exact for every value but NaN, of which only that it is one is kept. A finite master within half a unit of overflow has an infinite
/// `hi`, as rounding to bf16 demands, and still joins to itself.
pub fn split_master(master: f32) -> (u16, i16) {
    element::split(master)
}

/// The fp32 master that [`split_master`] took apart.
pub fn join_master(hi: u16, lo: i16) -> f32 {
    element::join(hi, lo)
}

/// [`split_master`] of `numel` elements.
///
/// # Safety
/// Until this returns, the caller keeps the arrays valid for `numel` elements and naturally aligned, `src` unwritten, `hi` and `lo`
/// untouched by anyone else; no two overlap.
pub unsafe fn split_f32(pool: &Pool, src: *const f32, hi: *mut u16, lo: *mut i16, numel: usize) {
    // SAFETY: promised by the caller.
    unsafe { split_f32_at(pool, dispatch::level(), src, hi, lo, numel) }
}

/// [`split_f32`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`split_f32`].
pub unsafe fn split_f32_at(pool: &Pool, level: Level, src: *const f32, hi: *mut u16, lo: *mut i16, numel: usize) {
    let supported = Supported::new(level);
    let (src, hi, lo) = (Shared::from_const(src), Shared(hi), Shared(lo));
    for_each_range(pool, numel, GRAIN_NUMEL, |start, numel| {
        // SAFETY: the caller keeps the arrays alive; ranges do not overlap, and each is taken by one thread.
        unsafe { split(supported, src.slice(start, numel), hi.slice_mut(start, numel), lo.slice_mut(start, numel)) }
    });
}

/// [`join_master`] of `numel` elements.
///
/// # Safety
/// Until this returns, the caller keeps the arrays valid for `numel` elements and naturally aligned, `hi` and `lo` unwritten, `dst`
/// untouched by anyone else; `dst` overlaps neither.
pub unsafe fn join_f32(pool: &Pool, hi: *const u16, lo: *const i16, dst: *mut f32, numel: usize) {
    // SAFETY: promised by the caller.
    unsafe { join_f32_at(pool, dispatch::level(), hi, lo, dst, numel) }
}

/// [`join_f32`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`join_f32`].
pub unsafe fn join_f32_at(pool: &Pool, level: Level, hi: *const u16, lo: *const i16, dst: *mut f32, numel: usize) {
    let supported = Supported::new(level);
    let (hi, lo, dst) = (Shared::from_const(hi), Shared::from_const(lo), Shared(dst));
    for_each_range(pool, numel, GRAIN_NUMEL, |start, numel| {
        // SAFETY: the caller keeps the arrays alive; ranges do not overlap, and each is taken by one thread.
        unsafe { join(supported, hi.slice(start, numel), lo.slice(start, numel), dst.slice_mut(start, numel)) }
    });
}

/// Rounds `numel` elements to fp16: to nearest, ties to even, overflow to infinity.
///
/// # Safety
/// Until this returns, the caller keeps the arrays valid for `numel` elements and naturally aligned, `src` unwritten, `dst` untouched
/// by anyone else; they do not overlap.
pub unsafe fn f32_to_fp16(pool: &Pool, src: *const f32, dst: *mut u16, numel: usize) {
    // SAFETY: promised by the caller.
    unsafe { f32_to_fp16_at(pool, dispatch::level(), src, dst, numel) }
}

/// [`f32_to_fp16`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`f32_to_fp16`].
pub unsafe fn f32_to_fp16_at(pool: &Pool, level: Level, src: *const f32, dst: *mut u16, numel: usize) {
    let supported = Supported::new(level);
    let (src, dst) = (Shared::from_const(src), Shared(dst.cast::<f16>()));
    for_each_range(pool, numel, GRAIN_NUMEL, |start, numel| {
        // SAFETY: the caller keeps the arrays alive; ranges do not overlap, and each is taken by one thread.
        unsafe { round_to_fp16(supported, src.slice(start, numel), dst.slice_mut(start, numel)) }
    });
}

/// Copies `bytes` bytes with all threads, past the caches: for more than they hold, or for what is not read soon. A store that went through
/// them would first read the line that it overwrites.
///
/// # Safety
/// Until this returns, the caller keeps `src` valid and unwritten and `dst` valid and untouched by anyone else; they do not overlap.
pub unsafe fn copy(pool: &Pool, src: *const u8, dst: *mut u8, bytes: usize) {
    // SAFETY: promised by the caller.
    unsafe { copy_all(pool, &[Copied { src, dst, bytes }]) }
}

/// Bytes on their way to another place.
#[derive(Debug, Clone, Copy)]
pub struct Copied {
    /// First byte.
    pub src: *const u8,
    /// Where it goes.
    pub dst: *mut u8,
    /// How many.
    pub bytes: usize,
}

// SAFETY: only addresses; whoever hands them over says how long they are valid and who else may use them.
unsafe impl Send for Copied {}
// SAFETY: as above.
unsafe impl Sync for Copied {}

/// [`copy`] of several ranges in one pass.
///
/// # Safety
/// As for [`copy`], of every range; no two overlap.
pub unsafe fn copy_all(pool: &Pool, ranges: &[Copied]) {
    let grains = Grains::new(ranges.iter().map(|range| range.bytes), COPY_GRAIN_BYTES);
    pool.for_each_grain(grains.count(), |grain| {
        let (range, start, bytes) = grains.locate(grain);
        let Copied { src, dst, .. } = ranges[range];
        // SAFETY: the caller keeps all ranges alive; grains do not overlap, and each is taken by one thread.
        let (src, dst) = unsafe { (Shared::from_const(src).slice(start, bytes), Shared(dst).slice_mut(start, bytes)) };
        let head = dst.as_ptr().align_offset(WORD).min(bytes);
        let (first, rest) = dst.split_at_mut(head);
        first.copy_from_slice(&src[..head]);
        // SAFETY: bytes, and the fence follows.
        unsafe { past_caches(&src[head..], rest) };
        fence();
    });
}

/// Copies numbers past the caches if `dst` begins at a multiple of a word, else through them. Where the length of the slices is known when
/// this is compiled, its loop is unrolled.
///
/// # Panics
/// If the slices are not equally long.
///
/// # Safety
/// Nobody accesses `dst` before this thread has called [`fence`]. `T` has no padding.
#[inline]
pub(crate) unsafe fn past_caches<T: Copy>(src: &[T], dst: &mut [T]) {
    assert!(src.len() == dst.len());
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_stream_si128};
        let (from, to) = (src.as_ptr().cast::<u8>(), dst.as_mut_ptr().cast::<u8>());
        if to.addr().is_multiple_of(WORD) {
            let bytes = size_of_val(src);
            let words = bytes / WORD * WORD;
            for at in (0..words).step_by(WORD) {
                // SAFETY: every x86-64 has SSE2; the word lies in both slices, and that of `dst` begins at a multiple of its size.
                unsafe { _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
            }
            // SAFETY: what is left of both slices, which do not overlap.
            unsafe { std::ptr::copy_nonoverlapping(from.add(words), to.add(words), bytes - words) };
            return;
        }
    }
    dst.copy_from_slice(src);
}

/// What this thread stored past the caches is there for everybody, itself included.
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    };
}

fn for_each_range(pool: &Pool, numel: usize, grain_numel: usize, f: impl Fn(usize, usize) + Sync) {
    let grains = Grains::new(std::iter::once(numel), grain_numel);
    pool.for_each_grain(grains.count(), |grain| {
        let (_, start, numel) = grains.locate(grain);
        f(start, numel);
    });
}

at_every_level! {
    fn split(src: &[f32], hi: &mut [u16], lo: &mut [i16]) {
        for ((src, hi), lo) in src.iter().zip(hi).zip(lo) {
            (*hi, *lo) = element::split(*src);
        }
    }
}

at_every_level! {
    fn join(hi: &[u16], lo: &[i16], dst: &mut [f32]) {
        for ((hi, lo), dst) in hi.iter().zip(lo).zip(dst) {
            *dst = element::join(*hi, *lo);
        }
    }
}

at_every_level! {
    fn round_to_fp16(src: &[f32], dst: &mut [f16]) {
        for (src, dst) in src.iter().zip(dst) {
            *dst = f16::round(*src);
        }
    }
}
