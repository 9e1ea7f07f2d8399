//! The Adam step against an obvious scalar reference (bits), against f64 (a bound), and against itself at other levels and threads.

mod common;

use common::{GRAD_DTYPES, Grad, Random, any_f32, same};
use half::f16;
use proptest::prelude::*;
use tierwise_kernels::adam::{Pass, adam_segments, adam_segments_at, adam_undoable_at};
use tierwise_kernels::convert::{join_master, split_master};
use tierwise_kernels::dispatch::Level;
use tierwise_kernels::{AdamConstants, AdamHyper, AdamSegment, Format, GradDtype, Pool, UndoRecord};

const FORMATS: [Format; 3] = [Format::SplitBf16, Format::Fp16Master, Format::Fp32];

const HYPER: AdamHyper = AdamHyper { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, decoupled: true };

/// A parameter and its states in one format.
#[derive(Clone)]
struct Param {
    format: Format,
    param16: Vec<u16>,
    param32: Vec<f32>,
    lo: Vec<i16>,
    master: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl Param {
    fn new(format: Format, weights: &[f32], exp_avg: &[f32], exp_avg_sq: &[f32]) -> Self {
        let (hi, lo): (Vec<u16>, Vec<i16>) = weights.iter().map(|&w| split_master(w)).unzip();
        let mut param = Self {
            format,
            param16: vec![],
            param32: vec![],
            lo: vec![],
            master: vec![],
            exp_avg: exp_avg.to_vec(),
            exp_avg_sq: exp_avg_sq.to_vec(),
        };
        match format {
            Format::SplitBf16 => (param.param16, param.lo) = (hi, lo),
            Format::Fp16Master => (param.param16, param.master) = (vec![0; weights.len()], weights.to_vec()),
            Format::Fp32 => param.param32 = weights.to_vec(),
        }
        param
    }

    fn segment(&mut self, grad: &Grad, constants: AdamConstants) -> AdamSegment {
        let (param, master) = match self.format {
            Format::SplitBf16 => (self.param16.as_mut_ptr().cast(), self.lo.as_mut_ptr().cast()),
            Format::Fp16Master => (self.param16.as_mut_ptr().cast(), self.master.as_mut_ptr().cast()),
            Format::Fp32 => (self.param32.as_mut_ptr().cast(), std::ptr::null_mut()),
        };
        AdamSegment {
            format: self.format,
            grad_dtype: grad.dtype,
            numel: grad.values.len(),
            param,
            master,
            exp_avg: self.exp_avg.as_mut_ptr(),
            exp_avg_sq: self.exp_avg_sq.as_mut_ptr(),
            grad: grad.ptr(),
            constants,
        }
    }

    /// Room for what a step of it overwrites, `shift` elements behind the start of each array.
    fn room(&self, shift: usize) -> Self {
        let room = |len: usize| if len == 0 { 0 } else { len + shift };
        Self {
            format: self.format,
            param16: vec![0x7fc0; room(self.param16.len())],
            param32: vec![7.5; room(self.param32.len())],
            lo: vec![-1; room(self.lo.len())],
            master: vec![7.5; room(self.master.len())],
            exp_avg: vec![7.5; room(self.exp_avg.len())],
            exp_avg_sq: vec![7.5; room(self.exp_avg_sq.len())],
        }
    }

    fn record(&mut self, grad: &Grad, shift: usize) -> UndoRecord {
        let segment = self.segment(grad, AdamConstants::new(&HYPER, 1, 1.0));
        UndoRecord {
            param: segment.param.wrapping_add(shift * self.format.param_bytes()),
            master: segment.master.wrapping_add(shift * self.format.master_bytes()),
            exp_avg: segment.exp_avg.wrapping_add(shift),
            exp_avg_sq: segment.exp_avg_sq.wrapping_add(shift),
        }
    }

    /// Every array, in bits.
    fn bits(&self) -> [Vec<u32>; 6] {
        let floats = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
        [
            self.param16.iter().map(|&bits| u32::from(bits)).collect(),
            floats(&self.param32),
            self.lo.iter().map(|&bits| u32::from(bits.cast_unsigned())).collect(),
            floats(&self.master),
            floats(&self.exp_avg),
            floats(&self.exp_avg_sq),
        ]
    }

    fn weight(&self, i: usize) -> f32 {
        match self.format {
            Format::SplitBf16 => join_master(self.param16[i], self.lo[i]),
            Format::Fp16Master => self.master[i],
            Format::Fp32 => self.param32[i],
        }
    }

    /// The 16-bit parameter is what the master rounds to; NaN by being one.
    fn rounded_is_consistent(&self, i: usize) -> bool {
        let w = self.weight(i);
        match self.format {
            Format::SplitBf16 if w.is_nan() => self.param16[i] & 0x7fff > 0x7f80,
            Format::SplitBf16 => split_master(w) == (self.param16[i], self.lo[i]),
            Format::Fp16Master if w.is_nan() => self.param16[i] & 0x7fff > 0x7c00,
            Format::Fp16Master => f16::from_f32_const(w).to_bits() == self.param16[i],
            Format::Fp32 => true,
        }
    }

    fn assert_same(&self, other: &Self, what: &str) {
        for i in 0..self.exp_avg.len() {
            let pairs = [(self.weight(i), other.weight(i)), (self.exp_avg[i], other.exp_avg[i]), (self.exp_avg_sq[i], other.exp_avg_sq[i])];
            assert!(pairs.iter().all(|&(a, b)| same(a, b)), "{what}: {:?} {pairs:?} at {i}", self.format);
            assert!(self.rounded_is_consistent(i) && other.rounded_is_consistent(i), "{what}: 16-bit parameter at {i}");
        }
    }

    /// The definition, one element after the other.
    #[expect(clippy::many_single_char_names, reason = "the names of the definition")]
    fn reference_step(&mut self, grad: &Grad, c: &AdamConstants) {
        let flush = |x: f32| if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x };
        for (i, &grad) in grad.values.iter().enumerate() {
            let w = self.weight(i);
            let mut g = grad * c.grad_scale;
            if c.l2 != 0.0 {
                let decay = c.l2 * w;
                g += decay;
            }
            let (old, new) = (c.beta1 * self.exp_avg[i], c.one_minus_beta1 * g);
            let m = flush(old + new);
            let (old, new) = (c.beta2 * self.exp_avg_sq[i], c.one_minus_beta2 * g);
            let new = new * g;
            let v = flush(old + new);
            let denom = v.sqrt() / c.bias_correction2_sqrt;
            let denom = denom + c.eps;
            let w = w * c.decay;
            let update = c.step_size * (m / denom);
            let w = w - update;
            (self.exp_avg[i], self.exp_avg_sq[i]) = (m, v);
            match self.format {
                Format::SplitBf16 => (self.param16[i], self.lo[i]) = split_master(w),
                Format::Fp16Master => (self.param16[i], self.master[i]) = (f16::from_f32_const(w).to_bits(), w),
                Format::Fp32 => self.param32[i] = w,
            }
        }
    }
}

