//! What a product's parameters mean to Candle's kernels is what the product means.

use super::{Addend, Parameters, Product, Vector};
use metal_candle_compiler::Layout;
use metal_candle_compiler::render::{Binding, Place};
use metal_candle_graph::{DType, Shape};

/// Memory of an operand, and a matrix in it.
struct Matrix {
    data: Vec<f64>,
    layout: Layout,
}

impl Matrix {
    /// Of these extents, stored in the order `order` of its dims (outermost first), each row `gap` elements longer than
    /// needed, from element `start` on. Dims of `repeated` have a stride of 0.
    fn new(
        dims: &[usize],
        order: &[usize],
        gap: usize,
        start: usize,
        repeated: &[usize],
    ) -> Matrix {
        let mut layout = Layout::contiguous(Shape::new(dims).unwrap());
        let mut step = 1;
        for (place, dim) in order.iter().rev().enumerate() {
            let stride = if repeated.contains(dim) { 0 } else { step };
            layout.strides[*dim] = stride as isize;
            if stride > 0 {
                step = step * dims[*dim] + if place == 0 { gap } else { 0 };
            }
        }
        layout.offset = start as isize;
        let value = |i: usize| ((i * 7 + start) % 23) as f64 - 11.0;
        Matrix { data: (0..start + step).map(value).collect(), layout }
    }

    fn at(&self, index: &[usize]) -> usize {
        let steps = index.iter().zip(self.layout.strides());
        let sum: isize = steps.map(|(i, stride)| *i as isize * stride).sum();
        (self.layout.offset + sum) as usize
    }

    fn place(&self, binding: Binding, dtype: DType) -> Place {
        Place { binding, dtype, layout: self.layout }
    }
}

/// Every index of `dims`.
fn indices(dims: &[usize]) -> Vec<Vec<usize>> {
    dims.iter().fold(vec![Vec::new()], |all, extent| {
        let longer = |index: &Vec<usize>| {
            let index = index.clone();
            (0..*extent).map(move |i| [index.clone(), vec![i]].concat())
        };
        all.iter().flat_map(longer).collect()
    })
}

fn meant([a, b, out]: [&Matrix; 3], alpha: f64, accumulate: bool) -> Vec<f64> {
    let mut data = out.data.clone();
    let k = *a.layout.shape.dims().last().unwrap();
    for index in indices(out.layout.shape.dims()) {
        let (leading, last) = index.split_at(index.len() - 2);
        let sum: f64 = (0..k)
            .map(|p| {
                let l = [leading, &[last[0], p]].concat();
                let r = [leading, &[p, last[1]]].concat();
                a.data[a.at(&l)] * b.data[b.at(&r)]
            })
            .sum();
        let at = out.at(&index);
        data[at] = alpha * sum + if accumulate { out.data[at] } else { 0.0 };
    }
    data
}

/// As the kernels read their parameters.
fn read(product: &Product, [a, b, out]: [&Matrix; 3]) -> Vec<f64> {
    let mut data = out.data.clone();
    for starts in &product.starts {
        let [a_start, b_start, out_start] = starts.map(|bytes| bytes / 4);
        let factors = [&a.data[a_start..], &b.data[b_start..]];
        let [a, b] = if product.swapped { [factors[1], factors[0]] } else { factors };
        launch(product, a, b, &mut data[out_start..]);
    }
    data
}

