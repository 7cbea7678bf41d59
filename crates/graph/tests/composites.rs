//! The composites against loops, and what they refuse.

use metal_candle_graph::composite::{
    AttentionAttrs, AttentionInput, CrossEntropyAttrs, RopeLayout,
};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    Composite, ComputationGraph, DType, Distribution, Error, NodeId, Operation, Result, Scalar,
    Shape, TensorType, infer, random_f64,
};

fn f64_scalar(x: f64) -> Scalar {
    Scalar::from_f64(DType::F64, x)
}

fn shape(dims: &[usize]) -> Shape {
    Shape::new(dims).unwrap()
}

fn ty(dtype: DType, dims: &[usize]) -> TensorType {
    TensorType::new(dtype, shape(dims))
}

/// Normal numbers; `stream` tells tensors apart.
fn normal(stream: u32, dims: &[usize]) -> Value {
    let ty = ty(DType::F64, dims);
    let draw = |i| random_f64(Distribution::Normal, 7, stream, i);
    Value { ty, data: (0..ty.shape.len() as u64).map(draw).collect() }
}

fn integers(dims: &[usize], data: &[i64]) -> Value {
    Value { ty: ty(DType::I64, dims), data: data.iter().map(|x| *x as f64).collect() }
}

fn evaluate(composite: Composite, inputs: &[Value]) -> Vec<f64> {
    let mut g = ComputationGraph::new();
    let x: Vec<NodeId> = (0..).zip(inputs).map(|(i, v)| g.input(i, v.ty)).collect();
    let y = g.add(Operation::Composite(composite), &x).unwrap();
    g.outputs = vec![y];
    let y = oracle::evaluate(&g, inputs).unwrap().remove(0);
    assert_eq!(y.data.len(), y.ty.shape.len());
    y.data
}

fn assert_close(name: &str, got: &[f64], want: &[f64]) {
    assert_eq!(got.len(), want.len(), "{name}");
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= 1e-12 * (1.0 + b.abs()), "{name}: element {i}: {a} is not {b}");
    }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

#[test]
fn softmaxes_are_their_formula() {
    let x = normal(0, &[3, 4]);
    let rows = || x.data.chunks(4);
    let p: Vec<f64> = rows().flat_map(softmax).collect();
    let log: Vec<f64> = p.iter().map(|p| p.ln()).collect();
    let sum: Vec<f64> = rows().map(|row| row.iter().map(|x| x.exp()).sum::<f64>().ln()).collect();
    let x = std::slice::from_ref(&x);
    assert_close("softmax", &evaluate(Composite::Softmax { dim: 1 }, x), &p);
    assert_close("log_softmax", &evaluate(Composite::LogSoftmax { dim: 1 }, x), &log);
    assert_close("logsumexp", &evaluate(Composite::LogSumExp { dim: 1 }, x), &sum);
    // Far beyond where exp overflows; and the sum of nothing.
    let far = Value { ty: ty(DType::F64, &[2]), data: vec![1e4, 1e4] };
    assert_close("far", &evaluate(Composite::Softmax { dim: 0 }, &[far]), &[0.5, 0.5]);
    let nothing = Value { ty: ty(DType::F64, &[1, 0]), data: vec![] };
    assert_eq!(evaluate(Composite::LogSumExp { dim: 1 }, &[nothing]), [f64::NEG_INFINITY]);
}

#[test]
fn norms_are_their_formula() {
    let (x, w, b) = (normal(0, &[3, 4]), normal(1, &[4]), normal(2, &[4]));
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let eps = 0.1;
    let normed = |row: &[f64]| {
        let squares: Vec<f64> = row.iter().map(|x| x * x).collect();
        let rms = (mean(&squares) + eps).sqrt();
        row.iter().map(|x| x / rms).collect::<Vec<f64>>()
    };
    let (mut rms, mut layer) = (vec![], vec![]);
    for row in x.data.chunks(4) {
        rms.extend(normed(row).iter().zip(&w.data).map(|(x, w)| x * w));
        let centred: Vec<f64> = row.iter().map(|x| x - mean(row)).collect();
        let scaled = normed(&centred).into_iter().zip(&w.data).zip(&b.data);
        layer.extend(scaled.map(|((x, w), b)| x * w + b));
    }
    let eps = f64_scalar(eps);
    let got = evaluate(Composite::RmsNorm { eps }, &[x.clone(), w.clone()]);
    assert_close("rms_norm", &got, &rms);
    assert_close("layer_norm", &evaluate(Composite::LayerNorm { eps }, &[x, w, b]), &layer);
}

