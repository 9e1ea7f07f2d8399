//! Adding gradients: into an fp32 accumulator, or into a gradient of the same type as autograd does.

use half::{bf16, f16};

use crate::dispatch::{self, Level, Supported, at_every_level};
use crate::element::Element;
use crate::pool::{GRAIN_NUMEL, Grains, Pool, Shared};
use crate::{Addition, GradDtype};

/// `dst = src` (`overwrite`) or `dst += src`: in fp32 where sums are kept in fp32; where they are of the gradient's own type, the sum is taken
/// in fp32 and rounded to nearest, ties to even, as torch does. All in one turn of the pool, whose threads do one thing after the other.
///
/// # Panics
/// If a sum is of another type.
///
/// # Safety
/// Until this returns, the caller keeps every `dst` valid for as many elements as its `src` and untouched by anyone else, and every `src`
/// valid and unwritten; all are naturally aligned, and none overlaps another.
pub unsafe fn add(pool: &Pool, additions: &[Addition]) {
    // SAFETY: promised by the caller.
    unsafe { add_at(pool, dispatch::level(), additions) }
}

/// [`add`] at a given level, for tests and measurements.
///
/// # Panics
/// If this machine lacks the level, or as [`add`] does.
///
/// # Safety
/// As for [`add`].
pub unsafe fn add_at(pool: &Pool, level: Level, additions: &[Addition]) {
    for Addition { sums, src, .. } in additions {
        assert!(
            *sums == GradDtype::Fp32 || *sums == src.dtype,
            "sums of {:?} are kept in {sums:?}: not in fp32 or as they come",
            src.dtype
        );
    }
    let supported = Supported::new(level);
    let grains = Grains::new(additions.iter().map(|addition| addition.src.numel), GRAIN_NUMEL);
    pool.for_each_grain(grains.count(), |grain| {
        let (which, start, numel) = grains.locate(grain);
        let addition = &additions[which];
        // SAFETY: the caller keeps both arrays alive; grains do not overlap, and each is taken by one thread. The dtype says what `src` points
        // to.
        unsafe {
            match addition.src.dtype {
                GradDtype::Bf16 => add_grain::<bf16>(supported, addition, start, numel),
                GradDtype::Fp16 => add_grain::<f16>(supported, addition, start, numel),
                GradDtype::Fp32 => add_grain::<f32>(supported, addition, start, numel),
            }
        }
    });
}

/// # Safety
/// As for [`add`], for these elements; the gradient's type is `G`.
#[expect(clippy::cast_ptr_alignment, reason = "the caller promises natural alignment")]
unsafe fn add_grain<G: Element>(supported: Supported, addition: &Addition, start: usize, numel: usize) {
    let Addition { dst, sums, src, overwrite } = *addition;
    // SAFETY: promised by the caller.
    let src = unsafe { Shared::from_const(src.ptr.cast::<G>()).slice(start, numel) };
    if sums == GradDtype::Fp32 {
        // SAFETY: promised by the caller.
        let dst = unsafe { Shared(dst.cast::<f32>()).slice_mut(start, numel) };
        return if overwrite { widen_into::<G>(supported, dst, src) } else { widen_add::<G>(supported, dst, src) };
    }
    // SAFETY: promised by the caller.
    let dst = unsafe { Shared(dst.cast::<G>()).slice_mut(start, numel) };
    if overwrite { dst.copy_from_slice(src) } else { round_add::<G>(supported, dst, src) }
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
