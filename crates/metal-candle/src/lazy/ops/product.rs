//! Matrix products, dense, low-rank and quantised.

use crate::error::AtCaller;
use crate::{BlockFormat, LazyTensor, Result};
use metal_candle_graph::{Error, Operation, Shape, broadcast_shapes};

impl LazyTensor {
    /// The matrix product, over batches.
    ///
    /// Operands may be any views: transposed, sliced and broadcast ones are read where they lie.
    /// One matrix for the whole batch is one product with all rows, and so is its gradient.
    ///
    /// # Shapes
    /// `[.., m, k]` and `[.., k, n]` give `[.., m, n]`; the leading dims broadcast together.
    ///
    /// # Numerics
    /// Accumulates in f32 (f64 for f64) and rounds once.
    ///
    /// # Errors
    /// Below rank 2, for other inner extents, for leading dims that do not broadcast together, for
    /// integers, and where dtypes or devices differ.
    #[track_caller]
    pub fn matmul(&self, rhs: &LazyTensor) -> Result<LazyTensor> {
        let op = "matmul";
        let (l, r) = (self.ty().shape, rhs.ty().shape);
        for got in [l.rank(), r.rank()] {
            if got < 2 {
                return Err(Error::Rank { op, expected: "at least 2", got }).at_caller();
            }
        }
        let ((l_batch, l_last), (r_batch, r_last)) =
            (l.dims().split_at(l.rank() - 2), r.dims().split_at(r.rank() - 2));
        if l_last[1] != r_last[0] {
            return Err(Error::Dot { op, lhs: l, rhs: r }).at_caller();
        }
        let one_matrix = r_batch.iter().all(|extent| *extent == 1);
        if one_matrix && l.rank() > 2 && r.rank() <= l.rank() {
            let rows = l_batch.iter().product::<usize>() * l_last[0];
            let a = self.reshape(&[rows, l_last[1]])?;
            let y = LazyTensor::record(Operation::Dot, &[&a, &rhs.reshape(r_last)?])?;
            return y.reshape(l.with(l.rank() - 1, r_last[1]).dims());
        }
        let batches = (Shape::new(l_batch).at_caller()?, Shape::new(r_batch).at_caller()?);
        let batch = broadcast_shapes(op, &batches.0, &batches.1)
            .map_err(|_| Error::Broadcast { op, lhs: l, rhs: r })
            .at_caller()?;
        let batched = |last: &[usize]| Shape::new(&[batch.dims(), last].concat());
        let a = self.broadcast_for(op, batched(l_last).at_caller()?)?;
        let b = rhs.broadcast_for(op, batched(r_last).at_caller()?)?;
        LazyTensor::record(Operation::Dot, &[&a, &b])
    }

    /// `base + scale · (x A) B` (Hu et al. 2021), where x is this tensor.
    ///
    /// Where `base` is a product of its own, as `x W`, the last one accumulates onto its result.
    ///
    /// # Shapes
    /// `x: [.., k]`, `a: [k, rank]`, `b: [rank, n]`, and a base that broadcasts with `[.., n]`.
    ///
    /// # Numerics
    /// As [`LazyTensor::matmul`].
    ///
    /// # Errors
    /// As [`LazyTensor::matmul`] and [`LazyTensor::add`].
    #[track_caller]
    pub fn lora(
        &self,
        base: &LazyTensor,
        a: &LazyTensor,
        b: &LazyTensor,
        scale: f64,
    ) -> Result<LazyTensor> {
        base.add(&self.matmul(a)?.matmul(b)?.affine(scale, 0.0)?)
    }

    /// `x Wᵀ` with a weight that stays in its GGUF blocks: a frozen linear layer.
    ///
    /// The gradient goes to x only.
    ///
    /// # Shapes
    /// `x: [.., cols]` and `blocks: u8[bytes]`, the blocks of `rows` rows of `cols` weights one
    /// after the other, give `[.., rows]`.
    ///
    /// # Numerics
    /// Products are accumulated in f32 and rounded once. On a processor with the instructions for it, factors
    /// are rounded before: a few rows of x to eight bits, relative to the largest of 32 elements (weights are
    /// taken as they are); of many rows both x and the weights to bf16. f64 is not rounded.
    ///
    /// # Errors
    /// Where `cols` is no multiple of the block, `blocks` has another length or dtype, x another
    /// last extent or an integer dtype.
    #[track_caller]
    pub fn quant_matmul(
        &self,
        blocks: &LazyTensor,
        format: BlockFormat,
        rows: usize,
        cols: usize,
    ) -> Result<LazyTensor> {
        let op = Operation::QuantDot { format, rows, cols, transposed: false };
        LazyTensor::record(op, &[self, blocks])
    }

    /// The f32 weights in these GGUF blocks.
    ///
    /// # Shapes
    /// `u8[bytes]`, the blocks of `rows` rows of `cols` weights one after the other, gives
    /// `f32[rows, cols]`.
    ///
    /// # Numerics
    /// Exact: what ggml's own f32 dequantisation gives. There is no gradient.
    ///
    /// # Errors
    /// Where `cols` is no multiple of the block, or this tensor has another length or dtype.
    #[track_caller]
    pub fn dequantize(&self, format: BlockFormat, rows: usize, cols: usize) -> Result<LazyTensor> {
        LazyTensor::record(Operation::Dequantize { format, rows, cols }, &[self])
    }
}
