//! The rules of `simplify`, one by one; common subexpressions meet by interning, dead code goes by
//! rebuilding.

use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    BinaryOp, ComputationGraph, DType, Dims, NodeId, Operation, ReduceOp, Scalar, Shape,
    TensorType, UnaryOp, pass,
};

fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

fn input(g: &mut ComputationGraph, index: u32, dims: &[usize]) -> NodeId {
    g.input(index, TensorType::new(DType::F32, shape(dims)))
}

/// What `simplify` makes of `build(x)`, x an input of these dims.
fn simplified(
    dims: &[usize],
    build: impl Fn(&mut ComputationGraph, NodeId) -> NodeId,
) -> ComputationGraph {
    let mut g = ComputationGraph::new();
    let x = input(&mut g, 0, dims);
    g.outputs = vec![build(&mut g, x)];
    // One more rebuild drops what no longer counts.
    let after = pass::simplify(&g).unwrap();
    after.rebuild(|out, node, inputs| Ok(out.copy(node, inputs))).unwrap()
}

/// `simplify` turns `build(x)` into `want(x)`.
#[track_caller]
fn becomes(
    dims: &[usize],
    build: impl Fn(&mut ComputationGraph, NodeId) -> NodeId,
    want: impl Fn(&mut ComputationGraph, NodeId) -> NodeId,
) {
    let after = simplified(dims, build);
    let mut expected = ComputationGraph::new();
    let x = input(&mut expected, 0, dims);
    expected.outputs = vec![want(&mut expected, x)];
    let live = |g: &ComputationGraph| {
        g.rebuild(|out, node, inputs| Ok(out.copy(node, inputs))).unwrap().to_string()
    };
    assert_eq!(live(&after), live(&expected));
}

fn id(_: &mut ComputationGraph, x: NodeId) -> NodeId {
    x
}

fn with(op: BinaryOp, value: f64) -> impl Fn(&mut ComputationGraph, NodeId) -> NodeId {
    move |g, x| g.binary_scalar(op, x, value).unwrap()
}

fn before(value: f64, op: BinaryOp) -> impl Fn(&mut ComputationGraph, NodeId) -> NodeId {
    move |g, x| {
        let c = g.scalar_like(x, value);
        g.binary(op, c, x).unwrap()
    }
}

fn full(value: f64) -> impl Fn(&mut ComputationGraph, NodeId) -> NodeId {
    move |g, x| g.full_like(x, value).unwrap()
}

#[test]
fn identities_are_dropped() {
    becomes(&[3], with(BinaryOp::Mul, 1.0), id);
    becomes(&[3], before(1.0, BinaryOp::Mul), id);
    becomes(&[3], with(BinaryOp::Div, 1.0), id);
    becomes(&[3], with(BinaryOp::Sub, 0.0), id);
    becomes(&[3], with(BinaryOp::Add, -0.0), id);
    becomes(&[3], before(-0.0, BinaryOp::Add), id);
    becomes(&[3], with(BinaryOp::Pow, 1.0), id);
    becomes(
        &[3],
        |g, x| {
            let minus = g.unary(UnaryOp::Neg, x).unwrap();
            g.unary(UnaryOp::Neg, minus).unwrap()
        },
        id,
    );
}

#[test]
fn what_only_looks_like_an_identity_stays() {
    let kept =
        |build: &dyn Fn(&mut ComputationGraph, NodeId) -> NodeId| becomes(&[3], build, build);
    // -0 + 0 is 0, NaN * 0 is NaN, x - (-0) turns -0 into 0.
    kept(&with(BinaryOp::Add, 0.0));
    kept(&with(BinaryOp::Mul, 0.0));
    kept(&with(BinaryOp::Sub, -0.0));
    kept(&before(1.0, BinaryOp::Div));
    kept(&before(0.0, BinaryOp::Sub));
    kept(&with(BinaryOp::Pow, 3.0));
    kept(&|g, x| g.binary(BinaryOp::Sub, x, x).unwrap());
    kept(&|g, x| g.binary(BinaryOp::Div, x, x).unwrap());
    // Sums are never reordered.
    kept(&|g, x| {
        let y = g.binary_scalar(BinaryOp::Add, x, 0.1).unwrap();
        g.binary_scalar(BinaryOp::Add, y, 0.2).unwrap()
    });
}

