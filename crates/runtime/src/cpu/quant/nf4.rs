//! Rows of NF4: a weight is an entry of a table of 16, times a scale of its block of 64.
//!
//! Nothing is rounded to integers here, for the table's entries are none: a row of blocks is multiplied with the f32
//! vector as it is, and the scale comes in once a block. A look-up is a shuffle of registers: one of 16 lanes with AVX-512,
//! two of 8 with AVX2. All versions give the same bits: the sums are kept in 16 lanes everywhere.

use super::unpack::UnpackFn;
use metal_candle_graph::BlockFormat;

/// `y[i] = Σ row i · x`, of as many rows as there are results.
pub(super) type DotFn = unsafe fn(&[u8], &[f32], &mut [f32]);

static TABLE: [f32; LANES] = BlockFormat::NF4_VALUES;
const BYTES: usize = BlockFormat::NF4.block_bytes();
const LEN: usize = BlockFormat::NF4.block_len();
const LANES: usize = 16;

/// Sixteen f32. What is added or multiplied is rounded at once.
///
/// # Safety
/// The methods may be called where the processor has the instruction set, from a function compiled for it.
unsafe trait Lanes: Copy {
    fn splat(x: f32) -> Self;
    fn load(from: &[f32; LANES]) -> Self;
    fn store(self, to: &mut [f32; LANES]);
    fn add(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    /// What sixteen codes stand for: in a byte, the high bits come first.
    fn look_up(codes: &[u8; LANES / 2]) -> Self;
}

#[inline(always)]
fn scale_and_codes(block: &[u8; BYTES]) -> (f32, &[[u8; LANES / 2]]) {
    let (scale, codes) = block.split_first_chunk().expect("metal-candle bug: a block of NF4");
    (f32::from_le_bytes(*scale), codes.as_chunks().0)
}

#[inline(always)]
unsafe fn dot_body<V: Lanes>(row: &[u8], x: &[f32], y: &mut f32) {
    let mut sums = V::splat(0.0);
    for (block, x) in row.as_chunks::<BYTES>().0.iter().zip(x.as_chunks::<LEN>().0) {
        let (scale, codes) = scale_and_codes(block);
        let mut of_block = V::splat(0.0);
        for (codes, x) in codes.iter().zip(x.as_chunks::<LANES>().0) {
            of_block = of_block.add(V::look_up(codes).mul(V::load(x)));
        }
        sums = sums.add(V::splat(scale).mul(of_block));
    }
    let mut all = [0.0; LANES];
    sums.store(&mut all);
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            all[i] += all[i + half];
        }
        half /= 2;
    }
    *y = all[0];
}

#[inline(always)]
unsafe fn dots_body<V: Lanes>(rows: &[u8], x: &[f32], y: &mut [f32]) {
    let len = rows.len() / y.len().max(1);
    for (i, y) in y.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { dot_body::<V>(&rows[i * len..(i + 1) * len], x, y) };
    }
}

/// `to = blocks`, from part `first` on, which counts 32 weights.
#[inline(always)]
unsafe fn unpack_body<V: Lanes>(row: &[u8], first: usize, to: &mut [f32]) {
    for (i, to) in to.as_chunks_mut::<{ LEN / 2 }>().0.iter_mut().enumerate() {
        let (at, half) = ((first + i) / 2, (first + i) % 2);
        let (scale, codes) = scale_and_codes(&row.as_chunks().0[at]);
        let scale = V::splat(scale);
        for (codes, to) in codes[2 * half..].iter().zip(to.as_chunks_mut::<LANES>().0) {
            scale.mul(V::look_up(codes)).store(to);
        }
    }
}

/// Any processor.
#[derive(Clone, Copy)]
struct Plain([f32; LANES]);

