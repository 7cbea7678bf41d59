//! Philox 4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! Counter-based: element `i` of a random tensor depends only on (seed, stream, i), so a recomputed dropout
//! mask is the same mask, and a result does not depend on threads or tiles.

use crate::Distribution;

/// One block: four words from a counter and a key.
#[inline]
pub const fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let mut round = 0;
    while round < 10 {
        let a = 0xD251_1F53_u64 * counter[0] as u64;
        let b = 0xCD9E_8D57_u64 * counter[2] as u64;
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        round += 1;
    }
    counter
}

/// Element `index` of the random tensor (`seed`, `stream`).
///
/// Uniform values are multiples of 2⁻²⁴ in `[0, 1)`, exact in `f32`. Normal values are Box-Muller of two such,
/// computed in `f64`.
#[inline]
pub fn random_f64(distribution: Distribution, seed: i64, stream: u32, index: u64) -> f64 {
    let counter = [index as u32, (index >> 32) as u32, stream, 0];
    let words = philox4x32(counter, [seed as u32, (seed as u64 >> 32) as u32]);
    let unit = |word: u32| f64::from(word >> 8) * (1.0 / f64::from(1u32 << 24));
    match distribution {
        Distribution::Uniform => unit(words[0]),
        Distribution::Normal => {
            // 1 - u lies in (0, 1], where the logarithm is finite.
            let radius = (-2.0 * (1.0 - unit(words[0])).ln()).sqrt();
            radius * (std::f64::consts::TAU * unit(words[1])).cos()
        }
    }
}
