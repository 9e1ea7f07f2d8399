//! Random numbers that hit the corners of fp32, and comparison of bits, shared by the tests.
#![allow(dead_code, unused_imports)] // Each test binary uses its part.

use half::{bf16, f16};
use proptest::prelude::*;
use tierwise_kernels::{GradDtype, GradSpan};

pub const GRAD_DTYPES: [GradDtype; 3] = [GradDtype::Bf16, GradDtype::Fp16, GradDtype::Fp32];

/// Any fp32 value, corners often.
pub fn any_f32() -> impl Strategy<Value = f32> {
    prop_oneof![
        4 => -2.0_f32..2.0,
        2 => any::<u32>().prop_map(f32::from_bits),
        1 => (0_u32..0x0080_0000, any::<bool>()).prop_map(|(bits, negative)| f32::from_bits(bits | u32::from(negative) << 31)),
        1 => prop::sample::select(vec![
            0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, f32::MIN_POSITIVE, -f32::MIN_POSITIVE,
            f32::from_bits(1), f32::from_bits(0x7fff_ffff), f32::from_bits(0xffff_ffff), f32::from_bits(0x7f80_0001),
            f32::from_bits(0x7f7f_8000), f32::from_bits(0x007f_ffff), 65504.0, 65519.0, 65520.0, 1e-20, 1e20,
        ]),
    ]
}

/// Equal bits, or both NaN.
pub fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Gradient elements of one type and the fp32 values they stand for.
pub struct Grad {
    pub dtype: GradDtype,
    pub values: Vec<f32>,
    bytes: Vec<u32>,
}

impl Grad {
    pub fn new(dtype: GradDtype, values: &[f32]) -> Self {
        let pairs = |bits: &dyn Fn(f32) -> u16| {
            values.chunks(2).map(|pair| pair.iter().rev().fold(0, |word, &x| word << 16 | u32::from(bits(x)))).collect()
        };
        let (bytes, values) = match dtype {
            GradDtype::Bf16 => {
                let round = |x| bf16::from_f32_const(x);
                (pairs(&|x| round(x).to_bits()), values.iter().map(|&x| round(x).to_f32_const()).collect())
            }
            GradDtype::Fp16 => {
                let round = |x| f16::from_f32_const(x);
                (pairs(&|x| round(x).to_bits()), values.iter().map(|&x| round(x).to_f32_const()).collect())
            }
            GradDtype::Fp32 => (values.iter().map(|x| x.to_bits()).collect(), values.to_vec()),
        };
        Self { dtype, values, bytes }
    }

    pub fn ptr(&self) -> *const u8 {
        self.bytes.as_ptr().cast()
    }

    /// The elements from `start`.
    pub fn span(&self, start: usize) -> GradSpan {
        assert!(start <= self.values.len());
        GradSpan { ptr: self.ptr().wrapping_add(start * self.dtype.bytes()), dtype: self.dtype, numel: self.values.len() - start }
    }
}

/// A small generator for sizes that proptest would shrink too slowly.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // SplitMix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Between -1 and 1.
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn uniforms(&mut self, numel: usize) -> Vec<f32> {
        (0..numel).map(|_| self.uniform()).collect()
    }
}
