//! Products, of weights in blocks too, and the losses behind one.

use super::{Build, FLOATS, attrs, check_all, tolerance};
use crate::plans::Task;
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::{
    BinaryOp, BlockFormat, Composite, DType, NodeId, Operation, Shape, oracle,
};

/// Losses and gradients of 70 rows and 150 classes: several chunks of either, with and without ragged ends.
fn losses(dtype: DType, ignore_index: Option<i64>, smoothing: f64) -> Task {
    let mut b = Build::new();
    let [n, v, d] = [70, 150, 16];
    let (x, w, dy) = (b.input(dtype, &[d, n]), b.input(dtype, &[v, d]), b.input(wide(dtype), &[n]));
    let x = b.g.permute(x, &[1, 0]).unwrap();
    let label = |i| if i % 5 == 0 { ignore_index.unwrap_or(3) as f64 } else { (i * 7 % v) as f64 };
    let labels = b.given(DType::I64, &[n], (0..n).map(label).collect());
    let attrs = attrs(ignore_index, smoothing);
    let outputs = vec![
        b.composite(Composite::LinearCrossEntropy(attrs), &[x, w, labels]),
        b.composite(Composite::LinearCrossEntropyGradX(attrs), &[x, w, labels]),
        b.composite(Composite::LinearCrossEntropyGradWeight(attrs), &[dy, x, w, labels]),
    ];
    b.task(format!("losses of {dtype}"), outputs, 4.0 * tolerance(dtype))
}

