//! Elementwise operations, reductions and views.

use super::{Gen, Var};
use metal_candle_graph::{
    ArgReduceOp, BinaryOp, DType, Dims, NodeId, Operation, ReduceOp, Shape, UnaryOp,
    broadcast_shapes,
};

impl Gen {
    pub(super) fn unary(&mut self) {
        use UnaryOp::*;
        let f = self.rng.pick(UnaryOp::ALL);
        let Some(x) = self.any_where(|s, v| s.is_float(v.id) || f.takes_integers()) else {
            return;
        };
        let float = self.is_float(x.id);
        match f {
            Floor | Ceil | Round | Sign if float && !x.exact => {}
            Neg | Abs | Sign | Relu | Floor | Ceil | Round if float => {
                let y = self.g.unary(f, x.id).unwrap();
                self.keep_exact(y, &[x]);
                if f != Neg {
                    self.kinked(x);
                }
            }
            Recip | Sqrt | Rsqrt | Log | Log1p => {
                let positive = self.positive(x);
                let y = self.g.unary(f, positive.id).unwrap();
                let v = self.derived(y, &[positive], false);
                self.push(v);
            }
            Sin | Cos | Tanh | Erf | Sigmoid | Silu | Gelu | GeluTanh => {
                let y = self.g.unary(f, x.id).unwrap();
                let v = self.derived(y, &[x], false);
                self.push(v);
            }
            Neg | Abs | Sign | Relu | Floor | Ceil | Round | Sqr | Exp | Expm1 => {
                let y = self.g.unary(f, x.id).unwrap();
                self.keep(y, &[x]);
            }
        }
    }

    /// `x² + 0.5`
    pub(super) fn positive(&mut self, x: Var) -> Var {
        let xx = self.g.unary(UnaryOp::Sqr, x.id).unwrap();
        let y = self.g.binary_scalar(BinaryOp::Add, xx, 0.5).unwrap();
        self.derived(y, &[x], false)
    }

    pub(super) fn binary(&mut self) {
        use BinaryOp::*;
        let f = self.rng.pick(&[
            Add, Add, Add, Sub, Sub, Mul, Mul, Mul, Div, Pow, Maximum, Minimum, Eq, Ne, Lt, Le, Gt,
            Ge,
        ]);
        let discontinuous = f.is_comparison();
        let Some(mut a) = self.any_where(|_, v| v.exact || !discontinuous) else { return };
        let mut b = self.partner(a, discontinuous);
        if self.is_float(a.id) && matches!(f, Div) {
            b = self.positive(b);
        }
        if self.is_float(a.id) && matches!(f, Pow) {
            a = self.positive(a);
        } else if self.rng.one_in(2) && !matches!(f, Div | Pow) {
            (a, b) = (b, a);
        }
        let Ok(y) = self.g.binary(f, a.id, b.id) else { return };
        if !self.fits(&self.g.shape(y)) {
            return;
        }
        match f {
            Maximum | Minimum => {
                self.keep_exact(y, &[a, b]);
                let exact = if a.exact { b } else { a };
                self.kinked(exact);
            }
            Eq | Ne | Lt | Le | Gt | Ge => drop(self.keep_exact(y, &[a, b])),
            Add | Sub if self.is_float(y) && self.rng.one_in(2) => self.halve(y, &[a, b]),
            Add | Sub | Mul | Div | Pow => drop(self.keep(y, &[a, b])),
        }
    }

    /// Half of a sum, in one of two spellings.
    fn halve(&mut self, y: NodeId, from: &[Var]) {
        let half = if self.rng.one_in(2) {
            self.g.binary_scalar(BinaryOp::Mul, y, 0.5).unwrap()
        } else {
            self.g.binary_scalar(BinaryOp::Div, y, 2.0).unwrap()
        };
        let v = self.derived(half, from, false);
        self.push(v);
    }

