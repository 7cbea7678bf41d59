//! Many rows times rows of blocks, in integers: for AVX-512 VNNI, which multiplies eight bits four times as fast as bf16.
//!
//! Rows are rounded to eight bits, every 32 elements by a scale of their own, as for a few of them (`dot`); the weights are
//! taken as they are. Products of 32 elements are summed in integers, exactly; these, and what the weights' shifts come to,
//! in f32. A tile's sums stay in registers over the whole row, so the number of threads changes no bit.
//!
//! ```text
//! a panel, for every 32 elements    rows:    [rows][8 steps] of four i8    [rows] scales     [halves][rows] sums
//!                                   weights: [8 steps][32] of four u8      [halves][32] scales   [halves][32] shifts
//! ```
//!
//! Parts whose halves have scales of their own, as those of `Q6_K`, are multiplied half by half. Where the shift of a
//! weight is a whole number of its scales ([`Format::OFFSET`]), as most are, what it comes to is added to the integers, and the
//! panels lack shifts: a third less is to be multiplied beside the products.

mod pack;
mod tile;

use super::Blocks;
use super::format::{Format, LEN, Q4_0, Q4_1, Q4K, Q5K, Q6K, Q8_0};
use crate::cpu::gemm::Multiply;
use crate::cpu::matrix::Mat;
use crate::cpu::number::{Accumulator, Float, Real};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use metal_candle_graph::{BlockFormat, DType};
use tile::{Tile, TileFn};

/// Rows of a tile.
const ROWS: usize = 6;
/// Its columns: two vectors.
const COLS: usize = 32;
/// Fours of a part.
const STEPS: usize = LEN / 4;
/// Elements of the rows that are packed at a time, if they are not fewer than a panel. Each time, the weights are packed
/// anew, which costs more than that the rows outgrow the second cache somewhat: a panel of them is read once for a panel of
/// weights, in order, and some bytes a cycle.
const PACKED: usize = 1 << 20;

/// The loops for a format.
#[derive(Clone, Copy)]
pub(super) struct Loops {
    /// Packs `count` rows of blocks, of so many bytes each, for a panel of [`COLS`].
    pack: unsafe fn(rows: &[u8], count: usize, to: &mut [u32]),
    /// Rounds a row of a panel: the number of the row, and of how many.
    round: unsafe fn(x: &[f32], row: usize, rows: usize, to: &mut [u32]),
    /// Of so many rows, less one: a panel of rows times a panel of weights.
    tiles: [TileFn; ROWS],
    /// Words for 32 elements of a row.
    row_words: usize,
    /// Words for 32 elements of a panel of weights.
    weight_words: usize,
}

/// For weights of this format, if the processor has the instructions.
pub(super) fn loops(format: BlockFormat) -> Option<Loops> {
    use crate::cpu::simd::{Level, level};
    use std::arch::is_x86_feature_detected as has;
    let fits = matches!(level(), Level::Avx512) && has!("avx512vnni") && has!("f16c");
    if !fits {
        return None;
    }
    match format {
        BlockFormat::Q4_0 => Some(of::<Q4_0, 1, { Q4_0::OFFSET }>()),
        BlockFormat::Q4_1 => Some(of::<Q4_1, 1, { Q4_1::OFFSET }>()),
        BlockFormat::Q8_0 => Some(of::<Q8_0, 1, { Q8_0::OFFSET }>()),
        BlockFormat::Q4K => Some(of::<Q4K, 1, { Q4K::OFFSET }>()),
        BlockFormat::Q5K => Some(of::<Q5K, 1, { Q5K::OFFSET }>()),
        BlockFormat::Q6K => Some(of::<Q6K, 2, { Q6K::OFFSET }>()),
        BlockFormat::Q5_0
        | BlockFormat::Q5_1
        | BlockFormat::Q8_1
        | BlockFormat::Q2K
        | BlockFormat::Q3K
        | BlockFormat::Q8K
        | BlockFormat::NF4 => None,
    }
}

fn of<F: Format, const HALVES: usize, const OFFSET: i32>() -> Loops {
    Loops {
        pack: pack::weights::<F, HALVES, OFFSET>,
        round: pack::row::<HALVES, OFFSET>,
        tiles: [
            tile::tile::<1, HALVES, OFFSET>,
            tile::tile::<2, HALVES, OFFSET>,
            tile::tile::<3, HALVES, OFFSET>,
            tile::tile::<4, HALVES, OFFSET>,
            tile::tile::<5, HALVES, OFFSET>,
            tile::tile::<6, HALVES, OFFSET>,
        ],
        row_words: row_words(HALVES),
        weight_words: weight_words(HALVES, OFFSET),
    }
}

