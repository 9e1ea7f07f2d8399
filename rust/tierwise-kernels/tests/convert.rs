//! Splitting and joining masters, rounding, copying and accumulating, against obvious references.

mod common;

use common::{GRAD_DTYPES, Grad, Random, any_f32, same};
use half::{bf16, f16};
use proptest::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tierwise_kernels::accumulate::add_at;
use tierwise_kernels::convert::{copy, f32_to_fp16_at, join_f32_at, join_master, split_f32_at, split_master};
use tierwise_kernels::dispatch::Level;
use tierwise_kernels::{Addition, GradDtype, GradSpan, Pool};

fn addition(dst: *mut f32, src: GradSpan, overwrite: bool) -> Addition {
    Addition { dst: dst.cast(), sums: GradDtype::Fp32, src, overwrite }
}

fn in_place(dst: *mut u8, src: GradSpan) -> Addition {
    Addition { dst, sums: src.dtype, src, overwrite: false }
}

/// `hi` is the nearest bf16, halves away from zero, by comparing distances in f64 (exact there).
fn assert_nearest(x: f32) {
    let (hi, lo) = split_master(x);
    assert_eq!(join_master(hi, lo).to_bits(), x.to_bits(), "{x:e} does not come back");
    let truncated = (x.to_bits() >> 16) as u16;
    let value = |bits: u16| {
        let value = bf16::from_bits(bits);
        // Past the largest finite number the next step counts as 2^128.
        if value.is_infinite() { 128_f64.exp2() } else { f64::from(value.to_f32_const()).abs() }
    };
    let magnitude = f64::from(x).abs();
    let (below, above) = (magnitude - value(truncated), value(truncated + 1) - magnitude);
    assert_eq!(hi, if above <= below { truncated + 1 } else { truncated }, "{x:e} is not rounded to nearest");
}

#[test]
fn splitting_is_exact_and_nearest_for_every_bf16_and_its_ties() {
    for hi in 0..=u16::MAX {
        for lo in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let x = f32::from_bits(u32::from(hi) << 16 | lo);
            if x.is_finite() {
                assert_nearest(x);
            }
        }
    }
}

#[test]
fn splitting_keeps_infinity_and_nan() {
    assert_eq!(split_master(f32::INFINITY), (0x7f80, 0));
    assert_eq!(split_master(f32::NEG_INFINITY), (0xff80, 0));
    assert_eq!(split_master(f32::MAX), (0x7f80, -1));
    assert_eq!(split_master(-0.0), (0x8000, 0));
    for bits in [0x7f80_0001, 0x7fff_ffff, 0xffff_ffff, 0xff80_0001, 0x7fc0_0000, 0x7f80_7fff, 0xffc0_0000] {
        let (hi, lo) = split_master(f32::from_bits(bits));
        assert!(bf16::from_bits(hi).is_nan() && join_master(hi, lo).is_nan(), "{bits:#x}");
    }
}

