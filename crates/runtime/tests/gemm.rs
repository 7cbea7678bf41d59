//! `gemm` against three loops.

mod support;

use metal_candle_compiler::LibraryCall;
use metal_candle_graph::DType;
use support::*;

/// `a: [batch.., m, k]`, `b: [batch.., k, n]`
fn product(
    a: &Tensor,
    b: &Tensor,
    alpha: f64,
    bias: Option<&Tensor>,
    base: Option<&Tensor>,
) -> Vec<f64> {
    let rank = a.shape().rank();
    let [m, k, n] = [a.shape()[rank - 2], a.shape()[rank - 1], b.shape()[rank - 1]];
    let batches: usize = a.shape().dims()[..rank - 2].iter().product();
    let mut out = Vec::new();
    for batch in 0..batches {
        for i in 0..m {
            for j in 0..n {
                let at = |l: usize| {
                    a.values[(batch * m + i) * k + l] * b.values[(batch * k + l) * n + j]
                };
                let start = base.map_or(0.0, |base| base.values[out.len()])
                    + bias.map_or(0.0, |bias| bias.values[j]);
                out.push(start + alpha * (0..k).map(at).sum::<f64>());
            }
        }
    }
    out
}

fn check(rng: &mut Rng, dtype: DType, batch: &[usize], [m, k, n]: [usize; 3], shared_b: bool) {
    let dims = |tail: [usize; 2]| [batch, &tail[..]].concat();
    let (a_dims, out_dims) = (dims([m, k]), dims([m, n]));
    let a_values = rng.units(shape(&a_dims).len());
    let a = if rng.flip() {
        Tensor::dense(dtype, &a_dims, &a_values)
    } else {
        Tensor::strided(rng, dtype, &a_dims, &a_values)
    };
    let b = if shared_b {
        let ones = [vec![1; batch.len()], vec![k, n]].concat();
        let values = rng.units(k * n);
        let b = Tensor::strided(rng, dtype, &ones, &values);
        batch.iter().enumerate().fold(b, |b, (d, extent)| b.broadcast(d, *extent))
    } else {
        let values = rng.units(shape(&dims([k, n])).len());
        Tensor::strided(rng, dtype, &dims([k, n]), &values)
    };
    let (alpha, accumulate) = ([1.0, -0.75][rng.below(2)], rng.flip());
    let values = rng.units(shape(&out_dims).len());
    let base = Tensor::dense(dtype, &out_dims, &values);
    let base = accumulate.then_some(&base);
    let bias = Tensor::dense(dtype, &[n], &rng.units(n));
    let bias = rng.flip().then_some(&bias);
    let call = LibraryCall::Gemm { alpha, accumulate };
    let args: Vec<&Tensor> = [&a, &b].into_iter().chain(bias).collect();
    let got = run(call, &args, &[(dtype, shape(&out_dims))], base).unwrap();
    let expected = product(&a, &b, alpha, bias, base);
    let with = format!("alpha {alpha} accumulate {accumulate} bias {}", bias.is_some());
    let what = format!("{dtype} {batch:?} {m}x{k}x{n} {with}");
    close(&got[0], &expected, tolerance(dtype) * (1.0 + k as f64).sqrt(), &what);
}

#[test]
fn gemm_equals_three_loops() {
    let mut rng = Rng::new(1);
    for dtype in FLOATS {
        for round in 0..60 {
            let extents = [0; 3].map(|_: usize| [1, 2, 3, 7, 16, 33, 70][rng.below(7)]);
            let batch: Vec<usize> = (0..rng.below(3)).map(|_| 1 + rng.below(3)).collect();
            check(&mut rng, dtype, &batch, extents, round % 3 == 0);
        }
    }
}

#[test]
fn gemm_of_large_matrices_splits_without_a_trace() {
    let mut rng = Rng::new(2);
    for dtype in FLOATS {
        check(&mut rng, dtype, &[], [150, 600, 300], false);
        check(&mut rng, dtype, &[3], [40, 64, 130], true);
    }
}

#[test]
fn gemm_with_a_thin_side_equals_three_loops() {
    let mut rng = Rng::new(4);
    for dtype in FLOATS {
        for extents in [[300, 600, 8], [300, 5, 600], [16, 600, 300], [8, 130, 1100], [1100, 70, 3]]
        {
            for _ in 0..4 {
                check(&mut rng, dtype, &[], extents, false);
            }
        }
        // Ranks that fill no vector, sums of odd length, and rows that end within a block.
        for rank in 1..=33 {
            let (rows, k) = (34 + rng.below(160), 17 + rng.below(200));
            check(&mut rng, dtype, &[], [rows, k, rank], false);
            check(&mut rng, dtype, &[], [rank, k, rows], false);
        }
    }
}