#[test]
fn ropes_rotate_their_pairs() {
    let (x, angle) = (normal(0, &[2, 6]), normal(1, &[2, 3]));
    let table = |f: fn(f64) -> f64| Value {
        ty: angle.ty,
        data: angle.data.iter().map(|a| f(*a)).collect(),
    };
    let inputs = [x.clone(), table(f64::cos), table(f64::sin)];
    for (layout, pair) in [
        (RopeLayout::Half, (|i| (i, i + 3)) as fn(usize) -> (usize, usize)),
        (RopeLayout::Interleaved, |i| (2 * i, 2 * i + 1)),
    ] {
        let mut want = vec![0.0; 12];
        for (row, i) in (0..2).flat_map(|row| (0..3).map(move |i| (row, i))) {
            let (a, b) = pair(i);
            let (a, b) = (6 * row + a, 6 * row + b);
            let (sin, cos) = angle.data[3 * row + i].sin_cos();
            want[a] = x.data[a] * cos - x.data[b] * sin;
            want[b] = x.data[b] * cos + x.data[a] * sin;
        }
        assert_close("rope", &evaluate(Composite::Rope { layout }, &inputs), &want);
    }
}

fn plain() -> AttentionAttrs {
    AttentionAttrs {
        scale: f64_scalar(0.6),
        causal: false,
        window: None,
        mask: false,
        segments: false,
        offset: false,
    }
}

/// Attention by loops over `[b, t, h, d]`; `sees(b, i, j)` and `bias(b, h, i, j)` as the attributes
/// say.
fn attention(
    [q, k, v]: [&Value; 3],
    sees: impl Fn(usize, usize, usize) -> bool,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
) -> Vec<f64> {
    let at = |x: &Value, b: usize, t: usize, h: usize| {
        let s = x.ty.shape;
        let start = ((b * s[1] + t) * s[2] + h) * s[3];
        x.data[start..start + s[3]].to_vec()
    };
    let (s, keys, heads) = (q.ty.shape, k.ty.shape[1], k.ty.shape[2]);
    let mut y = vec![];
    for b in 0..s[0] {
        for i in 0..s[1] {
            for h in 0..s[2] {
                let shared = h / (s[2] / heads);
                let seen: Vec<usize> = (0..keys).filter(|j| sees(b, i, *j)).collect();
                let score = |j: &usize| {
                    let pairs = at(q, b, i, h).into_iter().zip(at(k, b, *j, shared));
                    0.6 * pairs.map(|(q, k)| q * k).sum::<f64>() + bias(b, h, i, *j)
                };
                let p = softmax(&seen.iter().map(score).collect::<Vec<f64>>());
                let mut row = vec![0.0; v.ty.shape[3]];
                for (j, p) in seen.iter().zip(p) {
                    row.iter_mut().zip(at(v, b, *j, shared)).for_each(|(y, v)| *y += p * v);
                }
                y.extend(row);
            }
        }
    }
    y
}

#[test]
fn attention_sees_what_its_attributes_say() {
    let (q, k, v) = (normal(0, &[2, 3, 4, 2]), normal(1, &[2, 5, 2, 2]), normal(2, &[2, 5, 2, 3]));
    let mask = normal(3, &[2, 4, 3, 5]);
    let (of_q, of_k) = ([1, 1, 2, 4, 3, 3], [1, 2, 2, 1, 9, 3, 3, 5, 5, 5]);
    let segments = [integers(&[2, 3], &of_q), integers(&[2, 5], &of_k)];
    let qkv = || [q.clone(), k.clone(), v.clone()];
    let free = |_: usize, _: usize, _: usize, _: usize| 0.0;
    let masked = |b: usize, h: usize, i: usize, j: usize| mask.data[((b * 4 + h) * 3 + i) * 5 + j];
    let same = |b: usize, i: usize, j: usize| of_q[b * 3 + i] == of_k[b * 5 + j];
    let causal = AttentionAttrs { causal: true, ..plain() };

    let run =
        |attrs, more: &[Value]| evaluate(Composite::Attention(attrs), &[&qkv(), more].concat());
    let want = |sees: &dyn Fn(usize, usize, usize) -> bool| attention([&q, &k, &v], sees, free);
    assert_close("plain", &run(plain(), &[]), &want(&|_, _, _| true));
    // The last of three queries stands at the last of five keys.
    assert_close("causal", &run(causal, &[]), &want(&|_, i, j| j <= i + 2));
    let window = AttentionAttrs { window: Some(2), ..causal };
    assert_close("window", &run(window, &[]), &want(&|_, i, j| j <= i + 2 && j + 2 > i + 2));
    let offset = AttentionAttrs { offset: true, ..causal };
    let at = |o| [integers(&[], &[o])];
    assert_close("offset", &run(offset, &at(1)), &want(&|_, i, j| j <= i + 1));
    // Query 0 stands before all keys, and gives 0.
    assert_close("before", &run(offset, &at(-1)), &want(&|_, i, j| j < i));
    let by_segment = AttentionAttrs { segments: true, ..plain() };
    assert_close("segments", &run(by_segment, &segments), &want(&same));
    let all = AttentionAttrs { mask: true, segments: true, ..window };
    let sees = |b: usize, i: usize, j: usize| j <= i + 2 && j > i && same(b, i, j);
    let got = run(all, &[std::slice::from_ref(&mask), &segments].concat());
    assert_close("all", &got, &attention([&q, &k, &v], sees, masked));
}

