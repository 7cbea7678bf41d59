//! The vocabulary. An operation carries attributes only; edges live in [`Node`](crate::Node).

use crate::{BlockFormat, Composite, DType, MAX_RANK, Scalar, Shape};
use std::fmt;

/// Declares a scalar function table: the enum, the list of all, and the printed names.
macro_rules! scalar_table {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant,)* }

        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant),*];

            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

scalar_table! {
    /// A scalar function of one argument, applied elementwise. Input and output have one dtype.
    UnaryOp {
        Neg = "neg",
        Abs = "abs",
        /// -1, 0 or 1; NaN stays NaN.
        Sign = "sign",
        Recip = "recip",
        Sqr = "sqr",
        Sqrt = "sqrt",
        Rsqrt = "rsqrt",
        Exp = "exp",
        Log = "log",
        Log1p = "log1p",
        Expm1 = "expm1",
        Sin = "sin",
        Cos = "cos",
        Tanh = "tanh",
        Erf = "erf",
        /// `1 / (1 + exp(-x))`
        Sigmoid = "sigmoid",
        /// `max(x, 0)`; the gradient at 0 is 0.
        Relu = "relu",
        /// `x * sigmoid(x)`
        Silu = "silu",
        /// `x * (1 + erf(x / sqrt 2)) / 2`
        Gelu = "gelu",
        /// `x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`
        GeluTanh = "gelu_tanh",
        Floor = "floor",
        Ceil = "ceil",
        /// Half to even, as IEEE 754 and PyTorch do.
        Round = "round",
    }
}

impl UnaryOp {
    /// Whether integers are in the domain.
    pub const fn takes_integers(self) -> bool {
        use UnaryOp::*;
        matches!(self, Neg | Abs | Sign | Sqr | Relu | Floor | Ceil | Round)
    }
}

scalar_table! {
    /// A scalar function of two arguments of one dtype, applied elementwise.
    BinaryOp {
        Add = "add",
        Sub = "sub",
        Mul = "mul",
        /// Integers truncate towards zero; an integer division by zero gives 0.
        Div = "div",
        /// Integers: repeated multiplication, wrapping; a negative exponent gives 0 unless the base is 1 or -1.
        Pow = "pow",
        /// NaN if either is NaN.
        Maximum = "maximum",
        /// NaN if either is NaN.
        Minimum = "minimum",
        Eq = "eq",
        Ne = "ne",
        Lt = "lt",
        Le = "le",
        Gt = "gt",
        Ge = "ge",
    }
}

impl BinaryOp {
    /// Comparisons give `u8` 0 or 1.
    pub const fn is_comparison(self) -> bool {
        use BinaryOp::*;
        matches!(self, Eq | Ne | Lt | Le | Gt | Ge)
    }
}

scalar_table! {
    /// A reduction. Floats accumulate in `f32` (`f64` for F64), integers in `i64`.
    ReduceOp {
        Sum = "sum",
        /// NaN if any element is NaN.
        Max = "max",
        /// NaN if any element is NaN.
        Min = "min",
    }
}

scalar_table! {
    /// The position of an extreme element; the first one on ties, NaN counts as extreme.
    ArgReduceOp {
        ArgMax = "argmax",
        ArgMin = "argmin",
    }
}

scalar_table! {
    /// What a random element is drawn from.
    Distribution {
        /// Uniform on `[0, 1)`.
        Uniform = "uniform",
        /// Standard normal.
        Normal = "normal",
    }
}

/// A set of dims, as bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Dims(u8);

impl Dims {
    /// The set of these dims, each below [`MAX_RANK`].
    pub fn new(dims: impl IntoIterator<Item = usize>) -> Dims {
        Dims(dims.into_iter().fold(0, |bits, d| bits | 1 << d))
    }

    /// Whether `dim` is among them.
    pub const fn contains(self, dim: usize) -> bool {
        self.0 & (1 << dim) != 0
    }