    /// A value of a's dtype that broadcasts with it: of the pool, a constant, or a new input.
    pub(super) fn partner(&mut self, a: Var, exact: bool) -> Var {
        let (dtype, shape) = (self.dtype(a.id), self.shape(a));
        if self.rng.one_in(5) {
            return self.constant(dtype);
        }
        let meets = |s: &Gen, v: Var| {
            let both = broadcast_shapes("test", &shape, &s.shape(v));
            s.dtype(v.id) == dtype && (v.exact || !exact) && both.is_ok_and(|both| s.fits(&both))
        };
        if !self.rng.one_in(4)
            && let Some(b) = self.any_where(meets)
        {
            return b;
        }
        let dims: Vec<usize> =
            shape.dims().iter().map(|d| if self.rng.one_in(3) { 1 } else { *d }).collect();
        let lead = self.rng.below(dims.len() + 1);
        let lead = if self.rng.one_in(2) { lead } else { 0 };
        self.input(dtype, Shape::new(&dims[lead..]).unwrap())
    }

    pub(super) fn select_or_cast(&mut self) {
        if self.rng.one_in(2) {
            return self.cast();
        }
        let a = self.any();
        let b = self.partner(a, false);
        let Ok(shape) = broadcast_shapes("test", &self.shape(a), &self.shape(b)) else { return };
        let meets = |s: &Gen, v: Var| {
            s.dtype(v.id) == DType::U8 && broadcast_shapes("test", &shape, &s.shape(v)).is_ok()
        };
        let cond = self.any_where(meets).unwrap_or_else(|| self.input(DType::U8, shape));
        let y = self.g.select(cond.id, a.id, b.id).unwrap();
        if self.fits(&self.g.shape(y)) {
            self.keep_exact(y, &[cond, a, b]);
        }
    }

    fn cast(&mut self) {
        let x = self.any();
        let mut to: Vec<DType> = self.limits.floats.to_vec();
        if x.exact {
            to.extend([DType::U8, DType::U32, DType::I64]);
        }
        let to = self.rng.pick(&to);
        let y = self.g.cast(x.id, to).unwrap();
        if to.is_float() && !self.is_float(x.id) {
            // Up to 9, exact in quarters.
            let y = self.g.binary_scalar(BinaryOp::Mul, y, 0.25).unwrap();
            self.keep_exact(y, &[x]);
        } else if to == DType::I64 || to.is_float() {
            self.keep_exact(y, &[x]);
        } else {
            self.keep(y, &[x]);
        }
    }

    pub(super) fn reduce(&mut self) {
        let op = self.rng.pick(&[ReduceOp::Sum, ReduceOp::Sum, ReduceOp::Max, ReduceOp::Min]);
        let Some(x) = self.any_where(|s, v| s.shape(v).rank() > 0) else { return };
        let shape = self.shape(x);
        if self.limits.calls && self.rng.one_in(4) {
            return self.scan(x);
        }
        let rank = shape.rank();
        let mut dims = vec![if self.rng.one_in(2) { rank - 1 } else { self.rng.below(rank) }];
        dims.extend((0..rank).filter(|_| self.rng.one_in(4)));
        let n: usize = Dims::new(dims.iter().copied()).iter().map(|d| shape[d]).product();
        if n == 0 && op != ReduceOp::Sum {
            return;
        }
        let y = self.g.add(Operation::Reduce { op, dims: Dims::new(dims) }, &[x.id]).unwrap();
        if op != ReduceOp::Sum {
            self.keep_exact(y, &[x]);
            self.kinked(x);
        } else if self.is_float(y) {
            let y = self.g.binary_scalar(BinaryOp::Mul, y, 1.0 / n.max(1) as f64).unwrap();
            let v = self.derived(y, &[x], false);
            self.push(v);
        } else {
            self.keep(y, &[x]);
        }
    }

    fn scan(&mut self, x: Var) {
        let shape = self.shape(x);
        let dim = self.rng.below(shape.rank());
        if self.rng.one_in(2) {
            let op = self.rng.pick(ArgReduceOp::ALL);
            if x.exact && shape[dim] > 0 {
                let y = self.g.add(Operation::ArgReduce { op, dim }, &[x.id]).unwrap();
                self.keep(y, &[x]);
            }
            return;
        }
        let reverse = self.rng.one_in(2);
        let mut y = self.g.add(Operation::CumSum { dim, reverse }, &[x.id]).unwrap();
        if self.is_float(y) {
            let scale = 1.0 / shape[dim].max(1) as f64;
            y = self.g.binary_scalar(BinaryOp::Mul, y, scale).unwrap();
        }
        self.keep(y, &[x]);
    }

    /// Adds a value that is small as it is.
    pub(super) fn push(&mut self, v: Var) {
        self.pool.push(v);
    }
}
