//! Every library call in every dtype, on operands laid out in every way, and on the sizes that its kernels treat
//! differently.

use crate::plans::{Outcome, Renderer, Task, check};
use crate::random::Rng;
use crate::{DIALECTS, refused};
use metal_candle_compiler::render::{Dialect, Limits, RenderError, Status};
use metal_candle_graph::composite::{CrossEntropyAttrs, RopeLayout};
use metal_candle_graph::oracle::{self, Value};
use metal_candle_graph::{
    ArgReduceOp, BinaryOp, BlockFormat, Composite, ComputationGraph, DType, Error, NodeId,
    Operation, Scalar, Shape, TensorType,
};

const FLOATS: [DType; 4] = [DType::BF16, DType::F16, DType::F32, DType::F64];

/// So little room that rows, classes and weights come in several parts.
fn dialects() -> impl Iterator<Item = (&'static Dialect, Limits)> {
    DIALECTS
        .map(|(_, dialect, limits)| (dialect, Limits { workspace_bytes: 4 << 10, ..limits }))
        .into_iter()
}

/// A graph, and values for its inputs.
struct Build {
    g: ComputationGraph,
    inputs: Vec<Value>,
    rng: Rng,
}

impl Build {
    fn new() -> Build {
        Build { g: ComputationGraph::new(), inputs: Vec::new(), rng: Rng(5) }
    }

    fn given(&mut self, dtype: DType, dims: &[usize], data: Vec<f64>) -> NodeId {
        let ty = TensorType::new(dtype, Shape::new(dims).unwrap());
        assert_eq!(data.len(), ty.shape.len());
        self.inputs.push(Value { ty, data });
        self.g.input(self.inputs.len() as u32 - 1, ty)
    }

    /// Eighths, or small whole numbers.
    fn input(&mut self, dtype: DType, dims: &[usize]) -> NodeId {
        let len = dims.iter().product();
        let rng = &mut self.rng;
        let draw = |_| match dtype.is_float() {
            true => (rng.below(33) as f64 - 16.0) / 8.0,
            false => rng.below(6) as f64,
        };
        let data = (0..len).map(draw).collect();
        self.given(dtype, dims, data)
    }

    /// The same, so much smaller that a product with weights of large scales is no large number.
    fn small(&mut self, dtype: DType, dims: &[usize], format: BlockFormat) -> NodeId {
        let id = self.input(dtype, dims);
        if format.block_len() == 256 {
            let value = self.inputs.last_mut().unwrap();
            value.data.iter_mut().for_each(|x| *x /= 64.0);
        }
        id
    }

    fn index(&mut self, dtype: DType, dims: &[usize], below: usize) -> NodeId {
        let data = (0..dims.iter().product()).map(|_| self.rng.below(below) as f64).collect();
        self.given(dtype, dims, data)
    }

    fn start(&mut self, at: usize) -> NodeId {
        self.given(DType::I64, &[], vec![at as f64])
    }

    fn op(&mut self, op: Operation, inputs: &[NodeId]) -> NodeId {
        self.g.add(op, inputs).unwrap()
    }

    fn composite(&mut self, composite: Composite, inputs: &[NodeId]) -> NodeId {
        self.op(Operation::Composite(composite), inputs)
    }

    fn task(mut self, name: String, outputs: Vec<NodeId>, tolerance: f64) -> Task {
        self.g.outputs = outputs;
        let want = oracle::evaluate(&self.g, &self.inputs).unwrap();
        self.expecting(name, want, tolerance)
    }

    fn expecting(self, name: String, want: Vec<Value>, tolerance: f64) -> Task {
        let tolerances = vec![tolerance; want.len()];
        let donated = vec![false; self.inputs.len()];
        Task { name, graph: self.g, inputs: self.inputs, donated, want, tolerances }
    }
}

/// A few roundings.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::BF16 => 1.6e-2,
        DType::F16 => 2e-3,
        DType::F32 => 2e-5,
        _ => 1e-12,
    }
}

#[track_caller]
fn check_all(name: &str, tasks: &[Task]) {
    for (dialect, limits) in dialects() {
        check(name, dialect, limits, tasks, refused);
    }
}