fn wide(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// What gguf-py reads in 512 weights of each format: see `reference/blocks.py`.
fn blocks(format: BlockFormat) -> (Vec<u8>, Vec<f64>) {
    let mut rest = &include_bytes!("../blocks.bin")[..];
    for other in BlockFormat::ALL {
        let (bytes, after) = rest.split_at(other.bytes_for(512).unwrap());
        let (weights, after) = after.split_at(4 * 512);
        if other == format {
            let weight = |bytes: &[u8]| f64::from(f32::from_le_bytes(bytes.try_into().unwrap()));
            return (bytes.to_vec(), weights.chunks(4).map(weight).collect());
        }
        rest = after;
    }
    unreachable!("all formats are there")
}

/// A matrix of so many rows of `cols` weights, which take turns: its blocks, and what they mean.
fn matrix(format: BlockFormat, rows: usize, cols: usize) -> [Vec<f64>; 2] {
    let (bytes, weights) = blocks(format);
    let (of_row, rows_there) = (format.bytes_for(cols).unwrap(), 512 / cols);
    let row = |i: usize| (i * 5 + i / 3) % rows_there;
    let blocks =
        (0..rows).flat_map(|i| bytes[row(i) * of_row..][..of_row].iter().map(|x| f64::from(*x)));
    let wide = (0..rows).flat_map(|i| weights[row(i) * cols..][..cols].iter().copied());
    [blocks.collect(), wide.collect()]
}

/// The graph that `f` makes of x and the weight, on blocks; expected is what it makes on the weights that they mean.
fn quantised(
    name: String,
    (format, [rows, cols]): (BlockFormat, [usize; 2]),
    tolerance: f64,
    f: impl Fn(&mut Build, Option<BlockFormat>, NodeId) -> Vec<NodeId>,
) -> Task {
    let [bytes, wide] = matrix(format, rows, cols);
    let mut b = Build::new();
    let w = b.given(DType::F64, &[rows, cols], wide);
    b.g.outputs = f(&mut b, None, w);
    let want = oracle::evaluate(&b.g, &b.inputs).unwrap();
    let mut b = Build::new();
    let w = b.given(DType::U8, &[bytes.len()], bytes);
    b.g.outputs = f(&mut b, Some(format), w);
    b.expecting(name, want, tolerance)
}

/// `x wᵀ`, or `x w`.
fn product(
    b: &mut Build,
    blocks: Option<BlockFormat>,
    [rows, cols]: [usize; 2],
    transposed: bool,
    x: NodeId,
    w: NodeId,
) -> NodeId {
    if let Some(format) = blocks {
        return b.op(Operation::QuantDot { format, rows, cols, transposed }, &[x, w]);
    }
    let w = if transposed { w } else { b.g.transpose(w).unwrap() };
    let shape = b.g.shape(x);
    let m = shape.len() / shape.last().unwrap();
    let flat = b.g.reshape(x, Shape::new(&[m, shape.last().unwrap()]).unwrap()).unwrap();
    let flat = b.g.cast(flat, DType::F64).unwrap();
    let y = b.op(Operation::Dot, &[flat, w]);
    let to = shape.with(shape.rank() - 1, b.g.shape(w)[1]);
    b.g.reshape(y, to).unwrap()
}

/// Few rows and many, both ways, dense and strided; parts of weights and their ends.
fn quantised_products(format: BlockFormat, dtype: DType) -> Task {
    let dims = if format.block_len() == 32 { [300, 64] } else { [21, 512] };
    // Sums of some hundred products: their factors may be rounded to bf16.
    let tolerance = if dtype == DType::F64 { 1e-9 } else { 6e-2 };
    quantised(format!("{dtype} times {format:?}"), (format, dims), tolerance, |b, blocks, w| {
        let [rows, cols] = dims;
        let mut outputs = Vec::new();
        for m in [1, 3, 8, 11] {
            let x = b.small(dtype, &[m, cols], format);
            outputs.push(product(b, blocks, dims, false, x, w));
            let x = b.small(dtype, &[rows, m], format);
            let x = b.g.permute(x, &[1, 0]).unwrap();
            outputs.push(product(b, blocks, dims, true, x, w));
        }
        let x = b.small(dtype, &[2, cols, 5], format);
        let x = b.g.permute(x, &[0, 2, 1]).unwrap();
        outputs.push(product(b, blocks, dims, false, x, w));
        let few = b.op(Operation::Slice { dim: 1, start: 1, len: 2, step: 2 }, &[x]);
        outputs.push(product(b, blocks, dims, false, few, w));
        outputs
    })
}

/// A product of few rows rounds neither factor.
fn exact_product(format: BlockFormat) -> Task {
    quantised(format!("{format:?} exactly"), (format, [6, 512]), 2e-5, |b, blocks, w| {
        let x = b.input(DType::F32, &[2, 512]);
        let dense = match blocks {
            Some(format) => b.op(Operation::Dequantize { format, rows: 6, cols: 512 }, &[w]),
            None => w,
        };
        vec![product(b, blocks, [6, 512], false, x, w), dense]
    })
}

fn quantised_losses(format: BlockFormat, dtype: DType) -> Task {
    let [v, d] = if format.block_len() == 32 { [300, 64] } else { [300, 256] };
    quantised(format!("losses of {dtype} by {format:?}"), (format, [v, d]), 6e-2, |b, blocks, w| {
        let n = 66;
        let mut x = b.small(dtype, &[n, d], format);
        if blocks.is_none() {
            x = b.g.cast(x, DType::F64).unwrap();
        }
        let labels = b.index(DType::U32, &[n], v);
        let attrs = CrossEntropyAttrs { blocks, ..attrs(Some(7), 0.1) };
        let forward = b.composite(Composite::LinearCrossEntropy(attrs), &[x, w, labels]);
        vec![forward, b.composite(Composite::LinearCrossEntropyGradX(attrs), &[x, w, labels])]
    })
}

fn all_losses() -> Vec<Task> {
    let kinds = [(None, 0.0), (Some(-100), 0.1)];
    let dense = FLOATS.into_iter().flat_map(|dtype| kinds.map(|(i, s)| losses(dtype, i, s)));
    let blocks = [BlockFormat::Q4_1, BlockFormat::Q6K]
        .into_iter()
        .flat_map(|format| FLOATS.map(|dtype| quantised_losses(format, dtype)));
    dense.chain(blocks).collect()
}

#[test]
fn losses_after_a_linear_layer_equal_the_oracle() {
    check_all("losses", &all_losses());
}

fn all_quantised() -> Vec<Task> {
    let exact = BlockFormat::ALL.map(exact_product);
    let of_dtypes = FLOATS.map(|dtype| quantised_products(BlockFormat::Q8_0, dtype));
    let of_formats = BlockFormat::ALL.map(|format| quantised_products(format, DType::F32));
    let long = FLOATS.map(|dtype| quantised_products(BlockFormat::Q4K, dtype));
    exact.into_iter().chain(of_dtypes).chain(of_formats).chain(long).collect()
}

#[test]
fn products_with_blocks_equal_those_with_what_they_mean() {
    check_all("blocks", &all_quantised());
}

/// A product, onto an addend or not, of few rows or many; of a weight either way round, and batched.
fn products(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    let [k, n] = [136, 200];
    let by_rows = b.input(dtype, &[k, n]);
    let by_columns = b.input(dtype, &[n, k]);
    let by_columns = b.g.transpose(by_columns).unwrap();
    let wider = b.input(dtype, &[k, n + 64]);
    let part = b.op(Operation::Slice { dim: 1, start: 8, len: n, step: 1 }, &[wider]);
    let ragged = b.input(dtype, &[k, n + 3]);
    let of_batch = b.input(dtype, &[2, k, n]);
    let scaled =
        |b: &mut Build, x: NodeId| b.g.binary_scalar(BinaryOp::Mul, x, 1.0 / 64.0).unwrap();
    for w in [by_rows, by_columns, part, ragged] {
        for m in [1, 3, 4, 5] {
            let x = b.input(dtype, &[m, k]);
            let y = b.op(Operation::Dot, &[x, w]);
            outputs.push(scaled(&mut b, y));
            let x = b.input(dtype, &[k, m]);
            let x = b.g.transpose(x).unwrap();
            let z = b.op(Operation::Dot, &[x, w]);
            let z = scaled(&mut b, z);
            // As LoRA: onto another product.
            let (low, high) = (b.input(dtype, &[m, 8]), b.g.shape(w)[1]);
            let high = b.input(dtype, &[8, high]);
            let low = b.op(Operation::Dot, &[low, high]);
            let sum = b.g.binary(BinaryOp::Add, low, z).unwrap();
            outputs.push(scaled(&mut b, sum));
        }
    }
    // Few long columns, each for several groups.
    for [k, n, m] in [[1064, 3, 1], [1024, 4, 4], [2184, 2, 3]] {
        let (x, w) = (b.input(dtype, &[m, k]), b.input(dtype, &[n, k]));
        let w = b.g.transpose(w).unwrap();
        let y = b.op(Operation::Dot, &[x, w]);
        outputs.push(scaled(&mut b, y));
    }
    // Where a concatenation wants them, of few rows and of many.
    for m in [3, 70] {
        let right = [by_rows, by_columns, ragged];
        let mut part = |w| {
            let x = b.input(dtype, &[m, k]);
            let y = b.op(Operation::Dot, &[x, w]);
            scaled(&mut b, y)
        };
        let (columns, rows) = (right.map(&mut part), [by_rows, by_columns].map(&mut part));
        outputs.push(b.g.concat(1, &columns).unwrap());
        let rows = rows.map(|part| b.g.transpose(part).unwrap());
        outputs.push(b.g.concat(0, &rows).unwrap());
    }
    let x = b.input(dtype, &[2, 1, k]);
    outputs.push(b.op(Operation::Dot, &[x, of_batch]));
    let every = b.g.broadcast_to(by_columns, Shape::new(&[2, k, n]).unwrap()).unwrap();
    outputs.push(b.op(Operation::Dot, &[x, every]));
    b.task(format!("products of {dtype}"), outputs, 2.0 * tolerance(dtype))
}

#[test]
fn products_equal_the_oracle() {
    check_all("products", &FLOATS.map(products));
}

/// Rows of a batch, what is summed over, and columns: whole tiles and parts of some, more and fewer tiles than can run.
const THIN: [[usize; 4]; 5] =
    [[1, 261, 8, 192], [2, 150, 48, 128], [1, 330, 24, 640], [1, 600, 16, 320], [3, 100, 64, 128]];

/// `x w`, `x w` onto what another product gave, and `x w` of a part of each row of a wider x.
fn thin_products(dtype: DType) -> Vec<Task> {
    let task = |[batch, rows, k, n]: [usize; 4]| {
        let mut b = Build::new();
        let mut outputs = Vec::new();
        let by_rows = b.input(dtype, &[k, n]);
        let by_columns = b.input(dtype, &[n, k]);
        let by_columns = b.g.transpose(by_columns).unwrap();
        let wider = b.input(dtype, &[batch, rows, k + 24]);
        let part = b.op(Operation::Slice { dim: 2, start: 16, len: k, step: 1 }, &[wider]);
        let x = b.input(dtype, &[batch, rows, k]);
        for w in [by_rows, by_columns] {
            let every = b.g.broadcast_to(w, Shape::new(&[batch, k, n]).unwrap()).unwrap();
            for x in [x, part] {
                let y = b.op(Operation::Dot, &[x, every]);
                outputs.push(b.g.binary_scalar(BinaryOp::Mul, y, 1.0 / 64.0).unwrap());
            }
            let (z, v) = (b.input(dtype, &[batch, rows, 40]), b.input(dtype, &[batch, 40, n]));
            let z = b.op(Operation::Dot, &[z, v]);
            let y = b.op(Operation::Dot, &[x, every]);
            let y = b.g.binary_scalar(BinaryOp::Mul, y, 0.25).unwrap();
            let sum = b.g.binary(BinaryOp::Add, z, y).unwrap();
            outputs.push(b.g.binary_scalar(BinaryOp::Mul, sum, 1.0 / 64.0).unwrap());
        }
        b.task(format!("{batch} x {rows} x {k} x {n} of {dtype}"), outputs, 4.0 * tolerance(dtype))
    };
    THIN.map(task).to_vec()
}

fn all_thin() -> Vec<Task> {
    [DType::BF16, DType::F16].into_iter().flat_map(thin_products).collect()
}

#[test]
fn thin_products_equal_the_oracle() {
    check_all("thin", &all_thin());
}

/// What [`thin_products`] is to try is what is rendered for it: a kernel, where there are tensor cores.
#[test]
fn thin_products_of_many_rows_are_a_kernel_on_tensor_cores() {
    use metal_candle_compiler::render::{Dialect, Limits, Part, call};
    use metal_candle_compiler::{Target, Work, plan};
    let limits = Limits::cuda(8, 2048);
    let kernels = |limits: &Limits, task: &Task| -> usize {
        let plan = plan(&task.graph, &Target::CUDA, &[]).unwrap();
        let calls = plan.steps.iter().filter_map(|step| match &step.work {
            Work::Call(work) => call(work, &step.args, &step.outs, Dialect::CUDA, limits).ok(),
            Work::Kernel(_) => None,
        });
        let is_thin = |part: &Part| matches!(part, Part::Kernel(source) if source.text.contains("thin::product"));
        calls.flat_map(|call| call.parts).filter(is_thin).count()
    };
    for task in all_thin() {
        assert_eq!(kernels(&limits, &task), 0, "{}", task.name);
        // All six; where three are one product for what they share, that is one of them.
        assert!(kernels(&limits.of_capability(9, 0), &task) >= 4, "{}", task.name);
    }
}

/// Rows in two dims, what is summed over, and columns: a tile, a part of one, several; more parts of a sum than there are lanes
/// for them, and fewer.
const SMALL: [[usize; 4]; 6] = [
    [1, 5, 136, 40],
    [3, 11, 100, 68],
    [1, 70, 512, 8],
    [2, 10, 7, 30],
    [1, 16, 4, 16],
    [1, 48, 65, 70],
];

/// Factors as they lie and transposed, with gaps and without; onto another product, and with a bias.
fn small_products(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    let scaled =
        |b: &mut Build, x: NodeId| b.g.binary_scalar(BinaryOp::Mul, x, 1.0 / 64.0).unwrap();
    for [batch, rows, k, n] in SMALL {
        let by_rows = b.input(dtype, &[k, n]);
        let by_columns = b.input(dtype, &[n, k]);
        let by_columns = b.g.transpose(by_columns).unwrap();
        let ragged = b.input(dtype, &[k, n + 3]);
        let ragged = b.op(Operation::Slice { dim: 1, start: 1, len: n, step: 1 }, &[ragged]);
        let bias = b.input(dtype, &[n]);
        for (turn, w) in [by_rows, by_columns, ragged].into_iter().enumerate() {
            let x = match turn {
                0 => b.input(dtype, &[batch, rows, k]),
                1 => {
                    let x = b.input(dtype, &[k, batch * rows]);
                    let x = b.g.transpose(x).unwrap();
                    b.g.reshape(x, Shape::new(&[batch, rows, k]).unwrap()).unwrap()
                }
                _ => {
                    let x = b.input(dtype, &[batch, rows, k + 5]);
                    b.op(Operation::Slice { dim: 2, start: 3, len: k, step: 1 }, &[x])
                }
            };
            let w = b.g.broadcast_to(w, Shape::new(&[batch, k, n]).unwrap()).unwrap();
            let y = b.op(Operation::Dot, &[x, w]);
            let y = scaled(&mut b, y);
            let (low, high) = (b.input(dtype, &[batch, rows, 4]), b.input(dtype, &[4, n]));
            let high = b.g.broadcast_to(high, Shape::new(&[batch, 4, n]).unwrap()).unwrap();
            let low = b.op(Operation::Dot, &[low, high]);
            let sum = b.g.binary(BinaryOp::Add, low, y).unwrap();
            let shape = b.g.shape(sum);
            let every = b.g.broadcast_to(bias, shape).unwrap();
            outputs.push(b.g.binary(BinaryOp::Add, sum, every).unwrap());
            let y = b.op(Operation::Dot, &[x, w]);
            outputs.push(b.g.binary_scalar(BinaryOp::Mul, y, 1.0 / 32.0).unwrap());
        }
    }
    b.task(format!("small products of {dtype}"), outputs, 4.0 * tolerance(dtype))
}

#[test]
fn small_products_equal_the_oracle() {
    check_all("small", &FLOATS.map(small_products));
}

/// `x w + bias` of few rows and of many, and the same with a LoRA branch; a bias that is a part of a vector; one of a product
/// that is scaled afterwards; what looks like one, and is added after the product.
fn biased(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    let [k, n] = [72, 128];
    let by_rows = b.input(dtype, &[k, n]);
    let by_columns = b.input(dtype, &[n, k]);
    let by_columns = b.g.transpose(by_columns).unwrap();
    let wider = b.input(dtype, &[n + 16]);
    let bias = b.input(dtype, &[n]);
    let part = b.op(Operation::Slice { dim: 0, start: 8, len: n, step: 1 }, &[wider]);
    let odd = b.op(Operation::Slice { dim: 0, start: 3, len: n, step: 1 }, &[wider]);
    let (down, up) = (b.input(dtype, &[k, 8]), b.input(dtype, &[8, n]));
    let plus = |b: &mut Build, x: NodeId, bias: NodeId| {
        let shape = b.g.shape(x);
        let every = b.g.broadcast_to(bias, shape).unwrap();
        b.g.binary(BinaryOp::Add, x, every).unwrap()
    };
    let scaled = |b: &mut Build, x: NodeId, by| b.g.binary_scalar(BinaryOp::Mul, x, by).unwrap();
    for (w, bias) in [(by_rows, bias), (by_columns, part), (by_columns, odd)] {
        for m in [1, 4, 270] {
            let x = b.input(dtype, &[m, k]);
            let y = b.op(Operation::Dot, &[x, w]);
            let y = scaled(&mut b, y, 1.0 / 64.0);
            let y = plus(&mut b, y, bias);
            outputs.push(scaled(&mut b, y, 0.5));
            let low = b.op(Operation::Dot, &[x, down]);
            let low = scaled(&mut b, low, 1.0 / 64.0);
            let high = b.op(Operation::Dot, &[low, up]);
            let base = b.op(Operation::Dot, &[x, w]);
            let base = scaled(&mut b, base, 1.0 / 64.0);
            let sum = b.g.binary(BinaryOp::Add, base, high).unwrap();
            outputs.push(plus(&mut b, sum, bias));
        }
    }
    let x = b.input(dtype, &[4, k]);
    let y = b.op(Operation::Dot, &[x, by_rows]);
    let y = scaled(&mut b, y, 1.0 / 64.0);
    let twice = plus(&mut b, y, bias);
    outputs.push(plus(&mut b, twice, part));
    let column = b.input(dtype, &[4, 1]);
    let y = b.op(Operation::Dot, &[x, by_columns]);
    let y = scaled(&mut b, y, 1.0 / 64.0);
    outputs.push(plus(&mut b, y, column));
    b.task(format!("products of {dtype} with a bias"), outputs, 4.0 * tolerance(dtype))
}

#[test]
fn products_with_a_bias_equal_the_oracle() {
    check_all("biased", &FLOATS.map(biased));
}

pub(super) fn all() -> Vec<Task> {
    let plain = [all_losses(), all_quantised(), FLOATS.map(products).to_vec(), all_thin()];
    [&plain.concat()[..], &FLOATS.map(biased), &FLOATS.map(small_products)].concat()
}