    /// In ascending order.
    pub fn iter(self) -> impl DoubleEndedIterator<Item = usize> {
        (0..MAX_RANK).filter(move |d| self.contains(*d))
    }

    /// How many there are.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Whether there are none.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// A permutation of the dims: output dim `i` is input dim `p[i]`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Permutation {
    rank: u8,
    dims: [u8; MAX_RANK],
}

impl Permutation {
    /// `None` if `dims` is no permutation of `0..dims.len()`, or longer than [`MAX_RANK`].
    pub fn new(dims: &[usize]) -> Option<Permutation> {
        if dims.len() > MAX_RANK || (0..dims.len()).any(|d| !dims.contains(&d)) {
            return None;
        }
        let mut p = Permutation { rank: dims.len() as u8, dims: [0; MAX_RANK] };
        for (to, from) in p.dims.iter_mut().zip(dims) {
            *to = *from as u8;
        }
        Some(p)
    }

    /// The number of dims.
    pub fn rank(&self) -> usize {
        self.rank as usize
    }

    /// The input dim at output position `i`.
    pub fn source(&self, i: usize) -> usize {
        self.dims[i] as usize
    }

    /// The input dim of each output dim.
    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.dims[..self.rank()].iter().map(|d| *d as usize)
    }

    /// What undoes this one.
    pub fn inverse(&self) -> Permutation {
        let mut inverse = *self;
        for i in 0..self.rank() {
            inverse.dims[self.source(i)] = i as u8;
        }
        inverse
    }

    /// First `self`, then `next`.
    pub fn then(&self, next: &Permutation) -> Permutation {
        let mut both = *self;
        for i in 0..self.rank() {
            both.dims[i] = self.dims[next.source(i)];
        }
        both
    }

    /// Whether nothing moves.
    pub fn is_identity(&self) -> bool {
        self.iter().enumerate().all(|(i, d)| i == d)
    }
}

