//! Products: the library's, but for those of few rows, of [few tiles](super::small), and those that [sum over few](super::thin).

use super::draft::{BLOCK, Draft, Gpu};
use super::quant::vector;
use super::walk::Walk;
use super::{Call, Part, Place, Product, small, thin};
use crate::render::launch::SIMD;
use crate::render::{Binding, Launch, scalar};
use crate::{Layout, Operand};
use metal_candle_graph::DType;

/// Elements that a thread multiplies together.
const RUN: usize = 8;
const ACCESS: usize = 16;
/// Blocks of a multiprocessor: enough of them have enough on its way from memory.
const RESIDENT: usize = 4;

/// `args = [a: [.., m, k], b: [.., k, n]]`, and a bias `[n]` where there is one.
pub(super) fn gemm(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    alpha: f64,
    accumulate: bool,
) -> Call {
    let mut product = product(args, 0, out, alpha, accumulate);
    product.bias = args.get(2).map(|bias| place(Binding::Arg(2), bias));
    let part = few_rows(gpu, args, out, alpha, accumulate)
        .or_else(|| small::product(gpu, &product))
        .or_else(|| thin::product(gpu, &product))
        .unwrap_or(Part::Product(product));
    Call { parts: vec![part], workspace_bytes: 0 }
}

/// `args = [a_0, b_0, a_1, b_1, ..]`, one product after the other.
pub(super) fn sum(args: &[Operand], out: &Operand, alphas: &[f64], accumulate: bool) -> Call {
    let part = |(i, alpha): (usize, &f64)| {
        Part::Product(product(args, 2 * i, out, *alpha, accumulate || i > 0))
    };
    Call { parts: alphas.iter().enumerate().map(part).collect(), workspace_bytes: 0 }
}

/// Of the factors from the `first` on.
fn product(args: &[Operand], first: usize, out: &Operand, alpha: f64, accumulate: bool) -> Product {
    let [a, b] = [first, first + 1].map(|i| place(Binding::Arg(i as u32), &args[i]));
    Product { alpha, accumulate, a, b, bias: None, out: place(Binding::Out(0), out) }
}

fn place(binding: Binding, operand: &Operand) -> Place {
    Place { binding, dtype: operand.dtype, layout: operand.layout }
}

/// How the columns of a weight are read in wide accesses.
#[derive(Clone, Copy)]
enum Reads {
    /// Neighbours belong to one column.
    Columns,
    /// Neighbours belong to one row.
    Rows,
}

/// A kernel for few rows times one matrix, where that can be read in wide accesses.
fn few_rows(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    alpha: f64,
    accumulate: bool,
) -> Option<Part> {
    let (a, b, bias) = (&args[0], &args[1], args.get(2));
    let rank = out.layout.shape.rank();
    let [k, n] = [b.layout.shape[rank - 2], b.layout.shape[rank - 1]];
    let rows = out.layout.shape.len().checked_div(n)?;
    let same = a.dtype == b.dtype && b.dtype == out.dtype && b.dtype != DType::F64;
    let few = (1..=gpu.limits.few_rows).contains(&rows) && k > 0;
    if !(b.layout.is_one_matrix() && same && few && out.layout.strides[rank - 1] == 1) {
        return None;
    }
    let reads = reads(&b.layout, rank, ACCESS / b.dtype.size_bytes())?;
    let split = split(gpu, reads, k, n);
    let row_dims = out.layout.shape.with(rank - 1, 1);
    let x = Walk::over(row_dims.dims())
        .place("from", a.layout.strides(), a.layout.offset)
        .place("to", out.layout.strides(), out.layout.offset)
        .collapsed();
    let step = a.layout.strides[rank - 1];
    let (template, lines, stride) = match reads {
        Reads::Columns => ("times_columns", n, b.layout.strides[rank - 1]),
        Reads::Rows => ("times_rows", k, b.layout.strides[rank - 2]),
    };
    let weight = Walk::over(&[lines]).place("weight", &[stride], b.layout.offset);
    let vector = vector(&x, step, a.dtype);
    let beyond = weight.reach().max(k * step.unsigned_abs()) + k + n + 2 * BLOCK * RUN;
    let draft = Draft::new(gpu, "gemm", template)
        .asks_first(Binding::Arg(1))
        .template(rows)
        .reads(Binding::Arg(0), "x", a.dtype)
        .reads(Binding::Arg(1), "w", b.dtype)
        .reads_if(bias.map(|_| Binding::Arg(2)), "bias", b.dtype)
        .writes(Binding::Out(0), "out", out.dtype)
        .numbers(b.dtype)
        .aligned(ACCESS)
        .constant("COLS", n as i64)
        .constant("INNER", k as i64)
        .constant("SPLIT", split as i64)
        .constant("STEP", step as i64)
        .constant("VECTOR", vector as i64)
        .constant("ACCUMULATE", i64::from(accumulate))
        .constant("BIAS", bias.map_or(0, |bias| bias.layout.offset as i64))
        .function("A", "alpha", &format!("{alpha:?}"))
        .walk(&x, beyond)
        .places(&weight);
    Some(draft.finish(launch(gpu, reads, n, split, b.dtype)))
}

/// Whether accesses of `wide` elements cover the weight, and along what.
fn reads(b: &Layout, rank: usize, wide: usize) -> Option<Reads> {
    let multiple = |x: isize| x.unsigned_abs().is_multiple_of(wide);
    let [k, n] = [rank - 2, rank - 1];
    if !multiple(b.offset) {
        None
    } else if b.strides[k] == 1 && b.shape[k].is_multiple_of(RUN) && multiple(b.strides[n]) {
        Some(Reads::Columns)
    } else if b.strides[n] == 1 && b.shape[n].is_multiple_of(wide) && multiple(b.strides[k]) {
        Some(Reads::Rows)
    } else {
        None
    }
}

/// How many SIMD groups share a column: more than one where that leaves half of the device idle, and its runs are enough for
/// all of their lanes.
fn split(gpu: Gpu<'_>, reads: Reads, k: usize, n: usize) -> usize {
    let groups = gpu.limits.resident_threads / SIMD;
    let fits = |split: &usize| k >= 2 * split * SIMD * RUN && n * split <= groups / 2;
    match reads {
        Reads::Columns => [4, 2].into_iter().find(fits).unwrap_or(1),
        Reads::Rows => 1,
    }
}

fn launch(gpu: Gpu<'_>, reads: Reads, n: usize, split: usize, dtype: DType) -> Launch {
    match reads {
        Reads::Columns => {
            let groups = BLOCK / SIMD;
            let columns = groups / split;
            let shared_bytes = groups * scalar::register_bytes(dtype);
            Launch {
                resident: RESIDENT,
                ..gpu.block_rows(n.div_ceil(columns), BLOCK, shared_bytes)
            }
        }
        Reads::Rows => {
            let (block, width) = (2 * BLOCK, 8 * ACCESS / dtype.size_bytes());
            gpu.block_rows(n.div_ceil(width), block, block / 32 * width * size_of::<f32>())
        }
    }
}
