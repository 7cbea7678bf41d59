//! Bad input is a typed error with the values in it, at the line that made the mistake; never a
//! panic.

#[path = "bad_input/calls.rs"]
mod calls;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use crate::testbed::device;
use metal_candle::graph::Error as GraphError;
use metal_candle::{
    Attention, BlockFormat, CrossEntropy, DType, Error, ErrorKind, LazyTensor, compile, grad,
};
use metal_candle_runtime::Error as RuntimeError;

fn zeros(dims: &[usize], dtype: DType) -> LazyTensor {
    LazyTensor::zeros(dims, dtype, device()).unwrap()
}

fn f32(dims: &[usize]) -> LazyTensor {
    zeros(dims, DType::F32)
}

fn index(values: &[i64], dims: &[usize]) -> LazyTensor {
    LazyTensor::from_slice(values, dims, device()).unwrap()
}

/// The kind of error, printed: kinds hold `&'static str`s and shapes, of which text is the shortest
/// form.
#[track_caller]
fn assert_refused<T>(result: metal_candle::Result<T>, line: u32, message: &str) -> Error {
    let Err(error) = result else { panic!("line {line}: this was accepted") };
    let text = error.kind().to_string();
    assert!(text.contains(message), "line {line}: expected {message:?}, got {text:?}");
    let location = error.location();
    assert!(location.file().ends_with("bad_input.rs"), "line {line}: {location}");
    assert!((line..line + 4).contains(&location.line()), "line {line}: {location}");
    assert!(error.to_string().contains(&format!("{}:{}", location.file(), location.line())));
    error
}

/// This call is refused, on this line, with this text.
macro_rules! refused {
    ($call:expr, $message:literal) => {
        assert_refused($call, line!(), $message)
    };
}

#[test]
fn shapes_that_do_not_fit() {
    let (a, b) = (f32(&[2, 3]), f32(&[4, 5]));
    refused!(a.add(&b), "add: shapes [2, 3] and [4, 5] do not broadcast together");
    refused!(a.maximum(&b), "maximum: shapes [2, 3] and [4, 5]");
    refused!(zeros(&[2], DType::U8).where_cond(&a, &b), "where_cond: shapes [2, 3] and [4, 5]");
    refused!(a.matmul(&b), "matmul: inner extents differ in [2, 3] x [4, 5]");
    refused!(a.matmul(&f32(&[3])), "rank at least 2, got rank 1");
    refused!(f32(&[2, 2, 3]).matmul(&f32(&[3, 3, 4])), "matmul: shapes [2, 2, 3] and [3, 3, 4]");
    refused!(a.reshape(&[7]), "cannot reshape [2, 3] (6 elements) into [7] (7 elements)");
    refused!(a.broadcast_as(&[2, 4]), "shapes [2, 3] and [2, 4]");
    refused!(a.broadcast_as(&[3]), "shapes [2, 3] and [3]");
    refused!(LazyTensor::cat(&[&a, &b], 0), "cat: expected shape");
    refused!(LazyTensor::stack(&[&a, &b], 0), "stack: expected shape [2, 3], got [4, 5]");
    refused!(LazyTensor::cat::<LazyTensor>(&[], 0), "cat: expected 1 inputs, got 0");
    refused!(a.rms_norm(&f32(&[4]), 1e-5), "rms_norm: expected shape [3], got [4]");
    refused!(a.layer_norm(&f32(&[3]), &f32(&[2]), 1e-5), "layer_norm: expected shape [3], got [2]");
    refused!(a.rope(&a, &a), "rope: the last extent must be even, got 3");
    refused!(a.lora(&f32(&[2, 9]), &f32(&[3, 2]), &f32(&[2, 4]), 1.0), "[2, 9] and [2, 4]");
    refused!(a.gather(&index(&[0; 9], &[3, 3]), 1), "gather: expected shape [2, 3], got [3, 3]");
    refused!(a.index_select(&index(&[0; 4], &[2, 2]), 0), "rank 1 for the index, got rank 2");
    refused!(a.slice_update(0, &f32(&[1, 4]), &index(&[0], &[])), "expected shape [1, 3]");
    refused!(LazyTensor::from_vec(vec![1f32; 5], &[2, 3], device()), "expected a value of 6");
    let labels = index(&[0; 3], &[3]);
    refused!(a.cross_entropy(&labels, CrossEntropy::new()), "expected shape [2], got [3]");
    let q = f32(&[1, 2, 6, 8]);
    let k = f32(&[1, 2, 4, 8]);
    refused!(Attention::new().forward(&q, &k, &k), "a multiple of the number of key heads");
    refused!(Attention::new().forward(&a, &k, &k), "rank 4 (batch, time, heads, features)");
}

