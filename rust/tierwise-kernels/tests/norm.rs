//! The reduction tree against an obvious one (bits) and against f64 (a bound).

mod common;

use common::{GRAD_DTYPES, Grad, Random, any_f32};
use proptest::prelude::*;
use tierwise_kernels::dispatch::Level;
use tierwise_kernels::norm::{BLOCK_NUMEL, LANES, PartialSum, sum_squares, sum_squares_at};
use tierwise_kernels::{GradDtype, GradSpan, Pool};

/// The tree as its definition reads.
fn reference(values: &[f32]) -> f64 {
    let mut sum = 0.0;
    for block in values.chunks(BLOCK_NUMEL) {
        let mut lanes = vec![0.0_f32; LANES];
        for (i, x) in block.iter().enumerate() {
            let square = x * x;
            lanes[i % LANES] += square;
        }
        for s in (0..11).rev().map(|bit| 1 << bit) {
            for j in 0..s {
                lanes[j] += lanes[j + s];
            }
        }
        sum += f64::from(lanes[0]);
    }
    sum
}

fn assert_same(sums: &[f64], expected: &[f64]) {
    assert_eq!(sums.len(), expected.len());
    for (sum, expected) in sums.iter().zip(expected) {
        assert!(sum.to_bits() == expected.to_bits() || (sum.is_nan() && expected.is_nan()), "{sum:e}, not {expected:e}");
    }
}

#[test]
fn levels_threads_and_addresses_equal_the_tree() {
    let mut random = Random(4);
    let sizes = [0, 1, 2047, 2048, 2049, 65_535, 65_536, 65_537, 300_001, 0];
    for dtype in GRAD_DTYPES {
        let grads: Vec<Grad> = sizes.iter().map(|&numel| Grad::new(dtype, &random.uniforms(numel + 1))).collect();
        // From the second element: natural alignment only.
        let spans: Vec<GradSpan> = grads.iter().map(|grad| grad.span(1)).collect();
        let expected: Vec<f64> = grads.iter().map(|grad| reference(&grad.values[1..])).collect();
        for threads in [1, 2, 3] {
            let pool = Pool::new(Some(threads));
            for level in Level::supported() {
                // SAFETY: `grads` owns the elements and lives to the end of the loop body.
                assert_same(&unsafe { sum_squares_at(&pool, level, &spans) }, &expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn corners_equal_the_tree(values in prop::collection::vec(any_f32(), 0..5000)) {
        let pool = Pool::new(Some(1));
        for dtype in GRAD_DTYPES {
            let grad = Grad::new(dtype, &values);
            for level in Level::supported() {
                // SAFETY: `grad` owns the elements and lives to the end of the loop body.
                assert_same(&unsafe { sum_squares_at(&pool, level, &[grad.span(0)]) }, &[reference(&grad.values)]);
            }
        }
    }
}

/// All terms are positive, so the relative error is at most one rounding per addition on the longest path (32 rows, 11 halvings) and one
/// of the square.
#[test]
fn close_to_f64() {
    let mut random = Random(5);
    let grad = Grad::new(GradDtype::Fp32, &random.uniforms(500_000));
    let exact: f64 = grad.values.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    // SAFETY: `grad` owns the elements and outlives the call.
    let sum = unsafe { sum_squares(&Pool::new(Some(2)), &[grad.span(0)]) }[0];
    assert!((sum - exact).abs() <= exact * 44.0 * f64::from(f32::EPSILON) / 2.0, "{sum} {exact}");
}

#[test]
fn a_non_finite_element_is_seen() {
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut values = vec![0.5; 70_000];
        values[69_999] = bad;
        for dtype in GRAD_DTYPES {
            let grad = Grad::new(dtype, &values);
            // SAFETY: `grad` owns the elements and outlives the call.
            assert!(!unsafe { sum_squares(&Pool::new(Some(2)), &[grad.span(0)]) }[0].is_finite());
        }
    }
}

/// Parts as pieces cut them, and borders in the middle of blocks and of rows.
#[test]
fn a_span_in_parts_has_the_bits_of_the_whole() {
    let mut random = Random(11);
    let pool = Pool::new(Some(2));
    let numel = 300_001;
    for dtype in GRAD_DTYPES {
        let grad = Grad::new(dtype, &random.uniforms(numel));
        let whole = grad.span(0);
        let expected = [reference(&grad.values)];
        for sizes in
            [vec![numel], vec![4096], vec![1], vec![65_536], vec![65_537, 3], vec![64, 200_000], vec![2047, 2049, 130_000], vec![0, 70_000]]
        {
            let mut partial = PartialSum::default();
            let mut first = 0;
            for size in sizes.iter().cycle() {
                let size = (*size).min(numel - first);
                let part = GradSpan { ptr: whole.ptr.wrapping_add(first * dtype.bytes()), dtype, numel: size };
                // SAFETY: `grad` owns the elements and outlives the call.
                unsafe { partial.add(&pool, part) };
                first += size;
                if first == numel {
                    break;
                }
            }
            assert_same(&[partial.finish()], &expected);
        }
    }
    assert_eq!(PartialSum::default().finish().to_bits(), 0.0_f64.to_bits());
}
