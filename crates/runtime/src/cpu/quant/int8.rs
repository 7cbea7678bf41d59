//! Many rows times rows of blocks, in integers: for AVX-512 VNNI, which multiplies eight bits four times as fast as bf16.
//!
//! Rows are rounded to eight bits, every 32 elements by a scale of their own, as for a few of them (`dot`); the weights are
//! taken as they are. Products of 32 elements are summed in integers, exactly; these, and what the weights' shifts come to,
//! in f32. A tile's sums stay in registers over the whole row, so the number of threads changes no bit.
//!
//! ```text
//! a panel, for every 32 elements    rows:    [8 steps][rows] of four i8    [rows] scales     [halves][rows] sums
//!                                   weights: [8 steps][32] of four u8      [halves][32] scales   [halves][32] shifts
//! ```
//!
//! Parts whose halves have scales of their own, as those of `Q6_K`, are multiplied half by half.

use super::Blocks;
use super::format::{Format, LEN, Q4_0, Q4_1, Q4K, Q5K, Q6K, Q8_0};
use super::isa::x86::Vnni;
use crate::cpu::gemm::Multiply;
use crate::cpu::matrix::Mat;
use crate::cpu::number::{Accumulator, Float, Real};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use metal_candle_graph::BlockFormat;
use std::arch::x86_64::*;

/// Rows of a tile.
const ROWS: usize = 6;
/// Its columns: two vectors.
const COLS: usize = 32;
/// Fours of a part.
const STEPS: usize = LEN / 4;
/// Elements of the rows that are packed at a time, if they are not fewer than a panel: they stay in the second cache.
const PACKED: usize = 1 << 19;

/// The loops for a format.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// Packs `count` rows of blocks, of so many bytes each, for a panel of [`COLS`].
    pack: unsafe fn(rows: &[u8], count: usize, to: &mut [u32]),
    /// Of so many rows, less one: a panel of rows times a panel of weights.
    tiles: [TileFn; ROWS],
    halves: usize,
}

/// Results: rows of [`COLS`].
type Tile = [[f32; COLS]; ROWS];

/// A panel of rows times one of weights.
type TileFn = unsafe fn(rows: &[u32], weights: &[u32], to: &mut Tile);

/// For weights of this format, if the processor has the instructions.
pub(super) fn loops(format: BlockFormat) -> Option<Loops> {
    use crate::cpu::simd::{Level, level};
    use std::arch::is_x86_feature_detected as has;
    let fits = matches!(level(), Level::Avx512) && has!("avx512vnni") && has!("f16c");
    if !fits {
        return None;
    }
    match format {
        BlockFormat::Q4_0 => Some(of::<Q4_0, 1>()),
        BlockFormat::Q4_1 => Some(of::<Q4_1, 1>()),
        BlockFormat::Q8_0 => Some(of::<Q8_0, 1>()),
        BlockFormat::Q4K => Some(of::<Q4K, 1>()),
        BlockFormat::Q5K => Some(of::<Q5K, 1>()),
        BlockFormat::Q6K => Some(of::<Q6K, 2>()),
        BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_1
        | BlockFormat::Q2K
        | BlockFormat::Q3K
        | BlockFormat::Q8K
        | BlockFormat::NF4 => None,
    }
}

fn of<F: Format, const HALVES: usize>() -> Loops {
    Loops {
        pack: pack_weights::<F, HALVES>,
        tiles: [
            tile::<1, HALVES>,
            tile::<2, HALVES>,
            tile::<3, HALVES>,
            tile::<4, HALVES>,
            tile::<5, HALVES>,
            tile::<6, HALVES>,
        ],
        halves: HALVES,
    }
}

impl Loops {
    /// Words of a part of a panel of so many rows.
    fn row_words(&self, rows: usize) -> usize {
        (STEPS + 1 + self.halves) * rows
    }

    fn weight_words(&self) -> usize {
        (STEPS + 2 * self.halves) * COLS
    }