fn step(pool: &Pool, level: Level, segments: &[AdamSegment]) {
    // SAFETY: the segments point into vectors that the calling test owns and does not touch meanwhile.
    unsafe { adam_segments_at(pool, level, Pass::Whole, segments) }
}

/// Parameters first, moments later; gives what is there between the two.
fn step_in_two(pool: &Pool, level: Level, param: &mut Param, grad: &Grad, constants: AdamConstants) -> Param {
    // SAFETY: as in `step`.
    unsafe { adam_segments_at(pool, level, Pass::Params, &[param.segment(grad, constants)]) };
    let between = param.clone();
    // SAFETY: as in `step`.
    unsafe { adam_segments_at(pool, level, Pass::Moments, &[param.segment(grad, constants)]) };
    between
}

/// Steps parameters, and checks that the records hold, from element `shift` on, what was overwritten.
fn step_undoable(pool: &Pool, level: Level, params: &mut [Param], grads: &[Grad], constants: AdamConstants, shift: usize) {
    let before = params.to_vec();
    let mut rooms: Vec<Param> = params.iter().map(|param| param.room(shift)).collect();
    let blank: Vec<Param> = rooms.clone();
    let segments: Vec<(AdamSegment, UndoRecord)> = params
        .iter_mut()
        .zip(grads)
        .zip(&mut rooms)
        .map(|((param, grad), room)| (param.segment(grad, constants), room.record(grad, shift)))
        .collect();
    // SAFETY: as in `step`, of the records too.
    unsafe { adam_undoable_at(pool, level, &segments) };
    for ((before, room), blank) in before.iter().zip(&rooms).zip(&blank) {
        for ((before, room), blank) in before.bits().iter().zip(room.bits()).zip(blank.bits()) {
            let shift = room.len() - before.len();
            assert!(room[..shift] == blank[..shift] && room[shift..] == before[..], "{level:?}, shift {shift}");
        }
    }
}