#[test]
fn dtypes_that_do_not_fit() {
    let (x, n) = (f32(&[2, 3]), zeros(&[2, 3], DType::I64));
    refused!(x.add(&n), "add: dtypes f32 and i64 differ: cast one of them with to_dtype");
    refused!(x.matmul(&zeros(&[3, 2], DType::F16)), "matmul: dtypes f32 and f16 differ");
    refused!(LazyTensor::cat(&[&x, &n], 0), "cat: dtypes f32 and i64 differ");
    refused!(n.exp(), "exp: expected dtype a float, got i64");
    refused!(n.softmax(-1), "softmax: expected dtype a float, got i64");
    refused!(n.mean_all(), "mean: expected dtype a float, got i64");
    refused!(n.matmul(&n.t().unwrap()), "matmul: expected dtype a float, got i64");
    refused!(n.where_cond(&x, &x), "where_cond: expected dtype u8 for the condition, got i64");
    refused!(x.gather(&x, 0), "gather: expected dtype u8, u32 or i64 for the index, got f32");
    refused!(x.embedding(&x), "index_select: expected dtype u8, u32 or i64 for the index, got f32");
    refused!(n.dropout(0.5, 0), "dropout: expected dtype a float, got i64");
    refused!(LazyTensor::randn(&[2], DType::U8, 0, device()), "random: expected dtype a float");
    refused!(n.affine(0.5, 0.0), "the scalar must be a value of the tensor's dtype, got 0.5");
    refused!(x.dynamic_slice(0, &zeros(&[], DType::U32), 1), "expected dtype i64 for the position");
    refused!(x.to_vec::<f64>(), "expected a buffer of f64, got f32");
    refused!(x.quant_matmul(&x, BlockFormat::Q8_0, 2, 32), "expected dtype u8 for the blocks");
    refused!(grad(&n.sum_all().unwrap(), &[&n]), "expected a scalar loss of a float dtype");
    refused!(grad(&x, &[&x]), "expected a scalar loss of a float dtype, got f32[2, 3]");
    let loss = x.mul(&n.to_dtype(DType::F32).unwrap()).unwrap().sum_all().unwrap();
    refused!(grad(&loss, &[&n.named("n")]), "trainable n");
    let loss = x.sqr().unwrap().sum_all().unwrap();
    loss.eval().unwrap();
    refused!(
        grad(&loss, &[&x]),
        "forgotten how it was made, and so whether from trainable #0: record the gradients before \
         the loss is evaluated, or evaluate both together with eval_all"
    );
    // A value by itself still has a gradient.
    assert_eq!(grad(&loss, &[&loss]).unwrap()[0].to_vec::<f32>().unwrap(), [1.0]);
}

#[test]
fn dims_that_are_not_there() {
    let x = f32(&[2, 3]);
    refused!(x.softmax(2), "softmax: dim 2 is out of range for rank 2");
    refused!(x.softmax(-3), "softmax: dim -3 is out of range for rank 2");
    refused!(x.sum([0, 5]), "sum: dim 5 is out of range for rank 2");
    refused!(x.sum([0, 0]), "name a dim twice");
    refused!(x.transpose(0, 2), "transpose: dim 2 is out of range");
    refused!(x.permute([0, 0]), "name a dim twice or are no permutation of rank 2");
    refused!(x.permute([0]), "name a dim twice or are no permutation of rank 2");
    refused!(x.squeeze(7), "squeeze: dim 7 is out of range");
    refused!(x.unsqueeze(4), "unsqueeze: dim 4 is out of range");
    refused!(x.flip(i64::MIN), "flip: dim -9223372036854775808 is out of range");
    refused!(x.argmax(usize::MAX), "argmax: dim 9223372036854775807 is out of range");
    refused!(f32(&[]).softmax(0), "softmax: dim 0 is out of range for rank 0");
    refused!(f32(&[3]).t(), "t: expected a tensor of rank at least 2, got rank 1");
    refused!(x.narrow(1, 2, 2), "slice: range 2..4 is out of bounds for extent 3 of dim 1");
    refused!(x.slice(1, 0, 2, 0), "step must be at least 1, got 0");
    refused!(x.slice(1, usize::MAX, 1, usize::MAX), "is out of bounds for extent 3 of dim 1");
    // Of one element no step is taken: however long, it is none.
    let one = x.slice(1, 0, 2, 2).unwrap().slice(1, 1, 1, usize::MAX).unwrap();
    assert!(one.exp().unwrap().eval().is_ok());
    refused!(x.chunk(0, 0), "the number of chunks must be at least 1, got 0");
    refused!(x.to_vec1::<f32>(), "to_vec1: expected a tensor of rank 1, got rank 2");
    refused!(x.to_scalar::<f32>(), "expected a tensor of one element, got f32[2, 3]");
    refused!(f32(&[1; 8]).unsqueeze(0), "rank at most 8, got rank 9");
}

