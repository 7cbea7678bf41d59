//! Every rule of a primitive against finite differences.

use crate::check::{
    Arg, add_inputs, assert_close, check, differentiate, float, given, integers, mention, slope,
    values, within,
};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    ArgReduceOp, BinaryOp, BlockFormat, ComputationGraph, DType, Dims, Distribution, Node, NodeId,
    Operation, Permutation, ReduceOp, Result, Scalar, Shape, UnaryOp,
};

/// Intervals on which `f` is smooth.
fn domain(f: UnaryOp) -> &'static [(f64, f64)] {
    use UnaryOp::*;
    match f {
        Recip | Abs | Sign | Relu => &[(-2.0, -0.3), (0.3, 2.0)],
        Sqrt | Rsqrt | Log => &[(0.5, 2.0)],
        Log1p => &[(-0.5, 2.0)],
        Floor | Ceil => &[(-0.9, -0.1), (2.1, 2.9)],
        Round => &[(-0.4, 0.4), (2.6, 3.4)],
        Neg | Sqr | Exp | Expm1 | Sin | Cos | Tanh | Erf | Sigmoid | Silu | Gelu | GeluTanh => {
            &[(-2.0, 2.0)]
        }
    }
}

#[test]
fn unary_ops_have_the_slope_of_their_function() {
    for f in UnaryOp::ALL {
        for (low, high) in domain(*f) {
            check(f.as_str(), &[within(&[3, 4], *low, *high)], |g, x| g.unary(*f, x[0]));
        }
    }
}

#[test]
fn unary_slopes_have_the_slope_of_their_slope() {
    for f in UnaryOp::ALL {
        for (low, high) in domain(*f) {
            check(f.as_str(), &[within(&[7], *low, *high)], |g, x| {
                let y = g.unary(*f, x[0])?;
                let dx = slope(g, y, x[0])?;
                mention(g, dx, x)
            });
        }
    }
}

#[test]
fn binary_ops_have_the_slopes_of_their_function_in_every_broadcast() {
    let shapes: [[&[usize]; 2]; 7] = [
        [&[5], &[5]],
        [&[3, 1], &[1, 4]],
        [&[], &[2, 3]],
        [&[2, 3, 4], &[4]],
        [&[2, 1, 4], &[3, 1]],
        [&[0, 3], &[1, 3]],
        [&[1], &[0]],
    ];
    for f in BinaryOp::ALL.iter().filter(|f| !f.is_comparison()) {
        // The base of a power and a divisor are positive.
        let (low, high) = match f {
            BinaryOp::Pow => ((0.5, 2.0), (-2.0, 2.0)),
            BinaryOp::Div => ((-1.0, 1.0), (0.5, 2.0)),
            _ => ((-1.0, 1.0), (-1.0, 1.0)),
        };
        for [a, b] in shapes {
            let args = [within(a, low.0, low.1), within(b, high.0, high.1)];
            check(&format!("{f} {a:?} {b:?}"), &args, |g, x| g.binary(*f, x[0], x[1]));
        }
        check(&format!("{f} with itself"), &[within(&[5], 0.5, 2.0)], |g, x| {
            // Not the very same value, where max and min have a kink.
            let x1 = g.binary_scalar(BinaryOp::Add, x[0], 0.1)?;
            g.binary(*f, x1, x[0])
        });
    }
}

#[test]
fn powers_with_a_constant_exponent_take_any_base() {
    for exponent in [-2.0, -1.0, 0.0, 1.0, 2.0, 3.0] {
        for (low, high) in [(-2.0, -0.5), (0.5, 2.0)] {
            check(&format!("pow {exponent}"), &[within(&[6], low, high)], |g, x| {
                g.binary_scalar(BinaryOp::Pow, x[0], exponent)
            });
        }
    }
}

