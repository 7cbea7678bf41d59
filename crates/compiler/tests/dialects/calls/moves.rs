//! What moves, adds and turns elements.

use super::{Build, attrs, check_all, tolerance};
use crate::plans::Task;
use metal_candle_graph::composite::RopeLayout;
use metal_candle_graph::{ArgReduceOp, Composite, DType, NodeId, Operation, Shape};

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
    let views = all.len();
    let mut sizes = vec![[3, 5, 700], [300, 2, 9]];
    if views > 2 {
        sizes.extend([[2, 600, 9], [1, 2, 5000], [1, 400, 300], [1, 2, 20_011]]);
    }
    all.extend(sizes.iter().map(|dims| b.input(dtype, dims)));
    if dtype.is_float() {
        // NaN comes before everything, the first one of several.
        let mut data: Vec<f64> = (0..2 * 600).map(|i| f64::from(i % 7)).collect();
        for at in [5, 400, 599, 650] {
            data[at] = f64::NAN;
        }
        all.push(b.given(dtype, &[2, 1, 600], data));
    }
    for (i, x) in all.into_iter().enumerate() {
        let dims = if i < views { i % 3..i % 3 + 1 } else { 0..3 };
        for dim in dims {
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

/// Keys on their way to a cache: heads after positions, and before.
fn turned_into(dtype: DType) -> Task {
    let mut b = Build::new();
    let mut outputs = Vec::new();
    for layout in [RopeLayout::Half, RopeLayout::Interleaved] {
        for (d, dim) in [(64, 1), (64, 2), (6, 1)] {
            let (mut dims, mut rows) = ([2, 3, 3, d], [1; 4]);
            (dims[dim], rows[dim], rows[3]) = (5, 5, d / 2);
            let x = b.input(dtype, &dims);
            let to = Shape::new(&[dims[0], dims[1], dims[2], d / 2]).unwrap();
            let tables = [(); 2].map(|()| b.input(DType::F32, &rows));
            let [cos, sin] = tables.map(|table| b.g.broadcast_to(table, to).unwrap());
            let rotated = b.composite(Composite::Rope { layout }, &[x, cos, sin]);
            dims[dim] = 9;
            let cache = b.input(dtype, &dims);
            let at = b.start(3);
            outputs.push(b.op(Operation::SliceUpdate { dim }, &[cache, rotated, at]));
        }
    }
    b.task(format!("rope of {dtype} into a slice"), outputs, 2.0 * tolerance(dtype))
}

pub(super) fn all() -> Vec<Task> {
    let of = |dtype: DType| {
        let mut tasks = put(dtype);
        tasks.extend([taken(dtype), added(dtype), along(dtype)]);
        if dtype.is_float() {
            tasks.extend([turned(dtype), turned_into(dtype)]);
        }
        tasks
    };
    DType::ALL.into_iter().flat_map(of).collect()
}

#[test]
fn calls_that_move_and_sum_equal_the_oracle() {
    check_all("calls", &all());
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