    /// `out = x wᵀ`
    pub(super) fn product<T: Float, X: Multiply<Acc: Real>>(
        &self,
        x: Mat<'_, X>,
        w: &Blocks,
        out: &mut [T],
        parallel: bool,
    ) {
        let parts = w.cols / LEN;
        let (row_bytes, out) = (w.bytes.len() / w.rows, Parts::new(out));
        let at_a_time = (PACKED / w.cols.max(1)).next_multiple_of(ROWS);
        for start in (0..x.rows()).step_by(at_a_time) {
            let x = x.row_range(start, at_a_time.min(x.rows() - start));
            let panels = x.rows().div_ceil(ROWS);
            let words = parts * self.row_words(ROWS);
            scratch::with(panels * words, |packed: &mut [u32]| {
                parallel::for_each_chunk(parallel, packed, words, |panel, to| {
                    let first = panel * ROWS;
                    self.pack_rows(x.row_range(first, ROWS.min(x.rows() - first)), to);
                });
                let packed = &*packed;
                parallel::for_each(parallel, w.rows.div_ceil(COLS), |group| {
                    let first = group * COLS;
                    let cols = COLS.min(w.rows - first);
                    let blocks = &w.bytes[first * row_bytes..(first + cols) * row_bytes];
                    scratch::with(parts * self.weight_words(), |weights: &mut [u32]| {
                        // SAFETY: this processor has what the loops were compiled for, as was seen.
                        unsafe { (self.pack)(blocks, cols, weights) };
                        let mut tile = [[0.0; COLS]; ROWS];
                        for (panel, rows) in packed.chunks_exact(words).enumerate() {
                            let of = ROWS.min(x.rows() - panel * ROWS);
                            let rows = &rows[..parts * self.row_words(of)];
                            // SAFETY: as above.
                            unsafe { (self.tiles[of - 1])(rows, weights, &mut tile) };
                            for (i, sums) in tile[..of].iter().enumerate() {
                                let row = start + panel * ROWS + i;
                                // SAFETY: columns of the result belong to one task.
                                let to = unsafe { out.part(row * w.rows + first, cols) };
                                let mut wide = [T::Acc::ZERO; COLS];
                                T::Acc::from_f32_all(sums, &mut wide);
                                T::narrow_all(&wide[..cols], to);
                            }
                        }
                    });
                });
            });
        }
    }

    /// Rounds and packs the rows of one panel.
    fn pack_rows<X: Multiply<Acc: Real>>(&self, x: Mat<'_, X>, to: &mut [u32]) {
        scratch::with(x.cols(), |wide: &mut [X::Acc]| {
            for row in 0..x.rows() {
                x.row_range(row, 1).packed(wide);
                let parts =
                    X::Acc::as_f32(wide).expect("metal-candle bug: rows of f64").as_chunks();
                let words = to.chunks_exact_mut(self.row_words(x.rows()));
                for (part, to) in parts.0.iter().zip(words) {
                    // SAFETY: this processor has the instructions, as was seen.
                    unsafe { pack_part(part, row, x.rows(), self.halves, to) };
                }
            }
        });
    }
}

/// Rounds a part of row `row`, of so many.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn pack_part(x: &[f32; LEN], row: usize, rows: usize, halves: usize, to: &mut [u32]) {
    // SAFETY: 32 elements.
    let [a, b] = unsafe { [_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[LEN / 2..].as_ptr())] };
    // As integers, magnitudes are in order, and a NaN is the largest.
    let magnitude = |x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fff_ffff));
    let most = _mm512_reduce_max_epu32(_mm512_max_epu32(magnitude(a), magnitude(b)));
    let scale = f32::from_bits(most) / 127.0;
    let by = _mm512_set1_ps(if scale == 0.0 { 0.0 } else { 1.0 / scale });
    let round = |x| _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(x, by)));
    let q = [round(a), round(b)];
    let sums = q.map(|q| {
        let fours = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), q);
        let twos = _mm_add_epi32(fours, _mm_shuffle_epi32::<0b01_00_11_10>(fours));
        _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32::<0b10_11_00_01>(twos)))
    });
    // SAFETY: both are 32 bytes.
    let q = unsafe { std::mem::transmute::<[__m128i; 2], [u32; STEPS]>(q) };
    let (steps, rest) = to.split_at_mut(STEPS * rows);
    for (step, q) in q.into_iter().enumerate() {
        steps[step * rows + row] = q;
    }
    rest[row] = scale.to_bits();
    let sum = |sum: i32| (sum as f32 * scale).to_bits();
    if halves == 1 {
        rest[rows + row] = sum(sums[0] + sums[1]);
    } else {
        rest[rows + row] = sum(sums[0]);
        rest[2 * rows + row] = sum(sums[1]);
    }
}

