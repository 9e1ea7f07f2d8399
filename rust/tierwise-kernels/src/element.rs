//! Conversions of single elements, written so that loops over them vectorise at every level.

use half::{bf16, f16};

/// An element type of gradients and parameters.
pub(crate) trait Element: Copy + Send + Sync {
    /// The value in fp32, exactly. NaN stays NaN.
    fn widen(self) -> f32;
    /// Rounds to nearest, ties to even, overflow to infinity. NaN stays NaN.
    fn round(value: f32) -> Self;
}

impl Element for f32 {
    #[inline]
    fn widen(self) -> f32 {
        self
    }

    #[inline]
    fn round(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline]
    fn widen(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }

    #[inline]
    fn round(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
        Self::from_bits(if value.is_nan() { 0x7fc0 } else { rounded })
    }
}

impl Element for f16 {
    #[inline]
    fn widen(self) -> f32 {
        const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
        let bits = self.to_bits() as u32;
        let shifted = (bits & 0x7fff) << 13;
        let exponent = bits & 0x7c00;
        // A subnormal is its fraction added to 2^-14, less 2^-14: exact, and no fp32 denormal slows it down.
        let subnormal = (f32::from_bits(SMALLEST_NORMAL | shifted) - f32::from_bits(SMALLEST_NORMAL)).to_bits();
        let normal = shifted + ((127 - 15) << 23);
        let special = shifted | 0x7f80_0000;
        let magnitude = if exponent == 0 {
            subnormal
        } else if exponent == 0x7c00 {
            special
        } else {
            normal
        };
        f32::from_bits(magnitude | ((bits & 0x8000) << 16))
    }

    #[inline]
    fn round(value: f32) -> Self {
        const SMALLEST_NORMAL: u32 = 0x3880_0000; // 2^-14
        const TOO_LARGE: u32 = 0x4780_0000; // 2^16; 65520 and above reach infinity by rounding
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        // One unit in the last place of 0.5 is the fp16 subnormals' unit, so the addition rounds there.
        let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5_f32.to_bits());
        let normal = magnitude.wrapping_add(0xfff + ((magnitude >> 13) & 1)).wrapping_sub((127 - 15) << 23) >> 13;
        let special = if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        let rounded = if magnitude < SMALLEST_NORMAL {
            subnormal
        } else if magnitude >= TOO_LARGE {
            special
        } else {
            normal
        };
        Self::from_bits((rounded | ((bits >> 16) & 0x8000)) as u16)
    }
}

/// See [`crate::convert::split_master`].
#[inline]
pub(crate) fn split(master: f32) -> (u16, i16) {
    // A NaN payload could round to an infinity or carry into the sign; one quiet NaN cannot.
    let bits = if master.is_nan() { 0x7fc0_0000 } else { master.to_bits() };
    ((bits.wrapping_add(0x8000) >> 16) as u16, bits as u16 as i16)
}

/// See [`crate::convert::join_master`].
#[inline]
pub(crate) fn join(hi: u16, lo: i16) -> f32 {
    f32::from_bits(((hi as u32) << 16).wrapping_add(lo as i32 as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn widening_equals_half_for_every_value() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(same(b.widen(), b.to_f32()), "bf16 {bits:#x}");
            assert!(same(h.widen(), h.to_f32_const()), "fp16 {bits:#x}");
        }
    }

    fn rounds_like_half(x: f32) {
        let (b, h) = (bf16::round(x), f16::round(x));
        let (b_half, h_half) = (bf16::from_f32_const(x), f16::from_f32_const(x));
        assert!(b.to_bits() == b_half.to_bits() || (b.is_nan() && b_half.is_nan()), "bf16 of {x:e}: {b:?}, not {b_half:?}");
        assert!(h.to_bits() == h_half.to_bits() || (h.is_nan() && h_half.is_nan()), "fp16 of {x:e}: {h:?}, not {h_half:?}");
    }

    #[test]
    fn rounding_equals_half_at_every_tie_and_its_neighbours() {
        for bits in 0..=u16::MAX {
            for value in [bf16::from_bits(bits).to_f32(), f16::from_bits(bits).to_f32_const()] {
                // Halfway to the next bf16, the next normal and the next subnormal fp16.
                for offset in [0, 0x8000, 0x1000, 0x80_0000 >> 1] {
                    for neighbour in [u32::MAX, 0, 1] {
                        rounds_like_half(f32::from_bits(value.to_bits().wrapping_add(offset).wrapping_add(neighbour)));
                    }
                }
            }
            // Ties of subnormal fp16 values.
            let tie = (f32::from(bits) + 0.5) * (-24_f32).exp2();
            for neighbour in [u32::MAX, 0, 1] {
                rounds_like_half(f32::from_bits(tie.to_bits().wrapping_add(neighbour)));
            }
        }
    }

    proptest! {
        #[test]
        fn rounding_equals_half(bits: u32) {
            rounds_like_half(f32::from_bits(bits));
        }
    }
}