#[test]
fn cross_entropies_are_their_formula() {
    let (x, weight) = (normal(0, &[3, 2]), normal(1, &[4, 2]));
    let labels = integers(&[3], &[2, -100, 0]);
    let logit =
        |i: usize, c: usize| (0..2).map(|d| x.data[2 * i + d] * weight.data[2 * c + d]).sum();
    let logits: Vec<f64> = (0..12).map(|i| logit(i / 4, i % 4)).collect();
    let smoothing = 0.2;
    let loss = |i: usize| {
        let log: Vec<f64> = softmax(&logits[4 * i..4 * i + 4]).iter().map(|p| p.ln()).collect();
        let label = labels.data[i];
        if label < 0.0 {
            return 0.0;
        }
        -(1.0 - smoothing) * log[label as usize] - smoothing * log.iter().sum::<f64>() / 4.0
    };
    let want: Vec<f64> = (0..3).map(loss).collect();
    let attrs = CrossEntropyAttrs {
        ignore_index: Some(-100),
        label_smoothing: f64_scalar(smoothing),
        blocks: None,
    };
    let logits = Value { ty: ty(DType::F64, &[3, 4]), data: logits };
    let got = evaluate(Composite::CrossEntropy(attrs), &[logits, labels.clone()]);
    assert_close("cross_entropy", &got, &want);
    let got = evaluate(Composite::LinearCrossEntropy(attrs), &[x, weight, labels]);
    assert_close("linear_cross_entropy", &got, &want);
}

fn refused(composite: Composite, inputs: &[TensorType]) -> Error {
    let got: Result<TensorType> = infer(&Operation::Composite(composite), inputs);
    got.expect_err(&format!("{composite:?} of {inputs:?}"))
}

fn attribute(op: &'static str, what: &'static str, expected: &'static str, got: &str) -> Error {
    Error::Attribute { op, what, expected, got: got.to_string() }
}

