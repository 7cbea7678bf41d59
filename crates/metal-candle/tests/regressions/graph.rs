//! The lazy layer: it fused nothing, interned nothing, broadcast nothing, kept everything alive,
//! and lost gradients.

use super::{assert_near, randn, tensor, vec};
use crate::testbed::device;
use metal_candle::{Attention, CrossEntropy, DType, LazyTensor, Plan, Result, compile, grad};
use metal_candle_compiler::Work;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

fn plan(x: &LazyTensor) -> Plan {
    LazyTensor::plan(&[x]).unwrap()
}

#[track_caller]
fn assert_one_kernel(x: Result<LazyTensor>) {
    let plan = plan(&x.unwrap());
    assert!(plan.steps.len() == 1 && matches!(plan.steps[0].work, Work::Kernel(_)), "{plan}");
    assert_eq!(plan.arena_bytes, 0, "{plan}");
}

/// `relu(gelu(2x + 1) * x + x)`: 1.x ran five operations.
fn gelu_chain(x: &LazyTensor) -> Result<LazyTensor> {
    x.affine(2.0, 1.0)?.gelu()?.mul(x)?.add(x)?.relu()
}

#[test]
fn the_gelu_chain_is_one_kernel() {
    assert_one_kernel(gelu_chain(&randn(&[64, 512], 0)));
}

#[test]
fn rows_of_several_stages_are_one_kernel() {
    let (x, w, b) = (randn(&[64, 512], 0), randn(&[512], 1), randn(&[512], 2));
    assert_one_kernel(x.softmax(-1));
    assert_one_kernel(x.log_softmax(-1));
    assert_one_kernel(x.rms_norm(&w, 1e-6));
    assert_one_kernel(x.layer_norm(&w, &b, 1e-6));
    assert_one_kernel(x.silu().and_then(|y| y.mul(&x)));
    let labels = LazyTensor::from_vec(vec![3i64; 64], &[64], device()).unwrap();
    assert_one_kernel(x.cross_entropy(&labels, CrossEntropy::new().per_row()));
}

/// 1.x made five nodes of `(a + b) + b`: b was another one each time.
#[test]
fn equal_operands_and_equal_results_are_computed_once() {
    let (a, b) = (randn(&[8], 0), randn(&[8], 1));
    let sum = (&a + &b) + &b;
    let chain = plan(&sum);
    assert_eq!((chain.inputs.len(), chain.steps.len()), (2, 1), "{chain}");
    assert_eq!(chain.flops(), 2 * 8, "{chain}");
    // Recorded twice, made once.
    let twice = (&a + &b).mul(&(&a + &b)).unwrap();
    assert_eq!(plan(&twice).flops(), 2 * 8, "{}", plan(&twice));
    let both = LazyTensor::plan(&[&(&a + &b), &(&a + &b)]).unwrap();
    assert_eq!(both.flops(), 8, "{both}");
    let (x, y) = (vec(&a), vec(&b));
    let want: Vec<f32> = x.iter().zip(y).map(|(a, b)| a + b + b).collect();
    assert_eq!(vec(&sum), want);
}

#[test]
fn operands_broadcast_as_in_numpy() {
    let (row, column) = (tensor(&[1.0, 2.0, 3.0], &[3]), tensor(&[10.0, 20.0], &[2, 1]));
    assert_eq!(vec(&(&row + &column)), [11.0, 12.0, 13.0, 21.0, 22.0, 23.0]);
    let scalar = tensor(&[0.5], &[]);
    assert_eq!(vec(&(&scalar * &row)), [0.5, 1.0, 1.5]);
    let (batch, matrix) = (tensor(&[1.0; 12], &[2, 3, 2]), tensor(&[1.0, 2.0], &[2, 1]));
    assert_eq!(vec(&batch.matmul(&matrix).unwrap()), [3.0; 6]);
    // What was repeated is summed in the gradient.
    let loss = (&row * &column).sum_all().unwrap();
    let g = grad(&loss, &[&row, &column]).unwrap();
    assert_eq!((g[0].dims(), vec(&g[0])), (row.dims(), vec![30.0; 3]));
    assert_eq!((g[1].dims(), vec(&g[1])), (column.dims(), vec![6.0; 2]));
}

/// Memory that can be given away is held by nobody: only then does a donated call succeed.
fn is_free(x: LazyTensor) -> bool {
    let f = compile(|x: &[LazyTensor]| Ok(vec![x[0].affine(2.0, 0.0)?])).donate([0]);
    f.call(vec![x]).is_ok()
}