/// What PyTorch gives where a function has no derivative.
#[test]
fn kinks_have_pytorchs_gradient() {
    type Build = fn(&mut ComputationGraph, &[NodeId]) -> Result<NodeId>;
    type Case = (&'static str, Vec<Arg>, Build, Vec<Vec<f64>>);
    let at = |data: &[f64]| given(&[data.len()], data);
    let sin1 = 1f64.sin(); // the weight of the only, or first, element
    let cases: [Case; 9] = [
        ("relu", vec![at(&[0.0])], |g, x| g.unary(UnaryOp::Relu, x[0]), vec![vec![0.0]]),
        ("abs", vec![at(&[0.0])], |g, x| g.unary(UnaryOp::Abs, x[0]), vec![vec![0.0]]),
        (
            "maximum",
            vec![at(&[2.0]), at(&[2.0])],
            |g, x| g.binary(BinaryOp::Maximum, x[0], x[1]),
            vec![vec![sin1 / 2.0], vec![sin1 / 2.0]],
        ),
        (
            "minimum",
            vec![at(&[2.0]), at(&[2.0])],
            |g, x| g.binary(BinaryOp::Minimum, x[0], x[1]),
            vec![vec![sin1 / 2.0], vec![sin1 / 2.0]],
        ),
        (
            "max",
            vec![at(&[3.0, 1.0, 3.0, 3.0])],
            |g, x| g.reduce(ReduceOp::Max, x[0], Dims::new([0])),
            vec![vec![sin1 / 3.0, 0.0, sin1 / 3.0, sin1 / 3.0]],
        ),
        (
            "min",
            vec![at(&[3.0, 1.0, 1.0])],
            |g, x| g.reduce(ReduceOp::Min, x[0], Dims::new([0])),
            vec![vec![0.0, sin1 / 2.0, sin1 / 2.0]],
        ),
        (
            "pow 0^0",
            vec![at(&[0.0]), at(&[0.0])],
            |g, x| g.binary(BinaryOp::Pow, x[0], x[1]),
            vec![vec![0.0], vec![0.0]],
        ),
        (
            "pow 0^2",
            vec![at(&[0.0]), at(&[2.0])],
            |g, x| g.binary(BinaryOp::Pow, x[0], x[1]),
            vec![vec![0.0], vec![0.0]],
        ),
        (
            "pow 0^1",
            vec![at(&[0.0])],
            |g, x| g.binary_scalar(BinaryOp::Pow, x[0], 1.0),
            vec![vec![sin1]],
        ),
    ];
    for (name, args, build, want) in cases {
        for (got, want) in differentiate(name, &args, build).iter().zip(want) {
            for (a, b) in got.data.iter().zip(&want) {
                assert!((a - b).abs() < 1e-15, "{name}: got {:?}, want {want:?}", got.data);
            }
        }
    }
}

#[test]
fn selections_split_between_their_branches() {
    let cond = integers(DType::U8, &[2, 3], &[1, 0, 0, 1, 1, 0]);
    check("where_cond", &[cond, float(&[2, 3]), float(&[2, 3])], |g, x| {
        g.add(Operation::Select, x)
    });
    let row = integers(DType::U8, &[2, 1], &[1, 0]);
    check("where_cond, broadcast", &[row, float(&[3]), float(&[])], |g, x| {
        g.select(x[0], x[1], x[2])
    });
}

#[test]
fn reductions_spread_over_what_they_reduced() {
    let dims: [(&[usize], &[usize]); 6] = [
        (&[4], &[0]),
        (&[3, 4], &[1]),
        (&[3, 4], &[0]),
        (&[2, 3, 4], &[0, 2]),
        (&[2, 1, 3], &[0, 1, 2]),
        (&[0, 3], &[1]),
    ];
    for op in ReduceOp::ALL {
        for (shape, dims) in dims {
            check(&format!("{op} {shape:?} {dims:?}"), &[float(shape)], |g, x| {
                let dims = Dims::new(dims.iter().copied());
                g.add(Operation::Reduce { op: *op, dims }, x)
            });
        }
    }
    check("the sum of nothing", &[float(&[2, 0])], |g, x| g.sum(x[0], Dims::new([1])));
}

#[test]
fn running_sums_run_back() {
    for reverse in [false, true] {
        for (shape, dim) in [(&[5][..], 0), (&[2, 3, 4], 1), (&[2, 0], 1)] {
            check(&format!("cumsum {shape:?} {dim} {reverse}"), &[float(shape)], |g, x| {
                g.add(Operation::CumSum { dim, reverse }, x)
            });
        }
    }
}

fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

#[test]
fn movements_move_back() {
    let zero = Scalar::from_f64(DType::F64, 7.0);
    let permutation = Permutation::new(&[2, 0, 1]).unwrap();
    let cases: [(&[usize], Operation); 14] = [
        (&[2, 6], Operation::Reshape(shape(&[3, 1, 4]))),
        (&[2, 0], Operation::Reshape(shape(&[0, 5]))),
        (&[2, 3, 4], Operation::Permute(permutation)),
        (&[1, 3, 1], Operation::Broadcast(shape(&[2, 3, 4]))),
        (&[1, 3], Operation::Broadcast(shape(&[0, 3]))),
        (&[2, 5], Operation::Slice { dim: 1, start: 1, len: 3, step: 1 }),
        (&[2, 9, 2], Operation::Slice { dim: 1, start: 1, len: 3, step: 3 }),
        (&[8, 2], Operation::Slice { dim: 0, start: 1, len: 4, step: 2 }),
        (&[1, 1, 2, 1, 2, 1, 1, 7], Operation::Slice { dim: 7, start: 0, len: 3, step: 3 }),
        (&[3], Operation::Slice { dim: 0, start: 2, len: 1, step: usize::MAX }),
        (&[3], Operation::Slice { dim: 0, start: 3, len: 0, step: 2 }),
        (&[2, 3], Operation::Flip { dim: 1 }),
        (&[2, 3], Operation::Pad { dim: 0, before: 2, after: 1, value: zero }),
        (&[0, 3], Operation::Pad { dim: 0, before: 2, after: 1, value: zero }),
    ];
    for (shape, op) in cases {
        check(&format!("{op:?} of {shape:?}"), &[float(shape)], |g, x| g.add(op, x));
    }
}

#[test]
fn concatenations_come_apart() {
    let parts = [float(&[2, 1]), float(&[2, 3]), float(&[2, 0])];
    check("cat", &parts, |g, x| g.concat(1, &[x[0], x[1], x[2], x[0]]));
    check("cat of empty rows", &[float(&[0, 2]), float(&[0, 2])], |g, x| g.concat(1, x));
}

#[test]
fn reads_by_index_add_and_additions_read() {
    let long = |dims: &[usize], data: &[i64]| integers(DType::I64, dims, data);
    let u32s = |dims: &[usize], data: &[i64]| integers(DType::U32, dims, data);
    let at = |start: i64| long(&[], &[start]);
    let cases: Vec<(Operation, Vec<Arg>)> = vec![
        (Operation::Gather { dim: 1 }, vec![float(&[3, 4]), long(&[2, 3], &[0, 3, 3, 1, 1, 1])]),
        (
            Operation::Gather { dim: 0 },
            vec![float(&[3, 2]), u32s(&[4, 2], &[0, 1, 2, 2, 1, 0, 1, 1])],
        ),
        (Operation::IndexSelect { dim: 0 }, vec![float(&[4, 3]), u32s(&[3], &[2, 0, 2])]),
        (Operation::IndexSelect { dim: 1 }, vec![float(&[2, 3, 2]), long(&[4], &[1, 1, 2, 0])]),
        (Operation::IndexSelect { dim: 0 }, vec![float(&[4, 3]), long(&[0], &[])]),
        (
            Operation::ScatterAdd { dim: 1 },
            vec![float(&[3, 4]), long(&[2, 3], &[0, 3, 3, 1, 1, 1]), float(&[2, 3])],
        ),
        (
            Operation::IndexAdd { dim: 1 },
            vec![float(&[2, 3]), u32s(&[4], &[2, 0, 2, 1]), float(&[2, 4])],
        ),
        (Operation::SliceUpdate { dim: 1 }, vec![float(&[2, 5]), float(&[2, 2]), at(3)]),
        (Operation::SliceUpdate { dim: 0 }, vec![float(&[3, 2]), float(&[0, 2]), at(1)]),
        (Operation::DynamicSlice { dim: 0, len: 2 }, vec![float(&[5, 2]), at(1)]),
    ];
    for (op, args) in cases {
        check(&format!("{op:?}"), &args, |g, x| g.add(op, x));
    }
}

#[test]
fn products_transpose() {
    let shapes: [[&[usize]; 2]; 5] = [
        [&[2, 3], &[3, 4]],
        [&[2, 2, 3], &[2, 3, 1]],
        [&[2, 1, 3, 2], &[2, 1, 2, 2]],
        [&[2, 0], &[0, 3]],
        [&[0, 2], &[2, 3]],
    ];
    for [a, b] in shapes {
        check(&format!("matmul {a:?} {b:?}"), &[float(a), float(b)], |g, x| {
            g.add(Operation::Dot, x)
        });
    }
    check("x xᵀ", &[float(&[3, 2])], |g, x| {
        let t = g.transpose(x[0])?;
        g.add(Operation::Dot, &[x[0], t])
    });
}

/// The gradient of a product with blocks is that of the product with the weight they stand for.
#[test]
fn quantised_products_transpose() {
    let (format, rows, cols) = (BlockFormat::Q8_0, 3, 64);
    let blocks = integers(DType::U8, &[rows * 68], &[0; 3 * 68]);
    for transposed in [false, true] {
        let args = [float(&[2, if transposed { rows } else { cols }]), blocks.clone()];
        let mut g = ComputationGraph::new();
        let x = add_inputs(&mut g, &args);
        let y = g.add(Operation::QuantDot { format, rows, cols, transposed }, &x).unwrap();
        g.outputs = vec![y, slope(&mut g, y, x[0]).unwrap()];
        let got = evaluate(&dense(&g), &args);

        let mut g = ComputationGraph::new();
        let x = add_inputs(&mut g, &args);
        let y = dense_product(&mut g, x[0], rows, cols, transposed).unwrap();
        g.outputs = vec![y, slope(&mut g, y, x[0]).unwrap()];
        assert_close("quant_matmul", &got, &evaluate(&g, &args));
    }
}

/// `g` with a dense weight in the place of blocks.
fn dense(g: &ComputationGraph) -> ComputationGraph {
    let swap = |out: &mut ComputationGraph, node: &Node, inputs: &[NodeId]| match node.op {
        Operation::QuantDot { rows, cols, transposed, .. } => {
            dense_product(out, inputs[0], rows, cols, transposed)
        }
        _ => Ok(out.copy(node, inputs)),
    };
    g.rebuild(swap).unwrap()
}

fn dense_product(
    g: &mut ComputationGraph,
    x: NodeId,
    rows: usize,
    cols: usize,
    transposed: bool,
) -> Result<NodeId> {
    // [rows, cols], every element another
    let w = g.add(Operation::Iota { len: rows * cols, dtype: DType::F64 }, &[])?;
    let w = g.unary(UnaryOp::Sin, w)?;
    let w = g.reshape(w, shape(&[rows, cols]))?;
    let w = if transposed { w } else { g.transpose(w)? };
    g.add(Operation::Dot, &[x, w])
}

fn evaluate(g: &ComputationGraph, args: &[Arg]) -> Vec<Value> {
    oracle::evaluate(g, &values(args)).unwrap()
}

#[test]
fn random_numbers_are_constants_to_a_gradient() {
    let op = Operation::Random {
        distribution: Distribution::Normal,
        stream: 3,
        dtype: DType::F64,
        shape: shape(&[2, 3]),
    };
    check("noise", &[integers(DType::I64, &[], &[42]), float(&[2, 3])], |g, x| {
        let noise = g.add(op, &[x[0]])?;
        g.binary(BinaryOp::Mul, noise, x[1])
    });
}

/// Positions and comparisons choose, and what they choose has a gradient.
#[test]
fn choices_are_constants_to_a_gradient() {
    check("x at its maximum", &[float(&[3, 4])], |g, x| {
        let at = g.add(Operation::ArgReduce { op: ArgReduceOp::ArgMax, dim: 1 }, &[x[0]])?;
        g.add(Operation::Gather { dim: 1 }, &[x[0], at])
    });
    check("x where it is positive", &[float(&[9])], |g, x| {
        let positive = g.binary_scalar(BinaryOp::Gt, x[0], 0.0)?;
        let square = g.unary(UnaryOp::Sqr, x[0])?;
        g.select(positive, x[0], square)
    });
}

#[test]
fn casts_between_floats_pass_the_cotangent() {
    check("through f64", &[float(&[4])], |g, x| {
        // One way only: a finite difference would see f32's rounding.
        let c = g.add(Operation::Cast(DType::F64), &[x[0]])?;
        g.unary(UnaryOp::Sqr, c)
    });
    let [dx] = &differentiate("through f32", &[given(&[2], &[0.5, 2.0])], |g, x| {
        let narrow = g.cast(x[0], DType::F32)?;
        let y = g.unary(UnaryOp::Sqr, narrow)?;
        g.cast(y, DType::F64)
    })[..] else {
        panic!("one trainable, one gradient")
    };
    for (got, want) in dx.data.iter().zip([1f64.sin(), 4.0 * 2f64.sin()]) {
        assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    }
}