#[test]
fn powers_become_simpler_functions() {
    becomes(&[3], with(BinaryOp::Pow, 2.0), |g, x| g.unary(UnaryOp::Sqr, x).unwrap());
    becomes(&[3], with(BinaryOp::Pow, -1.0), |g, x| g.unary(UnaryOp::Recip, x).unwrap());
    becomes(&[3], with(BinaryOp::Pow, 0.0), full(1.0));
}

#[test]
fn constants_are_folded_through_views_and_casts() {
    let fold = |op, a: f64, b: f64| {
        move |g: &mut ComputationGraph, x: NodeId| {
            let (a, b) = (g.full_like(x, a).unwrap(), g.scalar_like(x, b));
            let b = g.reshape(b, shape(&[1])).unwrap();
            g.binary(op, a, b).unwrap()
        }
    };
    becomes(&[3], fold(BinaryOp::Add, 1.5, 2.0), full(3.5));
    becomes(&[3], fold(BinaryOp::Sub, 1.5, 2.0), full(-0.5));
    becomes(&[3], fold(BinaryOp::Mul, 1.5, 2.0), full(3.0));
    becomes(&[3], fold(BinaryOp::Div, 1.5, 2.0), full(0.75));
    for (f, from, to) in [
        (UnaryOp::Neg, 1.5, -1.5),
        (UnaryOp::Abs, -1.5, 1.5),
        (UnaryOp::Recip, 4.0, 0.25),
        (UnaryOp::Sqr, 1.5, 2.25),
        (UnaryOp::Sqrt, 2.25, 1.5),
        (UnaryOp::Relu, -1.0, 0.0),
        (UnaryOp::Floor, -1.5, -2.0),
        (UnaryOp::Ceil, -1.5, -1.0),
        (UnaryOp::Round, 2.5, 2.0),
    ] {
        let folded = |g: &mut ComputationGraph, x: NodeId| {
            let c = g.full_like(x, from).unwrap();
            g.unary(f, c).unwrap()
        };
        becomes(&[3], folded, full(to));
    }
    let cast = |g: &mut ComputationGraph, x: NodeId| {
        let c = g.constant(Scalar::from_i64(DType::I64, 7));
        let c = g.broadcast_to(c, g.shape(x)).unwrap();
        g.cast(c, DType::F32).unwrap()
    };
    becomes(&[3], cast, full(7.0));
}

/// A cast saturates and rounds; a constant is folded only to what the cast would give.
#[test]
fn folded_casts_give_what_the_cast_gives() {
    let floats = [0.1, 0.5, 300.7, -1.5, 1e-6, 7e4, 65504.0, 5e9, -5e9, 257.0, f64::INFINITY];
    for (from, value) in floats.iter().map(|x| (DType::F32, *x)).chain([(DType::I64, 257.0)]) {
        for through in DType::ALL {
            let mut g = ComputationGraph::new();
            let c = g.constant(Scalar::from_f64(from, value));
            let narrow = g.cast(c, through).unwrap();
            g.outputs = vec![narrow, g.cast(narrow, DType::F64).unwrap()];
            let want = oracle::evaluate(&g, &[]).unwrap();
            let got = oracle::evaluate(&pass::simplify(&g).unwrap(), &[]).unwrap();
            assert_eq!(got, want, "{value} as {through}");
        }
    }
}

