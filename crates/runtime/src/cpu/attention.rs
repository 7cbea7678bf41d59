//! Scaled dot-product attention in blocks of query rows: `softmax(scale q kᵀ + mask) v`.
//!
//! A task is one batch entry, one key head and one block of rows. The query heads that share the key head are rows
//! like any other, so k and v are read where they are, once for all of them. Scores exist for one block at a time, and
//! only for the keys that it can see. Few rows in all go another way (`few`).

mod few;

use crate::cpu::gemm::few_rows::InRows;
use crate::cpu::gemm::gemm_of;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float, for_index};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Out, Strided};
use half::{bf16, f16};
use metal_candle_graph::DType;
use metal_candle_graph::composite::AttentionAttrs;
use std::ops::Range;

/// Positions of one block, with all query heads of the key head up to so many: what is packed of k and v is packed
/// for all of them. Fewer where every row sees keys of its own, for those that only some rows see are computed for all.
const POSITIONS: usize = 64;
const CAUSAL_POSITIONS: usize = 32;
const MAX_HEADS: usize = 4;

/// `args` as `Composite::Attention`; outputs: y and lse, those that are wanted.
pub(crate) fn call(
    args: &[Arg],
    outs: &mut [Out],
    attrs: &AttentionAttrs,
    [y, lse]: [bool; 2],
    parallel: bool,
) {
    let mut outs = outs.iter_mut();
    let mut next = || outs.next().expect("metal-candle bug: attention lacks an output");
    let (y, lse) = (y.then(&mut next), lse.then(&mut next));
    match args[0].dtype() {
        DType::F32 => attention::<f32>(args, y, lse, attrs, parallel),
        DType::BF16 => attention::<bf16>(args, y, lse, attrs, parallel),
        DType::F16 => attention::<f16>(args, y, lse, attrs, parallel),
        DType::F64 => {
            let it = Attention::<f64>::new(args, attrs);
            it.tiled(y.map(|y| it.result(y)), lse.map(|lse| it.row_result(lse)), parallel);
        }
        other => panic!("metal-candle bug: expected a float, got {other}"),
    }
}

fn attention<T: Float + InRows>(
    args: &[Arg],
    y: Option<&mut Out>,
    lse: Option<&mut Out>,
    attrs: &AttentionAttrs,
    parallel: bool,
) {
    let it = Attention::<T>::new(args, attrs);
    match (y, lse) {
        (Some(y), None) if it.is_few() => it.few(it.result(y), parallel),
        (y, lse) => {
            it.tiled(y.map(|y| it.result(y)), lse.map(|lse| it.row_result(lse)), parallel);
        }
    }
}

/// `1 / sum`, or 0 for a row that sees nothing.
fn reciprocal<A: Real>(sum: A) -> A {
    if sum == A::ZERO { A::ZERO } else { A::from_f64(1.0) / sum }
}

/// Infinite for a row that sees nothing.
fn log_sum_exp<A: Real>(max: A, sum: A) -> A {
    if sum == A::ZERO { A::from_f64(f64::INFINITY) } else { max + sum.ln() }
}

/// The inputs of an attention, and the walk over its blocks.
pub(super) struct Attention<'a, T> {
    pub(super) q: Strided<'a, T>,
    pub(super) k: Strided<'a, T>,
    pub(super) v: Strided<'a, T>,
    pub(super) attention_mask: Option<Arg<'a>>,
    segments: Option<[Arg<'a>; 2]>,
    offset: i64,
    pub(super) attrs: &'a AttentionAttrs,
    pub(super) b: usize,
    pub(super) tq: usize,
    pub(super) tk: usize,
    pub(super) hq: usize,
    pub(super) hk: usize,
    pub(super) d: usize,
    pub(super) dv: usize,
}

/// Rows `(position, head of the group)` of one key head, and the keys that any of them sees.
pub(super) struct Block {
    pub(super) rows: Range<usize>,
    pub(super) keys: Range<usize>,
}

impl<'a, T: Float> Attention<'a, T> {
    pub(super) fn new(args: &[Arg<'a>], attrs: &'a AttentionAttrs) -> Attention<'a, T> {
        let mut rest = args.iter().copied();
        let mut next = || rest.next().expect("metal-candle bug: attention lacks an input");
        let (q, k, v) = (next(), next(), next());
        let attention_mask = attrs.mask.then(&mut next);
        let segments = attrs.segments.then(|| [next(), next()]);
        let offset = attrs.offset.then(|| next().scalar::<i64>());
        let ([b, tq, hq, d], [_, tk, hk, _], [_, _, _, dv]) =
            (extents(&q), extents(&k), extents(&v));
        let fits = *k.shape().dims() == [b, tk, hk, d]
            && *v.shape().dims() == [b, tk, hk, dv]
            && hk != 0
            && hq.is_multiple_of(hk)
            && attention_mask.is_none_or(|m| *m.shape().dims() == [b, hq, tq, tk])
            && segments
                .is_none_or(|[q, k]| *q.shape().dims() == [b, tq] && *k.shape().dims() == [b, tk]);
        assert!(fits, "metal-candle bug: attention of {}, {}, {}", q.shape(), k.shape(), v.shape());
        Attention {
            q: q.read(),
            k: k.read(),
            v: v.read(),
            attention_mask,
            segments,
            offset: offset.unwrap_or(tk as i64 - tq as i64),
            attrs,
            b,
            tq,
            tk,
            hq,
            hk,
            d,
            dv,
        }
    }

