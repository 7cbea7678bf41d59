//! Every closed form against finite differences and against the gradient of the decomposition.

use crate::check::{
    Arg, assert_close, check, differentiate, float, frozen, given, integers, mention, slope, within,
};
use metal_candle_graph::composite::{
    AttentionAttrs, AttentionInput, CrossEntropyAttrs, RopeLayout, decompose,
};
use metal_candle_graph::{
    BinaryOp, Composite, ComputationGraph, DType, NodeId, Operation, Scalar, UnaryOp,
};

fn f64_scalar(x: f64) -> Scalar {
    Scalar::from_f64(DType::F64, x)
}

/// First and second derivatives, and agreement with the meaning.
fn check_composite(composite: Composite, args: &[Arg]) {
    let shapes: Vec<String> = args.iter().map(|arg| arg.ty().to_string()).collect();
    let name = format!("{composite:?} of {}", shapes.join(", "));
    let add = |g: &mut ComputationGraph, x: &[NodeId]| g.add(Operation::Composite(composite), x);
    check(&name, args, add);
    let meaning = |g: &mut ComputationGraph, x: &[NodeId]| {
        let y = decompose(g, &composite, x)?;
        // A meaning may leave an input out (attention to no keys), which is an error to
        // `gradients`.
        mention(g, y, x)
    };
    let (got, want) = (differentiate(&name, args, add), differentiate(&name, args, meaning));
    assert_close(&name, &got, &want);
}

/// The slope of the composite's first differentiated input, as a function of all of them.
fn check_slope(composite: Composite, args: &[Arg]) {
    let first = args.iter().position(Arg::is_differentiated).unwrap();
    check(&format!("the slope of {composite:?}"), args, |g, x| {
        let y = g.add(Operation::Composite(composite), x)?;
        let dx = slope(g, y, x[first])?;
        mention(g, dx, x)
    });
}

#[test]
fn softmaxes() {
    let shapes: [(&[usize], usize); 8] = [
        (&[5], 0),
        (&[3, 4], 1),
        (&[3, 4], 0),
        (&[2, 3, 2], 1),
        (&[3, 1], 1),
        (&[0, 3], 1),
        (&[3, 0], 1),
        (&[2, 0, 3], 0),
    ];
    for (shape, dim) in shapes {
        let args = [within(shape, -3.0, 3.0)];
        check_composite(Composite::Softmax { dim }, &args);
        check_composite(Composite::LogSoftmax { dim }, &args);
        check_composite(Composite::LogSumExp { dim }, &args);
    }
    let args = [float(&[2, 3])];
    check_slope(Composite::Softmax { dim: 1 }, &args);
    check_slope(Composite::LogSoftmax { dim: 0 }, &args);
    check_slope(Composite::LogSumExp { dim: 1 }, &args);
}

#[test]
fn norms() {
    for eps in [1e-3, 0.5] {
        let eps = f64_scalar(eps);
        for shape in [&[4][..], &[3, 4], &[2, 3, 5], &[3, 1], &[0, 4], &[2, 0]] {
            let n = [shape[shape.len() - 1]];
            check_composite(Composite::RmsNorm { eps }, &[float(shape), float(&n)]);
            check_composite(Composite::LayerNorm { eps }, &[float(shape), float(&n), float(&n)]);
        }
        check_slope(Composite::RmsNorm { eps }, &[float(&[2, 3]), float(&[3])]);
        check_slope(Composite::LayerNorm { eps }, &[float(&[2, 3]), float(&[3]), float(&[3])]);
    }
}

#[test]
fn ropes() {
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for shape in [&[6][..], &[3, 4], &[1, 2, 1, 3, 1, 1, 1, 2], &[0, 4], &[3, 0]] {
            let mut half = shape.to_vec();
            half[shape.len() - 1] /= 2;
            let args = [float(shape), frozen(&half), frozen(&half)];
            check_composite(Composite::Rope { layout }, &args);
        }
    }
}

fn plain() -> AttentionAttrs {
    AttentionAttrs {
        scale: f64_scalar(0.7),
        causal: false,
        window: None,
        mask: false,
        segments: false,
        offset: false,
    }
}

fn causal() -> AttentionAttrs {
    AttentionAttrs { causal: true, ..plain() }
}

/// `[b, tq, hq, d]`, `[b, tk, hk, d]`, `[b, tk, hk, dv]`
fn qkv([b, tq, tk, hq, hk, d, dv]: [usize; 7]) -> Vec<Arg> {
    vec![float(&[b, tq, hq, d]), float(&[b, tk, hk, d]), float(&[b, tk, hk, dv])]
}

