//! The weight of the classes, dense or in blocks, chunk by chunk.

use crate::cpu::gemm::{gemm_factors, gemm_of};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Float, Number, Real};
use crate::cpu::quant::Blocks;
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Strided};
use metal_candle_graph::composite::CrossEntropyAttrs;
use std::ops::Range;

/// `[classes, d]`
#[derive(Clone, Copy)]
pub(super) enum Weight<'a, T> {
    Dense(Mat<'a, T>),
    Blocks(Blocks<'a>),
}

impl<'a, T: Float> Weight<'a, T> {
    pub(super) fn new(
        op: &'static str,
        x: &Strided<'a, T>,
        weight: &Arg<'a>,
        attrs: &CrossEntropyAttrs,
    ) -> Weight<'a, T> {
        let d = x.cols();
        let classes = attrs.classes(d, weight.shape());
        if let Some(format) = attrs.blocks {
            return Weight::Blocks(Blocks::new(weight, format, classes, d));
        }
        let fits = weight.shape().dims() == [classes, d];
        assert!(fits, "metal-candle bug: {op} of {} and {}", x.shape(), weight.shape());
        Weight::Dense(weight.read::<T>().matrix())
    }

    pub(super) fn classes(&self) -> usize {
        match self {
            Weight::Dense(w) => w.rows(),
            Weight::Blocks(w) => w.rows(),
        }
    }

    /// The scratch that a [`Chunk`] of `len` elements needs.
    pub(super) fn wide_len(&self, len: usize) -> usize {
        match self {
            Weight::Dense(_) => 0,
            Weight::Blocks(_) => len,
        }
    }

    /// Some rows, `[rows, d]`: in place, or unpacked in `wide`.
    pub(super) fn rows<'b>(&self, range: Range<usize>, wide: &'b mut [T::Acc]) -> Chunk<'b, T>
    where
        'a: 'b,
    {
        match self {
            Weight::Dense(w) => Chunk::Dense(w.row_range(range.start, range.len())),
            Weight::Blocks(w) => Chunk::Unpacked(w.dense_rows(range, wide)),
        }
    }
}

/// Some rows of the weight, `[classes, d]`. Products with what was rounded once round their other factor, too.
pub(super) enum Chunk<'a, T: Float> {
    Dense(Mat<'a, T>),
    Unpacked(Mat<'a, T::Acc>),
}

impl<T: Float> Chunk<'_, T> {
    /// `logits = x weightᵀ`
    pub(super) fn logits(&self, logits: MatMut<'_, T::Acc>, x: Mat<'_, T>) {
        let one = T::Acc::from_f64(1.0);
        match self {
            Chunk::Dense(w) => gemm_of::<T, _, _>(logits, x, w.transposed(), one, false),
            Chunk::Unpacked(w) => gemm_factors(logits, x, w.transposed(), one, false, true),
        }
    }

    /// `sums += p weight`
    pub(super) fn add_weighted(&self, sums: MatMut<'_, T::Acc>, p: Mat<'_, T::Acc>) {
        let one = T::Acc::from_f64(1.0);
        match self {
            Chunk::Dense(w) => gemm_of::<T, _, _>(sums, p, *w, one, true),
            Chunk::Unpacked(w) => gemm_factors(sums, p, *w, one, true, true),
        }
    }

    /// `to += Σ rows`
    pub(super) fn add_rows(&self, to: &mut [T::Acc]) {
        fn add<T: Number<Acc: Real>>(to: &mut [T::Acc], from: Mat<'_, T>) {
            scratch::with(to.len(), |row: &mut [T::Acc]| {
                for i in 0..from.rows() {
                    from.row_range(i, 1).packed(row);
                    T::Acc::axpy(to, T::Acc::from_f64(1.0), row);
                }
            });
        }
        match self {
            Chunk::Dense(w) => add(to, *w),
            Chunk::Unpacked(w) => add(to, *w),
        }
    }
}