fn launch(product: &Product, a: &[f64], b: &[f64], to: &mut [f64]) {
    let blocks_z = product.grid[2];
    match &product.parameters {
        Parameters::Matrices { gemm: g, add, aligned } => {
            let tile = product.kernel.split('_').skip(4).map(|n| n.parse::<usize>().unwrap());
            let sizes = [g.m, g.n, g.k].map(|x| x as usize);
            let whole = sizes.iter().zip(tile).map(|(size, tile)| size.is_multiple_of(tile));
            assert!(whole.eq(*aligned), "a tile that is not whole is taken to be: {product:?}");
            let transposed = |at: usize| product.kernel.as_bytes()["gemm_".len() + at] == b't';
            let [m, n, k] = [g.m, g.n, g.k].map(|x| x as usize);
            for (z, i, j) in three(blocks_z, m, n) {
                let sum: f64 = (0..k)
                    .map(|p| {
                        let (lda, ldb) = (g.lda as usize, g.ldb as usize);
                        let l = if transposed(0) { i + p * lda } else { i * lda + p };
                        let r = if transposed(1) { j * ldb + p } else { j + p * ldb };
                        a[l + z * g.batch_stride_a as usize] * b[r + z * g.batch_stride_b as usize]
                    })
                    .sum();
                let at = z * g.batch_stride_d as usize + i * g.ldd as usize + j;
                let c =
                    i * add.ldc as usize + j * add.fdc as usize + z * add.batch_stride_c as usize;
                to[at] = scaled(product, sum, (add.alpha, add.beta), to, c, at);
            }
        }
        Parameters::Vector(v) => {
            let (matrix, vector) = if v.matrix_is_b { (b, a) } else { (a, b) };
            let by_columns = product.kernel.starts_with("gemv_t");
            for (z, o, _) in three(blocks_z, v.out_len as usize, 1) {
                let sum: f64 = (0..v.in_len as usize)
                    .map(|p| {
                        let ld = v.matrix_ld as usize;
                        let at = if by_columns { p * ld + o } else { o * ld + p };
                        matrix[at + z * v.matrix_batch_stride as usize]
                            * vector[p + z * v.vector_batch_stride as usize]
                    })
                    .sum();
                let at = z * v.out_len as usize + o;
                let c = o * v.addend_stride as usize + z * v.addend_batch_stride as usize;
                to[at] = scaled(product, sum, (v.alpha, v.beta), to, c, at);
            }
        }
    }
}

fn three(z: usize, m: usize, n: usize) -> impl Iterator<Item = (usize, usize, usize)> {
    (0..z).flat_map(move |z| (0..m).flat_map(move |i| (0..n).map(move |j| (z, i, j))))
}

/// The epilogue; the addend must be the element itself, or the lone zero.
fn scaled(
    product: &Product,
    sum: f64,
    (alpha, beta): (f32, f32),
    to: &[f64],
    addend: usize,
    at: usize,
) -> f64 {
    match product.addend() {
        None => sum,
        Some(Addend::Zero) => {
            assert_eq!((addend, beta), (0, 0.0), "only one zero can be read");
            f64::from(alpha) * sum
        }
        Some(Addend::Result) => {
            assert_eq!(addend, at, "another element is added to than is written");
            f64::from(alpha) * sum + f64::from(beta) * to[addend]
        }
    }
}

const SCALES: [(f64, bool); 4] = [(1.0, false), (2.0, false), (1.0, true), (0.5, true)];

/// Panics where the parameters do not mean the product; whether there are any.
fn check(operands: [&Matrix; 3]) -> bool {
    let bindings = [Binding::Arg(0), Binding::Arg(1), Binding::Out(0)];
    let mut is_taken = false;
    for (alpha, accumulate) in SCALES {
        let want = meant(operands, alpha, accumulate);
        for few_cores in [false, true] {
            let place = |i: usize| operands[i].place(bindings[i], DType::F32);
            let places = [place(0), place(1), place(2)];
            let Some(product) =
                Product::new([&places[0], &places[1], &places[2]], alpha, accumulate, few_cores)
            else {
                continue;
            };
            is_taken = true;
            assert!(product.grid.iter().all(|extent| *extent > 0), "{product:?}");
            assert!(product.block.iter().product::<usize>() <= 1024, "{product:?}");
            assert_eq!(read(&product, operands), want, "{product:?}");
        }
    }
    is_taken
}

/// Around tiles, thin, and of one row or column.
const EXTENTS: [[usize; 3]; 9] = [
    [5, 7, 3],
    [17, 33, 16],
    [64, 64, 32],
    [20, 1, 9],
    [1, 40, 8],
    [1, 1, 5],
    [40, 8, 1],
    [1, 64, 100],
    [64, 1, 100],
];

