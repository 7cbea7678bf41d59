//! Shape and dtype inference: the only place where an ill-formed operation is refused.

use crate::{
    BlockFormat, DType, Dims, Error, Operation, ReduceOp, Result, Shape, TensorType, composite,
};

/// The shape to which `lhs` and `rhs` broadcast (NumPy's rule).
///
/// # Errors
/// [`Error::Broadcast`] where two extents differ and neither is 1.
pub fn broadcast_shapes(op: &'static str, lhs: &Shape, rhs: &Shape) -> Result<Shape> {
    if lhs == rhs {
        return Ok(*lhs);
    }
    let rank = lhs.rank().max(rhs.rank());
    let at = |s: &Shape, i: usize| (i + s.rank()).checked_sub(rank).map_or(1, |j| s[j]);
    let mut dims = [0; crate::MAX_RANK];
    for (i, dim) in dims[..rank].iter_mut().enumerate() {
        *dim = match (at(lhs, i), at(rhs, i)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(Error::Broadcast { op, lhs: *lhs, rhs: *rhs }),
        };
    }
    Shape::new(&dims[..rank])
}

/// The type of `op`'s result.
///
/// # Errors
/// Whatever is wrong with the number, dtypes or shapes of `inputs`, or with the attributes of `op`.
pub fn infer(op: &Operation, inputs: &[TensorType]) -> Result<TensorType> {
    check_arity(op, inputs.len())?;
    let name = op.name();
    let out = |dtype, shape| Ok(TensorType::new(dtype, shape));
    match *op {
        Operation::Input(_) => panic!("metal-candle bug: an input carries its own type"),
        Operation::Const(c) => out(c.dtype(), Shape::SCALAR),
        Operation::Iota { len, dtype } => out(dtype, Shape::new(&[len])?),
        Operation::Random { dtype, shape, .. } => {
            require(dtype.is_float(), || dtype_error(name, "a float", dtype))?;
            check_scalar_i64(name, &inputs[0])?;
            out(dtype, shape)
        }
        Operation::Unary(f) => {
            let x = inputs[0];
            require(x.dtype.is_float() || f.takes_integers(), || {
                dtype_error(name, "a float", x.dtype)
            })?;
            Ok(x)
        }
        Operation::Binary(f) => {
            check_same(name, &inputs[0], &inputs[1])?;
            let dtype = if f.is_comparison() { DType::U8 } else { inputs[0].dtype };
            out(dtype, inputs[0].shape)
        }
        Operation::Select => {
            check_same(name, &inputs[1], &inputs[2])?;
            check_shape(name, inputs[1].shape, inputs[0].shape)?;
            let cond = inputs[0].dtype;
            require(cond == DType::U8, || dtype_error(name, "u8 for the condition", cond))?;
            Ok(inputs[1])
        }
        Operation::Cast(dtype) => out(dtype, inputs[0].shape),
        Operation::Reduce { op, dims } => infer_reduce(name, op, dims, &inputs[0]),
        Operation::ArgReduce { dim, .. } => {
            check_dim(name, dim, &inputs[0].shape)?;
            let shape = inputs[0].shape;
            require(shape[dim] != 0, || Error::EmptyReduce { op: name, shape })?;
            out(DType::U32, shape.with(dim, 1))
        }
        Operation::CumSum { dim, .. } | Operation::Flip { dim } => {
            check_dim(name, dim, &inputs[0].shape)?;
            Ok(inputs[0])
        }
        Operation::Reshape(_)
        | Operation::Permute(_)
        | Operation::Broadcast(_)
        | Operation::Slice { .. }
        | Operation::Pad { .. }
        | Operation::Concat { .. } => infer_movement(op, inputs),
        Operation::Gather { .. }
        | Operation::IndexSelect { .. }
        | Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::DynamicSlice { .. } => infer_indexing(op, inputs),
        Operation::Dot => infer_dot(name, &inputs[0], &inputs[1]),
        Operation::QuantDot { format, rows, cols, transposed } => {
            infer_quant_dot(name, format, [rows, cols], transposed, inputs)
        }
        Operation::Dequantize { format, rows, cols } => {
            check_blocks(name, format, [rows, cols], &inputs[0])?;
            out(DType::F32, Shape::new(&[rows, cols])?)
        }
        Operation::AllReduce => {
            let dtype = inputs[0].dtype;
            let sums = matches!(dtype, DType::F32 | DType::F64);
            require(sums, || dtype_error(name, "f32 or f64", dtype))?;
            Ok(inputs[0])
        }
        Operation::Composite(c) => composite::infer(&c, inputs),
    }
}