// SAFETY: no instruction set is needed.
unsafe impl Lanes for Plain {
    #[inline(always)]
    fn splat(x: f32) -> Plain {
        Plain([x; LANES])
    }
    #[inline(always)]
    fn load(from: &[f32; LANES]) -> Plain {
        Plain(*from)
    }
    #[inline(always)]
    fn store(self, to: &mut [f32; LANES]) {
        *to = self.0;
    }
    #[inline(always)]
    fn add(self, other: Plain) -> Plain {
        Plain(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }
    #[inline(always)]
    fn mul(self, other: Plain) -> Plain {
        Plain(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }
    #[inline(always)]
    fn look_up(codes: &[u8; LANES / 2]) -> Plain {
        let code = |i: usize| codes[i / 2] >> (if i.is_multiple_of(2) { 4 } else { 0 }) & 15;
        Plain(std::array::from_fn(|i| TABLE[usize::from(code(i))]))
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{LANES, Lanes, TABLE};
    use std::arch::x86_64::*;

    /// Where the codes of eight weights begin in a little-endian word.
    const SHIFTS: [i32; 8] = [4, 0, 12, 8, 20, 16, 28, 24];

    #[inline(always)]
    fn words(codes: &[u8; LANES / 2]) -> [i32; 2] {
        let (words, _) = codes.as_chunks();
        [i32::from_le_bytes(words[0]), i32::from_le_bytes(words[1])]
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx2([__m256; 2]);

    // SAFETY: arrays of f32 are read and written as long as they are.
    unsafe impl Lanes for Avx2 {
        #[inline(always)]
        fn splat(x: f32) -> Avx2 {
            // SAFETY: the trait's promise, of AVX2.
            unsafe { Avx2([_mm256_set1_ps(x); 2]) }
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Avx2 {
            let at = from.as_ptr();
            // SAFETY: the trait's promise, of AVX2.
            unsafe { Avx2([_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))]) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            let at = to.as_mut_ptr();
            // SAFETY: the trait's promise, of AVX2.
            unsafe {
                _mm256_storeu_ps(at, self.0[0]);
                _mm256_storeu_ps(at.add(8), self.0[1]);
            }
        }
        #[inline(always)]
        fn add(self, other: Avx2) -> Avx2 {
            let ([a, b], [c, d]) = (self.0, other.0);
            // SAFETY: the trait's promise, of AVX2.
            unsafe { Avx2([_mm256_add_ps(a, c), _mm256_add_ps(b, d)]) }
        }
        #[inline(always)]
        fn mul(self, other: Avx2) -> Avx2 {
            let ([a, b], [c, d]) = (self.0, other.0);
            // SAFETY: the trait's promise, of AVX2.
            unsafe { Avx2([_mm256_mul_ps(a, c), _mm256_mul_ps(b, d)]) }
        }
        #[inline(always)]
        fn look_up(codes: &[u8; LANES / 2]) -> Avx2 {
            let [first, second] = words(codes);
            // SAFETY: the trait's promise, of AVX2.
            unsafe { Avx2([eight(first), eight(second)]) }
        }
    }

    /// What the eight codes of a word stand for.
    ///
    /// # Safety
    /// The processor has AVX2.
    #[inline(always)]
    unsafe fn eight(word: i32) -> __m256 {
        // SAFETY: the table has sixteen entries; else the caller's promise.
        unsafe {
            let shifts = _mm256_loadu_si256(SHIFTS.as_ptr().cast());
            let codes = _mm256_srlv_epi32(_mm256_set1_epi32(word), shifts);
            // Three bits are looked at; the fourth, as a sign, chooses the half of the table.
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(TABLE.as_ptr()), codes);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(TABLE.as_ptr().add(8)), codes);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)))
        }
    }

    #[derive(Clone, Copy)]
    pub(super) struct Avx512(__m512);

    // SAFETY: arrays of f32 are read and written as long as they are.
    unsafe impl Lanes for Avx512 {
        #[inline(always)]
        fn splat(x: f32) -> Avx512 {
            // SAFETY: the trait's promise, of AVX-512.
            unsafe { Avx512(_mm512_set1_ps(x)) }
        }
        #[inline(always)]
        fn load(from: &[f32; LANES]) -> Avx512 {
            // SAFETY: the trait's promise, of AVX-512.
            unsafe { Avx512(_mm512_loadu_ps(from.as_ptr())) }
        }
        #[inline(always)]
        fn store(self, to: &mut [f32; LANES]) {
            // SAFETY: the trait's promise, of AVX-512.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), self.0) }
        }
        #[inline(always)]
        fn add(self, other: Avx512) -> Avx512 {
            // SAFETY: the trait's promise, of AVX-512.
            unsafe { Avx512(_mm512_add_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn mul(self, other: Avx512) -> Avx512 {
            // SAFETY: the trait's promise, of AVX-512.
            unsafe { Avx512(_mm512_mul_ps(self.0, other.0)) }
        }
        #[inline(always)]
        fn look_up(codes: &[u8; LANES / 2]) -> Avx512 {
            let [first, second] = words(codes);
            // SAFETY: the trait's promise, of AVX-512.
            unsafe {
                let shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(SHIFTS.as_ptr().cast()));
                let both = _mm512_mask_set1_epi32(_mm512_set1_epi32(first), 0xff00, second);
                // Four bits are looked at.
                let codes = _mm512_srlv_epi32(both, shifts);
                Avx512(_mm512_permutexvar_ps(codes, _mm512_loadu_ps(TABLE.as_ptr())))
            }
        }
    }

    macro_rules! versions {
        ($($name:ident: $lanes:ident, $features:literal;)*) => {$(
            pub(super) mod $name {
                use super::super::{dots_body, unpack_body};

                #[target_feature(enable = $features)]
                pub(in super::super) unsafe fn dots(rows: &[u8], x: &[f32], y: &mut [f32]) {
                    // SAFETY: the caller's promise is the body's.
                    unsafe { dots_body::<super::$lanes>(rows, x, y) }
                }
                #[target_feature(enable = $features)]
                pub(in super::super) unsafe fn unpack(row: &[u8], first: usize, to: &mut [f32]) {
                    // SAFETY: the caller's promise is the body's.
                    unsafe { unpack_body::<super::$lanes>(row, first, to) }
                }
            }
        )*};
    }
    versions! {
        avx2: Avx2, "avx2";
        avx512: Avx512, "avx512f,avx512bw,avx512dq,avx512vl";
    }
}

/// The versions for this processor.
pub(super) fn loops() -> (UnpackFn, DotFn) {
    #[cfg(target_arch = "x86_64")]
    {
        use crate::cpu::simd::{Level, level};
        match level() {
            Level::Avx512 => return (x86::avx512::unpack, x86::avx512::dots),
            Level::Avx2 => return (x86::avx2::unpack, x86::avx2::dots),
            Level::Baseline => {}
        }
    }
    (unpack_body::<Plain>, dots_body::<Plain>)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that this processor can run.
    fn versions() -> Vec<(UnpackFn, DotFn)> {
        #[allow(unused_mut, reason = "other processors have one")]
        let mut all: Vec<(UnpackFn, DotFn)> = vec![loops()];
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            all.push((x86::avx2::unpack, x86::avx2::dots));
        }
        all
    }

    #[test]
    fn every_version_gives_the_bits_of_the_plain_one() {
        let mut state = 3u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        for blocks in 0..9 {
            let x: Vec<f32> = (0..blocks * LEN).map(|_| random() as f32 / 1e4 - 3.0).collect();
            let mut row: Vec<u8> = (0..blocks * BYTES).map(|_| random() as u8).collect();
            for block in row.chunks_exact_mut(BYTES) {
                block[..4].copy_from_slice(&(random() as f32 / 1e6).to_le_bytes());
            }
            for (unpack, dot) in versions() {
                let (mut expected, mut got) = (0f32, 0f32);
                // SAFETY: this processor has what they were compiled for.
                unsafe {
                    dot_body::<Plain>(&row, &x, &mut expected);
                    dot(&row, &x, std::slice::from_mut(&mut got));
                }
                assert_eq!(got.to_bits(), expected.to_bits(), "{blocks} blocks");
                for first in 0..2 * blocks {
                    let mut expected = vec![0f32; blocks * LEN - 32 * first];
                    let mut got = expected.clone();
                    // SAFETY: as above.
                    unsafe {
                        unpack_body::<Plain>(&row, first, &mut expected);
                        unpack(&row, first, &mut got);
                    }
                    assert_eq!(got, expected, "part {first} of {blocks} blocks");
                }
            }
        }
    }

    #[test]
    fn the_high_bits_come_first() {
        let mut block = [0u8; BYTES];
        block[..4].copy_from_slice(&2f32.to_le_bytes());
        (block[4], block[5]) = (0xf0, 0x7e);
        let mut weights = [0f32; LEN];
        // SAFETY: this was chosen for this processor.
        unsafe { loops().0(&block, 0, &mut weights) };
        assert_eq!(weights[..5], [2.0, -2.0, 0.0, 2.0 * TABLE[14], -2.0]);
    }
}
