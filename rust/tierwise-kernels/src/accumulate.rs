//! Adding gradients: into an fp32 accumulator, or into a gradient of the same type as autograd does.

use half::{bf16, f16};

use crate::dispatch::{self, Level, Supported, at_every_level};
use crate::element::Element;
use crate::pool::{GRAIN_NUMEL, Grains, Pool, Shared};
use crate::{GradDtype, GradSpan};

/// `dst = src` (`overwrite`) or `dst += src`, in fp32.
///
/// # Safety
/// Until this returns, the caller keeps `dst` valid for `src.numel` elements and untouched by anyone else, and the span valid and
/// unwritten; both are naturally aligned and do not overlap.
pub unsafe fn accumulate(pool: &Pool, dst: *mut f32, src: GradSpan, overwrite: bool) {
    // SAFETY: promised by the caller.
    unsafe { accumulate_at(pool, dispatch::level(), dst, src, overwrite) }
}

/// [`accumulate`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`accumulate`].
pub unsafe fn accumulate_at(pool: &Pool, level: Level, dst: *mut f32, src: GradSpan, overwrite: bool) {
    // SAFETY: promised by the caller, who keeps both arrays alive; the dtype says what the address points to.
    unsafe {
        match src.dtype {
            GradDtype::Bf16 => accumulate_as::<bf16>(pool, level, dst, src, overwrite),
            GradDtype::Fp16 => accumulate_as::<f16>(pool, level, dst, src, overwrite),
            GradDtype::Fp32 => accumulate_as::<f32>(pool, level, dst, src, overwrite),
        }
    }
}

/// `dst = src` (`overwrite`) or `dst += src` where `dst` holds `sums`: fp32, as [`accumulate`] does, or the span's own type, as
/// [`add_in_place`] does.
///
/// # Panics
/// If the types are others.
///
/// # Safety
/// Until this returns, the caller keeps `dst` valid for `src.numel` elements of `sums` and untouched by anyone else, and the span valid and
/// unwritten; both are naturally aligned and do not overlap.
pub unsafe fn add(pool: &Pool, dst: *mut u8, sums: GradDtype, src: GradSpan, overwrite: bool) {
    // SAFETY: promised by the caller.
    unsafe {
        if sums == GradDtype::Fp32 {
            return accumulate(pool, dst.cast(), src, overwrite);
        }
        assert_eq!(sums, src.dtype, "sums are kept in fp32 or as gradients come");
        if !overwrite {
            return add_in_place(pool, dst, src);
        }
        let bytes = sums.bytes();
        let grains = Grains::new(std::iter::once(src.numel), GRAIN_NUMEL);
        let (dst, src) = (Shared(dst), Shared::from_const(src.ptr));
        pool.for_each_grain(grains.count(), |grain| {
            let (_, start, numel) = grains.locate(grain);
            dst.slice_mut(start * bytes, numel * bytes).copy_from_slice(src.slice(start * bytes, numel * bytes));
        });
    }
}

/// `dst += src`, both of the span's type: the sum is taken in fp32 and rounded to nearest, ties to even, as torch does.
///
/// # Safety
/// Until this returns, the caller keeps `dst` valid for `src.numel` elements and untouched by anyone else, and the span valid and
/// unwritten; both are naturally aligned and do not overlap.
pub unsafe fn add_in_place(pool: &Pool, dst: *mut u8, src: GradSpan) {
    // SAFETY: promised by the caller.
    unsafe { add_in_place_at(pool, dispatch::level(), dst, src) }
}

/// [`add_in_place`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level.
///
/// # Safety
/// As for [`add_in_place`].
pub unsafe fn add_in_place_at(pool: &Pool, level: Level, dst: *mut u8, src: GradSpan) {
    // SAFETY: promised by the caller, who keeps both arrays alive; the dtype says what the addresses point to.
    unsafe {
        match src.dtype {
            GradDtype::Bf16 => add_in_place_as::<bf16>(pool, level, dst, src),
            GradDtype::Fp16 => add_in_place_as::<f16>(pool, level, dst, src),
            GradDtype::Fp32 => add_in_place_as::<f32>(pool, level, dst, src),
        }
    }
}

/// # Safety
/// As for [`accumulate`]; the span's type is `G`.
unsafe fn accumulate_as<G: Element>(pool: &Pool, level: Level, dst: *mut f32, span: GradSpan, overwrite: bool) {
    let supported = Supported::new(level);
    let grains = Grains::new(std::iter::once(span.numel), GRAIN_NUMEL);
    let (dst, src) = (Shared(dst), Shared::from_const(span.ptr.cast::<G>()));
    pool.for_each_grain(grains.count(), |grain| {
        let (_, start, numel) = grains.locate(grain);
        // SAFETY: the caller keeps both arrays alive; grains do not overlap, and each is taken by one thread.
        let (dst, src) = unsafe { (dst.slice_mut(start, numel), src.slice(start, numel)) };
        if overwrite { widen_into::<G>(supported, dst, src) } else { widen_add::<G>(supported, dst, src) }
    });
}

/// # Safety
/// As for [`add_in_place`]; both types are `G`.
unsafe fn add_in_place_as<G: Element>(pool: &Pool, level: Level, dst: *mut u8, span: GradSpan) {
    let supported = Supported::new(level);
    let grains = Grains::new(std::iter::once(span.numel), GRAIN_NUMEL);
    let (dst, src) = (Shared(dst.cast::<G>()), Shared::from_const(span.ptr.cast::<G>()));
    pool.for_each_grain(grains.count(), |grain| {
        let (_, start, numel) = grains.locate(grain);
        // SAFETY: the caller keeps both arrays alive; grains do not overlap, and each is taken by one thread.
        let (dst, src) = unsafe { (dst.slice_mut(start, numel), src.slice(start, numel)) };
        round_add::<G>(supported, dst, src);
    });
}

at_every_level! {
    fn widen_into<G: Element>(dst: &mut [f32], src: &[G]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = src.widen();
        }
    }
}

at_every_level! {
    fn widen_add<G: Element>(dst: &mut [f32], src: &[G]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst += src.widen();
        }
    }
}

at_every_level! {
    fn round_add<G: Element>(dst: &mut [G], src: &[G]) {
        for (dst, src) in dst.iter_mut().zip(src) {
            *dst = G::round(dst.widen() + src.widen());
        }
    }
}