    /// `y: [b, tq, hq, dv]` and `lse: [b, tq, hq]`, those that are wanted.
    fn tiled(&self, y: Option<&mut [T]>, lse: Option<&mut [T::Acc]>, parallel: bool) {
        let (y, lse, blocks) = (y.map(Parts::new), lse.map(Parts::new), self.blocks());
        parallel::for_each(parallel, self.b * self.hk * blocks, |task| {
            let (pair, block) = (task / blocks, self.block(task % blocks));
            let (b, head) = (pair / self.hk, pair % self.hk);
            let (rows, keys) = (block.rows.len(), block.keys.len());
            let lens = [rows * self.d, rows * keys, rows * self.dv, rows, rows];
            scratch::split(lens, |[q, scores, values, sums, maxima]: [&mut [T::Acc]; 5]| {
                self.pack_query(b, head, &block, q);
                self.scores(b, head, &block, q, scores);
                self.mask(b, head, &block, scores);
                self.exponentials(&block, scores, sums, maxima);
                if let Some(lse) = &lse {
                    for ((row, sum), max) in block.rows.clone().zip(&*sums).zip(&*maxima) {
                        // SAFETY: every row belongs to one task.
                        let to = unsafe { lse.part(self.query_row(b, head, row), 1) };
                        to[0] = log_sum_exp(*max, *sum);
                    }
                }
                let Some(y) = &y else { return };
                let (p, v) = (Mat::dense(scores, rows, keys), self.values(b, head, &block));
                let one = T::Acc::from_f64(1.0);
                gemm_of::<T, _, _>(MatMut::dense(values, rows, self.dv), p, v, one, false);
                for (r, row) in block.rows.clone().enumerate() {
                    let values = &mut values[r * self.dv..(r + 1) * self.dv];
                    T::Acc::scale_all(values, reciprocal(sums[r]));
                    // SAFETY: every row of the output belongs to one row of one task.
                    let to = unsafe { y.part(self.query_row(b, head, row) * self.dv, self.dv) };
                    T::narrow_all(values, to);
                }
            });
        });
    }