fn hyper() -> impl Strategy<Value = AdamHyper> {
    (1e-6..1e-1, 0.0..0.999, 0.5..0.9999, 0.0..1e-6, prop::sample::select(vec![0.0, 0.01, 0.3]), any::<bool>())
        .prop_map(|(lr, beta1, beta2, eps, weight_decay, decoupled)| AdamHyper { lr, beta1, beta2, eps, weight_decay, decoupled })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_level_equals_the_reference(
        elements in prop::collection::vec((any_f32(), any_f32(), any_f32(), any_f32()), 0..300),
        hyper in hyper(),
        step_count in 1_u64..10_000,
        grad_scale in prop_oneof![Just(1.0_f32), 1e-6_f32..2.0],
    ) {
        let pool = Pool::new(Some(2));
        let column = |f: fn(&(f32, f32, f32, f32)) -> f32| elements.iter().map(f).collect::<Vec<f32>>();
        let (weights, exp_avg) = (column(|e| e.0), column(|e| e.1));
        let (exp_avg_sq, grads) = (column(|e| e.2.abs()), column(|e| e.3));
        let constants = AdamConstants::new(&hyper, step_count, grad_scale);
        for format in FORMATS {
            for dtype in GRAD_DTYPES {
                let grad = Grad::new(dtype, &grads);
                let before = Param::new(format, &weights, &exp_avg, &exp_avg_sq);
                let mut expected = before.clone();
                expected.reference_step(&grad, &constants);
                for level in Level::supported() {
                    let mut param = before.clone();
                    step(&pool, level, &[param.segment(&grad, constants)]);
                    param.assert_same(&expected, &format!("{level:?} {dtype:?}"));
                    let mut param = [before.clone()];
                    step_undoable(&pool, level, &mut param, std::slice::from_ref(&grad), constants, 0);
                    param[0].assert_same(&expected, &format!("undoable, {level:?} {dtype:?}"));
                    let mut param = before.clone();
                    let between = step_in_two(&pool, level, &mut param, &grad, constants);
                    param.assert_same(&expected, &format!("two passes, {level:?} {dtype:?}"));
                    // The new weights are there after the first pass; moments that do not need the old ones are still to come.
                    let moments = if constants.l2 == 0.0 { &before } else { &expected };
                    let (exp_avg, exp_avg_sq) = (moments.exp_avg.clone(), moments.exp_avg_sq.clone());
                    between.assert_same(&Param { exp_avg, exp_avg_sq, ..expected.clone() }, "between two passes");
                }
            }
        }
    }
}

/// Several grains in one segment, and segments of many sizes, some empty: threads and levels share the work, never the bits.
#[test]
fn threads_and_levels_give_equal_bits() {
    let mut random = Random(1);
    let sizes = [200_003, 0, 1, 63, 64, 65, 65_536, 65_537, 4096, 0];
    let grads: Vec<Grad> = sizes.iter().enumerate().map(|(i, &numel)| Grad::new(GRAD_DTYPES[i % 3], &random.uniforms(numel))).collect();
    let params: Vec<Param> = sizes
        .iter()
        .enumerate()
        .map(|(i, &numel)| {
            let (w, m) = (random.uniforms(numel), random.uniforms(numel));
            let v: Vec<f32> = random.uniforms(numel).iter().map(|x| x * x).collect();
            Param::new(FORMATS[i % 3], &w, &m, &v)
        })
        .collect();
    let constants = AdamConstants::new(&HYPER, 3, 0.7);
    let mut expected = params.clone();
    for (param, grad) in expected.iter_mut().zip(&grads) {
        param.reference_step(grad, &constants);
    }
    for threads in [1, 2, 3] {
        let pool = Pool::new(Some(threads));
        assert_eq!(pool.threads(), threads);
        for level in Level::supported() {
            let mut stepped = params.clone();
            let segments: Vec<AdamSegment> = stepped.iter_mut().zip(&grads).map(|(param, grad)| param.segment(grad, constants)).collect();
            step(&pool, level, &segments);
            for (param, expected) in stepped.iter().zip(&expected) {
                param.assert_same(expected, &format!("{threads} threads, {level:?}"));
            }
            for shift in [0, 1, 8] {
                let mut stepped = params.clone();
                step_undoable(&pool, level, &mut stepped, &grads, constants, shift);
                for (param, expected) in stepped.iter().zip(&expected) {
                    param.assert_same(expected, &format!("undoable, {threads} threads, {level:?}"));
                }
            }
        }
    }
}

