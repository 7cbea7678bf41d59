//! Views, joins, indexing and products.

use super::{Gen, Var};
use metal_candle_graph::{
    BinaryOp, BlockFormat, DType, Operation, Scalar, Shape, broadcast_shapes,
};

impl Gen {
    pub(super) fn view(&mut self) {
        let x = self.any();
        let shape = self.shape(x);
        let rank = shape.rank();
        let y = match self.rng.below(6) {
            0 => {
                let to = self.reshaped(&shape);
                self.g.reshape(x.id, to)
            }
            1 => {
                let mut dims: Vec<usize> = (0..rank).collect();
                (1..rank).rev().for_each(|i| dims.swap(i, self.rng.below(i + 1)));
                self.g.permute(x.id, &dims)
            }
            2 => {
                let lead = if rank < self.limits.max_rank { self.rng.below(2) } else { 0 };
                let mut dims: Vec<usize> = (0..lead).map(|_| self.extent()).collect();
                dims.extend_from_slice(shape.dims());
                for d in dims.iter_mut().filter(|d| **d == 1) {
                    *d = self.extent();
                }
                let to = Shape::new(&dims).unwrap();
                if !self.fits(&to) {
                    return;
                }
                self.g.broadcast_to(x.id, to)
            }
            _ if rank == 0 => return,
            3 => {
                let dim = self.rng.below(rank);
                self.g.add(Operation::Flip { dim }, &[x.id])
            }
            _ => {
                let dim = self.rng.below(rank);
                let start = self.rng.below(shape[dim] + 1);
                let step = 1 + self.rng.below(3);
                let most = (shape[dim] - start).div_ceil(step);
                let len = if self.rng.one_in(8) { self.rng.below(most + 1) } else { most };
                self.g.add(Operation::Slice { dim, start, len, step }, &[x.id])
            }
        };
        self.keep_exact(y.unwrap(), &[x]);
    }

    /// The same number of elements in another shape.
    fn reshaped(&mut self, shape: &Shape) -> Shape {
        let mut dims = shape.dims().to_vec();
        for _ in 0..1 + self.rng.below(3) {
            match self.rng.below(4) {
                0 if dims.len() < self.limits.max_rank => {
                    let at = self.rng.below(dims.len() + 1);
                    dims.insert(at, 1);
                }
                1 if dims.contains(&1) => {
                    let at = dims.iter().position(|d| *d == 1).unwrap();
                    dims.remove(at);
                }
                2 if dims.len() > 1 => {
                    let at = self.rng.below(dims.len() - 1);
                    dims[at] *= dims.remove(at + 1);
                }
                3 if dims.len() < self.limits.max_rank && !dims.is_empty() => {
                    let at = self.rng.below(dims.len());
                    let divisors: Vec<usize> =
                        (1..=dims[at]).filter(|d| dims[at].is_multiple_of(*d)).collect();
                    if !divisors.is_empty() {
                        let outer = self.rng.pick(&divisors);
                        dims[at] /= outer;
                        dims.insert(at, outer);
                    }
                }
                _ => {}
            }
        }
        Shape::new(&dims).unwrap()
    }

    pub(super) fn join(&mut self) {
        let Some(x) = self.any_where(|s, v| s.shape(v).rank() > 0) else { return };
        let (dtype, shape) = (self.dtype(x.id), self.shape(x));
        let dim = self.rng.below(shape.rank());
        if self.rng.one_in(2) {
            let (before, after) = (self.rng.below(3), self.rng.below(3));
            if !self.fits(&shape.with(dim, shape[dim] + before + after)) {
                return;
            }
            let value = Scalar::from_f64(dtype, if dtype.is_float() { 0.5 } else { 3.0 });
            let y = self.g.add(Operation::Pad { dim, before, after, value }, &[x.id]).unwrap();
            self.keep_exact(y, &[x]);
            return;
        }
        let mut parts = vec![x];
        for _ in 0..1 + self.rng.below(2) {
            let joins = |s: &Gen, v: Var| {
                let other = s.shape(v);
                s.dtype(v.id) == dtype
                    && other.rank() == shape.rank()
                    && other.with(dim, shape[dim]) == shape
            };
            let other = if self.rng.one_in(2) { None } else { self.any_where(joins) };
            let new = shape.with(dim, self.extent());
            match other {
                Some(part) => parts.push(part),
                None if self.fits(&new) => parts.push(self.input(dtype, new)),
                None => {}
            }
        }
        let ids: Vec<_> = parts.iter().map(|v| v.id).collect();
        let y = self.g.concat(dim, &ids).unwrap();
        if self.fits(&self.g.shape(y)) {
            self.keep_exact(y, &parts);
        }
    }