    fn result<'o>(&self, out: &'o mut Out) -> &'o mut [T] {
        let expected = [self.b, self.tq, self.hq, self.dv];
        assert_eq!(out.shape().dims(), expected, "metal-candle bug: attention");
        out.slice()
    }

    fn row_result<'o>(&self, out: &'o mut Out) -> &'o mut [T::Acc] {
        let expected = [self.b, self.tq, self.hq];
        assert_eq!(out.shape().dims(), expected, "metal-candle bug: attention_logsumexp");
        out.slice()
    }

    fn group(&self) -> usize {
        self.hq / self.hk
    }

    fn block_rows(&self) -> usize {
        let positions = if self.attrs.causal { CAUSAL_POSITIONS } else { POSITIONS };
        positions * self.group().min(MAX_HEADS)
    }

    /// The number of blocks of one key head.
    pub(super) fn blocks(&self) -> usize {
        (self.tq * self.group()).div_ceil(self.block_rows())
    }

    pub(super) fn block(&self, index: usize) -> Block {
        let start = index * self.block_rows();
        let rows = start..(start + self.block_rows()).min(self.tq * self.group());
        // What is seen moves with the position: the first row sees the first key, the last row the last.
        let keys = self.seen(rows.start).start..self.seen(rows.end - 1).end;
        Block { rows, keys: keys.start.min(keys.end)..keys.end }
    }

    /// The keys that `row` sees by their position.
    pub(super) fn seen(&self, row: usize) -> Range<usize> {
        if !self.attrs.causal {
            return 0..self.tk;
        }
        let clamp = |key: i64| key.clamp(0, self.tk as i64) as usize;
        let end = self.offset.saturating_add((row / self.group()) as i64).saturating_add(1);
        let start = self.attrs.window.map_or(0, |window| end.saturating_sub(i64::from(window)));
        clamp(start)..clamp(end)
    }

    /// The query head of `row` of the key head.
    pub(super) fn head(&self, head: usize, row: usize) -> usize {
        head * self.group() + row % self.group()
    }

    pub(super) fn position(&self, row: usize) -> usize {
        row / self.group()
    }

    /// Where `row` lies among the rows of q and of the output.
    pub(super) fn query_row(&self, b: usize, head: usize, row: usize) -> usize {
        (b * self.tq + self.position(row)) * self.hq + self.head(head, row)
    }

    /// The rows of q of the block: `[rows, d]`
    pub(super) fn pack_query(&self, b: usize, head: usize, block: &Block, q: &mut [T::Acc]) {
        for (q, row) in q.chunks_exact_mut(self.d.max(1)).zip(block.rows.clone()) {
            self.q.row(self.query_row(b, head, row)).widen_to(q);
        }
    }

    pub(super) fn scale(&self) -> T::Acc {
        T::Acc::from_f64(self.attrs.scale.as_f64())
    }

    /// `[keys, d]`
    pub(super) fn keys(&self, b: usize, head: usize, block: &Block) -> Mat<'a, T> {
        let k = self.k.index(2, head).index(0, b).matrix(); // [tk, d]
        k.row_range(block.keys.start, block.keys.len())
    }

    /// `[keys, dv]`
    pub(super) fn values(&self, b: usize, head: usize, block: &Block) -> Mat<'a, T> {
        let v = self.v.index(2, head).index(0, b).matrix(); // [tk, dv]
        v.row_range(block.keys.start, block.keys.len())
    }

    /// `scale · q kᵀ`, `[rows, keys]`. The scale is applied to the sums: q may be rounded, and is then no further from
    /// what was given.
    pub(super) fn scores(
        &self,
        b: usize,
        head: usize,
        block: &Block,
        q: &[T::Acc],
        scores: &mut [T::Acc],
    ) {
        let (rows, keys) = (block.rows.len(), block.keys.len());
        let k = self.keys(b, head, block).transposed();
        let (scores, q) = (MatMut::dense(scores, rows, keys), Mat::dense(q, rows, self.d));
        gemm_of::<T, _, _>(scores, q, k, self.scale(), false);
    }

    /// Adds the mask, and hides the keys of other segments.
    pub(super) fn mask(&self, b: usize, head: usize, block: &Block, scores: &mut [T::Acc]) {
        let keys = block.keys.len().max(1);
        for (scores, row) in scores.chunks_exact_mut(keys).zip(block.rows.clone()) {
            if let Some(mask) = self.attention_mask {
                let at = (b * self.hq + self.head(head, row)) * self.tq + self.position(row);
                add_mask(&mask, at, block.keys.start, scores);
            }
            if let Some([of_q, of_k]) = self.segments {
                for_index!(of_q.dtype(), I => {
                    let own = of_q.read::<I>().row(b).get(self.position(row));
                    let theirs = of_k.read::<I>().row(b).from(block.keys.start).iter();
                    for (score, segment) in scores.iter_mut().zip(theirs) {
                        *score = if segment == own { *score } else { T::Acc::NEG_INFINITY };
                    }
                });
            }
        }
    }

    /// The part of a row of a block's scores that the row sees by its position; the rest becomes 0.
    fn seen_scores<'s>(
        &self,
        block: &Block,
        row: usize,
        scores: &'s mut [T::Acc],
    ) -> &'s mut [T::Acc] {
        let (seen, first) = (self.seen(row), block.keys.start);
        let start = seen.start.saturating_sub(first).min(scores.len());
        let end = seen.end.saturating_sub(first).clamp(start, scores.len());
        scores[..start].fill(T::Acc::ZERO);
        scores[end..].fill(T::Acc::ZERO);
        &mut scores[start..end]
    }

    /// `exp(score - max)` of what each row sees, 0 elsewhere; the sum and the max of each row.
    fn exponentials(
        &self,
        block: &Block,
        scores: &mut [T::Acc],
        sums: &mut [T::Acc],
        maxima: &mut [T::Acc],
    ) {
        sums.fill(T::Acc::ZERO);
        maxima.fill(T::Acc::NEG_INFINITY);
        let rows = scores.chunks_exact_mut(block.keys.len().max(1)).zip(block.rows.clone());
        for (((scores, row), sum), largest) in rows.zip(sums).zip(maxima) {
            let scores = self.seen_scores(block, row, scores);
            let max = T::Acc::max_of(scores);
            if max == T::Acc::NEG_INFINITY {
                scores.fill(T::Acc::ZERO);
            } else {
                *sum = T::Acc::exp_all(scores, max);
                *largest = max;
            }
        }
    }

    /// `exp(score - lse)` of what each row sees, 0 elsewhere.
    pub(super) fn weights(&self, block: &Block, scores: &mut [T::Acc], lse: &[T::Acc]) {
        let rows = scores.chunks_exact_mut(block.keys.len().max(1)).zip(block.rows.clone());
        for ((scores, row), lse) in rows.zip(lse) {
            let scores = self.seen_scores(block, row, scores);
            if lse.to_f64() == f64::INFINITY {
                scores.fill(T::Acc::ZERO);
            } else {
                T::Acc::exp_all(scores, *lse);
            }
        }
    }
}

fn extents(x: &Arg) -> [usize; 4] {
    let dims = x.shape().dims();
    dims.try_into().unwrap_or_else(|_| panic!("metal-candle bug: attention of {dims:?}"))
}

/// Adds row `at` of the mask from key `first` on.
fn add_mask<A: Real>(mask: &Arg, at: usize, first: usize, scores: &mut [A]) {
    for_float!(mask.dtype(), M => {
        let row = mask.read::<M>().row(at).from(first);
        for (score, m) in scores.iter_mut().zip(row.iter()) {
            *score += A::from_f64(m.widen().to_f64());
        }
    });
}