/// Gradients and states start where they start: only natural alignment is needed.
#[test]
fn any_naturally_aligned_address_gives_equal_bits() {
    let mut random = Random(2);
    let pool = Pool::new(Some(1));
    let constants = AdamConstants::new(&HYPER, 1, 1.0);
    let (w, m, g) = (random.uniforms(500), random.uniforms(500), random.uniforms(500));
    let v: Vec<f32> = m.iter().map(|x| x * x).collect();
    for dtype in GRAD_DTYPES {
        let grad = Grad::new(dtype, &g);
        let mut whole = Param::new(Format::SplitBf16, &w, &m, &v);
        let before = whole.clone();
        whole.reference_step(&grad, &constants);
        for start in [1, 2, 3, 7, 31] {
            let mut param = before.clone();
            let segment = param.segment(&grad, constants);
            let shifted = AdamSegment {
                numel: 500 - start,
                param: segment.param.wrapping_add(2 * start),
                master: segment.master.wrapping_add(2 * start),
                exp_avg: segment.exp_avg.wrapping_add(start),
                exp_avg_sq: segment.exp_avg_sq.wrapping_add(start),
                grad: grad.span(start).ptr,
                ..segment
            };
            // SAFETY: the segment points into `param` and `grad`, which live to the end of the loop body.
            unsafe { adam_segments(&pool, &[shifted]) };
            for i in 0..500 {
                let expected = if i < start { &before } else { &whole };
                assert!(same(param.weight(i), expected.weight(i)), "{dtype:?}, start {start}, element {i}");
            }
        }
    }
}

/// The fp32 step against the textbook in f64. The bound: about ten roundings of 2^-24 each in the moments and the update, which is at
/// most `lr / (1 - beta1)` here, and two of the weight.
#[test]
fn one_step_is_close_to_f64() {
    let mut random = Random(3);
    let numel = 10_000;
    let (w, g) = (random.uniforms(numel), random.uniforms(numel));
    let m: Vec<f32> = random.uniforms(numel).iter().map(|x| x * 0.1).collect();
    let v: Vec<f32> = random.uniforms(numel).iter().map(|x| 0.01 + 0.1 * x * x).collect();
    let epsilon = f64::from(f32::EPSILON) / 2.0;
    for decoupled in [true, false] {
        for step_count in [1, 2, 1000] {
            let hyper = AdamHyper { decoupled, ..HYPER };
            let grad = Grad::new(GradDtype::Fp32, &g);
            let mut param = Param::new(Format::Fp32, &w, &m, &v);
            // SAFETY: the segment points into `param` and `grad`, which live to the end of the loop body.
            unsafe { adam_segments(&Pool::new(Some(2)), &[param.segment(&grad, AdamConstants::new(&hyper, step_count, 0.5))]) };
            let (correction1, correction2) = (1.0 - hyper.beta1.powi(step_count as i32), 1.0 - hyper.beta2.powi(step_count as i32));
            for i in 0..numel {
                let [w, m, v, mut g] = [w[i], m[i], v[i], g[i]].map(f64::from);
                g *= 0.5;
                if !decoupled {
                    g += hyper.weight_decay * w;
                }
                let m = hyper.beta1 * m + (1.0 - hyper.beta1) * g;
                let v = hyper.beta2 * v + (1.0 - hyper.beta2) * g * g;
                let update = hyper.lr * (m / correction1) / ((v / correction2).sqrt() + hyper.eps);
                let w = if decoupled { w * (1.0 - hyper.lr * hyper.weight_decay) - update } else { w - update };
                let close = |x: f32, y: f64, scale: f64| (f64::from(x) - y).abs() <= 16.0 * epsilon * scale;
                assert!(close(param.exp_avg[i], m, 0.3), "exp_avg {} {m}", param.exp_avg[i]);
                assert!(close(param.exp_avg_sq[i], v, v), "exp_avg_sq {} {v}", param.exp_avg_sq[i]);
                let scale = hyper.lr / correction1 * 0.3 / ((v / correction2).sqrt() + hyper.eps) + 0.2;
                assert!(close(param.weight(i), w, scale), "weight {} {w}", param.weight(i));
            }
        }
    }
}