impl fmt::Debug for Permutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// One operation. `inputs` below names what [`Node::inputs`](crate::Node) holds, in order.
///
/// Shapes and dtypes are explicit: elementwise inputs have equal shapes (see [`Operation::Broadcast`]) and
/// one dtype (see [`Operation::Cast`]); [`crate::builder`] inserts both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// The `index`-th tensor that the caller passes. `inputs = []`
    Input(u32),
    /// A rank-0 constant. `inputs = []`
    Const(Scalar),
    /// `[0, 1, .., len)`. `inputs = []`
    Iota { len: usize, dtype: DType },
    /// Counter-based random numbers (Philox 4x32-10, Salmon et al. 2011): element `i` depends only on the
    /// seed, `stream` and `i`. `inputs = [seed: i64[]]`
    Random { distribution: Distribution, stream: u32, dtype: DType, shape: Shape },

    /// `inputs = [x]`
    Unary(UnaryOp),
    /// `inputs = [a, b]`
    Binary(BinaryOp),
    /// `cond != 0 ? a : b`. `inputs = [cond: u8, a, b]`
    Select,
    /// Float to integer truncates towards zero and saturates as Rust's `as`; integers wrap. `inputs = [x]`
    Cast(DType),
    /// Reduces `dims`, keeping each with extent 1. `inputs = [x]`
    Reduce { op: ReduceOp, dims: Dims },
    /// Position along `dim` as `u32`, keeping `dim` with extent 1. `inputs = [x]`
    ArgReduce { op: ArgReduceOp, dim: usize },
    /// Inclusive running sum along `dim`, from the end if `reverse`. `inputs = [x]`
    CumSum { dim: usize, reverse: bool },

    /// Same elements in row-major order. `inputs = [x]`
    Reshape(Shape),
    /// `inputs = [x]`
    Permute(Permutation),
    /// Repeats dims of extent 1 up to the given shape of the same rank. `inputs = [x]`
    Broadcast(Shape),
    /// `len` positions along `dim` from `start`, every `step`-th (`step >= 1`). `inputs = [x]`
    Slice { dim: usize, start: usize, len: usize, step: usize },
    /// Reverses `dim`. `inputs = [x]`
    Flip { dim: usize },
    /// `inputs = [x]`
    Pad { dim: usize, before: usize, after: usize, value: Scalar },
    /// `inputs = [x0, x1, ..]`, at least one
    Concat { dim: usize },

    /// `y[.., i, ..] = x[.., index[.., i, ..], ..]` (torch.gather): the index has x's rank and at most its
    /// extents in every other dim. `inputs = [x, index]`
    Gather { dim: usize },
    /// Whole slices along `dim` chosen by a rank-1 index. `inputs = [x, index]`
    IndexSelect { dim: usize },
    /// `base` with `src[.., i, ..]` added at `index[.., i, ..]` along `dim` (torch.scatter_add), in index
    /// order. `inputs = [base, index, src]`, `index` and `src` of one shape
    ScatterAdd { dim: usize },
    /// `base` with slice `i` of `src` added to slice `index[i]` along `dim`. `inputs = [base, index: [n], src]`
    IndexAdd { dim: usize },
    /// `base` with `update` written at position `start` along `dim`; in place if `base` is donated.
    /// `inputs = [base, update, start: i64[]]`
    SliceUpdate { dim: usize },
    /// `len` positions along `dim` from the run-time position `start`. `inputs = [x, start: i64[]]`
    DynamicSlice { dim: usize, len: usize },

    /// Batched matrix product. `inputs = [a: [.., m, k], b: [.., k, n]]`, equal batch dims, rank >= 2
    Dot,
    /// Product with a quantised weight of `rows x cols`, stored row-major in blocks along `cols`.
    /// Plain: `[.., cols] -> [.., rows]` (`x Wᵀ`, a linear layer); transposed: `[.., rows] -> [.., cols]`.
    /// `inputs = [x: float, w: u8[bytes]]`
    QuantDot { format: BlockFormat, rows: usize, cols: usize, transposed: bool },
    /// `f32[rows, cols]` from blocks. `inputs = [w: u8[bytes]]`
    Dequantize { format: BlockFormat, rows: usize, cols: usize },

    /// The sum over the ranks of the world that the plan runs in, on each of them; `x` where it runs alone. Every rank
    /// computes the same operations of this kind in the same order. F32 or F64. `inputs = [x]`
    AllReduce,

    /// An op with a decomposition. See [`Composite`].
    Composite(Composite),
}

impl Operation {
    /// The name that errors and plans print.
    pub const fn name(&self) -> &'static str {
        match self {
            Operation::Input(_) => "input",
            Operation::Const(_) => "const",
            Operation::Iota { .. } => "iota",
            Operation::Random { .. } => "random",
            Operation::Unary(f) => f.as_str(),
            Operation::Binary(f) => f.as_str(),
            Operation::Select => "where_cond",
            Operation::Cast(_) => "to_dtype",
            Operation::Reduce { op, .. } => op.as_str(),
            Operation::ArgReduce { op, .. } => op.as_str(),
            Operation::CumSum { .. } => "cumsum",
            Operation::Reshape(_) => "reshape",
            Operation::Permute(_) => "permute",
            Operation::Broadcast(_) => "broadcast_as",
            Operation::Slice { .. } => "slice",
            Operation::Flip { .. } => "flip",
            Operation::Pad { .. } => "pad",
            Operation::Concat { .. } => "cat",
            Operation::Gather { .. } => "gather",
            Operation::IndexSelect { .. } => "index_select",
            Operation::ScatterAdd { .. } => "scatter_add",
            Operation::IndexAdd { .. } => "index_add",
            Operation::SliceUpdate { .. } => "slice_update",
            Operation::DynamicSlice { .. } => "dynamic_slice",
            Operation::Dot => "matmul",
            Operation::QuantDot { .. } => "quant_matmul",
            Operation::Dequantize { .. } => "dequantize",
            Operation::AllReduce => "all_reduce",
            Operation::Composite(c) => c.as_str(),
        }
    }
}