/// x itself, and views that end in the same shape `[6, 40, 32]`: permuted, sliced, broadcast, flipped.
fn views(b: &mut Build, dtype: DType) -> Vec<NodeId> {
    let x = b.input(dtype, &[6, 40, 32]);
    let y = b.input(dtype, &[40, 32, 6]);
    let permuted = b.g.permute(y, &[2, 0, 1]).unwrap();
    let z = b.input(dtype, &[6, 44, 40]);
    let sliced = b.op(Operation::Slice { dim: 1, start: 4, len: 40, step: 1 }, &[z]);
    let sliced = b.op(Operation::Slice { dim: 2, start: 8, len: 32, step: 1 }, &[sliced]);
    let one = b.input(dtype, &[1, 40, 1]);
    let broadcast = b.g.broadcast_to(one, Shape::new(&[6, 40, 32]).unwrap()).unwrap();
    let flipped = b.op(Operation::Flip { dim: 1 }, &[x]);
    let all = vec![x, permuted, sliced, broadcast, flipped];
    // The others differ in their type alone.
    let few = matches!(dtype, DType::U32 | DType::F16 | DType::F64);
    all.into_iter().take(if few { 2 } else { 5 }).collect()
}

fn taken(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    let views = views(&mut b, dtype);
    for (x, of_index) in
        views.into_iter().zip([DType::I64, DType::U32, DType::U8].into_iter().cycle())
    {
        for dim in 0..3 {
            let extent = b.g.shape(x)[dim];
            let at = b.index(of_index, &[7], extent);
            outputs.push(b.op(Operation::IndexSelect { dim }, &[x, at]));
            let mut dims = [5, 30, 9];
            dims[dim] = 4;
            let at = b.index(of_index, &dims, extent);
            outputs.push(b.op(Operation::Gather { dim }, &[x, at]));
            let at = b.start(extent / 2 - 1);
            outputs.push(b.op(Operation::DynamicSlice { dim, len: extent / 2 }, &[x, at]));
        }
    }
    b.task(format!("taken from {dtype}"), outputs, 0.0)
}

fn put(dtype: DType) -> Vec<Task> {
    let task = |dim: usize, donated: bool| {
        let mut b = Build::new();
        let x = b.input(dtype, &[6, 40, 32]);
        let views = views(&mut b, dtype);
        let mut outputs = Vec::new();
        for (i, view) in views.into_iter().enumerate() {
            let (len, at) = ([2, 24, 16][dim], [1, 8, 8 + i][dim]);
            let update = b.op(Operation::Slice { dim, start: 0, len, step: 1 }, &[view]);
            let at = b.start(at);
            outputs.push(b.op(Operation::SliceUpdate { dim }, &[x, update, at]));
            if donated {
                break;
            }
        }
        let mut task = b.task(format!("{dtype} put along {dim}"), outputs, 0.0);
        task.donated[0] = donated;
        task
    };
    (0..3).flat_map(|dim| [task(dim, false), task(dim, true)]).collect()
}

fn added(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    for (x, of_index) in views(&mut b, dtype)
        .into_iter()
        .zip([DType::I64, DType::U32, DType::U8].into_iter().cycle())
    {
        for dim in 0..3 {
            // So few places that most are added to several times.
            let mut dims = [6, 40, 32];
            dims[dim] = 5;
            let base = b.input(dtype, &dims);
            let at = b.index(of_index, &[[6, 40, 32][dim]], 5);
            outputs.push(b.op(Operation::IndexAdd { dim }, &[base, at, x]));
            let at = b.index(of_index, &[6, 40, 32], 5);
            outputs.push(b.op(Operation::ScatterAdd { dim }, &[base, at, x]));
        }
    }
    b.task(format!("added to {dtype}"), outputs, tolerance(dtype))
}

fn along(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    let mut all = views(&mut b, dtype);
    all.extend(
        [[3, 5, 700], [2, 600, 9], [300, 2, 9], [1, 2, 5000], [1, 400, 300]]
            .map(|dims| b.input(dtype, &dims)),
    );
    if dtype.is_float() {
        // NaN comes before everything, the first one of several.
        let mut data: Vec<f64> = (0..2 * 600).map(|i| f64::from(i % 7)).collect();
        for at in [5, 400, 599, 650] {
            data[at] = f64::NAN;
        }
        all.push(b.given(dtype, &[2, 1, 600], data));
    }
    for (i, x) in all.into_iter().enumerate() {
        for dim in 0..3 {
            let op = [ArgReduceOp::ArgMax, ArgReduceOp::ArgMin][(i + dim) % 2];
            outputs.push(b.op(Operation::ArgReduce { op, dim }, &[x]));
            // The oracle adds up every prefix.
            if b.g.shape(x).len() < 12_000 {
                let reverse = (i + dim) % 3 == 0;
                outputs.push(b.op(Operation::CumSum { dim, reverse }, &[x]));
            }
        }
    }
    b.task(format!("along {dtype}"), outputs, tolerance(dtype))
}

