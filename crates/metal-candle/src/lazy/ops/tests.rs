//! Laws that hold for all operations: mistakes are errors that name the caller's line.

use crate::{Attention, BlockFormat, CrossEntropy, DType, Device, LazyTensor, Result};

fn zeros(dims: &[usize]) -> LazyTensor {
    LazyTensor::zeros(dims, DType::F32, &Device::Cpu).unwrap()
}

fn integers(dims: &[usize]) -> LazyTensor {
    LazyTensor::zeros(dims, DType::I64, &Device::Cpu).unwrap()
}

/// The message of an error, which must come from the line on which this stands.
macro_rules! refused {
    ($call:expr) => {{
        let error = $call.expect_err(stringify!($call));
        let at = (error.location().file(), error.location().line());
        assert_eq!(at, (file!(), line!()), "{error}");
        error.kind().to_string()
    }};
}

#[test]
fn shapes_that_do_not_fit_are_refused_with_both() {
    let (x, w) = (zeros(&[2, 3]), zeros(&[4, 5]));
    assert_eq!(refused!(x.add(&w)), "add: shapes [2, 3] and [4, 5] do not broadcast together");
    assert!(refused!(x.matmul(&w)).contains("[2, 3] x [4, 5]"));
    assert!(refused!(zeros(&[3]).matmul(&w)).contains("at least 2, got rank 1"));
    let batches = (zeros(&[2, 4, 4]), zeros(&[3, 4, 4]));
    assert!(refused!(batches.0.matmul(&batches.1)).contains("[2, 4, 4] and [3, 4, 4]"));
    assert!(refused!(x.reshape(&[5])).contains("[2, 3] (6 elements) into [5] (5 elements)"));
    assert!(refused!(x.broadcast_as(&[2, 4])).contains("[2, 3] and [2, 4]"));
    assert!(refused!(x.broadcast_as(&[3])).contains("[2, 3] and [3]"));
    assert!(refused!(integers(&[2]).to_dtype(DType::U8).and_then(|c| c.where_cond(&x, &x))) != "");
    assert!(refused!(LazyTensor::cat(&[&x, &w], 0)).starts_with("cat: expected shape"));
    assert!(refused!(LazyTensor::stack(&[&x, &w], 0)).starts_with("stack: expected shape"));
    assert!(refused!(x.rms_norm(&zeros(&[2]), 0.0)).starts_with("rms_norm: expected shape [3]"));
    assert!(refused!(x.rope(&w, &w)).contains("even"));
    assert!(refused!(x.embedding(&zeros(&[2]))).contains("index"));
    assert!(refused!(x.slice_update(0, &zeros(&[3, 3]), &integers(&[]))).contains("0..3"));
    let ids = zeros(&[2]);
    assert!(refused!(x.cross_entropy(&ids, CrossEntropy::new())).contains("index"));
    assert!(refused!(x.cross_entropy(&integers(&[3]), CrossEntropy::new())).contains("[2]"));
    assert!(refused!(Attention::new().forward(&x, &x, &x)).contains("rank 4"));
}

#[test]
fn dims_and_ranges_that_are_not_there_are_refused() {
    let x = zeros(&[2, 3]);
    assert_eq!(refused!(x.softmax(2)), "softmax: dim 2 is out of range for rank 2");
    assert_eq!(refused!(x.sum([0, -3])), "sum: dim -3 is out of range for rank 2");
    assert!(refused!(x.sum([1, -1])).contains("name a dim twice"));
    assert!(refused!(x.permute([0])).contains("permutation of rank 2"));
    assert!(refused!(x.unsqueeze(3)).contains("dim 3"));
    assert!(refused!(x.flatten(1, 0)).contains("flatten"));
    assert!(refused!(zeros(&[]).t()).contains("at least 2"));
    assert!(refused!(x.narrow(1, 2, 2)).contains("range 2..4"));
    assert!(refused!(x.slice(1, 0, 2, 0)).contains("step"));
    assert!(refused!(x.slice(1, 1, usize::MAX, 2)).contains("range"));
    assert!(refused!(x.chunk(0, 0)).contains("chunks"));
    assert!(refused!(x.pad(0, usize::MAX, 1, 0.0)).contains("elements"));
    assert!(refused!(x.reshape(&[usize::MAX, 2])).contains("elements"));
    assert!(refused!(x.unsqueeze(0).and_then(|x| x.reshape(&[1; 9]))) != "");
    assert!(refused!(LazyTensor::cat::<LazyTensor>(&[], 0)).contains("cat"));
}

#[test]
fn dtypes_are_never_converted_unasked() {
    let (x, i) = (zeros(&[2, 3]), integers(&[2, 3]));
    assert!(refused!(x.add(&i)).contains("f32 and i64 differ"));
    assert!(refused!(i.exp()).contains("a float, got i64"));
    assert!(refused!(i.mean_all()).contains("mean: expected dtype a float"));
    assert!(refused!(i.matmul(&i.t().unwrap())).contains("a float"));
    assert!(refused!(x.where_cond(&x, &x)).contains("u8 for the condition"));
    assert!(refused!(i.softmax(0)).contains("a float"));
    assert!(refused!(x.gather(&x, 0)).contains("index"));
    assert!(refused!(x.dynamic_slice(0, &x, 1)).contains("i64"));
    assert!(refused!(x.quant_matmul(&x, BlockFormat::Q8_0, 1, 32)).contains("u8"));
    assert!(refused!(i.affine(0.5, 0.0)).contains("0.5 for i64"));
    assert!(refused!(x.clamp(1.0, 0.0)).contains("1 for max 0"));
}

