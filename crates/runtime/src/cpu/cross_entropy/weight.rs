//! The weight of the classes, dense or in blocks, chunk by chunk.

use crate::cpu::gemm::{
    Factor, Multiply, Product, gemm_factors, gemm_of, gemm_of_packed, multiply_factors, packed_once,
};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Float, Number, Real};
use crate::cpu::quant::Blocks;
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Strided};
use metal_candle_graph::DType;
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

    /// Packs rows of x for [`Chunk::logits`]: every chunk multiplies them. Gives `f` them so.
    pub(super) fn packed<R>(
        &self,
        x: Mat<'_, T>,
        parallel: bool,
        f: impl FnOnce(Rows<'_, T>) -> R,
    ) -> R {
        let rounded = match self {
            Weight::Dense(_) => T::DTYPE == DType::BF16,
            Weight::Blocks(_) => true,
        };
        let extents = [x.rows(), x.cols()];
        packed_once::<T::Acc, _>(T::factor(&x), extents, rounded, parallel, |factor| {
            f(Rows { x, factor })
        })
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

/// Rows of x, `[rows, d]`, and as a factor of products with a [`Chunk`]: packed before, or themselves.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, T> {
    x: Mat<'a, T>,
    factor: &'a dyn Factor,
}

impl<'a, T: Float> Rows<'a, T> {
    /// Rows that each product packs for itself.
    pub(super) fn unpacked(x: &'a Mat<'a, T>) -> Rows<'a, T> {
        Rows { x: *x, factor: T::factor(x) }
    }

    pub(super) fn len(&self) -> usize {
        self.x.rows()
    }
}

/// Some rows of the weight, `[classes, d]`. Products with what was rounded once round their other factor, too.
pub(super) enum Chunk<'a, T: Float> {
    Dense(Mat<'a, T>),
    Unpacked(Mat<'a, T::Acc>),
}

impl<T: Float> Chunk<'_, T> {
    /// `logits = x weightᵀ`
    pub(super) fn logits(&self, logits: MatMut<'_, T::Acc>, Rows { x, factor }: Rows<'_, T>) {
        match self {
            Chunk::Dense(w) => gemm_of_packed::<T>(logits, (x, factor), w.transposed()),
            Chunk::Unpacked(w) => {
                let (extents, alpha) = ([x.rows(), w.rows(), x.cols()], T::Acc::from_f64(1.0));
                let product = Product { extents, alpha, accumulate: false, rounded: true };
                multiply_factors(logits, [factor, T::Acc::factor(w)], product);
            }
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