fn turned(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for d in [64, 6] {
            let x = b.input(dtype, &[2, 5, 3, d]);
            let heads_first = b.g.permute(x, &[0, 2, 1, 3]).unwrap();
            for of_table in [dtype, DType::F32] {
                let mut table = |dims: &[usize], to: &[usize]| {
                    let table = b.input(of_table, dims);
                    b.g.broadcast_to(table, Shape::new(to).unwrap()).unwrap()
                };
                let half = d / 2;
                let [cos, sin] = [(); 2].map(|()| table(&[5, 1, half], &[2, 5, 3, half]));
                let [cos_of_heads, sin_of_heads] =
                    [(); 2].map(|()| table(&[5, half], &[2, 3, 5, half]));
                outputs.push(b.composite(Composite::Rope { layout }, &[x, cos, sin]));
                let inputs = [heads_first, cos_of_heads, sin_of_heads];
                outputs.push(b.composite(Composite::Rope { layout }, &inputs));
            }
        }
    }
    b.task(format!("rope of {dtype}"), outputs, 2.0 * tolerance(dtype))
}

fn moves_and_sums() -> Vec<Task> {
    let of = |dtype: DType| {
        let mut tasks = put(dtype);
        tasks.extend([taken(dtype), added(dtype), along(dtype)]);
        tasks.extend(dtype.is_float().then(|| turned(dtype)));
        tasks
    };
    DType::ALL.into_iter().flat_map(of).collect()
}

#[test]
fn calls_that_move_and_sum_equal_the_oracle() {
    check_all("calls", &moves_and_sums());
}

/// Calls of which one extent, or the number of rows, is 0.
fn empty() -> Task {
    let mut b = Build::new();
    let dtype = DType::F32;
    let (x, none) = (b.input(dtype, &[4, 6]), b.input(dtype, &[0, 6]));
    let no_index = b.index(DType::I64, &[0], 1);
    let index = b.index(DType::I64, &[3], 4);
    let no_columns = b.input(dtype, &[4, 0]);
    let added = b.input(dtype, &[0, 6]);
    let start = b.start(2);
    let table = b.input(dtype, &[0, 3]);
    let classes = b.input(dtype, &[5, 6]);
    let outputs = vec![
        b.op(Operation::IndexSelect { dim: 0 }, &[x, no_index]),
        b.op(Operation::IndexSelect { dim: 0 }, &[no_columns, index]),
        b.op(Operation::IndexAdd { dim: 0 }, &[x, no_index, added]),
        b.op(Operation::SliceUpdate { dim: 0 }, &[x, added, start]),
        b.op(Operation::DynamicSlice { dim: 0, len: 0 }, &[x, start]),
        b.op(Operation::CumSum { dim: 0, reverse: false }, &[none]),
        b.op(Operation::CumSum { dim: 1, reverse: false }, &[none]),
        b.op(Operation::ArgReduce { op: ArgReduceOp::ArgMax, dim: 1 }, &[none]),
        b.composite(Composite::Rope { layout: RopeLayout::Half }, &[none, table, table]),
        b.composite(Composite::LinearCrossEntropy(attrs(None, 0.1)), &[none, classes, no_index]),
        b.composite(
            Composite::LinearCrossEntropyGradX(attrs(None, 0.1)),
            &[none, classes, no_index],
        ),
    ];
    b.task("of nothing".into(), outputs, 0.0)
}

#[test]
fn calls_of_nothing_do_nothing() {
    check_all("empty", &[empty()]);
}

// ---- products ----

fn attrs(ignore_index: Option<i64>, smoothing: f64) -> CrossEntropyAttrs {
    let label_smoothing = Scalar::from_f64(DType::F64, smoothing);
    CrossEntropyAttrs { ignore_index, label_smoothing, blocks: None }
}

