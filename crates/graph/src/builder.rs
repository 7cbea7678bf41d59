//! Shorthands for writing graphs: they insert the broadcasts, casts and reshapes that [`Operation`] wants
//! explicit. Decompositions, gradients and passes are written with them. Their errors are those of [`infer`](fn@crate::infer).

use crate::{
    BinaryOp, ComputationGraph, DType, Dims, Error, NodeId, Operation, Permutation, ReduceOp,
    Result, Scalar, Shape, UnaryOp, broadcast_shapes,
};

impl ComputationGraph {
    /// A rank-0 constant of `like`'s dtype.
    pub fn scalar_like(&mut self, like: NodeId, value: f64) -> NodeId {
        let dtype = self.ty(like).dtype;
        self.constant(Scalar::from_f64(dtype, value))
    }

    /// `value` in the dtype and shape of `like`.
    pub fn full_like(&mut self, like: NodeId, value: f64) -> Result<NodeId> {
        let c = self.scalar_like(like, value);
        self.broadcast_to(c, self.shape(like))
    }

    /// `op(x)`, element by element.
    pub fn unary(&mut self, op: UnaryOp, x: NodeId) -> Result<NodeId> {
        self.add(Operation::Unary(op), &[x])
    }

    /// `op(a, b)` with both broadcast to their common shape.
    pub fn binary(&mut self, op: BinaryOp, a: NodeId, b: NodeId) -> Result<NodeId> {
        let shape = broadcast_shapes(op.as_str(), &self.shape(a), &self.shape(b))?;
        let (a, b) = (self.broadcast_to(a, shape)?, self.broadcast_to(b, shape)?);
        self.add(Operation::Binary(op), &[a, b])
    }

    /// `op(x, value)` with the constant in x's dtype.
    pub fn binary_scalar(&mut self, op: BinaryOp, x: NodeId, value: f64) -> Result<NodeId> {
        let c = self.scalar_like(x, value);
        self.binary(op, x, c)
    }

    /// `a` where `cond` is not 0, else `b`; all broadcast to their common shape.
    pub fn select(&mut self, cond: NodeId, a: NodeId, b: NodeId) -> Result<NodeId> {
        let ab = broadcast_shapes("where_cond", &self.shape(a), &self.shape(b))?;
        let shape = broadcast_shapes("where_cond", &self.shape(cond), &ab)?;
        let cond = self.broadcast_to(cond, shape)?;
        let (a, b) = (self.broadcast_to(a, shape)?, self.broadcast_to(b, shape)?);
        self.add(Operation::Select, &[cond, a, b])
    }

    /// `x` in another dtype, or as it is.
    pub fn cast(&mut self, x: NodeId, dtype: DType) -> Result<NodeId> {
        if self.ty(x).dtype == dtype { Ok(x) } else { self.add(Operation::Cast(dtype), &[x]) }
    }

    /// The elements of `x` in another shape, or as they are.
    pub fn reshape(&mut self, x: NodeId, shape: Shape) -> Result<NodeId> {
        if self.shape(x) == shape { Ok(x) } else { self.add(Operation::Reshape(shape), &[x]) }
    }

    /// Dim `i` of the result is dim `dims[i]` of `x`.
    pub fn permute(&mut self, x: NodeId, dims: &[usize]) -> Result<NodeId> {
        let rank = self.shape(x).rank();
        let p = Permutation::new(dims).filter(|p| p.rank() == rank).ok_or_else(|| Error::Dims {
            op: "permute",
            dims: dims.to_vec(),
            rank,
        })?;
        if p.is_identity() { Ok(x) } else { self.add(Operation::Permute(p), &[x]) }
    }

    /// Swaps the last two dims.
    pub fn transpose(&mut self, x: NodeId) -> Result<NodeId> {
        let rank = self.shape(x).rank();
        if rank < 2 {
            return Err(Error::Rank { op: "transpose", expected: "at least 2", got: rank });
        }
        let mut dims: Vec<usize> = (0..rank).collect();
        dims.swap(rank - 1, rank - 2);
        self.permute(x, &dims)
    }

    /// `x` repeated up to `shape`: leading dims are added, dims of extent 1 repeated.
    pub fn broadcast_to(&mut self, x: NodeId, shape: Shape) -> Result<NodeId> {
        let from = self.shape(x);
        if from == shape {
            return Ok(x);
        }
        let x = if from.rank() < shape.rank() {
            let mut dims = vec![1; shape.rank() - from.rank()];
            dims.extend_from_slice(from.dims());
            self.reshape(x, Shape::new(&dims)?)?
        } else {
            x
        };
        if self.shape(x) == shape { Ok(x) } else { self.add(Operation::Broadcast(shape), &[x]) }
    }

    /// Reduces `dims`, keeping them with extent 1. Dims of extent 1 are skipped.
    pub fn reduce(&mut self, op: ReduceOp, x: NodeId, dims: Dims) -> Result<NodeId> {
        let shape = self.shape(x);
        let dims = Dims::new(dims.iter().filter(|d| *d >= shape.rank() || shape[*d] != 1));
        if dims.is_empty() { Ok(x) } else { self.add(Operation::Reduce { op, dims }, &[x]) }
    }

    /// The sum over `dims`, kept with extent 1.
    pub fn sum(&mut self, x: NodeId, dims: Dims) -> Result<NodeId> {
        self.reduce(ReduceOp::Sum, x, dims)
    }

    /// The mean over `dims`, kept with extent 1.
    pub fn mean(&mut self, x: NodeId, dims: Dims) -> Result<NodeId> {
        let n: usize = dims.iter().map(|d| self.shape(x)[d]).product();
        let sum = self.sum(x, dims)?;
        self.binary_scalar(BinaryOp::Mul, sum, 1.0 / n as f64)
    }

    /// Sums `x` down to `shape`: the transpose of [`ComputationGraph::broadcast_to`].
    pub fn sum_to(&mut self, x: NodeId, shape: Shape) -> Result<NodeId> {
        let from = self.shape(x);
        let lead = from.rank() - shape.rank();
        let repeated = |d: usize| d < lead || (shape[d - lead] == 1 && from[d] != 1);
        let summed = self.sum(x, Dims::new((0..from.rank()).filter(|d| repeated(*d))))?;
        self.reshape(summed, shape)
    }

    /// `len` elements of `dim` from `start` on.
    pub fn slice(&mut self, x: NodeId, dim: usize, start: usize, len: usize) -> Result<NodeId> {
        let full = self.shape(x).dims().get(dim).is_some_and(|e| start == 0 && len == *e);
        if full { Ok(x) } else { self.add(Operation::Slice { dim, start, len, step: 1 }, &[x]) }
    }

    /// The parts, one behind the other along `dim`.
    pub fn concat(&mut self, dim: usize, parts: &[NodeId]) -> Result<NodeId> {
        if let [only] = parts { Ok(*only) } else { self.add(Operation::Concat { dim }, parts) }
    }
}