fn check_arity(op: &Operation, got: usize) -> Result<()> {
    let expected = match op {
        Operation::Input(_) | Operation::Const(_) | Operation::Iota { .. } => 0,
        Operation::Binary(_)
        | Operation::Gather { .. }
        | Operation::IndexSelect { .. }
        | Operation::DynamicSlice { .. }
        | Operation::Dot
        | Operation::QuantDot { .. } => 2,
        Operation::Select
        | Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. } => 3,
        Operation::Concat { .. } => got.max(1),
        // Composites check their own, optional inputs included.
        Operation::Composite(_) => got,
        _ => 1,
    };
    require(got == expected, || Error::Arity { op: op.name(), expected, got })
}

fn infer_reduce(
    name: &'static str,
    op: ReduceOp,
    dims: Dims,
    x: &TensorType,
) -> Result<TensorType> {
    let mut shape = x.shape;
    for dim in dims.iter() {
        check_dim(name, dim, &shape)?;
        // An empty sum is 0; an empty maximum has no value.
        require(op == ReduceOp::Sum || shape[dim] != 0, || Error::EmptyReduce {
            op: name,
            shape: x.shape,
        })?;
        shape = shape.with(dim, 1);
    }
    Ok(TensorType::new(x.dtype, shape))
}

fn infer_movement(op: &Operation, inputs: &[TensorType]) -> Result<TensorType> {
    let (name, x) = (op.name(), inputs[0]);
    let shape = match *op {
        Operation::Reshape(to) => {
            require(to.len() == x.shape.len(), || Error::Reshape { op: name, from: x.shape, to })?;
            to
        }
        Operation::Permute(p) => {
            check_rank(name, "that of the permutation", p.rank(), &x.shape)?;
            let dims: Vec<usize> = p.iter().map(|d| x.shape[d]).collect();
            Shape::new(&dims)?
        }
        Operation::Broadcast(to) => {
            let fits = to.rank() == x.shape.rank()
                && to.dims().iter().zip(x.shape.dims()).all(|(t, f)| t == f || *f == 1);
            require(fits, || Error::Broadcast { op: name, lhs: x.shape, rhs: to })?;
            to
        }
        Operation::Slice { dim, start, len, step } => {
            check_dim(name, dim, &x.shape)?;
            check_attribute(name, step >= 1, "step", "at least 1", step)?;
            // The last position read is start + (len - 1) * step.
            let end = len
                .checked_sub(1)
                .map_or(Some(start), |n| n.checked_mul(step)?.checked_add(start)?.checked_add(1))
                .unwrap_or(usize::MAX);
            check_range(name, dim, start, end, &x.shape)?;
            x.shape.with(dim, len)
        }
        Operation::Pad { dim, before, after, value } => {
            check_dim(name, dim, &x.shape)?;
            require(value.dtype() == x.dtype, || Error::DTypeMismatch {
                op: name,
                lhs: x.dtype,
                rhs: value.dtype(),
            })?;
            grow(&x.shape, dim, [before, after])?
        }
        Operation::Concat { dim } => {
            check_dim(name, dim, &x.shape)?;
            let mut shape = x.shape;
            for part in &inputs[1..] {
                require(part.dtype == x.dtype, || Error::DTypeMismatch {
                    op: name,
                    lhs: x.dtype,
                    rhs: part.dtype,
                })?;
                check_rank(name, "that of the first part", x.shape.rank(), &part.shape)?;
                check_shape(name, x.shape.with(dim, part.shape[dim]), part.shape)?;
                shape = grow(&shape, dim, [part.shape[dim], 0])?;
            }
            shape
        }
        _ => unreachable!("metal-candle bug: {name} moves no data"),
    };
    Ok(TensorType::new(x.dtype, shape))
}