/// Losses and gradients of 150 rows and 300 classes: several chunks of either, with and without ragged ends.
fn losses(dtype: DType, ignore_index: Option<i64>, smoothing: f64) -> Task {
    let mut b = Build::new();
    let [n, v, d] = [150, 300, 16];
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
    let mut rest = &include_bytes!("blocks.bin")[..];
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
    let dims = if format.block_len() == 32 { [300, 64] } else { [20, 512] };
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
        let n = 70;
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

/// All of the above, to be compiled elsewhere.
pub(crate) fn every() -> Vec<Task> {
    let products = FLOATS.map(products);
    [moves_and_sums(), all_losses(), all_quantised()]
        .into_iter()
        .flatten()
        .chain(products)
        .collect()
}

// ---- bad indices ----

/// Graphs with one bad index each, and the error of it.
fn bad() -> Vec<(Build, Error)> {
    let index_of = |dtype: DType, bad: f64| {
        move |b: &mut Build, n: usize| {
            let data = (0..n).map(|i| if i == n - 2 { bad } else { (i % 3) as f64 }).collect();
            b.given(dtype, &[n], data)
        }
    };
    let mut all = Vec::new();
    let x = |b: &mut Build, dims: &[usize]| b.input(DType::F32, dims);
    for index in [index_of(DType::I64, -1.0), index_of(DType::U32, 7.0), index_of(DType::U8, 250.0)]
    {
        let ops: [fn(&mut Build, NodeId, NodeId, NodeId) -> NodeId; 4] = [
            |b, x, _, at| b.op(Operation::IndexSelect { dim: 0 }, &[x, at]),
            |b, x, y, at| b.op(Operation::IndexAdd { dim: 0 }, &[x, at, y]),
            |b, x, _, at| {
                let at = b.g.reshape(at, Shape::new(&[5, 1]).unwrap()).unwrap();
                b.op(Operation::Gather { dim: 0 }, &[x, at])
            },
            |b, x, y, at| {
                let at = b.g.reshape(at, Shape::new(&[5, 1]).unwrap()).unwrap();
                let at = b.g.broadcast_to(at, Shape::new(&[5, 1]).unwrap()).unwrap();
                let y = b.op(Operation::Slice { dim: 1, start: 0, len: 1, step: 1 }, &[y]);
                b.op(Operation::ScatterAdd { dim: 0 }, &[x, at, y])
            },
        ];
        for op in ops {
            let mut b = Build::new();
            let (x, y) = (x(&mut b, &[7, 4]), x(&mut b, &[5, 4]));
            let at = index(&mut b, 5);
            b.g.outputs = vec![op(&mut b, x, y, at)];
            let error = oracle::evaluate(&b.g, &b.inputs).expect_err("a bad index");
            all.push((b, error));
        }
    }
    for start in [-1.0, 4.0, f64::from(i32::MAX)] {
        let mut b = Build::new();
        let (x, update) = (x(&mut b, &[7, 4]), x(&mut b, &[4, 4]));
        let at = b.given(DType::I64, &[], vec![start]);
        let mut other = Build { g: b.g.clone(), inputs: b.inputs.clone(), rng: b.rng.clone() };
        b.g.outputs = vec![b.op(Operation::SliceUpdate { dim: 0 }, &[x, update, at])];
        other.g.outputs = vec![other.op(Operation::DynamicSlice { dim: 0, len: 4 }, &[x, at])];
        for b in [b, other] {
            let error = oracle::evaluate(&b.g, &b.inputs).expect_err("a bad start");
            all.push((b, error));
        }
    }
    let op = "linear_cross_entropy";
    for label in [5.0, -2.0] {
        let mut b = Build::new();
        let (x, w) = (x(&mut b, &[3, 4]), x(&mut b, &[5, 4]));
        let labels = b.given(DType::I64, &[3], vec![-100.0, label, 4.0]);
        let loss = Composite::LinearCrossEntropy(attrs(Some(-100), 0.0));
        b.g.outputs = vec![b.composite(loss, &[x, w, labels])];
        all.push((b, Error::IndexOutOfRange { op, index: label as i64, extent: 5, position: 1 }));
    }
    all
}

#[test]
fn a_bad_index_is_reported_and_goes_nowhere() {
    let all = bad();
    for (dialect, limits) in dialects() {
        let mut renderer = Renderer::new(dialect, limits);
        let plan = |(b, _): &(Build, Error)| renderer.plan(&b.g, &[]).unwrap();
        let rendered: Vec<_> = all.iter().map(plan).collect();
        let runs: Vec<_> =
            rendered.into_iter().zip(all.iter().map(|(b, _)| &b.inputs[..])).collect();
        for (Outcome { status, .. }, (b, expected)) in renderer.run("bad", &runs).iter().zip(&all) {
            let Status { index, extent, position, .. } = *status;
            let Some(op) = status.operation() else { panic!("no error in\n{}", b.g) };
            let (extent, position) = (extent as usize, position as usize);
            assert_eq!(
                Error::IndexOutOfRange { op, index, extent, position },
                *expected,
                "{}",
                b.g
            );
        }
    }
}

#[test]
fn f64_is_refused_by_metal() {
    let mut b = Build::new();
    let x = b.input(DType::F64, &[4]);
    b.g.outputs = vec![b.op(Operation::CumSum { dim: 0, reverse: false }, &[x])];
    let error = Renderer::new(Dialect::METAL, Limits::metal(8)).plan(&b.g, &[]).err();
    assert_eq!(error, Some(RenderError::DType { language: "Metal", dtype: DType::F64 }));
}