#[test]
fn ill_formed_rows_are_refused() {
    let x = |dims: &[usize]| ty(DType::F32, dims);
    let (eps, layout) = (f64_scalar(1e-5), RopeLayout::Half);
    let cases = [
        (
            refused(Composite::Softmax { dim: 2 }, &[x(&[2, 3])]),
            Error::Dim { op: "softmax", dim: 2, rank: 2 },
        ),
        (
            refused(Composite::LogSumExp { dim: 0 }, &[ty(DType::I64, &[2])]),
            Error::DType { op: "logsumexp", expected: "a float", got: DType::I64 },
        ),
        (
            refused(Composite::RmsNorm { eps }, &[x(&[2, 3])]),
            Error::Arity { op: "rms_norm", expected: 2, got: 1 },
        ),
        (
            refused(Composite::RmsNorm { eps }, &[x(&[2, 3]), x(&[2])]),
            Error::Shape { op: "rms_norm", expected: shape(&[3]), got: shape(&[2]) },
        ),
        (
            refused(Composite::LayerNorm { eps }, &[x(&[3]), x(&[3]), ty(DType::F16, &[3])]),
            Error::DTypeMismatch { op: "layer_norm", lhs: DType::F32, rhs: DType::F16 },
        ),
        (
            refused(Composite::RmsNorm { eps: f64_scalar(-1.0) }, &[x(&[3]), x(&[3])]),
            attribute("rms_norm", "eps", "0 or more", "-1.0"),
        ),
        (
            refused(Composite::Rope { layout }, &[x(&[2, 3]), x(&[2, 1]), x(&[2, 1])]),
            attribute("rope", "the last extent", "even", "3 (shape [2, 3])"),
        ),
        (
            refused(Composite::Rope { layout }, &[x(&[2, 4]), x(&[2, 2]), x(&[2])]),
            Error::Shape { op: "rope", expected: shape(&[2, 2]), got: shape(&[2]) },
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
}

#[test]
fn ill_formed_attentions_are_refused() {
    let x = |h: usize| ty(DType::F32, &[1, 2, h, 8]);
    let rows = |h: usize| ty(DType::F32, &[1, 2, h]);
    let long = |dims: &[usize]| ty(DType::I64, dims);
    let of = |attrs, inputs: &[TensorType]| refused(Composite::Attention(attrs), inputs);
    let window = AttentionAttrs { window: Some(3), ..plain() };
    let masked = AttentionAttrs { mask: true, ..plain() };
    let segments = AttentionAttrs { segments: true, ..plain() };
    let offset = AttentionAttrs { offset: true, ..plain() };
    let wrt = AttentionInput::Mask;
    let op = "attention";
    let heads = "the number of query heads";
    let cases = [
        (
            of(plain(), &[x(6), x(4), x(4)]),
            attribute(op, heads, "a multiple of the number of key heads", "6 for 4 key heads"),
        ),
        (
            of(window, &[x(4), x(4), x(4)]),
            attribute(op, "window", "at least 1, with causal", "3 (causal: false)"),
        ),
        (
            of(AttentionAttrs { window: Some(0), causal: true, ..plain() }, &[x(4), x(4), x(4)]),
            attribute(op, "window", "at least 1, with causal", "0 (causal: true)"),
        ),
        (of(masked, &[x(4), x(4), x(4)]), Error::Arity { op, expected: 4, got: 3 }),
        (
            of(masked, &[x(4), x(2), x(2), ty(DType::F32, &[2, 2])]),
            Error::Rank { op, expected: "4 (batch, heads, queries, keys) for the mask", got: 2 },
        ),
        (
            of(plain(), &[x(4), x(2), ty(DType::F32, &[1, 3, 2, 8])]),
            Error::Shape { op, expected: shape(&[1, 2, 2, 8]), got: shape(&[1, 3, 2, 8]) },
        ),
        (
            of(segments, &[x(4), x(4), x(4), long(&[1, 2]), long(&[1, 3])]),
            Error::Shape { op, expected: shape(&[1, 2]), got: shape(&[1, 3]) },
        ),
        (
            of(offset, &[x(4), x(4), x(4), ty(DType::U32, &[])]),
            Error::DType { op, expected: "i64 for the position or seed", got: DType::U32 },
        ),
        (
            refused(
                Composite::AttentionGrad { attrs: plain(), wrt },
                &[x(4), rows(4), rows(4), x(4), x(4), x(4)],
            ),
            attribute("attention_grad", "wrt", "an input of the attention", "Mask, without a mask"),
        ),
        (
            refused(Composite::AttentionGrad { attrs: masked, wrt }, &[]),
            Error::Arity { op: "attention_grad", expected: 7, got: 0 },
        ),
        (
            refused(
                Composite::AttentionGrad { attrs: plain(), wrt: AttentionInput::Query },
                &[x(4), rows(4), rows(2), x(4), x(4), x(4)],
            ),
            Error::Shape {
                op: "attention_grad",
                expected: shape(&[1, 2, 4]),
                got: shape(&[1, 2, 2]),
            },
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
}

#[test]
fn ill_formed_losses_are_refused() {
    let x = |dims: &[usize]| ty(DType::F32, dims);
    let labels = ty(DType::U32, &[3]);
    let attrs = |smoothing| CrossEntropyAttrs {
        ignore_index: None,
        label_smoothing: f64_scalar(smoothing),
        blocks: None,
    };
    let (loss, linear) =
        (Composite::CrossEntropy(attrs(0.0)), Composite::LinearCrossEntropy(attrs(0.0)));
    let of_weight = Composite::LinearCrossEntropyGradWeight(attrs(0.0));
    let op = "linear_cross_entropy";
    let cases = [
        (
            refused(loss, &[x(&[3, 5]), x(&[3])]),
            Error::DType {
                op: "cross_entropy",
                expected: "u8, u32 or i64 for the index",
                got: DType::F32,
            },
        ),
        (
            refused(loss, &[x(&[4, 5]), labels]),
            Error::Shape { op: "cross_entropy", expected: shape(&[4]), got: shape(&[3]) },
        ),
        (
            refused(Composite::CrossEntropy(attrs(1.5)), &[x(&[3, 5]), labels]),
            attribute("cross_entropy", "label_smoothing", "within 0 and 1", "1.5"),
        ),
        (
            refused(linear, &[x(&[3, 5]), x(&[7, 4]), labels]),
            Error::Shape { op, expected: shape(&[7, 5]), got: shape(&[7, 4]) },
        ),
        (
            refused(linear, &[x(&[3, 5]), ty(DType::BF16, &[7, 5]), labels]),
            Error::DTypeMismatch { op, lhs: DType::F32, rhs: DType::BF16 },
        ),
        (
            refused(of_weight, &[ty(DType::F64, &[3]), x(&[3, 5]), x(&[7, 5]), labels]),
            Error::DTypeMismatch {
                op: "linear_cross_entropy_grad_weight",
                lhs: DType::F32,
                rhs: DType::F64,
            },
        ),
    ];
    for (got, want) in cases {
        assert_eq!(got, want);
    }
}