#[test]
fn scales_in_turn_become_one() {
    let twice = |g: &mut ComputationGraph, x: NodeId| {
        let y = g.binary_scalar(BinaryOp::Mul, x, 3.0).unwrap();
        let c = g.scalar_like(x, 0.5);
        g.binary(BinaryOp::Mul, c, y).unwrap()
    };
    becomes(&[3], twice, with(BinaryOp::Mul, 1.5));
    // Integers wrap: nothing is merged there.
    let mut g = ComputationGraph::new();
    let x = g.input(0, TensorType::new(DType::U8, shape(&[2])));
    let y = g.binary_scalar(BinaryOp::Mul, x, 200.0).unwrap();
    let y = g.binary_scalar(BinaryOp::Mul, y, 200.0).unwrap();
    g.outputs = vec![y];
    let x = [Value::new(DType::U8, &[2], vec![3.0, 7.0]).unwrap()];
    let want = oracle::evaluate(&g, &x).unwrap();
    assert_eq!(oracle::evaluate(&pass::simplify(&g).unwrap(), &x).unwrap(), want);
}

#[test]
fn conditions_that_are_known_choose() {
    let of = |cond: i64| {
        move |g: &mut ComputationGraph, x: NodeId| {
            let cond = g.constant(Scalar::from_i64(DType::U8, cond));
            let other = g.full_like(x, 3.0).unwrap();
            g.select(cond, x, other).unwrap()
        }
    };
    becomes(&[3], of(1), id);
    becomes(&[3], of(0), full(3.0));
    let same = |g: &mut ComputationGraph, x: NodeId| {
        let cond = g.input(1, TensorType::new(DType::U8, shape(&[3])));
        g.select(cond, x, x).unwrap()
    };
    becomes(&[3], same, id);
}

fn slice(dim: usize, start: usize, len: usize, step: usize) -> Operation {
    Operation::Slice { dim, start, len, step }
}

#[test]
fn views_of_views_are_one_view() {
    let two = |a: Operation, b: Operation| {
        move |g: &mut ComputationGraph, x: NodeId| {
            let y = g.add(a, &[x]).unwrap();
            g.add(b, &[y]).unwrap()
        }
    };
    let one = |op: Operation| move |g: &mut ComputationGraph, x: NodeId| g.add(op, &[x]).unwrap();
    let reshape = |dims: &[usize]| Operation::Reshape(shape(dims));
    let broadcast = |dims: &[usize]| Operation::Broadcast(shape(dims));
    let flip = |dim| Operation::Flip { dim };
    becomes(&[2, 6], two(reshape(&[3, 4]), reshape(&[12])), one(reshape(&[12])));
    becomes(&[2, 6], two(reshape(&[3, 4]), reshape(&[2, 6])), id);
    becomes(&[1, 1], two(broadcast(&[1, 4]), broadcast(&[3, 4])), one(broadcast(&[3, 4])));
    becomes(&[2, 6], two(flip(1), flip(1)), id);
    becomes(&[9], two(slice(0, 1, 4, 2), slice(0, 1, 2, 2)), one(slice(0, 3, 2, 4)));
    // A slice of nothing at the end of a stepped slice.
    becomes(&[9], two(slice(0, 0, 3, 4), slice(0, 3, 0, 1)), one(slice(0, 0, 0, 1)));
    // Of one element no step is taken.
    let far = usize::MAX;
    becomes(&[9], two(slice(0, 2, 2, 3), slice(0, 1, 1, far)), one(slice(0, 5, 1, 1)));
    let permutes = |g: &mut ComputationGraph, x: NodeId| {
        let y = g.permute(x, &[1, 2, 0]).unwrap();
        g.permute(y, &[1, 2, 0]).unwrap()
    };
    becomes(&[2, 3, 4], permutes, |g, x| g.permute(x, &[2, 0, 1]).unwrap());
    let both = |g: &mut ComputationGraph, x: NodeId| {
        let y = g.permute(x, &[1, 2, 0]).unwrap();
        g.permute(y, &[2, 0, 1]).unwrap()
    };
    becomes(&[2, 3, 4], both, id);
    // Of two dims neither is the other's.
    let across = two(flip(0), flip(1));
    becomes(&[2, 6], across, across);
}

