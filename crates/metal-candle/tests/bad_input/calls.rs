//! Calls with anything for arguments: they are refused or they work, and nothing panics.

use crate::testbed::device;
use metal_candle::graph::Error as GraphError;
use metal_candle::{
    Attention, BlockFormat, CrossEntropy, DType, Dim, ErrorKind, LazyTensor, Result, grad,
};
use metal_candle_runtime::Error as RuntimeError;
use proptest::prelude::*;

/// A tensor to be made.
#[derive(Clone, Debug)]
struct Spec {
    dtype: usize,
    dims: Vec<usize>,
    fill: usize,
}

#[derive(Clone, Debug)]
struct Call {
    op: usize,
    tensors: [Spec; 4],
    dims: Vec<i64>,
    sizes: Vec<usize>,
    numbers: [f64; 2],
    /// An operation on the result, and the gradient of it.
    then: usize,
}

fn spec() -> impl Strategy<Value = Spec> {
    // Mostly f32, so that calls get beyond the check of dtypes.
    let dtype = prop_oneof![3 => Just(5usize), 1 => Just(2usize), 2 => 0usize..7];
    let dims = proptest::collection::vec(prop_oneof![8 => 1usize..4, 1 => Just(0usize)], 0..5);
    (dtype, dims, 0usize..6).prop_map(|(dtype, dims, fill)| Spec { dtype, dims, fill })
}

fn size() -> impl Strategy<Value = usize> {
    let odd = prop_oneof![Just(usize::MAX), Just(1 << 40), Just(1 << 62), Just(32), Just(68)];
    prop_oneof![8 => 0usize..4, 1 => odd]
}

fn dim() -> impl Strategy<Value = i64> {
    prop_oneof![8 => -4i64..4, 1 => prop_oneof![Just(i64::MIN), Just(i64::MAX), Just(9)]]
}

fn number() -> impl Strategy<Value = f64> {
    let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e300, -0.0, 1e-40];
    let whole = (-3i32..4).prop_map(f64::from);
    prop_oneof![4 => -2.0..2.0f64, 1 => whole, 1 => proptest::sample::select(odd.to_vec())]
}

fn call() -> impl Strategy<Value = Call> {
    let tensors = [spec(), spec(), spec(), spec()];
    let dims = proptest::collection::vec(dim(), 4);
    let sizes = proptest::collection::vec(size(), 4);
    (0..OPS, tensors, any::<bool>(), dims, sizes, [number(), number()], 0usize..4).prop_map(
        |(op, mut tensors, same, dims, sizes, numbers, then)| {
            if same {
                let first = tensors[0].clone();
                tensors.iter_mut().for_each(|t| t.dims.clone_from(&first.dims));
                tensors[1].dtype = first.dtype;
            }
            Call { op, tensors, dims, sizes, numbers, then }
        },
    )
}

impl Spec {
    fn tensor(&self) -> LazyTensor {
        let n: usize = self.dims.iter().product();
        let value = |i: usize| match self.fill {
            0 => 0.0,
            1 => 1.0,
            2 => -1.0,
            3 => (i % 3) as f64,
            4 => [0.5, f64::NAN, f64::INFINITY, -2.0][i % 4],
            _ => [1e9, 255.0, -7.0][i % 3],
        };
        let wide: Vec<f64> = (0..n).map(value).collect();
        let x = LazyTensor::from_vec(wide, &self.dims, device()).unwrap();
        x.to_dtype(DType::ALL[self.dtype]).unwrap()
    }
}

const OPS: usize = 64;