#[test]
fn parameters_mean_the_product() {
    let mut taken = 0;
    for [m, n, k] in EXTENTS {
        for (a_order, b_order) in
            [([0, 1], [0, 1]), ([0, 1], [1, 0]), ([1, 0], [0, 1]), ([1, 0], [1, 0])]
        {
            for (gap, start) in [(0, 0), (3, 5)] {
                let a = Matrix::new(&[m, k], &a_order, gap, start, &[]);
                let b = Matrix::new(&[k, n], &b_order, gap, 2 * start, &[]);
                let out = Matrix::new(&[m, n], &[0, 1], gap, 3 * start, &[]);
                taken += usize::from(check([&a, &b, &out]));
            }
        }
    }
    assert_eq!(taken, EXTENTS.len() * 8, "a plain product is not taken");
}

#[test]
fn batches_are_one_launch_and_rows_times_one_matrix_one_product() {
    for [m, n, k] in EXTENTS.into_iter().filter(|e| e.iter().product::<usize>() < 10_000) {
        for gap in [0, 2] {
            let a = Matrix::new(&[2, 3, m, k], &[0, 1, 2, 3], 0, 1, &[]);
            // A matrix for each batch; one for all.
            for repeated in [&[][..], &[0, 1]] {
                let b = Matrix::new(&[2, 3, k, n], &[0, 1, 2, 3], gap, 0, repeated);
                let out = Matrix::new(&[2, 3, m, n], &[0, 1, 2, 3], 0, 2, &[]);
                assert!(check([&a, &b, &out]), "[{m}, {n}, {k}]");
            }
            // Heads that lie between the rows, as attention has them.
            let a = Matrix::new(&[4, m, k], &[1, 0, 2], 0, 0, &[]);
            let b = Matrix::new(&[4, k, n], &[0, 2, 1], gap, 3, &[]);
            let out = Matrix::new(&[4, m, n], &[0, 1, 2], 0, 0, &[]);
            assert!(check([&a, &b, &out]), "[{m}, {n}, {k}]");
            // A result by columns; two leading dims that are no one step apart.
            let out = Matrix::new(&[4, m, n], &[0, 2, 1], gap, 1, &[]);
            assert!(check([&a, &b, &out]), "[{m}, {n}, {k}]");
            let a = Matrix::new(&[2, 3, m, k], &[1, 0, 2, 3], 0, 1, &[]);
            let b = Matrix::new(&[2, 3, k, n], &[0, 1, 2, 3], 0, 1, &[]);
            let out = Matrix::new(&[2, 3, m, n], &[0, 1, 2, 3], 0, 2, &[]);
            assert!(check([&a, &b, &out]), "[{m}, {n}, {k}]");
        }
    }
    let x = Matrix::new(&[8, 16, 32], &[0, 1, 2], 0, 0, &[]);
    let w = Matrix::new(&[8, 32, 64], &[0, 1, 2], 0, 0, &[0]);
    let y = Matrix::new(&[8, 16, 64], &[0, 1, 2], 0, 0, &[]);
    let places = [&x, &w, &y].map(|m| m.place(Binding::Arg(0), DType::F32));
    let product = Product::new([&places[0], &places[1], &places[2]], 1.0, false, false).unwrap();
    let Parameters::Matrices { gemm, .. } = product.parameters else { panic!("{product:?}") };
    assert_eq!((gemm.m, product.grid[2]), (8 * 16, 1));
}

#[test]
fn what_the_kernels_cannot_take_is_refused() {
    let a = Matrix::new(&[4, 6], &[0, 1], 0, 0, &[]);
    let b = Matrix::new(&[6, 8], &[0, 1], 0, 0, &[]);
    let out = Matrix::new(&[4, 8], &[0, 1], 0, 0, &[]);
    let place = |m: &Matrix, dtype| m.place(Binding::Arg(0), dtype);
    let product = |a: &Place, b: &Place, out: &Place| Product::new([a, b, out], 1.0, false, true);
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let [a, b, out] = [&a, &b, &out].map(|m| place(m, dtype));
        assert!(product(&a, &b, &out).is_some());
    }
    for dtype in [DType::F64, DType::I64] {
        let [a, b, out] = [&a, &b, &out].map(|m| place(m, dtype));
        assert!(product(&a, &b, &out).is_none());
    }
    let [l, r, o] = [&a, &b, &out].map(|m| place(m, DType::BF16));
    assert!(product(&l, &r, &place(&out, DType::F32)).is_none(), "mixed dtypes");
    let mut apart = l.clone();
    (apart.layout.strides[0], apart.layout.strides[1]) = (12, 2);
    assert!(product(&apart, &r, &o).is_none(), "no stride of 1");
    let mut backwards = l.clone();
    backwards.layout.strides[0] = -6;
    backwards.layout.offset = 18;
    assert!(product(&backwards, &r, &o).is_none(), "flipped rows");
}