/// Sums of products of these depths, by one call and by three loops each.
fn check_sum(rng: &mut Rng, dtype: DType, batch: &[usize], [m, n]: [usize; 2], depths: &[usize]) {
    let dims = |tail: [usize; 2]| [batch, &tail[..]].concat();
    let alphas: Vec<f64> = depths.iter().map(|_| [1.0, 2.0, -0.5, 0.3][rng.below(4)]).collect();
    let accumulate = rng.flip();
    let base_values = rng.units(shape(&dims([m, n])).len());
    let base = Tensor::dense(dtype, &dims([m, n]), &base_values);
    let mut expected = if accumulate { base.values.clone() } else { vec![0.0; base.values.len()] };
    let mut factors = Vec::new();
    for (k, alpha) in depths.iter().zip(&alphas) {
        let mut factor = |tail| {
            let values = rng.units(shape(&dims(tail)).len());
            Tensor::strided(rng, dtype, &dims(tail), &values)
        };
        let (a, b) = (factor([m, *k]), factor([*k, n]));
        for (sum, product) in expected.iter_mut().zip(product(&a, &b, *alpha, None, None)) {
            *sum += product;
        }
        factors.extend([a, b]);
    }
    let what = format!("{dtype} {batch:?} {m}x{depths:?}x{n} alphas {alphas:?} + {accumulate}");
    let call = LibraryCall::GemmSum { alphas, accumulate };
    let args: Vec<&Tensor> = factors.iter().collect();
    let out = (dtype, shape(&dims([m, n])));
    let got = run(call, &args, &[out], accumulate.then_some(&base)).unwrap();
    let k: usize = depths.iter().sum();
    close(&got[0], &expected, tolerance(dtype) * (1.0 + k as f64).sqrt(), &what);
}

#[test]
fn a_sum_of_products_equals_three_loops_for_each() {
    let mut rng = Rng::new(6);
    for dtype in FLOATS {
        for rank in 1..=33 {
            let sides = [96 + rng.below(60), 33 + rng.below(60)];
            let depths = [64 + rng.below(70), rank];
            check_sum(&mut rng, dtype, &[], sides, &depths);
        }
        // Slices that end within a factor, as many factors as there may be, and what is made product by product.
        check_sum(&mut rng, dtype, &[], [100, 70], &[700, 9, 1100, 513]);
        check_sum(&mut rng, dtype, &[], [120, 33], &[5, 65, 1, 2, 3, 64, 31, 8]);
        check_sum(&mut rng, dtype, &[], [90, 70], &[100, 8]);
        check_sum(&mut rng, dtype, &[], [100, 40], &[8, 16]);
        check_sum(&mut rng, dtype, &[], [100, 40], &[300]);
        check_sum(&mut rng, dtype, &[3], [100, 50], &[70, 4]);
        check_sum(&mut rng, dtype, &[25, 4], [1, 50], &[70, 4]);
    }
}

#[test]
fn gemm_with_vectors_equals_three_loops() {
    let mut rng = Rng::new(3);
    for dtype in FLOATS {
        for extents in [[1, 300, 2500], [2500, 300, 1], [1, 1, 700], [1, 900, 1], [700, 1, 1]] {
            for _ in 0..4 {
                check(&mut rng, dtype, &[], extents, false);
            }
        }
        check(&mut rng, dtype, &[5], [1, 40, 60], true);
    }
}

#[test]
fn gemm_of_nothing_is_nothing_or_zero() {
    let mut rng = Rng::new(4);
    for dtype in FLOATS {
        for extents in [[0, 4, 5], [4, 0, 5], [4, 5, 0], [0, 0, 0], [1, 0, 5], [5, 0, 1]] {
            check(&mut rng, dtype, &[], extents, false);
            check(&mut rng, dtype, &[2], extents, true);
            check(&mut rng, dtype, &[0], extents, false);
        }
    }
}

#[test]
fn gemm_of_few_rows_reads_a_dense_operand_where_it_lies() {
    let mut rng = Rng::new(5);
    for dtype in FLOATS {
        for [m, k, n] in [[64, 70, 130], [5, 300, 64], [2, 1100, 97], [84, 16, 33]] {
            let (a, b) = (rng.units(m * k), rng.units(k * n));
            let (a, b) = (Tensor::dense(dtype, &[m, k], &a), Tensor::dense(dtype, &[k, n], &b));
            let call = LibraryCall::Gemm { alpha: 0.5, accumulate: false };
            let got = run(call, &[&a, &b], &[(dtype, shape(&[m, n]))], None).unwrap();
            let expected = product(&a, &b, 0.5, None, None);
            let tolerance = tolerance(dtype) * (1.0 + k as f64).sqrt();
            close(&got[0], &expected, tolerance, &format!("{dtype} {m}x{k}x{n}"));
        }
    }
}