fn run(c: &Call) -> Result<LazyTensor> {
    let t: Vec<LazyTensor> = c.tensors.iter().map(Spec::tensor).collect();
    let [x, y, z, w] = &t[..] else { unreachable!("four tensors") };
    let (s, [a, b]) = (&c.sizes, c.numbers);
    let [d0, d1] = [c.dims[0], c.dims[1]].map(Dim::from);
    let options = CrossEntropy::new().label_smoothing(a);
    let format = BlockFormat::ALL[s[3] % BlockFormat::ALL.len()];
    match c.op {
        0 => x.add(y),
        1 => x.sub(y),
        2 => x.mul(y),
        3 => x.div(y),
        4 => x.pow(y),
        5 => x.maximum(y),
        6 => x.minimum(y),
        7 => x.eq(y)?.where_cond(z, w),
        8 => x.lt(y),
        9 => x.where_cond(y, z),
        10 => x.neg()?.abs()?.sign(),
        11 => x.recip()?.sqrt()?.log(),
        12 => x.exp()?.log1p()?.expm1(),
        13 => x.sin()?.cos()?.tanh()?.erf(),
        14 => x.sigmoid()?.relu()?.silu()?.gelu()?.gelu_tanh(),
        15 => x.floor()?.ceil()?.round()?.sqr(),
        16 => x.clamp(a, b),
        17 => x.affine(a, b),
        18 => x.powf(a),
        19 => x.to_dtype(DType::ALL[c.tensors[1].dtype]),
        20 => x.sum([d0, d1]),
        21 => x.mean([d0]),
        22 => x.max([d0, d1]),
        23 => x.min_keepdim([d0]),
        24 => x.argmax(d0),
        25 => x.argmin_keepdim(d0),
        26 => x.logsumexp(d0),
        27 => x.cumsum(d0),
        28 => x.reshape(s),
        29 => x.reshape(&s[..2]),
        30 => x.flatten(d0, d1),
        31 => x.transpose(d0, d1),
        32 => x.permute(c.dims[..x.rank().min(4)].iter().copied()),
        33 => x.squeeze(d0),
        34 => x.unsqueeze(d0),
        35 => x.broadcast_as(s),
        36 => x.narrow(d0, s[0], s[1]),
        37 => x.slice(d0, s[0], s[1], s[2]),
        38 => x.chunk(s[0], d0)?.pop().map_or_else(|| x.neg(), Ok),
        39 => x.flip(d0),
        40 => LazyTensor::cat(&[x, y, z], d0),
        41 => LazyTensor::stack(&[x, y], d0),
        42 => x.pad(d0, s[0], s[1], a),
        43 => x.gather(y, d0),
        44 => x.index_select(y, d0),
        45 => x.embedding(y),
        46 => x.scatter_add(y, z, d0),
        47 => x.index_add(y, z, d0),
        48 => x.slice_update(d0, y, z),
        49 => x.dynamic_slice(d0, y, s[0]),
        50 => x.matmul(y),
        51 => x.matmul(&y.t()?),
        52 => x.lora(y, z, w, a),
        53 => x.quant_matmul(y, format, s[0], s[1]),
        54 => x.dequantize(format, s[0], s[1]),
        55 => x.softmax(d0),
        56 => x.log_softmax(d0),
        57 => x.rms_norm(y, a),
        58 => x.layer_norm(y, z, a),
        59 => x.rope(y, z),
        60 => attention(c, &t),
        61 => x.cross_entropy(y, options),
        62 => x.linear_cross_entropy(y, z, options),
        _ => x.dropout(a, s[0] as u64),
    }
}

fn attention(c: &Call, t: &[LazyTensor]) -> Result<LazyTensor> {
    let four = |x: &LazyTensor| x.reshape(&[1, x.elem_count(), 1, 1]);
    let all = c.sizes[0].is_multiple_of(2);
    let [q, k, v] = if all {
        [four(&t[0])?, four(&t[1])?, four(&t[1])?]
    } else {
        [0, 1, 2].map(|i| t[i].clone())
    };
    let mut attention = Attention::new().scale(c.numbers[0]);
    if c.sizes[1].is_multiple_of(2) {
        attention = attention.window(c.sizes[2]);
    }
    if c.sizes[2].is_multiple_of(2) {
        attention = attention.mask(&t[3]);
    }
    if c.sizes[3] == 1 {
        attention = attention.offset(&t[3]);
    }
    if c.sizes[3] == 2 {
        attention = attention.segments(&t[2], &t[3]);
    }
    attention.forward(&q, &k, &v)
}

/// A second operation on the result, or its gradient.
fn then(c: &Call, y: LazyTensor) -> Result<LazyTensor> {
    match c.then {
        0 => y.flip(0)?.sum([0]),
        1 => y.reshape(&[y.elem_count()])?.cumsum(0),
        2 => {
            let x = c.tensors[0].tensor();
            let loss = y.mul(&x.sum_all()?.to_dtype(y.dtype())?)?.mean_all()?;
            Ok(grad(&loss, &[&x])?.remove(0))
        }
        _ => Ok(y),
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Refused as ill-formed, or evaluated; then an index may still be out of range, or memory
    /// short.
    #[test]
    fn malformed_calls_are_errors_and_never_panics(c in call()) {
        let Ok(y) = run(&c) else { return Ok(()) };
        if y.elem_count() > 1 << 20 {
            return Ok(());
        }
        let Ok(y) = then(&c, y) else { return Ok(()) };
        if let Err(error) = y.eval() {
            let expected = matches!(
                error.kind(),
                ErrorKind::Runtime(
                    RuntimeError::Graph(GraphError::IndexOutOfRange { .. })
                    | RuntimeError::OutOfMemory { .. }
                )
            );
            prop_assert!(expected, "{error:?}");
        }
    }
}