#[test]
fn what_was_evaluated_lets_go_of_what_it_was_made_of() {
    let x = randn(&[8], 0);
    let y = x.exp().unwrap().add(&x).unwrap();
    assert!(!is_free(x.clone()), "y still needs x");
    let x_of_y = y.log().unwrap();
    y.eval().unwrap();
    assert!(is_free(x), "y is a value and still holds x");
    // What stands on y is computed from the value.
    assert_eq!(LazyTensor::plan(&[&x_of_y]).unwrap().inputs.len(), 1);
}

#[test]
fn results_do_not_outlive_their_handles() {
    let x = randn(&[8], 0);
    let y = x.exp().unwrap();
    y.eval().unwrap();
    drop(y);
    for i in 0..100 {
        (&x * f64::from(i)).eval().unwrap();
    }
    assert!(is_free(x), "a plan or a result still holds x");
}

/// Candle's fused norm, softmax, rope and attention, its quantised product and 1.x's own kernels
/// cut the gradient.
#[test]
fn gradients_flow_through_every_fused_operation() {
    let (x, w, b) = (randn(&[4, 6], 0), randn(&[6], 1), randn(&[6], 2));
    let table = randn(&[4, 3], 3);
    let four = |x: &LazyTensor| x.reshape(&[1, 4, 2, 3]);
    let labels = LazyTensor::from_slice(&[0u32, 5, 2, 1], &[4], device()).unwrap();
    let blocks: Vec<u8> = (0..2 * 34).map(|i| if i % 34 == 1 { 32 } else { i as u8 }).collect();
    let blocks = LazyTensor::from_vec(blocks, &[68], device()).unwrap();
    let format = metal_candle::BlockFormat::Q8_0;
    let wide = |x: &LazyTensor| x.reshape(&[1, 24])?.pad(1, 4, 4, 0.0);
    let rows: Vec<(&str, Result<LazyTensor>)> = vec![
        ("softmax", x.softmax(-1)),
        ("log_softmax", x.log_softmax(-1)),
        ("logsumexp", x.logsumexp(-1)),
        ("rms_norm", x.rms_norm(&w, 1e-5)),
        ("layer_norm", x.layer_norm(&w, &b, 1e-5)),
        ("rope", x.rope(&table, &table)),
        ("rope_interleaved", x.rope_interleaved(&table, &table)),
        ("attention", four(&x).and_then(|q| Attention::new().causal().forward(&q, &q, &q))),
        ("cross_entropy", x.cross_entropy(&labels, CrossEntropy::new())),
        (
            "linear_cross_entropy",
            x.linear_cross_entropy(&x.detach(), &(labels.clone() * 0.0), CrossEntropy::new()),
        ),
        ("quant_matmul", wide(&x).and_then(|x| x.quant_matmul(&blocks, format, 2, 32))),
        ("dropout", x.dropout(0.5, 1)),
        ("gelu_chain", gelu_chain(&x)),
        ("lora", x.lora(&x, &randn(&[6, 2], 4), &randn(&[2, 6], 5), 2.0)),
        ("max", x.max([1])),
        ("gather", x.gather(&labels.reshape(&[4, 1]).unwrap(), 1)),
        ("embedding", x.embedding(&(labels.clone() * 0.0))),
    ];
    for (name, y) in rows {
        let y = y.unwrap_or_else(|e| panic!("{name}: {e}"));
        // Not the plain sum, which is constant for a softmax.
        let loss = y.sqr().unwrap().sum_all().unwrap();
        let g = grad(&loss, &[&x]).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(vec(&g[0]).iter().any(|g| g.abs() > 1e-6), "{name} has no gradient");
    }
}