/// The last thread of `gemv` starts earlier where it would reach beyond the end, and does an element twice.
#[test]
fn a_vector_is_accumulated_onto_by_one_thread_an_element() {
    for out_len in 1..40 {
        let a = Matrix::new(&[1, 96], &[0, 1], 0, 0, &[]);
        for order in [[0, 1], [1, 0]] {
            let b = Matrix::new(&[96, out_len], &order, 0, 0, &[]);
            let out = Matrix::new(&[1, out_len], &[0, 1], 0, 0, &[]);
            let places = [&a, &b, &out].map(|m| m.place(Binding::Arg(0), DType::F32));
            let product =
                Product::new([&places[0], &places[1], &places[2]], 1.0, true, false).unwrap();
            if let Parameters::Vector(Vector { out_len, .. }) = product.parameters {
                let of = |name: &str| {
                    let at = product.kernel.find(name).unwrap() + name.len();
                    product.kernel[at..].split('_').next().unwrap().parse::<i32>().unwrap()
                };
                let each = if product.kernel.starts_with("gemv_t") { of("_tn") } else { of("_tm") };
                assert_eq!(out_len % each, 0, "{product:?}");
            }
        }
    }
}

/// Every kernel that can be asked for is instantiated in Candle's sources: the lists of `mlx_gemm.metal` and `gemv.metal`.
#[test]
fn kernels_have_names_that_candle_has() {
    const TILES: [&str; 5] =
        ["32_32_16_2_2", "64_64_16_2_2", "64_64_16_1_2", "64_32_32_2_2", "32_64_16_1_2"];
    const GEMV: [&str; 7] = [
        "bm1_bn8_sm1_sn32_tm4_tn4",
        "bm1_bn8_sm1_sn32_tm1_tn4",
        "bm1_bn1_sm8_sn4_tm4_tn4",
        "bm1_bn1_sm8_sn4_tm1_tn4",
        "bm4_bn1_sm1_sn32_tm1_tn4",
        "bm4_bn1_sm1_sn32_tm4_tn4",
        "bm8_bn1_sm1_sn32_tm4_tn4",
    ];
    const GEMV_T: [&str; 5] = [
        "bm1_bn2_sm8_sn4_tm4_tn1",
        "bm1_bn2_sm8_sn4_tm4_tn4",
        "bm1_bn4_sm8_sn4_tm4_tn4",
        "bm1_bn16_sm8_sn4_tm4_tn4",
        "bm1_bn16_sm4_sn8_tm4_tn4",
    ];
    let sizes = [1, 2, 3, 8, 15, 16, 64, 200, 600, 1024, 2048, 4096, 9000];
    let mut seen = std::collections::BTreeSet::new();
    for (m, n, k) in
        sizes.iter().flat_map(|m| sizes.iter().flat_map(move |n| sizes.map(|k| (*m, *n, k))))
    {
        for order in [[0, 1], [1, 0]] {
            let mut layouts =
                [[m, k], [k, n], [m, n]].map(|d| Layout::contiguous(Shape::new(&d).unwrap()));
            if order == [1, 0] {
                (layouts[1].strides[0], layouts[1].strides[1]) = (1, k as isize);
            }
            for dtype in [DType::F32, DType::BF16] {
                let places =
                    layouts.map(|layout| Place { binding: Binding::Arg(0), dtype, layout });
                for few in [false, true] {
                    let places = [&places[0], &places[1], &places[2]];
                    seen.insert(Product::new(places, 2.0, false, few).unwrap().kernel);
                }
            }
        }
    }
    for kernel in seen {
        let known = |list: &[&str]| list.iter().any(|part| kernel.contains(&format!("_{part}")));
        let is_known = match &kernel {
            k if k.starts_with("gemm_") => known(&TILES),
            k if k.starts_with("gemv_t_") => known(&GEMV_T),
            _ => known(&GEMV),
        };
        assert!(is_known, "{kernel}");
    }
}
