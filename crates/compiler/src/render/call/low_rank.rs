//! A LoRA branch as one kernel.

use super::Call;
use super::draft::{BLOCK, Draft, Gpu};
use super::walk::Walk;
use crate::Operand;
use crate::render::{Binding, scalar};

/// The most rows of a block: each gives a thread one more sum to keep in a register.
const ROWS: usize = 16;
/// The fewest, where there are enough: what is read of a and b serves all of them.
const FEW_ROWS: usize = 4;
const GROUPS: usize = BLOCK / 32;

/// `args = [x: [.., m, k], a: [.., k, r], b: [.., r, n]]`; `outs = [out: [.., m, n]]`, and `low: [.., m, r]`.
pub(super) fn low_rank(
    gpu: Gpu<'_>,
    args: &[Operand],
    outs: &[Operand],
    [low_scale, scale]: [f64; 2],
) -> Call {
    let ([x, a, b], out, low) = ([&args[0], &args[1], &args[2]], &outs[0], outs.get(1));
    let col = x.layout.shape.rank() - 1;
    let (depth, rank, cols) = (x.layout.shape[col], a.layout.shape[col], out.layout.shape[col]);
    let row_of =
        |walk: Walk, name, o: &Operand| walk.place(name, o.layout.strides(), o.layout.offset);
    let walk = Walk::over(x.layout.shape.with(col, 1).dims());
    let walk = row_of(row_of(walk, "x_row", x), "out_row", out);
    let walk = row_of(walk, "low_row", low.unwrap_or(out)).collapsed();
    let rows = rows_of_block(gpu, walk.len());
    let shared_bytes = rows.max(GROUPS) * rank * scalar::register_bytes(x.dtype);
    let [[_, x_col], [a_row, a_col], [b_row, b_col]] = [x, a, b].map(steps);
    let dense = outs.iter().all(|o| o.layout.strides[col] == 1);
    assert!(dense, "metal-candle bug: results of a LoRA branch are rows");
    let reach = [(x, [1, depth]), (a, [depth, rank]), (b, [rank, cols]), (out, [1, cols])];
    let beyond = reach.into_iter().map(|(o, extents)| reach_of(o, extents)).max();
    let template = if low.is_some() { "low_rank_kept" } else { "low_rank" };
    let mut draft = Draft::new(gpu, "low_rank", template)
        .reads(Binding::Arg(0), "x", x.dtype)
        .reads(Binding::Arg(1), "a", a.dtype)
        .reads(Binding::Arg(2), "b", b.dtype)
        .writes(Binding::Out(0), "out", out.dtype);
    if let Some(low) = low {
        draft = draft.writes(Binding::Out(1), "low", low.dtype);
    }
    let draft = draft
        .numbers(x.dtype)
        .function(scalar::register_type(x.dtype), "low_scale", &format!("{low_scale:?}"))
        .function(scalar::register_type(x.dtype), "scale", &format!("{scale:?}"))
        .constant("ROWS", rows as i64)
        .constant("RANK", rank as i64)
        .constant("DEPTH", depth as i64)
        .constant("COLS", cols as i64)
        .constant("KEEPS", i64::from(low.is_some()))
        .constant("X_COL", x_col)
        .constant("A_START", a.layout.offset as i64)
        .constant("A_ROW", a_row)
        .constant("A_COL", a_col)
        .constant("B_START", b.layout.offset as i64)
        .constant("B_ROW", b_row)
        .constant("B_COL", b_col)
        .walk(&walk, beyond.unwrap_or(0) + BLOCK + rows);
    let tiles = if cols == 0 && low.is_none() { 0 } else { walk.len().div_ceil(rows) };
    let launch = gpu.block_rows(tiles, BLOCK, shared_bytes);
    Call { parts: vec![draft.finish(launch)], workspace_bytes: 0 }
}

/// A power of two: as many as there are, but that all of the device has work.
fn rows_of_block(gpu: Gpu<'_>, rows: usize) -> usize {
    let mut of_block = rows.max(1).next_power_of_two().min(ROWS);
    while of_block > FEW_ROWS && rows.div_ceil(of_block) < gpu.limits.resident_threads / BLOCK {
        of_block /= 2;
    }
    of_block
}

/// From row to row and from column to column.
fn steps(o: &Operand) -> [i64; 2] {
    let rank = o.layout.shape.rank();
    [rank - 2, rank - 1].map(|dim| o.layout.strides[dim] as i64)
}

/// The largest number that a place in a matrix of these extents is made of.
fn reach_of(o: &Operand, extents: [usize; 2]) -> usize {
    let of_dims = extents.into_iter().zip(steps(o));
    let reach = of_dims.map(|(extent, step)| extent.saturating_mul(step.unsigned_abs() as usize));
    reach.fold(o.layout.offset.unsigned_abs(), usize::saturating_add)
}