fn pools() -> impl Iterator<Item = (Pool, Level)> {
    [1, 2].into_iter().flat_map(|threads| Level::supported().map(move |level| (Pool::new(Some(threads)), level)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_finite_master_comes_back(bits: u32) {
        let x = f32::from_bits(bits);
        if x.is_finite() {
            assert_nearest(x);
        }
    }

    #[test]
    fn slices_equal_single_elements(src in prop::collection::vec(any_f32(), 0..400)) {
        let numel = src.len();
        for (pool, level) in pools() {
            let (mut hi, mut lo, mut joined, mut halves) = (vec![0; numel], vec![0; numel], vec![0.0; numel], vec![0; numel]);
            // SAFETY: the vectors have `numel` elements and outlive the calls.
            unsafe {
                split_f32_at(&pool, level, src.as_ptr(), hi.as_mut_ptr(), lo.as_mut_ptr(), numel);
                join_f32_at(&pool, level, hi.as_ptr(), lo.as_ptr(), joined.as_mut_ptr(), numel);
                f32_to_fp16_at(&pool, level, src.as_ptr(), halves.as_mut_ptr(), numel);
            }
            for i in 0..numel {
                prop_assert_eq!((hi[i], lo[i]), split_master(src[i]));
                prop_assert!(same(joined[i], src[i]));
                let (half, expected) = (f16::from_bits(halves[i]), f16::from_f32_const(src[i]));
                prop_assert!(half.to_bits() == expected.to_bits() || (half.is_nan() && expected.is_nan()), "{:e}", src[i]);
            }
        }
    }

    #[test]
    fn accumulating_equals_single_additions(pairs in prop::collection::vec((any_f32(), any_f32()), 0..400)) {
        let (first, second): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        for dtype in GRAD_DTYPES {
            let (first, second) = (Grad::new(dtype, &first), Grad::new(dtype, &second));
            for (pool, level) in pools() {
                // What is there before the overwrite must not matter.
                let mut sum = vec![f32::NAN; first.values.len()];
                // SAFETY: the vectors and gradients have equally many elements and outlive the calls.
                unsafe {
                    add_at(&pool, level, &[addition(sum.as_mut_ptr(), first.span(0), true)]);
                    add_at(&pool, level, &[addition(sum.as_mut_ptr(), second.span(0), false)]);
                }
                for (sum, (a, b)) in sum.iter().zip(first.values.iter().zip(&second.values)) {
                    prop_assert!(same(*sum, a + b), "{a:e} + {b:e} = {sum:e}");
                }
            }
        }
    }

    #[test]
    fn adding_in_place_rounds_once_to_nearest_even(pairs in prop::collection::vec((any_f32(), any_f32()), 0..400)) {
        let (first, second): (Vec<f32>, Vec<f32>) = pairs.into_iter().unzip();
        for (pool, level) in pools() {
            let (dst, src) = (Grad::new(GradDtype::Bf16, &first), Grad::new(GradDtype::Bf16, &second));
            let mut sum: Vec<bf16> = dst.values.iter().map(|&x| bf16::from_f32_const(x)).collect();
            // SAFETY: vector and gradient have equally many elements and outlive the call.
            unsafe { add_at(&pool, level, &[in_place(sum.as_mut_ptr().cast(), src.span(0))]) };
            for (sum, (a, b)) in sum.iter().zip(dst.values.iter().zip(&src.values)) {
                prop_assert!(same(sum.to_f32_const(), bf16::from_f32_const(a + b).to_f32_const()), "{a:e} + {b:e} = {sum:e}");
            }
            let (dst, src) = (Grad::new(GradDtype::Fp16, &first), Grad::new(GradDtype::Fp16, &second));
            let mut sum: Vec<f16> = dst.values.iter().map(|&x| f16::from_f32_const(x)).collect();
            // SAFETY: vector and gradient have equally many elements and outlive the call.
            unsafe { add_at(&pool, level, &[in_place(sum.as_mut_ptr().cast(), src.span(0))]) };
            for (sum, (a, b)) in sum.iter().zip(dst.values.iter().zip(&src.values)) {
                prop_assert!(same(sum.to_f32_const(), f16::from_f32_const(a + b).to_f32_const()), "{a:e} + {b:e} = {sum:e}");
            }
            let mut sum = first.clone();
            let src = Grad::new(GradDtype::Fp32, &second);
            // SAFETY: vector and gradient have equally many elements and outlive the call.
            unsafe { add_at(&pool, level, &[in_place(sum.as_mut_ptr().cast(), src.span(0))]) };
            prop_assert!(sum.iter().zip(first.iter().zip(&second)).all(|(sum, (a, b))| same(*sum, a + b)));
        }
    }
}

#[test]
fn additions_of_every_kind_go_together() {
    let mut random = Random(7);
    let numels = [70_001, 0, 9, 65_536, 1];
    let pool = Pool::new(Some(3));
    for own in [false, true] {
        for overwrite in [false, true] {
            let grads: Vec<Grad> =
                numels.iter().zip(GRAD_DTYPES.iter().cycle()).map(|(&n, &dtype)| Grad::new(dtype, &random.uniforms(n))).collect();
            let sums = |grad: &Grad| if own { grad.span(0).dtype } else { GradDtype::Fp32 };
            let old: Vec<Vec<u8>> = grads.iter().map(|g| (0..g.values.len() * sums(g).bytes()).map(|i| (i % 63) as u8).collect()).collect();
            let (mut together, mut apart) = (old.clone(), old.clone());
            let at =
                |bytes: &mut Vec<u8>, grad: &Grad| Addition { dst: bytes.as_mut_ptr(), sums: sums(grad), src: grad.span(0), overwrite };
            let all: Vec<Addition> = together.iter_mut().zip(&grads).map(|(bytes, grad)| at(bytes, grad)).collect();
            // SAFETY: every array has as many elements as its gradient, and both outlive the call.
            unsafe { add_at(&pool, Level::Baseline, &all) };
            for (words, grad) in apart.iter_mut().zip(&grads) {
                // SAFETY: as above.
                unsafe { add_at(&pool, Level::Baseline, &[at(words, grad)]) };
            }
            assert_eq!(together, apart);
            assert_ne!(together, old);
        }
    }
}

/// Where other work keeps the pool's threads busy, every turn is waited for: a chunk's additions take one, however many parameters it has.
#[test]
fn additions_take_one_turn_of_a_busy_pool() {
    let pool = Pool::new(Some(2));
    let grads: Vec<Grad> = (0..9).map(|_| Grad::new(GradDtype::Bf16, &vec![1.0; 70_000])).collect();
    let mut sums = vec![vec![0.0_f32; 70_000]; 9];
    let (turns, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Acquire) {
                pool.for_each_grain(2, |_| std::thread::sleep(Duration::from_millis(50)));
                turns.fetch_add(1, Ordering::AcqRel);
            }
        });
        while turns.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
        let before = turns.load(Ordering::Acquire);
        let all: Vec<Addition> = sums.iter_mut().zip(&grads).map(|(sum, grad)| addition(sum.as_mut_ptr(), grad.span(0), false)).collect();
        // SAFETY: the vectors and gradients have equally many elements and outlive the call.
        unsafe { add_at(&pool, Level::Baseline, &all) };
        let waited = turns.load(Ordering::Acquire) - before;
        done.store(true, Ordering::Release);
        assert!(waited < 6, "nine additions waited for {waited} turns of other work");
    });
    assert!(sums.iter().flatten().all(|&sum| sum.to_bits() == 1.0_f32.to_bits()));
}