fn attention_cases() -> Vec<(AttentionAttrs, Vec<Arg>)> {
    let small = [2, 3, 3, 2, 2, 2, 2];
    let grouped = [1, 2, 3, 4, 2, 2, 3];
    let with = |mut args: Vec<Arg>, more: Vec<Arg>| {
        args.extend(more);
        args
    };
    let ids = |dims: &[usize], data: &[i64]| integers(DType::U32, dims, data);
    let segments = || vec![ids(&[2, 3], &[1, 1, 2, 5, 6, 6]), ids(&[2, 3], &[1, 2, 2, 5, 5, 7])];
    let offset = |o: i64| vec![integers(DType::I64, &[], &[o])];
    // The first query sees nothing at all, the second only the last key.
    let hide = f64::NEG_INFINITY;
    let hiding = given(&[1, 1, 2, 3], &[hide, hide, hide, hide, hide, 0.3]);
    let masked = AttentionAttrs { mask: true, ..plain() };
    let with_segments = AttentionAttrs { segments: true, ..plain() };
    let with_offset = AttentionAttrs { offset: true, ..causal() };
    let everything = AttentionAttrs { mask: true, segments: true, window: Some(2), ..with_offset };
    vec![
        (plain(), qkv(small)),
        (plain(), qkv(grouped)),
        (plain(), qkv([1, 2, 3, 3, 1, 1, 2])),
        (causal(), qkv(small)),
        (causal(), qkv(grouped)),
        // The first query stands before all keys.
        (causal(), qkv([1, 4, 3, 2, 1, 2, 2])),
        (AttentionAttrs { window: Some(2), ..causal() }, qkv([1, 4, 4, 1, 1, 2, 2])),
        (masked, with(qkv(small), vec![float(&[2, 2, 3, 3])])),
        (masked, with(qkv([1, 2, 3, 1, 1, 2, 2]), vec![hiding])),
        (with_segments, with(qkv(small), segments())),
        (AttentionAttrs { segments: true, ..causal() }, with(qkv(small), segments())),
        (with_offset, with(qkv(grouped), offset(0))),
        (with_offset, with(qkv(grouped), offset(-1))),
        (
            everything,
            with(qkv(small), [vec![float(&[2, 2, 3, 3])], segments(), offset(1)].concat()),
        ),
        (causal(), qkv([2, 2, 0, 2, 2, 2, 2])),
        (plain(), qkv([0, 2, 2, 2, 1, 2, 2])),
        (plain(), qkv([1, 0, 2, 2, 1, 2, 2])),
    ]
}

#[test]
fn attentions() {
    for (attrs, args) in attention_cases() {
        check_composite(Composite::Attention(attrs), &args);
    }
}

#[test]
fn logarithms_of_attention_sums() {
    for (attrs, args) in attention_cases() {
        let composite = Composite::AttentionLogSumExp(attrs);
        // It is infinite where nothing is seen, and does not depend on v.
        check(&format!("exp(-{composite:?})"), &args, |g, x| {
            let lse = g.add(Operation::Composite(composite), x)?;
            let less = g.unary(UnaryOp::Neg, lse)?;
            let y = g.unary(UnaryOp::Exp, less)?;
            mention(g, y, &x[..3])
        });
    }
}

#[test]
fn attention_gradients_have_gradients() {
    for (attrs, args) in attention_cases() {
        let (q, v) = (args[0].ty().shape, args[2].ty().shape);
        let mut with_dy = vec![float(q.with(3, v[3]).dims())];
        with_dy.extend(args);
        let wrts = [AttentionInput::Query, AttentionInput::Key, AttentionInput::Value];
        for wrt in wrts.into_iter().chain(attrs.mask.then_some(AttentionInput::Mask)) {
            let grad = Composite::AttentionGrad { attrs, wrt };
            check(&format!("{grad:?}"), &with_dy, |g, x| {
                let y = g.add(Operation::Composite(Composite::Attention(attrs)), &x[1..])?;
                let weighed = g.binary(BinaryOp::Mul, x[0], y)?;
                slope(g, weighed, x[1 + wrt as usize])
            });
        }
    }
}

/// An input that is used twice, or computed from another, gets its own share and no more.
#[test]
fn self_attention_counts_every_use_once() {
    let attention = Operation::Composite(Composite::Attention(causal()));
    check("q = k = v", &[float(&[1, 3, 2, 2])], |g, x| g.add(attention, &[x[0], x[0], x[0]]));
    check("k from q", &[float(&[1, 3, 2, 2]), float(&[1, 3, 2, 2])], |g, x| {
        let k = g.unary(UnaryOp::Sin, x[0])?;
        let y = g.add(attention, &[x[0], k, x[1]])?;
        // And once more, through the gradients of the gradients.
        slope(g, y, k)
    });
}

fn cross_entropies() -> Vec<(CrossEntropyAttrs, Arg)> {
    let attrs = |label_smoothing, ignore_index| CrossEntropyAttrs {
        ignore_index,
        label_smoothing: f64_scalar(label_smoothing),
        blocks: None,
    };
    let long = |data: &[i64]| integers(DType::I64, &[data.len()], data);
    let u32s = |data: &[i64]| integers(DType::U32, &[data.len()], data);
    vec![
        (attrs(0.0, None), u32s(&[1, 0, 3])),
        (attrs(0.0, None), integers(DType::U8, &[2], &[3, 2])),
        (attrs(0.2, None), long(&[1, 0, 3])),
        (attrs(1.0, None), long(&[2])),
        (attrs(0.0, Some(-100)), long(&[-100, 2, 1])),
        (attrs(0.0, Some(-100)), u32s(&[2, 1])),
        (attrs(0.1, Some(2)), u32s(&[2, 1, 2])),
        (attrs(0.1, Some(0)), long(&[])),
    ]
}

#[test]
fn cross_entropies_of_logits() {
    for (attrs, labels) in cross_entropies() {
        let logits = within(&[labels.ty().shape[0], 4], -2.0, 2.0);
        check_composite(Composite::CrossEntropy(attrs), &[logits.clone(), labels.clone()]);
        check_slope(Composite::CrossEntropy(attrs), &[logits, labels]);
    }
}

#[test]
fn cross_entropies_of_a_linear_layer() {
    for (attrs, labels) in cross_entropies() {
        let n = labels.ty().shape[0];
        let args = [float(&[n, 3]), float(&[4, 3]), labels];
        check_composite(Composite::LinearCrossEntropy(attrs), &args);
        check_composite(Composite::LinearCrossEntropyGradX(attrs), &args);
        let [x, weight, labels] = args;
        let args = [float(&[n]), x, weight, labels];
        check_composite(Composite::LinearCrossEntropyGradWeight(attrs), &args);
    }
}
