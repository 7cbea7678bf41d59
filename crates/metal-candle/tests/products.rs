//! Layers as models have them on the test's device, against sums in f64: sizes that go to a backend's library, and to the kernels
//! for few rows, few tiles and thin factors; with a bias, with a LoRA branch, and with the cotangents of both.

#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use metal_candle::{DType, LazyTensor, Result, grad};
use testbed::{device, largest};

/// A matrix of numbers that 16 bits hold as they are.
#[derive(Clone)]
struct Matrix {
    rows: usize,
    cols: usize,
    values: Vec<f64>,
}

impl Matrix {
    /// Numbers in [-1, 1), times `scale`.
    fn drawn(rows: usize, cols: usize, seed: u64, scale: f64) -> Matrix {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 57) as f64 - 64.0) / 64.0 * scale
        };
        Matrix { rows, cols, values: (0..rows * cols).map(|_| next()).collect() }
    }

    fn tensor(&self, dtype: DType) -> LazyTensor {
        let values: Vec<f32> = self.values.iter().map(|x| *x as f32).collect();
        let x = LazyTensor::from_vec(values, &[self.rows, self.cols], device()).unwrap();
        x.to_dtype(dtype).unwrap().to_owned_copy().unwrap()
    }

    fn times(&self, other: &Matrix) -> Matrix {
        let mut out = Matrix { rows: self.rows, cols: other.cols, values: Vec::new() };
        for i in 0..self.rows {
            let row = &self.values[i * self.cols..][..self.cols];
            let mut sums = vec![0.0; other.cols];
            for (x, right) in row.iter().zip(other.values.chunks(other.cols)) {
                sums.iter_mut().zip(right).for_each(|(sum, y)| *sum += x * y);
            }
            out.values.extend(sums);
        }
        out
    }

    fn transposed(&self) -> Matrix {
        let at = |i: usize| self.values[i % self.rows * self.cols + i / self.rows];
        let values = (0..self.values.len()).map(at).collect();
        Matrix { rows: self.cols, cols: self.rows, values }
    }

    fn plus(&self, other: &Matrix) -> Matrix {
        let more = other.values.iter().cycle();
        let values = self.values.iter().zip(more).map(|(x, y)| x + y).collect();
        Matrix { values, ..*self }
    }
}

/// x, W, A, B, the bias as a row, and the cotangent of what a layer makes of them.
struct Layer([Matrix; 6]);

impl Layer {
    fn new([rows, input, output, rank]: [usize; 4]) -> Layer {
        let part = 1.0 / (input as f64).sqrt().log2().ceil().exp2();
        Layer([
            Matrix::drawn(rows, input, 1, 1.0),
            Matrix::drawn(input, output, 2, part),
            Matrix::drawn(input, rank, 3, part),
            Matrix::drawn(rank, output, 4, 0.25),
            Matrix::drawn(1, output, 5, 2.0),
            Matrix::drawn(rows, output, 6, 1.0),
        ])
    }

    /// `x W + x A B + bias`, and the gradients of x, A, B and the bias.
    fn expected(&self) -> [Matrix; 5] {
        let [x, w, a, b, bias, dy] = &self.0;
        let y = x.times(w).plus(&x.times(a).times(b)).plus(bias);
        let low = dy.times(&b.transposed());
        let dx = dy.times(&w.transposed()).plus(&low.times(&a.transposed()));
        let ones = Matrix { rows: 1, cols: dy.rows, values: vec![1.0; dy.rows] };
        [y, dx, x.transposed().times(&low), x.times(a).transposed().times(dy), ones.times(dy)]
    }

    fn got(&self, dtype: DType) -> Result<Vec<Vec<f32>>> {
        let [x, w, a, b, bias, dy] = self.0.each_ref().map(|matrix| matrix.tensor(dtype));
        let y = x.matmul(&w)?.add(&x.matmul(&a)?.matmul(&b)?)?.add(&bias)?;
        let f32_of = |x: &LazyTensor| x.to_dtype(DType::F32);
        let loss = f32_of(&y)?.mul(&f32_of(&dy)?)?.sum_all()?;
        let mut all = vec![y];
        all.extend(grad(&loss, &[&x, &a, &b, &bias])?);
        // As one plan, as a training step is.
        let all: Vec<LazyTensor> = all.iter().map(f32_of).collect::<Result<_>>()?;
        LazyTensor::eval_all(&all.iter().collect::<Vec<_>>())?;
        all.iter().map(LazyTensor::to_vec::<f32>).collect()
    }
}

fn check(extents: [usize; 4], dtype: DType) {
    let layer = Layer::new(extents);
    // Of the largest value: sums are made in f32, and what lies between products is rounded to the dtype.
    let slack = match dtype {
        DType::F32 => 1e-5,
        DType::F16 => 4e-3,
        _ => 2e-2,
    };
    let names = ["y", "dx", "dA", "dB", "dbias"];
    for ((name, got), want) in names.iter().zip(layer.got(dtype).unwrap()).zip(layer.expected()) {
        let top = largest(want.values.iter().copied());
        let errors = got.iter().zip(&want.values).map(|(got, want)| f64::from(*got) - want);
        let most = largest(errors);
        println!("{extents:?} {dtype} {name}: {most:.1e} of {top:.1e}");
        assert!(got.iter().all(|x| x.is_finite()), "{extents:?} {dtype} {name}");
        assert!(most <= slack * top, "{extents:?} {dtype} {name}: off by {most} of {top}");
    }
}

#[test]
fn layers_with_a_bias_and_a_branch() {
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        // A token, few rows, few tiles, a ragged matrix, many rows.
        for extents in [[1, 256, 192, 8], [3, 256, 64, 4], [64, 512, 512, 8], [77, 90, 131, 5]] {
            check(extents, dtype);
        }
        check([640, 256, 384, 16], dtype);
    }
}