fn infer_indexing(op: &Operation, inputs: &[TensorType]) -> Result<TensorType> {
    let (name, x) = (op.name(), inputs[0]);
    match *op {
        Operation::Gather { dim } => {
            check_dim(name, dim, &x.shape)?;
            check_index(name, &inputs[1])?;
            check_within(name, dim, &x.shape, &inputs[1].shape)?;
            Ok(TensorType::new(x.dtype, inputs[1].shape))
        }
        Operation::IndexSelect { dim } => {
            check_dim(name, dim, &x.shape)?;
            check_index(name, &inputs[1])?;
            check_rank(name, "1 for the index", 1, &inputs[1].shape)?;
            let dims = x.shape.with(dim, inputs[1].shape[0]);
            Ok(TensorType::new(x.dtype, Shape::new(dims.dims())?))
        }
        Operation::ScatterAdd { dim } => {
            check_dim(name, dim, &x.shape)?;
            check_index(name, &inputs[1])?;
            check_shape(name, inputs[1].shape, inputs[2].shape)?;
            check_within(name, dim, &x.shape, &inputs[1].shape)?;
            check_dtype(name, &x, &inputs[2])?;
            Ok(x)
        }
        Operation::IndexAdd { dim } => {
            check_dim(name, dim, &x.shape)?;
            check_index(name, &inputs[1])?;
            check_rank(name, "1 for the index", 1, &inputs[1].shape)?;
            check_shape(name, x.shape.with(dim, inputs[1].shape[0]), inputs[2].shape)?;
            check_dtype(name, &x, &inputs[2])?;
            Ok(x)
        }
        Operation::SliceUpdate { dim } => {
            check_dim(name, dim, &x.shape)?;
            check_rank(name, "that of the base", x.shape.rank(), &inputs[1].shape)?;
            let len = inputs[1].shape[dim];
            check_shape(name, x.shape.with(dim, len), inputs[1].shape)?;
            check_range(name, dim, 0, len, &x.shape)?;
            check_dtype(name, &x, &inputs[1])?;
            check_scalar_i64(name, &inputs[2])?;
            Ok(x)
        }
        Operation::DynamicSlice { dim, len } => {
            check_dim(name, dim, &x.shape)?;
            check_range(name, dim, 0, len, &x.shape)?;
            check_scalar_i64(name, &inputs[1])?;
            Ok(TensorType::new(x.dtype, x.shape.with(dim, len)))
        }
        _ => unreachable!("metal-candle bug: {name} does not index"),
    }
}

fn infer_dot(name: &'static str, a: &TensorType, b: &TensorType) -> Result<TensorType> {
    let (l, r) = (a.shape, b.shape);
    for s in [&l, &r] {
        require(s.rank() >= 2, || Error::Rank { op: name, expected: "at least 2", got: s.rank() })?;
    }
    require(a.dtype.is_float(), || dtype_error(name, "a float", a.dtype))?;
    check_dtype(name, a, b)?;
    let k = l.rank() - 1;
    let batched = l.rank() == r.rank() && l.dims()[..k - 1] == r.dims()[..k - 1];
    require(batched && l[k] == r[k - 1], || Error::Dot { op: name, lhs: l, rhs: r })?;
    Ok(TensorType::new(a.dtype, Shape::new(l.with(k, r[k]).dims())?))
}

fn infer_quant_dot(
    name: &'static str,
    format: BlockFormat,
    [rows, cols]: [usize; 2],
    transposed: bool,
    inputs: &[TensorType],
) -> Result<TensorType> {
    check_blocks(name, format, [rows, cols], &inputs[1])?;
    let x = inputs[0];
    require(x.dtype.is_float(), || dtype_error(name, "a float", x.dtype))?;
    let (from, to) = if transposed { (rows, cols) } else { (cols, rows) };
    let last = x.shape.rank().checked_sub(1).ok_or(Error::Rank {
        op: name,
        expected: "at least 1",
        got: 0,
    })?;
    let weight = Shape::new(&[rows, cols])?;
    require(x.shape[last] == from, || Error::Dot { op: name, lhs: x.shape, rhs: weight })?;
    Ok(TensorType::new(x.dtype, Shape::new(x.shape.with(last, to).dims())?))
}