#[test]
fn views_that_show_all_as_it_is_are_dropped() {
    let one = |op: Operation| move |g: &mut ComputationGraph, x: NodeId| g.add(op, &[x]).unwrap();
    becomes(&[2, 3], one(Operation::Reshape(shape(&[2, 3]))), id);
    becomes(&[2, 3], one(Operation::Broadcast(shape(&[2, 3]))), id);
    becomes(&[2, 3], one(slice(1, 0, 3, 1)), id);
    becomes(&[2, 1], one(Operation::Flip { dim: 1 }), id);
    becomes(&[2, 1], one(Operation::Reduce { op: ReduceOp::Sum, dims: Dims::new([1]) }), id);
    becomes(&[2], one(Operation::Cast(DType::F32)), id);
    let value = Scalar::from_f64(DType::F32, 1.0);
    becomes(&[2], one(Operation::Pad { dim: 0, before: 0, after: 0, value }), id);
    let with_nothing = |g: &mut ComputationGraph, x: NodeId| {
        let nothing = input(g, 1, &[2, 0]);
        g.add(Operation::Concat { dim: 1 }, &[nothing, x, nothing]).unwrap()
    };
    becomes(&[2, 3], with_nothing, id);
}

#[test]
fn equal_subexpressions_are_one_node() {
    let mut g = ComputationGraph::new();
    let (a, b) = (input(&mut g, 0, &[3]), input(&mut g, 1, &[3]));
    let sum = g.binary(BinaryOp::Add, a, b).unwrap();
    assert_eq!(g.binary(BinaryOp::Add, a, b).unwrap(), sum);
    assert_ne!(g.binary(BinaryOp::Add, b, a).unwrap(), sum);
    let len = g.len();
    let one = g.binary_scalar(BinaryOp::Mul, sum, 1.0).unwrap();
    let zero = g.constant(Scalar::from_f64(DType::F32, 0.0));
    let minus = g.constant(Scalar::from_f64(DType::F32, -0.0));
    assert!(zero != minus && g.len() == len + 6);
    // After a rewrite too: both sides of the product become the one sum.
    g.outputs = vec![g.binary(BinaryOp::Mul, sum, one).unwrap()];
    let after = pass::simplify(&g).unwrap();
    let product = &after[after.outputs[0]];
    assert_eq!(product.inputs[0], product.inputs[1]);
}

#[test]
fn what_no_output_needs_is_gone_after_a_rebuild() {
    let mut g = ComputationGraph::new();
    let (x, unused) = (input(&mut g, 0, &[3]), input(&mut g, 1, &[3]));
    let dead = g.unary(UnaryOp::Exp, unused).unwrap();
    g.unary(UnaryOp::Log, dead).unwrap();
    let y = g.unary(UnaryOp::Sin, x).unwrap();
    g.outputs = vec![y, y];
    let after = g.rebuild(|out, node, inputs| Ok(out.copy(node, inputs))).unwrap();
    assert_eq!(
        after.to_string(),
        "%0 = input{0}() : f32[3]\n%1 = sin(%0) : f32[3]\noutputs: %1, %1\n"
    );
}

/// How many products a graph has, and what its outputs are on these values.
fn products(g: &ComputationGraph, inputs: &[Value]) -> (usize, Vec<Value>) {
    let live = g.rebuild(|out, node, inputs| Ok(out.copy(node, inputs))).unwrap();
    let count = live.nodes().iter().filter(|node| node.op == Operation::Dot).count();
    (count, oracle::evaluate(&live, inputs).unwrap())
}

fn counted(dims: &[&[usize]]) -> (ComputationGraph, Vec<NodeId>, Vec<Value>) {
    let mut g = ComputationGraph::new();
    let (mut ids, mut values) = (Vec::new(), Vec::new());
    for (i, dims) in dims.iter().enumerate() {
        ids.push(input(&mut g, i as u32, dims));
        let ty = TensorType::new(DType::F32, shape(dims));
        let data = (0..ty.shape.len()).map(|j| ((i * 7 + j * 13) % 11) as f64 - 5.0).collect();
        values.push(Value { ty, data });
    }
    (g, ids, values)
}