#[test]
fn a_gradient_that_cannot_be_is_an_error_with_op_and_path() {
    let (x, w) = (randn(&[4], 0), randn(&[4], 1).named("w"));
    let hidden = x.mul(&w).unwrap();
    let floored = hidden.gt(&x).unwrap().to_dtype(DType::F32).unwrap();
    let error = grad(&floored.sum_all().unwrap(), &[&w]).unwrap_err().to_string();
    for part in ["trainable w", "gt", "w -> mul -> gt", "regressions/graph.rs"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    let unused = grad(&x.sum_all().unwrap(), &[&w]).unwrap_err().to_string();
    assert!(unused.contains("trainable w is not used by the loss"), "{unused}");
    // Detached, it is not used either.
    let detached = x.mul(&w.detach()).unwrap().sum_all().unwrap();
    assert!(grad(&detached, &[&w]).is_err());
}

/// In bf16 the extreme is rounded and its operand is not, if a kernel keeps that in a register.
#[test]
fn the_largest_of_narrow_floats_gets_its_gradient() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let x = randn(&[5, 40], 0);
        let y = x.to_dtype(dtype).unwrap().affine(1.1, 0.0).unwrap();
        let loss = y.max([1]).unwrap().to_dtype(DType::F32).unwrap().sum_all().unwrap();
        let g = grad(&loss, &[&x]).unwrap();
        for row in vec(&g[0]).chunks(40) {
            let sum: f32 = row.iter().sum();
            assert!((sum - 1.1).abs() < 0.02, "{dtype}: a row's gradients sum to {sum}");
        }
    }
}

/// 1.x computed x A anew for every element of the result.
#[test]
fn lora_costs_three_products_and_no_more() {
    let (x, w) = (randn(&[64, 512], 0), randn(&[512, 512], 1));
    let (a, b) = (randn(&[512, 8], 2), randn(&[8, 512], 3));
    let plan = plan(&x.lora(&x.matmul(&w).unwrap(), &a, &b, 2.0).unwrap());
    assert!(plan.steps.len() <= 3, "{plan}");
    let flops = 2 * 64 * (512 * 512 + 512 * 8 + 8 * 512);
    assert!(plan.flops() <= flops + 64 * 512 * 2, "{plan}");
}

/// 1.x compiled its shader anew at every call.
#[test]
fn a_function_is_traced_and_planned_once_for_its_shapes() {
    let traces = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&traces);
    let f = compile(move |args: &[LazyTensor]| {
        count.fetch_add(1, Ordering::Relaxed);
        Ok(vec![gelu_chain(&args[0])?])
    });
    for (rows, expected) in [(4, 1), (4, 1), (6, 2), (4, 2), (6, 2)] {
        drop(f.call(vec![randn(&[rows, 8], 0)]).unwrap());
        assert_eq!(traces.load(Ordering::Relaxed), expected, "{rows} rows");
    }
}

/// Two losses of one product are two losses, whatever they share.
#[test]
fn calls_that_share_inputs_keep_their_own_options() {
    let (x, weight) = (randn(&[4, 6], 0), randn(&[5, 6], 1));
    let labels = LazyTensor::from_slice(&[0i64, 1, 2, 1], &[4], device()).unwrap();
    let of = |options: CrossEntropy| x.linear_cross_entropy(&weight, &labels, options.per_row());
    let options = [
        CrossEntropy::new(),
        CrossEntropy::new().ignore_index(Some(1)),
        CrossEntropy::new().label_smoothing(0.3),
    ];
    let together: Vec<LazyTensor> = options.iter().map(|o| of(*o).unwrap()).collect();
    LazyTensor::eval_all(&together.iter().collect::<Vec<_>>()).unwrap();
    for (together, options) in together.iter().zip(options) {
        assert_near(&vec(together), &vec(&of(options).unwrap()), 1e-6);
    }
    let gradients = |scale: f64| {
        let q = x.reshape(&[1, 4, 2, 3]).unwrap();
        let y = Attention::new().scale(scale).forward(&q, &q, &q).unwrap();
        grad(&y.sqr().unwrap().sum_all().unwrap(), &[&x]).unwrap().remove(0)
    };
    let (one, two) = (gradients(0.3), gradients(2.0));
    LazyTensor::eval_all(&[&one, &two]).unwrap();
    assert_near(&vec(&one), &vec(&gradients(0.3)), 1e-6);
    assert_near(&vec(&two), &vec(&gradients(2.0)), 1e-6);
    assert_ne!(vec(&one), vec(&two));
}

/// A scale goes into the product that makes its operand or into the one that reads it, not into
/// both.
#[test]
fn products_of_scaled_products_are_planned() {
    let (x, w) = (randn(&[3, 4], 0), randn(&[4, 4], 1));
    let scaled = x.matmul(&w).unwrap().affine(0.5, 0.0).unwrap();
    let y = scaled.matmul(&w).unwrap().affine(2.0, 0.0).unwrap().matmul(&w).unwrap();
    let want = x.matmul(&w).unwrap();
    want.eval().unwrap();
    let want = want.matmul(&w).unwrap();
    want.eval().unwrap();
    assert_near(&vec(&y), &vec(&want.matmul(&w).unwrap()), 1e-5);
}