/// Words for 32 elements of a row: these, their scale and their sums.
const fn row_words(halves: usize) -> usize {
    STEPS + 1 + halves
}

/// Words for 32 elements of a panel of weights: these, their scales and, if they have them, their shifts.
const fn weight_words(halves: usize, offset: i32) -> usize {
    let of_halves = if offset == 0 { 2 * halves } else { halves };
    (STEPS + of_halves) * COLS
}

impl Loops {
    /// `out = x wᵀ`
    pub(super) fn product<T: Float, X: Multiply<Acc: Real>>(
        &self,
        x: Mat<'_, X>,
        w: &Blocks,
        out: &mut [T],
        parallel: bool,
    ) {
        let parts = w.cols / LEN;
        let out = Parts::new(out);
        let at_a_time = (PACKED / w.cols.max(1)).next_multiple_of(ROWS);
        for start in (0..x.rows()).step_by(at_a_time) {
            let x = x.row_range(start, at_a_time.min(x.rows() - start));
            let words = parts * self.row_words * ROWS;
            scratch::with(x.rows().div_ceil(ROWS) * words, |packed: &mut [u32]| {
                parallel::for_each_chunk(parallel, packed, words, |panel, to| {
                    let first = panel * ROWS;
                    self.pack_rows(x.row_range(first, ROWS.min(x.rows() - first)), to);
                });
                let packed = &*packed;
                parallel::for_each(parallel, w.rows.div_ceil(COLS), |group| {
                    self.columns([start, x.rows()], packed, w, group, &out);
                });
            });
        }
    }

    /// Rounds and packs the rows of one panel.
    fn pack_rows<X: Multiply<Acc: Real>>(&self, x: Mat<'_, X>, to: &mut [u32]) {
        scratch::with(x.cols(), |wide: &mut [X::Acc]| {
            for row in 0..x.rows() {
                let row_of_x = x.row_range(row, 1);
                let in_place = X::DTYPE == DType::F32 && x.col_stride() == 1;
                let values = if in_place { row_of_x.widened(wide) } else { row_of_x.packed(wide) };
                let values = values.row_slice(0).expect("metal-candle bug: a row with gaps");
                let values = X::Acc::as_f32(values).expect("metal-candle bug: rows of f64");
                // SAFETY: this processor has what the loop was compiled for, as was seen.
                unsafe { (self.round)(values, row, x.rows(), to) };
            }
        });
    }

    /// The products of rows, so many from the first one, with one panel of weights.
    fn columns<T: Float>(
        &self,
        [start, rows]: [usize; 2],
        packed: &[u32],
        w: &Blocks,
        group: usize,
        out: &Parts<T>,
    ) {
        let (parts, first, row_bytes) = (w.cols / LEN, group * COLS, w.bytes.len() / w.rows);
        let cols = COLS.min(w.rows - first);
        let blocks = &w.bytes[first * row_bytes..(first + cols) * row_bytes];
        let in_place = T::DTYPE == DType::F32 && cols == COLS;
        scratch::with(parts * self.weight_words, |weights: &mut [u32]| {
            // SAFETY: this processor has what the loops were compiled for, as was seen.
            unsafe { (self.pack)(blocks, cols, weights) };
            let mut tile = Tile::ZERO;
            for (panel, words) in packed.chunks_exact(parts * self.row_words * ROWS).enumerate() {
                let of = ROWS.min(rows - panel * ROWS);
                let words = &words[..parts * self.row_words * of];
                let multiply = self.tiles[of - 1];
                let row = |i: usize| (start + panel * ROWS + i) * w.rows + first;
                if in_place {
                    let to = out.start_of(row(0), (of - 1) * w.rows + cols).cast();
                    // SAFETY: columns of the result belong to one task, and its elements are f32; as above.
                    unsafe { multiply(words, weights, to, w.rows) };
                    continue;
                }
                // SAFETY: a tile of its size; as above.
                unsafe { multiply(words, weights, tile.0.as_mut_ptr().cast(), COLS) };
                for (i, sums) in tile.0[..of].iter().enumerate() {
                    // SAFETY: columns of the result belong to one task.
                    let to = unsafe { out.part(row(i), cols) };
                    let mut wide = [T::Acc::ZERO; COLS];
                    T::Acc::from_f32_all(sums, &mut wide);
                    T::narrow_all(&wide[..cols], to);
                }
            }
        });
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