fn check_blocks(
    name: &'static str,
    format: BlockFormat,
    [rows, cols]: [usize; 2],
    w: &TensorType,
) -> Result<()> {
    require(w.dtype == DType::U8, || dtype_error(name, "u8 for the blocks", w.dtype))?;
    let row = format.bytes_for(cols).ok_or_else(|| Error::Attribute {
        op: name,
        what: "the number of columns",
        expected: "a multiple of the block length",
        got: format!("{cols} ({format:?} blocks hold {})", format.block_len()),
    })?;
    let bytes = row.checked_mul(rows).ok_or(Error::ShapeOverflow { dims: vec![rows, cols] })?;
    check_shape(name, Shape::new(&[bytes])?, w.shape)
}

pub(crate) fn require(ok: bool, error: impl FnOnce() -> Error) -> Result<()> {
    if ok { Ok(()) } else { Err(error()) }
}

fn dtype_error(op: &'static str, expected: &'static str, got: DType) -> Error {
    Error::DType { op, expected, got }
}

pub(crate) fn check_dim(op: &'static str, dim: usize, shape: &Shape) -> Result<()> {
    let rank = shape.rank();
    require(dim < rank, || Error::Dim { op, dim: dim as i64, rank })
}

pub(crate) fn check_shape(op: &'static str, expected: Shape, got: Shape) -> Result<()> {
    require(expected == got, || Error::Shape { op, expected, got })
}

pub(crate) fn check_rank(
    op: &'static str,
    expected: &'static str,
    rank: usize,
    shape: &Shape,
) -> Result<()> {
    require(shape.rank() == rank, || Error::Rank { op, expected, got: shape.rank() })
}

pub(crate) fn check_dtype(op: &'static str, a: &TensorType, b: &TensorType) -> Result<()> {
    require(a.dtype == b.dtype, || Error::DTypeMismatch { op, lhs: a.dtype, rhs: b.dtype })
}

fn check_same(op: &'static str, a: &TensorType, b: &TensorType) -> Result<()> {
    check_dtype(op, a, b)?;
    check_shape(op, a.shape, b.shape)
}

pub(crate) fn check_float(op: &'static str, x: &TensorType) -> Result<()> {
    require(x.dtype.is_float(), || dtype_error(op, "a float", x.dtype))
}

/// Indices and labels are `u8`, `u32` or `i64`.
pub(crate) fn check_index(op: &'static str, x: &TensorType) -> Result<()> {
    require(!x.dtype.is_float(), || dtype_error(op, "u8, u32 or i64 for the index", x.dtype))
}

pub(crate) fn check_scalar_i64(op: &'static str, x: &TensorType) -> Result<()> {
    require(x.dtype == DType::I64, || dtype_error(op, "i64 for the position or seed", x.dtype))?;
    check_rank(op, "0 for the position or seed", 0, &x.shape)
}

fn check_range(
    op: &'static str,
    dim: usize,
    start: usize,
    end: usize,
    shape: &Shape,
) -> Result<()> {
    let extent = shape[dim];
    require(start <= end && end <= extent, || Error::Range { op, dim, start, end, extent })
}

/// The index of a gather or scatter lies within x in every dim but `dim`.
fn check_within(op: &'static str, dim: usize, x: &Shape, index: &Shape) -> Result<()> {
    check_rank(op, "that of x", x.rank(), index)?;
    let fits = (0..x.rank()).all(|d| d == dim || index[d] <= x[d]);
    require(fits, || Error::Shape { op, expected: x.with(dim, index[dim]), got: *index })
}

fn check_attribute(
    op: &'static str,
    ok: bool,
    what: &'static str,
    expected: &'static str,
    got: usize,
) -> Result<()> {
    require(ok, || Error::Attribute { op, what, expected, got: got.to_string() })
}

fn grow(shape: &Shape, dim: usize, by: [usize; 2]) -> Result<Shape> {
    let mut dims = shape.dims().to_vec();
    dims[dim] = dims[dim]
        .checked_add(by[0])
        .and_then(|d| d.checked_add(by[1]))
        .ok_or_else(|| Error::ShapeOverflow { dims: shape.dims().to_vec() })?;
    Shape::new(&dims)
}