#[test]
#[should_panic(expected = "sums of Bf16 are kept in Fp16")]
fn sums_of_another_type_are_refused() {
    let grad = Grad::new(GradDtype::Bf16, &[1.0]);
    let addition = Addition { dst: std::ptr::dangling_mut(), sums: GradDtype::Fp16, src: grad.span(0), overwrite: true };
    // SAFETY: nothing is read or written before the types are looked at.
    unsafe { add_at(&Pool::new(Some(1)), Level::Baseline, &[addition]) };
}

#[test]
fn long_arrays_are_covered_once_by_all_threads() {
    let mut random = Random(6);
    let numel = 200_001;
    let values = random.uniforms(numel);
    let grad = Grad::new(GradDtype::Bf16, &values);
    let mut sum = values.clone();
    let mut bytes = vec![0_u8; 3 * (1 << 20) + 5];
    let source: Vec<u8> = (0..bytes.len()).map(|i| (i % 251) as u8).collect();
    let pool = Pool::new(Some(3));
    // SAFETY: the vectors and the gradient have the lengths named and outlive the calls.
    unsafe {
        add_at(&pool, Level::Baseline, &[addition(sum.as_mut_ptr(), grad.span(0), false)]);
        copy(&pool, source.as_ptr(), bytes.as_mut_ptr(), bytes.len());
    }
    assert!((0..numel).all(|i| sum[i].to_bits() == (values[i] + grad.values[i]).to_bits()));
    assert_eq!(bytes, source);
}

#[test]
fn copies_may_begin_and_end_anywhere() {
    let source: Vec<u8> = (0..400_u32).map(|i| (i % 251) as u8).collect();
    let pool = Pool::new(Some(1));
    for (from, to) in [(0, 0), (1, 0), (0, 1), (3, 15), (7, 7)] {
        for len in [0, 1, 14, 15, 16, 17, 63, 64, 65, 300] {
            let mut bytes = vec![0_u8; 400];
            // SAFETY: both vectors have more bytes than are copied, and outlive the call.
            unsafe { copy(&pool, source[from..].as_ptr(), bytes[to..].as_mut_ptr(), len) };
            assert_eq!(&bytes[to..to + len], &source[from..from + len], "{len} bytes from {from} to {to}");
            assert!(bytes[..to].iter().chain(&bytes[to + len..]).all(|&byte| byte == 0), "{len} bytes from {from} to {to}");
        }
    }
}
