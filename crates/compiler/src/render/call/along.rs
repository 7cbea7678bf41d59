//! Running sums and extremes along a dim.

use super::Call;
use super::draft::{BLOCK, Draft, Gpu};
use super::walk::Walk;
use crate::Operand;
use crate::render::launch::SIMD;
use crate::render::{Binding, scalar};
use metal_candle_graph::ArgReduceOp;

/// The shortest line that a block shares.
const BLOCK_LINE: usize = 256;
/// The longest line that a thread walks by itself, where a SIMD group could.
const THREAD_LINE: usize = 16;
/// The longest line of a SIMD group.
const SIMD_LINE: usize = 4096;
/// Threads of a longer one: often there is a single line, of a vocabulary.
const WIDE_BLOCK: usize = 4 * BLOCK;
/// An element and its place, as SIMD groups hand them on.
const PARTIAL_BYTES: usize = 16;

/// The lines of `x` along `dim`: where each starts in the operands.
fn lines(operands: &[(&'static str, &Operand)], dim: usize) -> Walk {
    let shape = operands[0].1.layout.shape.with(dim, 1);
    let place = |walk: Walk, (name, o): &(&'static str, &Operand)| {
        walk.place(name, o.layout.strides(), o.layout.offset)
    };
    operands.iter().fold(Walk::over(shape.dims()), place).collapsed()
}

/// `args = [x]`
pub(super) fn cumsum(gpu: Gpu<'_>, x: &Operand, out: &Operand, dim: usize, reverse: bool) -> Call {
    let extent = x.layout.shape[dim];
    let lines = lines(&[("from", x), ("to", out)], dim);
    let wide = extent >= BLOCK_LINE;
    let launch = match wide {
        true => gpu.block_rows(lines.len(), BLOCK, BLOCK * scalar::register_bytes(x.dtype)),
        false => gpu.elements(if extent == 0 { 0 } else { lines.len() }),
    };
    let draft = Draft::new(gpu, "cumsum", if wide { "scan_block" } else { "scan_line" })
        .reads(Binding::Arg(0), "x", x.dtype)
        .writes(Binding::Out(0), "out", out.dtype)
        .numbers(x.dtype)
        .constant("EXTENT", extent as i64)
        .constant("REVERSE", i64::from(reverse))
        .constant("FROM_ALONG", x.layout.strides[dim] as i64)
        .constant("TO_ALONG", out.layout.strides[dim] as i64)
        .walk(&lines, reach_along(x, dim).max(reach_along(out, dim)));
    Call { parts: vec![draft.finish(launch)], workspace_bytes: 0 }
}

fn reach_along(x: &Operand, dim: usize) -> usize {
    x.layout.strides[dim].unsigned_abs().max(1).saturating_mul(x.layout.shape[dim] + BLOCK)
}

/// `args = [x]`; the output keeps `dim` with extent 1, u32
pub(super) fn arg_reduce(
    gpu: Gpu<'_>,
    x: &Operand,
    out: &Operand,
    dim: usize,
    op: ArgReduceOp,
) -> Call {
    let extent = x.layout.shape[dim];
    let lines = lines(&[("from", x), ("to", out)], dim);
    // Beside each other, lines are read by neighbouring threads; else elements are.
    let across = x.layout.strides[dim].unsigned_abs() != 1 && lines.len() > BLOCK;
    let (template, launch) = if across || extent <= THREAD_LINE {
        ("arg_thread", gpu.elements(lines.len()))
    } else if extent <= SIMD_LINE {
        ("arg_simd", gpu.simd_rows(lines.len()))
    } else {
        ("arg_block", gpu.block_rows(lines.len(), WIDE_BLOCK, WIDE_BLOCK / SIMD * PARTIAL_BYTES))
    };
    let draft = Draft::new(gpu, "arg_reduce", template)
        .reads(Binding::Arg(0), "x", x.dtype)
        .writes(Binding::Out(0), "out", out.dtype)
        .numbers(x.dtype)
        .constant("EXTENT", extent as i64)
        .constant("LARGEST", i64::from(op == ArgReduceOp::ArgMax))
        .constant("FROM_ALONG", x.layout.strides[dim] as i64)
        .walk(&lines, reach_along(x, dim));
    Call { parts: vec![draft.finish(launch)], workspace_bytes: 0 }
}