    pub(super) fn index(&mut self) {
        let nonempty = |s: &Gen, v: Var| s.shape(v).rank() > 0 && !s.shape(v).is_empty();
        let Some(x) = self.any_where(nonempty) else { return };
        let (dtype, shape) = (self.dtype(x.id), self.shape(x));
        let dim = self.rng.below(shape.rank());
        let n = self.extent();
        if !self.fits(&shape.with(dim, n)) {
            return;
        }
        match self.rng.below(6) {
            0 => {
                let mut at = shape.with(dim, n);
                for d in (0..shape.rank()).filter(|d| *d != dim) {
                    at = at.with(d, 1 + self.rng.below(shape[d]));
                }
                let index = self.indices(at, shape[dim]);
                let y = self.g.add(Operation::Gather { dim }, &[x.id, index.id]).unwrap();
                self.keep_exact(y, &[x]);
            }
            1 => {
                let index = self.indices(Shape::new(&[n]).unwrap(), shape[dim]);
                let y = self.g.add(Operation::IndexSelect { dim }, &[x.id, index.id]).unwrap();
                self.keep_exact(y, &[x]);
            }
            2 => {
                let index = self.indices(shape.with(dim, n), shape[dim]);
                let src = self.input(dtype, shape.with(dim, n));
                let op = Operation::ScatterAdd { dim };
                let y = self.g.add(op, &[x.id, index.id, src.id]).unwrap();
                self.keep(y, &[x, src]);
            }
            3 => {
                let index = self.indices(Shape::new(&[n]).unwrap(), shape[dim]);
                let src = self.input(dtype, shape.with(dim, n));
                let op = Operation::IndexAdd { dim };
                let y = self.g.add(op, &[x.id, index.id, src.id]).unwrap();
                self.keep(y, &[x, src]);
            }
            4 => {
                let len = self.rng.below(shape[dim] + 1);
                let update = self.input(dtype, shape.with(dim, len));
                let start = self.rng.below(shape[dim] - len + 1);
                let start = self.scalar_i64(start as i64);
                let op = Operation::SliceUpdate { dim };
                let y = self.g.add(op, &[x.id, update.id, start.id]).unwrap();
                self.keep_exact(y, &[x, update]);
            }
            _ => {
                let len = self.rng.below(shape[dim] + 1);
                let start = self.rng.below(shape[dim] - len + 1);
                let start = self.scalar_i64(start as i64);
                let y = self.g.add(Operation::DynamicSlice { dim, len }, &[x.id, start.id]);
                self.keep_exact(y.unwrap(), &[x]);
            }
        }
    }

    pub(super) fn product(&mut self) {
        if self.rng.one_in(4) {
            return self.quantised();
        }
        let Some(a) = self.any_where(|s, v| s.is_float(v.id) && s.shape(v).rank() >= 2) else {
            return;
        };
        let shape = self.shape(a);
        let rank = shape.rank();
        let right = shape.with(rank - 2, shape[rank - 1]).with(rank - 1, self.extent());
        let b = if self.rng.one_in(3) || !self.fits(&right) {
            let t = self.g.transpose(a.id).unwrap();
            self.derived(t, &[a], true)
        } else {
            self.input(self.dtype(a.id), right)
        };
        let y = self.g.add(Operation::Dot, &[a.id, b.id]).unwrap();
        if !self.fits(&self.g.shape(y)) {
            return;
        }
        // A product of products, where it is small enough as it is.
        let small = self.rng.one_in(2);
        let scale = if small { 0.25 } else { 1.0 } / shape[rank - 1].max(1) as f64;
        let mut y = self.g.binary_scalar(BinaryOp::Mul, y, scale).unwrap();
        if small && self.rng.one_in(2) {
            let v = self.derived(y, &[a, b], false);
            return self.push(v);
        }
        let mut from = vec![a, b];
        // An addend, as LoRA has one.
        let to = self.g.shape(y);
        let addend = |s: &Gen, v: Var| {
            let both = broadcast_shapes("test", &to, &s.shape(v));
            s.dtype(v.id) == s.dtype(a.id) && both.is_ok_and(|both| both == to)
        };
        if self.rng.one_in(2)
            && let Some(c) = self.any_where(addend)
        {
            y = self.g.binary(BinaryOp::Add, c.id, y).unwrap();
            from.push(c);
        }
        self.keep(y, &from);
    }

    /// Blocks of Q8_0 (a scale of 2^-7, as an f16, and bytes) or of NF4 (1.5, as an f32, and codes).
    fn quantised(&mut self) {
        let nf4 = self.rng.one_in(2);
        let (format, scale): (_, &[u8]) = match nf4 {
            true => (BlockFormat::NF4, &[0, 0, 0xc0, 0x3f]),
            false => (BlockFormat::Q8_0, &[0, 32]),
        };
        let (rows, cols) = (1 + self.rng.below(3), format.block_len());
        let bytes = rows * format.block_bytes();
        let byte = |i: usize, rng: &mut super::Rng| match scale.get(i % format.block_bytes()) {
            Some(byte) => f64::from(*byte),
            None => rng.below(256) as f64,
        };
        let data = (0..bytes).map(|i| byte(i, &mut self.rng)).collect();
        let w = self.input_of(DType::U8, Shape::new(&[bytes]).unwrap(), data);
        self.pool.pop();
        if self.rng.one_in(3) {
            let y = self.g.add(Operation::Dequantize { format, rows, cols }, &[w.id]).unwrap();
            let v = self.derived(y, &[w], false);
            return self.push(v);
        }
        let transposed = !self.limits.public && self.rng.one_in(2);
        let from = if transposed { rows } else { cols };
        let dtype = self.rng.pick(self.limits.floats);
        let x = self.input(dtype, Shape::new(&[2, from]).unwrap());
        let op = Operation::QuantDot { format, rows, cols, transposed };
        let y = self.g.add(op, &[x.id, w.id]).unwrap();
        let y = self.g.binary_scalar(BinaryOp::Mul, y, 1.0 / from as f64).unwrap();
        let mut v = self.derived(y, &[x, w], false);
        // Fast kernels round its factors: see `LibraryCall::QuantGemm`.
        if dtype != DType::F64 {
            v.coarsest = DType::BF16;
        }
        self.push(v);
    }
}