/// Indices are values: they are seen when they are read, at the line that evaluates.
#[test]
fn indices_out_of_range() {
    let x = f32(&[4, 3]);
    let at = |i: i64| index(&[0, i], &[2]);
    for (i, name) in [(4, "4"), (-1, "-1"), (i64::MAX, "9223372036854775807")] {
        let message = format!("index {name} is out of range for extent 4 (at position 1)");
        let refused = |result: metal_candle::Result<LazyTensor>| {
            let error = result.unwrap().eval().unwrap_err();
            assert!(error.to_string().contains(&message), "{error}");
            let ErrorKind::Runtime(RuntimeError::Graph(kind)) = error.kind() else {
                panic!("{error:?}")
            };
            let GraphError::IndexOutOfRange { index, extent, position, .. } = kind else {
                panic!("{kind:?}")
            };
            assert_eq!((*index, *extent, *position), (i, 4, 1));
        };
        refused(x.index_select(&at(i), 0));
        refused(x.embedding(&at(i)));
        refused(x.gather(&at(i).reshape(&[2, 1]).unwrap(), 0));
        refused(x.index_add(&at(i), &f32(&[2, 3]), 0));
        refused(x.scatter_add(&at(i).reshape(&[2, 1]).unwrap(), &f32(&[2, 1]), 0));
    }
    let start = |i: i64| index(&[i], &[]);
    for i in [3, -1, i64::MIN] {
        let window = x.dynamic_slice(0, &start(i), 2).unwrap();
        refused!(window.eval(), "is out of range for extent 3");
        let update = x.slice_update(0, &f32(&[2, 3]), &start(i)).unwrap();
        refused!(update.eval(), "is out of range for extent 3");
    }
}

#[test]
fn class_labels_out_of_range() {
    let (x, weight) = (f32(&[2, 3]), f32(&[4, 3]));
    for label in [4, -1, i64::MIN] {
        let labels = index(&[0, label], &[2]);
        let linear = x.linear_cross_entropy(&weight, &labels, CrossEntropy::new()).unwrap();
        refused!(linear.eval(), "is out of range for extent 4 (at position 1)");
        let gradients = x.linear_cross_entropy(&weight, &labels, CrossEntropy::new()).unwrap();
        let gradients = grad(&gradients, &[&weight]).unwrap();
        refused!(gradients[0].eval(), "is out of range for extent 4 (at position 1)");
    }
    // The one that is ignored is no class, and no mistake.
    let labels = index(&[0, -100], &[2]);
    assert!(
        weight.cross_entropy(&index(&[0; 4], &[4]), CrossEntropy::new()).unwrap().eval().is_ok()
    );
    let loss = x.linear_cross_entropy(&weight, &labels, CrossEntropy::new()).unwrap();
    assert!(loss.eval().is_ok());
}

#[test]
fn class_labels_out_of_range_of_given_logits() {
    let logits = f32(&[2, 4]);
    for label in [4, -1, i64::MIN] {
        // At the line of the loss if the labels are known, else when it runs.
        let labels = index(&[0, label], &[2]);
        let options = CrossEntropy::new();
        refused!(
            logits.cross_entropy(&labels, options),
            "out of range for extent 4 (at position 1)"
        );
        let labels = index(&[0, label], &[1, 2]).squeeze(0).unwrap();
        let loss = logits.cross_entropy(&labels, CrossEntropy::new()).unwrap();
        refused!(loss.eval(), "is out of range for extent 4 (at position 1)");
    }
    let labels = index(&[0, -100], &[2]);
    assert!(logits.cross_entropy(&labels, CrossEntropy::new()).unwrap().eval().is_ok());
}

