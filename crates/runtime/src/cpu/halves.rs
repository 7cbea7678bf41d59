//! Between f32 and the floats of 16 bits, without branches, so that compilers vectorise it.

use half::{bf16, f16};

/// Rounded to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded } as u16)
}

/// bf16 is the upper half of f32.
#[inline(always)]
pub(crate) fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Rounded to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_f16(x: f32) -> f16 {
    const INFINITY: u32 = 0x7c00;
    // Below, rounding up carries into the exponent, and so to infinity, by itself.
    const TOO_LARGE: u32 = 143 << 23;
    const SMALLEST_NORMAL: u32 = 113 << 23;
    // Added to a number below the smallest normal one, it leaves the bits of that number as f16 in its own last ones.
    const ALIGN: f32 = 0.5;
    let sign = x.to_bits() & 0x8000_0000;
    let bits = x.to_bits() ^ sign;
    let odd = (bits >> 13) & 1;
    let normal = bits.wrapping_sub(112 << 23).wrapping_add(0xfff + odd) >> 13;
    let small = (f32::from_bits(bits) + ALIGN).to_bits().wrapping_sub(ALIGN.to_bits());
    let quiet = INFINITY | 0x200 | (bits >> 13) & 0x1ff;
    let y = if bits < SMALLEST_NORMAL { small } else { normal };
    let y = if bits >= TOO_LARGE { INFINITY } else { y };
    let y = if x.is_nan() { quiet } else { y };
    f16::from_bits((y | sign >> 16) as u16)
}

#[inline(always)]
pub(crate) fn f16_to_f32(x: f16) -> f32 {
    // The difference of the exponents' biases: a multiplication makes numbers below the smallest normal one right, too.
    const BIAS: f32 = f32::from_bits((127 + 112) << 23);
    let bits = u32::from(x.to_bits());
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * BIAS;
    // What is not finite has the largest exponent.
    let exponent = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | exponent | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_rounded_as_the_formats_say() {
        for bits in (0..=u32::MAX).step_by(997).chain([0x7f80_0000, 0xff80_0000]) {
            let x = f32::from_bits(bits);
            // And its neighbours half way between two halves.
            for x in [x, f32::from_bits(bits & !0xfff), f32::from_bits(bits & !0x7fff)] {
                let (h, b) = (round_to_f16(x), round_to_bf16(x));
                assert!(h == f16::from_f32(x) || x.is_nan() && h.is_nan(), "{x:e}: {h}");
                assert!(b == bf16::from_f32(x) || x.is_nan() && b.is_nan(), "{x:e}: {b}");
                assert_eq!(h.is_sign_negative(), x.is_sign_negative());
            }
        }
    }

    #[test]
    fn every_half_is_widened_to_itself() {
        for bits in 0..=u16::MAX {
            let (h, b) = (f16::from_bits(bits), bf16::from_bits(bits));
            let (x, y) = (f16_to_f32(h), bf16_to_f32(b));
            assert!(x.to_bits() == h.to_f32().to_bits() || h.is_nan() && x.is_nan(), "{h}");
            assert!(y.to_bits() == b.to_f32().to_bits() || b.is_nan() && y.is_nan(), "{b}");
        }
    }
}
