//! Attention of few query rows, as a decoded token has: k and v are read where they lie, once and in order, and widened
//! as they are read.
//!
//! The blocked product would pack all keys for a row or two. Here a task is one batch entry and a range of keys; it leaves
//! its maxima, sums and weighted values, which are then joined range by range (FlashDecoding, Dao et al. 2023). Ranges
//! have a fixed length: any number of threads gives the same bits.

use super::{Attention, Block, reciprocal};
use crate::cpu::gemm::few_rows::InRows;
use crate::cpu::math;
use crate::cpu::matrix::Mat;
use crate::cpu::number::Float;
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::simd::prefetch;
use crate::cpu::view::Strided;
use smallvec::SmallVec;
use std::ops::Range;

/// Rows of a key head that are few.
const FEW_ROWS: usize = 16;
/// Keys of one task.
const RANGE: usize = 64;
/// Keys that are read for one key head before those of the next, which lie between them; meanwhile its next ones are asked
/// for: processors foresee one long row, not many short ones.
const STEP: usize = 16;
const LINE_BYTES: usize = 64;
/// Multiplications from which on another thread is worth waking.
const PARALLEL_WORK: usize = 1 << 17;

impl<T: Float + InRows> Attention<'_, T> {
    /// Whether [`Attention::few`] computes this one.
    pub(super) fn is_few(&self) -> bool {
        let rows = self.tq * self.group();
        (1..=FEW_ROWS).contains(&rows) && self.k.stride(3) == 1 && self.v.stride(3) == 1
    }

    /// The output, `[b, tq, hq, dv]`.
    pub(super) fn few(&self, out: &mut [T], parallel: bool) {
        let whole = self.block(0);
        let (rows, ranges) = (whole.rows.len(), whole.keys.len().div_ceil(RANGE).max(1));
        // Of one range and key head: weighted values, sums, maxima.
        let len = rows * (self.dv + 2);
        let work = self.b * self.hk * rows * whole.keys.len() * (self.d + self.dv);
        let parallel = parallel && work >= PARALLEL_WORK;
        let lens = [self.b * self.hk * rows * self.d, self.b * ranges * self.hk * len];
        scratch::split(lens, |[q, partial]: [&mut [f32]; 2]| {
            let of_q = (rows * self.d).max(1);
            for (i, q) in q.chunks_exact_mut(of_q).enumerate() {
                self.pack_query(i / self.hk, i % self.hk, &whole, q);
                math::scale_all_f32(q, self.scale());
            }
            let heads = Heads { q, k: self.of_heads(&self.k), v: self.of_heads(&self.v) };
            parallel::for_each_chunk(parallel, partial, self.hk * len, |task, to| {
                let start = whole.keys.start + task % ranges * RANGE;
                let keys = start..(start + RANGE).min(whole.keys.end);
                let block = Block { rows: whole.rows.clone(), keys };
                self.range(task / ranges, &block, &heads, to, len);
            });
            let out = Parts::new(out);
            for (b, partial) in partial.chunks_exact_mut(ranges * self.hk * len).enumerate() {
                for (head, row) in
                    (0..self.hk).flat_map(|h| whole.rows.clone().map(move |r| (h, r)))
                {
                    let ranges =
                        Ranges { first: head * len, stride: self.hk * len, rows, dv: self.dv };
                    let y = ranges.join(partial, row);
                    // SAFETY: every row of the output belongs to one row of one key head.
                    let to = unsafe { out.part(self.query_row(b, head, row) * self.dv, self.dv) };
                    T::narrow_all(y, to);
                }
            }
        });
    }

    /// `[tk, d]` of each key head of each batch entry.
    fn of_heads<'x>(&self, of: &Strided<'x, T>) -> SmallVec<[Mat<'x, T>; 8]> {
        let all = (0..self.b).flat_map(|b| (0..self.hk).map(move |head| (b, head)));
        all.map(|(b, head)| of.index(2, head).index(0, b).matrix()).collect()
    }

    /// `to`, of `len` for each key head: of the block's keys, `exp(score - max) v`, `[rows, dv]`, the sums of the
    /// exponentials, and the maxima.
    fn range(&self, b: usize, block: &Block, heads: &Heads<T>, to: &mut [f32], len: usize) {
        let (rows, keys, loops) = (block.rows.len(), block.keys.len(), T::loops());
        let (of_q, of_scores) = (rows * self.d, rows * keys);
        let own = b * self.hk..(b + 1) * self.hk;
        let (k, v) = (&heads.k[own.clone()], &heads.v[own.clone()]);
        let q = &heads.q[own.start * of_q..own.end * of_q];
        scratch::with(self.hk * of_scores, |scores: &mut [f32]| {
            each_step(block, self.hk, |head, at, step| {
                ask_for_next(&k[head], step.clone());
                let k = k[head].row_range(step.start, step.len());
                let (q, scores) = (&q[head * of_q..], &mut scores[head * of_scores + at..]);
                // SAFETY: this processor has what the loops were compiled for.
                unsafe { (loops.dots)(&q[..of_q], k, &mut scores[..of_scores - at], keys) };
            });
            for (head, to) in to.chunks_exact_mut(len).enumerate() {
                let scores = &mut scores[head * of_scores..][..of_scores];
                let (y, stats) = to.split_at_mut(rows * self.dv);
                let (sums, maxima) = stats.split_at_mut(rows);
                self.mask(b, head, block, scores);
                self.exponentials(block, scores, sums, maxima);
                y.fill(0.0);
            }
            each_step(block, self.hk, |head, at, step| {
                ask_for_next(&v[head], step.clone());
                let v = v[head].row_range(step.start, step.len());
                let p = &scores[head * of_scores + at..(head + 1) * of_scores];
                // SAFETY: as above.
                unsafe { (loops.weigh)(p, keys, v, &mut to[head * len..][..rows * self.dv]) };
            });
        });
    }
}