#[test]
fn reductions_of_nothing() {
    let x = f32(&[2, 0]);
    refused!(x.max([1]), "max: reducing an empty dim (shape [2, 0]) has no value");
    refused!(x.min_all(), "min: reducing an empty dim");
    refused!(x.argmax(1), "argmax: reducing an empty dim (shape [2, 0]) has no value");
    refused!(x.mean([1]), "mean: reducing an empty dim");
    refused!(x.argmin_all(), "argmin: reducing an empty dim");
    // The sum of nothing is 0, its softmax nothing.
    assert_eq!(x.sum([1]).unwrap().to_vec1::<f32>().unwrap(), [0.0, 0.0]);
    assert_eq!(x.softmax(1).unwrap().eval().unwrap().dims(), [2, 0]);
}

#[test]
fn shapes_that_cannot_be_addressed() {
    let huge = 1 << 40;
    let on = device();
    refused!(
        LazyTensor::zeros(&[huge, huge], DType::U8, on),
        "more elements than can be addressed"
    );
    refused!(LazyTensor::zeros(&[huge, huge, 0], DType::U8, on), "more elements than can be");
    refused!(LazyTensor::zeros(&[1; 9], DType::U8, on), "rank at most 8, got rank 9");
    refused!(f32(&[1, 1]).broadcast_as(&[huge, huge]), "more elements than can be addressed");
    refused!(f32(&[2]).pad(0, usize::MAX, 1, 0.0), "more elements than can be addressed");
    refused!(f32(&[huge, 1]).add(&f32(&[1, huge])), "more elements than can be addressed");
    refused!(f32(&[huge, 1]).matmul(&f32(&[1, huge])), "more elements than can be addressed");
    refused!(LazyTensor::arange(5, 2, DType::I64, on), "end must be at least start, got 2 for");
    refused!(LazyTensor::arange(i64::MIN, i64::MAX, DType::I64, on), "end must be at least start");
}

/// What can be addressed and is not there is an error with the bytes that were asked for, not an
/// abort.
#[test]
fn memory_that_is_not_there() {
    let huge = f32(&[1 << 57]);
    let error = huge.affine(2.0, 1.0).unwrap().eval().unwrap_err();
    let ErrorKind::Runtime(RuntimeError::OutOfMemory { bytes, .. }) = error.kind() else {
        panic!("{error:?}")
    };
    assert_eq!(*bytes, 4 << 57);
    let scratch = huge.exp().unwrap().cumsum(0).unwrap().sum_all().unwrap();
    assert!(matches!(
        scratch.eval().unwrap_err().kind(),
        ErrorKind::Runtime(RuntimeError::OutOfMemory { .. })
    ));
}

#[test]
fn candle_tensors_of_other_kinds() {
    let halves =
        candle_core::Tensor::zeros(2, candle_core::DType::F8E4M3, &candle_core::Device::Cpu);
    let error = LazyTensor::from_tensor(&halves.unwrap()).unwrap_err();
    assert!(error.to_string().contains("F8E4M3 is not supported: cast to one of"), "{error}");
}

#[test]
fn arguments_of_compiled_functions() {
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].add(&x[1])?])).donate([1]);
    let x = || f32(&[2]).to_owned_copy().unwrap();
    refused!(f.call(vec![x()]), "was given 1 arguments, but donates argument 1");
    let shared = x();
    let held = shared.clone();
    refused!(f.call(vec![x(), shared]), "is donated, but something else holds its memory too");
    drop(held);
    // The value of an argument is not there yet: refused at the line that wants it, inside.
    let line = line!() + 2;
    let seen = compile(|x: &[LazyTensor]| {
        let first = x[0].to_vec1::<f32>()?[0];
        Ok(vec![x[0].affine(first.into(), 0.0)?])
    });
    let message = "argument 0 of a function that is being compiled has no value yet";
    assert_refused(seen.call(vec![x()]), line, message);
}