#[test]
fn thin_products_that_share_a_factor_are_one() {
    let (mut g, ids, values) =
        counted(&[&[40, 32], &[32, 8], &[32, 4], &[32, 40], &[8, 40], &[4, 40]]);
    let [x, a, b, wide, c, d] = ids[..] else { unreachable!() };
    // Columns, rows, and one that is not thin.
    let pairs = [(x, a), (x, b), (x, wide), (c, x), (d, x)];
    g.outputs = pairs.map(|(l, r)| g.add(Operation::Dot, &[l, r]).unwrap()).to_vec();
    let (before, want) = products(&g, &values);
    let (after, got) = products(&pass::share_factors(&g).unwrap(), &values);
    assert_eq!((before, after), (5, 3));
    assert_eq!(got, want);
}

#[test]
fn a_product_that_needs_another_one_is_not_joined_with_it() {
    let (mut g, ids, values) = counted(&[&[32, 32], &[32, 4], &[32, 4]]);
    let [x, a, other] = ids[..] else { unreachable!() };
    // x (x a) shares x with x a, and cannot be made together with it; x other can.
    let first = g.add(Operation::Dot, &[x, a]).unwrap();
    let second = g.add(Operation::Dot, &[x, first]).unwrap();
    let third = g.add(Operation::Dot, &[x, other]).unwrap();
    g.outputs = vec![first, second, third];
    let (_, want) = products(&g, &values);
    let (_, got) = products(&pass::share_factors(&g).unwrap(), &values);
    assert_eq!(got, want);
}

#[test]
fn thin_products_that_are_added_up_are_one() {
    let dims: [&[usize]; 7] =
        [&[40, 4], &[4, 48], &[40, 8], &[48, 8], &[40, 64], &[64, 48], &[40, 48]];
    let (mut g, ids, values) = counted(&dims);
    let [x, a, y, b, wide, c, base] = ids[..] else { unreachable!() };
    let b = g.transpose(b).unwrap();
    let [thin, other, deep] =
        [(x, a), (y, b), (wide, c)].map(|(l, r)| g.add(Operation::Dot, &[l, r]).unwrap());
    let add = |g: &mut ComputationGraph, a, b| g.binary(BinaryOp::Add, a, b).unwrap();
    let first = add(&mut g, thin, base);
    let second = add(&mut g, deep, other);
    let sum = add(&mut g, first, second);
    g.outputs = vec![sum];
    let (before, want) = products(&g, &values);
    let (after, got) = products(&pass::join_sums(&g).unwrap(), &values);
    assert_eq!((before, after), (3, 2));
    assert_eq!(got, want);
    // One that something else reads stays.
    g.outputs = vec![sum, thin];
    let (_, want) = products(&g, &values);
    let (after, got) = products(&pass::join_sums(&g).unwrap(), &values);
    assert_eq!(after, 3);
    assert_eq!(got, want);
}

#[test]
fn factors_that_lie_side_by_side_anyway_are_summed_over_in_their_order() {
    let (mut g, ids, values) = counted(&[&[40, 4], &[4, 48], &[40, 8], &[8, 48]]);
    let [x, a, y, b] = ids[..] else { unreachable!() };
    let [thin, other] = [(x, a), (y, b)].map(|(l, r)| g.add(Operation::Dot, &[l, r]).unwrap());
    let sum = g.binary(BinaryOp::Add, thin, other).unwrap();
    let beside = g.concat(1, &[y, x]).unwrap();
    g.outputs = vec![sum, beside];
    let (_, want) = products(&g, &values);
    let joined = pass::join_sums(&g).unwrap();
    let (after, got) = products(&joined, &values);
    let live = joined.live();
    let count =
        |id: &NodeId| live[id.index()] && matches!(joined[*id].op, Operation::Concat { .. });
    // [y x], and its factors.
    assert_eq!((after, joined.ids().filter(count).count()), (1, 2));
    assert_eq!(got, want);
}