/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn pack_weights<F: Format, const HALVES: usize>(rows: &[u8], count: usize, to: &mut [u32]) {
    let row_bytes = rows.len() / count;
    let words = (STEPS + 2 * HALVES) * COLS;
    for (index, to) in to.chunks_exact_mut(words).enumerate() {
        if count < COLS {
            to.fill(0);
        }
        let (steps, rest) = to.split_at_mut(STEPS * COLS);
        let (scales, shifts) = rest.split_at_mut(HALVES * COLS);
        let at = index / F::PARTS * F::BLOCK_BYTES;
        for (col, row) in rows.chunks_exact(row_bytes).enumerate() {
            let part = F::part::<Vnni>(&row[at..at + F::BLOCK_BYTES], index % F::PARTS);
            for (step, q) in part.q.as_chunks::<4>().0.iter().enumerate() {
                steps[step * COLS + col] = u32::from_ne_bytes(*q);
            }
            for half in 0..HALVES {
                scales[half * COLS + col] = part.scale[half].to_bits();
                shifts[half * COLS + col] = part.shift[half].to_bits();
            }
        }
    }
}

/// # Safety
/// The processor has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn tile<const R: usize, const HALVES: usize>(rows: &[u32], weights: &[u32], to: &mut Tile) {
    let (row_words, weight_words) = ((STEPS + 1 + HALVES) * R, (STEPS + 2 * HALVES) * COLS);
    let parts = rows.len() / row_words;
    assert!(weights.len() >= parts * weight_words, "metal-candle bug: a panel of its size");
    let (mut x, mut w) = (rows.as_ptr(), weights.as_ptr());
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for _ in 0..parts {
        // SAFETY: within the panels, as was seen.
        unsafe {
            let (x_scales, w_scales) = (x.add(STEPS * R), w.add(STEPS * COLS));
            for half in 0..HALVES {
                let mut products = [[_mm512_setzero_si512(); 2]; R];
                for step in half * STEPS / HALVES..(half + 1) * STEPS / HALVES {
                    let w = [0, 16].map(|v| w.add(step * COLS + v));
                    let w = [_mm512_loadu_si512(w[0].cast()), _mm512_loadu_si512(w[1].cast())];
                    for (i, products) in products.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32((*x.add(step * R + i)).cast_signed());
                        products[0] = _mm512_dpbusd_epi32(products[0], w[0], x);
                        products[1] = _mm512_dpbusd_epi32(products[1], w[1], x);
                    }
                }
                for v in 0..2 {
                    let scales = w_scales.add(half * COLS + v * 16).cast::<f32>();
                    let shifts = _mm512_loadu_ps(scales.add(HALVES * COLS));
                    let scales = _mm512_loadu_ps(scales);
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let x_scale = _mm512_set1_ps(*x_scales.add(i).cast::<f32>());
                        let x_sum = _mm512_set1_ps(*x_scales.add((1 + half) * R + i).cast::<f32>());
                        let products = _mm512_cvtepi32_ps(products[i][v]);
                        let scale = _mm512_mul_ps(scales, x_scale);
                        sums[v] = _mm512_fmadd_ps(products, scale, sums[v]);
                        sums[v] = _mm512_fmadd_ps(shifts, x_sum, sums[v]);
                    }
                }
            }
            (x, w) = (x.add(row_words), w.add(weight_words));
        }
    }
    for (to, sums) in to.iter_mut().zip(sums) {
        // SAFETY: a row of two vectors.
        unsafe {
            _mm512_storeu_ps(to.as_mut_ptr(), sums[0]);
            _mm512_storeu_ps(to[16..].as_mut_ptr(), sums[1]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::dot::Rounded;
    use super::super::{Dot, unpack};
    use super::*;
    use crate::team::Team;
    use half::bf16;

    /// Rows of blocks, and where f16 lie in a block.
    fn weights(format: BlockFormat, halves: &[usize], [rows, cols]: [usize; 2]) -> Vec<u8> {
        let mut state = 11u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 16
        };
        let bytes = format.bytes_for(cols).unwrap() * rows;
        let mut bytes: Vec<u8> = (0..bytes).map(|_| random() as u8).collect();
        for block in bytes.chunks_exact_mut(format.block_bytes()) {
            for at in halves {
                // About 1, of either sign; no NaN.
                block[at + 1] = block[at + 1] & 0x83 | 0x38;
            }
        }
        bytes
    }

    /// What a row at a time gives, and the sum of magnitudes.
    fn by_dots(x: &[f32], w: &Blocks) -> Vec<[f32; 2]> {
        let Some((unpack, Dot::Rounded(dot))) = w.loops else { panic!("{:?}", w.format) };
        let row_bytes = w.bytes.len() / w.rows;
        Rounded::with(x, w.cols, |rounded| {
            let mut results = Vec::new();
            for (x, rounded) in x.chunks_exact(w.cols).zip(rounded.rows()) {
                for row in w.bytes.chunks_exact(row_bytes) {
                    let (mut y, mut wide) = (0.0f32, vec![0.0f32; w.cols]);
                    // SAFETY: both were chosen for this processor.
                    unsafe {
                        dot(row, rounded, std::slice::from_mut(&mut y));
                        unpack(row, 0, &mut wide);
                    }
                    results.push([y, x.iter().zip(&wide).map(|(x, w)| (x * w).abs()).sum()]);
                }
            }
            results
        })
    }

    fn check(format: BlockFormat, halves: &[usize]) {
        let Some(loops) = loops(format) else { return };
        let block = format.block_len();
        // A wide row last: it is taken in several times.
        for [m, n, blocks] in [[5, 1, 1], [6, 32, 3], [19, 70, 2], [27, 33, 131_072 / block]] {
            let cols = blocks * block;
            let bytes = weights(format, halves, [n, cols]);
            let w = Blocks { bytes: &bytes, format, rows: n, cols, loops: unpack::loops(format) };
            let value = |i: usize| ((i * 7919 % 1013) as f32 / 500.0 - 1.0) * (1 + i % 5) as f32;
            let x: Vec<f32> = (0..m * cols).map(value).collect();
            let [mut one, mut two] = [0, 1].map(|_| vec![f32::NAN; m * n]);
            let rows = Mat::dense(&x, m, cols);
            loops.product(rows, &w, &mut one, false);
            let team = Team::new(2);
            team.walk(|| loops.product(rows, &w, &mut two, true));
            assert_eq!(one, two, "{format:?}: other bits with two threads");
            for (i, (got, [expected, size])) in one.iter().zip(by_dots(&x, &w)).enumerate() {
                let near = (got - expected).abs() <= 2e-6 * size;
                assert!(near, "{format:?} {m} x {n} x {cols} at {i}: {got}, expected {expected}");
            }
            if m == 19 {
                let narrow: Vec<bf16> = x.iter().map(|x| bf16::from_f32(*x)).collect();
                let wide: Vec<f32> = narrow.iter().map(|x| x.to_f32()).collect();
                let mut rounded = vec![bf16::NAN; m * n];
                loops.product(Mat::dense(&narrow, m, cols), &w, &mut rounded, false);
                loops.product(Mat::dense(&wide, m, cols), &w, &mut one, false);
                let expected: Vec<bf16> = one.iter().map(|y| bf16::from_f32(*y)).collect();
                assert_eq!(rounded, expected, "{format:?} of bf16");
            }
        }
    }

    #[test]
    fn many_rows_are_what_each_of_them_is() {
        check(BlockFormat::Q4_0, &[0]);
        check(BlockFormat::Q4_1, &[0, 2]);
        check(BlockFormat::Q8_0, &[0]);
        check(BlockFormat::Q4K, &[0, 2]);
        check(BlockFormat::Q5K, &[0, 2]);
        check(BlockFormat::Q6K, &[208]);
    }

    #[test]
    fn what_is_not_a_number_stays_none() {
        let Some(loops) = loops(BlockFormat::Q8_0) else { return };
        let bytes = weights(BlockFormat::Q8_0, &[0], [3, 64]);
        let (format, loops_of) = (BlockFormat::Q8_0, unpack::loops(BlockFormat::Q8_0));
        let w = Blocks { bytes: &bytes, format, rows: 3, cols: 64, loops: loops_of };
        let mut x = vec![1.0; 7 * 64];
        (x[64 + 3], x[2 * 64 + 40]) = (f32::NAN, f32::INFINITY);
        let mut out = vec![0.0f32; 7 * 3];
        loops.product(Mat::dense(&x, 7, 64), &w, &mut out, false);
        let finite: Vec<bool> = out.chunks_exact(3).map(|row| row[0].is_finite()).collect();
        assert_eq!(finite, [true, false, false, true, true, true, true]);
    }
}