#[test]
fn what_is_empty_has_a_sum_and_no_extreme() {
    let x = zeros(&[0, 3]);
    assert_eq!(x.sum([0]).unwrap().to_vec1::<f32>().unwrap(), [0.0; 3]);
    assert_eq!(x.logsumexp(0).unwrap().to_vec1::<f32>().unwrap(), [f32::NEG_INFINITY; 3]);
    assert_eq!(x.max([1]).unwrap().dims(), [0]);
    for op in [LazyTensor::max_all, LazyTensor::min_all, LazyTensor::mean_all] {
        let message = op(&x).expect_err("an extreme of nothing").to_string();
        assert!(message.contains("reducing an empty dim (shape [0, 3])"), "{message}");
    }
    assert!(refused!(x.argmax(0)).contains("reducing an empty dim"));
}

#[test]
fn chunks_are_as_equal_as_they_can_be() {
    let lens = |n: usize, chunks: usize| -> Result<Vec<usize>> {
        Ok(zeros(&[n]).chunk(chunks, -1)?.iter().map(LazyTensor::elem_count).collect())
    };
    assert_eq!(lens(7, 3).unwrap(), [3, 2, 2]);
    assert_eq!(lens(2, 3).unwrap(), [1, 1]);
    assert_eq!(lens(0, 3).unwrap(), [0]);
}

#[test]
fn views_that_change_nothing_are_the_tensor_itself() {
    let x = zeros(&[2, 1, 3]).to_owned_copy().unwrap();
    let same = [
        x.reshape(&[2, 1, 3]),
        x.transpose(1, 1),
        x.permute([0, 1, 2]),
        x.squeeze(0),
        x.broadcast_as(&[2, 1, 3]),
        x.narrow(0, 0, 2),
        x.pad(0, 0, 0, 1.0),
        x.to_dtype(DType::F32),
        x.affine(1.0, 0.0),
        x.sum([1]).and_then(|y| y.unsqueeze(1)),
        LazyTensor::cat(&[&x], 0),
    ];
    assert!(same[..9].iter().all(|y| y.as_ref().unwrap().is_evaluated()));
    assert!(same.iter().all(|y| y.as_ref().unwrap().dims() == x.dims()));
}

#[test]
fn a_mean_in_f16_does_not_overflow_on_the_way() {
    let x = LazyTensor::full(300.0, &[1000], DType::F16, &Device::Cpu).unwrap();
    let mean = x.mean_all().unwrap().to_dtype(DType::F32).unwrap();
    assert_eq!(mean.to_scalar::<f32>().unwrap(), 300.0);
}

#[test]
fn a_mean_loss_counts_the_rows_that_count() {
    let logits = LazyTensor::from_vec(vec![0f32, 1.0, 2.0, 0.0, 5.0, 5.0], &[3, 2], &Device::Cpu);
    let logits = logits.unwrap();
    let labels = LazyTensor::from_vec(vec![1i64, -100, 0], &[3], &Device::Cpu).unwrap();
    let loss = |labels: &LazyTensor, options: CrossEntropy| {
        logits.cross_entropy(labels, options).unwrap().to_vec::<f32>().unwrap()
    };
    let rows = loss(&labels, CrossEntropy::new().per_row());
    assert!(rows.len() == 3 && rows[1] == 0.0 && rows[0] > 0.0);
    assert_eq!(loss(&labels, CrossEntropy::new().sum()), [rows[0] + rows[2]]);
    assert_eq!(loss(&labels, CrossEntropy::new()), [(rows[0] + rows[2]) / 2.0]);
    let none = LazyTensor::full(-100.0, &[3], DType::I64, &Device::Cpu).unwrap();
    assert_eq!(loss(&none, CrossEntropy::new()), [0.0]);
    let batch = logits.reshape(&[3, 1, 2]).unwrap();
    let labels = labels.reshape(&[3, 1]).unwrap();
    let per_row = batch.cross_entropy(&labels, CrossEntropy::new().per_row()).unwrap();
    assert_eq!(per_row.dims(), [3, 1]);
}

#[test]
fn lora_on_a_batch_is_three_products_and_nothing_else() {
    let x = zeros(&[4, 16, 32]).to_owned_copy().unwrap();
    let owned = |dims: &[usize]| zeros(dims).to_owned_copy().unwrap();
    let (w, a, b) = (owned(&[32, 24]), owned(&[32, 8]), owned(&[8, 24]));
    let y = x.lora(&x.matmul(&w).unwrap(), &a, &b, 2.0).unwrap();
    let plan = LazyTensor::plan(&[&y]).unwrap();
    let labels: Vec<&str> = plan.steps.iter().map(|s| s.label.as_str()).collect();
    assert_eq!(labels, ["matmul", "matmul+matmul"], "{plan}");
}

#[test]
fn random_numbers_are_those_of_philox() {
    // The known answers of Random123.
    let zeros = metal_candle_graph::philox4x32([0; 4], [0; 2]);
    assert_eq!(zeros, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
    let ones = metal_candle_graph::philox4x32([u32::MAX; 4], [u32::MAX; 2]);
    assert_eq!(ones, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
    let pi = metal_candle_graph::philox4x32(pi, [0xa409_3822, 0x299f_31d0]);
    assert_eq!(pi, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    let seed = 1 << 40;
    let x = LazyTensor::rand(&[3, 7], DType::F32, seed, &Device::Cpu).unwrap();
    let uniform = metal_candle_graph::Distribution::Uniform;
    let random = |i| metal_candle_graph::random_f64(uniform, seed as i64, 0, i) as f32;
    assert_eq!(x.to_vec::<f32>().unwrap(), (0..21).map(random).collect::<Vec<_>>());
}