/// What is read, by batch entry and key head.
struct Heads<'x, T> {
    /// Scaled: `[b, hk, rows, d]`
    q: &'x [f32],
    k: SmallVec<[Mat<'x, T>; 8]>,
    v: SmallVec<[Mat<'x, T>; 8]>,
}

/// A few keys of every key head, a few later ones of every key head, and so on: `f(head, first of the block's, keys)`.
fn each_step(block: &Block, heads: usize, mut f: impl FnMut(usize, usize, Range<usize>)) {
    for start in block.keys.clone().step_by(STEP) {
        for head in 0..heads {
            let end = (start + STEP).min(block.keys.end);
            f(head, start - block.keys.start, start..end);
        }
    }
}

/// Prefetches the rows of the step after that of `rows`.
#[inline(always)]
fn ask_for_next<T: Float>(of: &Mat<'_, T>, rows: Range<usize>) {
    for row in rows {
        let next = (row + STEP) as isize * of.row_stride();
        for at in (0..of.cols()).step_by(LINE_BYTES / size_of::<T>()) {
            prefetch(of.as_ptr().wrapping_offset(next + at as isize));
        }
    }
}

/// Where the ranges of a key head lie, and how much there is of each.
struct Ranges {
    first: usize,
    stride: usize,
    rows: usize,
    dv: usize,
}

impl Ranges {
    /// The row of the output, in the place of its first range.
    fn join<'p>(&self, partial: &'p mut [f32], row: usize) -> &'p [f32] {
        let Ranges { first, stride, rows, dv } = *self;
        let partial = &mut partial[first..];
        let (own, rest) = partial.split_at_mut(stride.min(partial.len()));
        let stats = |part: &[f32]| (part[rows * dv + row], part[rows * (dv + 1) + row]);
        let others = || rest.chunks(stride);
        let (mut sum, own_max) = stats(own);
        let max = others().map(|part| stats(part).1);
        let max = max.fold(own_max, |a, b| if b > a || b.is_nan() { b } else { a });
        // 0 of a range that sees nothing, or where nothing is seen at all.
        let weight =
            |of: f32| if of == f32::NEG_INFINITY { 0.0 } else { math::exp_of_f32(of - max) };
        let y = &mut own[row * dv..(row + 1) * dv];
        if !rest.is_empty() {
            math::scale_all_f32(y, weight(own_max));
            sum *= weight(own_max);
            for part in others() {
                let (its, of) = stats(part);
                math::axpy_f32(y, weight(of), &part[row * dv..(row + 1) * dv]);
                sum += its * weight(of);
            }
        }
        math::scale_all_f32(y, reciprocal(sum));
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::view::Arg;
    use crate::team::Team;
    use half::{bf16, f16};
    use metal_candle_compiler::{Layout, Operand, Slot};
    use metal_candle_graph::composite::AttentionAttrs;
    use metal_candle_graph::{DType, Scalar, Shape};

    /// Values in memory.
    struct Memory {
        bytes: Vec<u64>,
        operand: Operand,
    }

    impl Memory {
        fn new<T: Copy>(dtype: DType, dims: &[usize], values: &[T]) -> Memory {
            let shape = Shape::new(dims).expect("a shape");
            assert_eq!(shape.len(), values.len());
            let mut bytes = vec![0u64; size_of_val(values).div_ceil(8)];
            // SAFETY: as many bytes as the values have.
            unsafe {
                let to = bytes.as_mut_ptr().cast::<T>();
                std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
            }
            let layout = Layout::contiguous(shape);
            Memory { bytes, operand: Operand { slot: Slot::Input(0), dtype, layout } }
        }

        fn arg(&self) -> Arg<'_> {
            // SAFETY: dense values of the operand's type.
            unsafe { Arg::new(self.bytes.as_ptr().cast(), &self.operand) }
        }
    }

    /// `[b, tq, tk, hq, hk, d, dv]`, the position of the first query, and the window.
    type Case = ([usize; 7], i64, Option<u32>);

    /// `[q, k, v, mask, segments of the queries, segments of the keys, position]`
    fn operands<T: Float + InRows>((dims, position, _): Case) -> [Memory; 7] {
        let [b, tq, tk, hq, hk, d, dv] = dims;
        let mut state = 1u32;
        let mut random = |n: usize| -> Vec<T> {
            let mut unit = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                f64::from(state >> 8) / f64::from(1 << 23) - 1.0
            };
            (0..n).map(|_| T::narrow(unit() as f32)).collect()
        };
        let mut cache = |dims: [usize; 4]| {
            let mut values = random(dims.iter().product());
            let row = dims[2] * dims[3];
            for (i, position_of) in values.chunks_mut(row).enumerate() {
                // What was never written must never be read.
                if (i % tk) as i64 >= position + tq as i64 {
                    position_of.fill(T::narrow(f32::NAN));
                }
            }
            Memory::new(T::DTYPE, &dims, &values)
        };
        let (k, v) = (cache([b, tk, hk, d]), cache([b, tk, hk, dv]));
        let q = Memory::new(T::DTYPE, &[b, tq, hq, d], &random(b * tq * hq * d));
        let hides =
            |i: usize| if i.is_multiple_of(3) { f32::NEG_INFINITY } else { (i % 7) as f32 * 0.1 };
        let masks: Vec<f32> = (0..b * hq * tq * tk).map(hides).collect();
        let masks = Memory::new(DType::F32, &[b, hq, tq, tk], &masks);
        // The first keys of the second text are padding, and the query of the last one sees nothing.
        let is_token = |i: usize| u8::from(i / tk != 1 || i % tk > 2);
        let of_k: Vec<u8> = (0..b * tk).map(is_token).collect();
        let of_q: Vec<u8> = (0..b * tq).map(|i| if i / tq == 2 { 7 } else { 1 }).collect();
        let of_q = Memory::new(DType::U8, &[b, tq], &of_q);
        let of_k = Memory::new(DType::U8, &[b, tk], &of_k);
        [q, k, v, masks, of_q, of_k, Memory::new(DType::I64, &[], &[position])]
    }

    fn check<T: Float + InRows>(case: Case, [mask, segments]: [bool; 2], tolerance: f64) {
        let ([b, tq, _, hq, _, _, dv], _, window) = case;
        let [q, k, v, masks, of_q, of_k, position] = operands::<T>(case);
        let mut args = vec![q.arg(), k.arg(), v.arg()];
        args.extend(mask.then(|| masks.arg()));
        args.extend(segments.then_some([of_q.arg(), of_k.arg()]).into_iter().flatten());
        args.push(position.arg());
        let scale = Scalar::from_f64(DType::F64, 0.3);
        let attrs = AttentionAttrs { scale, causal: true, window, mask, segments, offset: true };
        let it = Attention::<T>::new(&args, &attrs);
        assert!(it.is_few());
        let result = |run: &(dyn Fn(&mut [T]) + Sync)| {
            let mut out = vec![T::narrow(f32::NAN); b * tq * hq * dv];
            run(&mut out);
            out
        };
        let (expected, got) =
            (result(&|out| it.tiled(Some(out), None, false)), result(&|out| it.few(out, false)));
        for (i, (expected, got)) in expected.iter().zip(&got).enumerate() {
            let [expected, got] = [expected, got].map(|x| f64::from(x.widen()));
            let near = (expected - got).abs() <= tolerance;
            assert!(near, "{} {case:?} at {i}: {got}, expected {expected}", T::DTYPE);
        }
        let team = Team::new(2);
        let on_two = team.walk(|| result(&|out| it.few(out, true)));
        assert!(got == on_two, "{} {case:?}: other bits with two threads", T::DTYPE);
    }

    #[test]
    fn few_rows_equal_the_tiled_way() {
        let cases: [Case; 6] = [
            ([1, 1, 40, 3, 1, 64, 64], 17, None),
            ([1, 1, 700, 9, 3, 64, 64], 640, None),
            ([3, 1, 300, 4, 4, 80, 24], 270, None),
            ([3, 2, 90, 10, 2, 17, 5], 80, Some(20)),
            ([1, 5, 600, 6, 2, 128, 96], 590, None),
            ([3, 1, 8, 2, 1, 1, 1], 0, None),
        ];
        for case in cases {
            for options in [[false, false], [true, false], [false, true]] {
                check::<f32>(case, options, 1e-5);
                check::<bf16>(case, options, 1e-2);
                check::<f16>(case, options, 2e-3);
            }
        }
    }
}