#[test]
fn denormal_moments_become_positive_zero() {
    let tiny = [f32::from_bits(1), -f32::from_bits(1), f32::from_bits(4), 1e-38, -1e-38, f32::MIN_POSITIVE, -f32::MIN_POSITIVE];
    let zeros = [0.0; 7];
    let grad = Grad::new(GradDtype::Bf16, &zeros);
    for level in Level::supported() {
        let mut param = Param::new(Format::SplitBf16, &[1.0; 7], &tiny, &tiny.map(f32::abs));
        step(&Pool::new(Some(1)), level, &[param.segment(&grad, AdamConstants::new(&HYPER, 1, 1.0))]);
        assert!(param.exp_avg.iter().chain(&param.exp_avg_sq).all(|x| x.to_bits() == 0), "{:?}", param.exp_avg);
    }
}

#[test]
fn smallest_normal_moment_is_kept() {
    let grad = Grad::new(GradDtype::Fp32, &[0.0; 64]);
    let hyper = AdamHyper { beta1: 1.0 - 1e-12, beta2: 1.0 - 1e-12, ..HYPER };
    let mut param = Param::new(Format::Fp32, &[1.0; 64], &[-f32::MIN_POSITIVE; 64], &[f32::MIN_POSITIVE; 64]);
    step(&Pool::new(Some(1)), Level::Baseline, &[param.segment(&grad, AdamConstants::new(&hyper, 1, 1.0))]);
    assert!(param.exp_avg.iter().all(|&x| x.to_bits() == (-f32::MIN_POSITIVE).to_bits()));
    assert!(param.exp_avg_sq.iter().all(|&x| x.to_bits() == f32::MIN_POSITIVE.to_bits()));
}

#[test]
fn a_nan_gradient_is_visible_in_the_bf16_parameter() {
    // The payload of all ones, CUDA's NaN, would carry into the sign and read as -0.
    let grad = Grad::new(GradDtype::Fp32, &[f32::from_bits(0x7fff_ffff); 70]);
    for level in Level::supported() {
        let mut param = Param::new(Format::SplitBf16, &[1.0; 70], &[0.0; 70], &[0.0; 70]);
        step(&Pool::new(Some(1)), level, &[param.segment(&grad, AdamConstants::new(&HYPER, 1, 1.0))]);
        assert!(param.param16.iter().all(|&hi| hi & 0x7fff > 0x7f80), "{:x?}", &param.param16[..4]);
    }
}

#[test]
fn constants_are_computed_in_f64() {
    let c = AdamConstants::new(&HYPER, 2, 0.5);
    let expected = AdamConstants {
        grad_scale: 0.5,
        beta1: 0.9,
        one_minus_beta1: (1.0 - 0.9_f64) as f32,
        beta2: 0.95,
        one_minus_beta2: (1.0 - 0.95_f64) as f32,
        bias_correction2_sqrt: (1.0 - 0.95_f64 * 0.95).sqrt() as f32,
        eps: 1e-8,
        step_size: (1e-3 / (1.0 - 0.9_f64 * 0.9)) as f32,
        decay: (1.0 - 1e-4) as f32,
        l2: 0.0,
    };
    assert_eq!(c, expected);
    let coupled = AdamConstants::new(&AdamHyper { decoupled: false, ..HYPER }, 2, 0.5);
    assert_eq!((coupled.decay, coupled.l2), (1.0, 0.1));
}

#[test]
#[should_panic(expected = "got step 0")]
fn step_zero_is_refused() {
    AdamConstants::new(&HYPER, 0, 1.0);
}
