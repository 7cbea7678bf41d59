//! Running sums and extremes along a dim.

use super::Call;
use super::draft::{BLOCK, Draft, Gpu};
use super::walk::Walk;
use crate::Operand;
use crate::render::launch::SIMD;
use crate::render::{Binding, Launch, scalar};
use metal_candle_graph::ArgReduceOp;

/// The shortest line that a block shares.
const BLOCK_LINE: usize = 256;
/// The longest line that a thread walks by itself, where a SIMD group could.
const THREAD_LINE: usize = 16;
/// The longest line of a SIMD group.
const SIMD_LINE: usize = 4096;
/// Threads of a longer one.
const WIDE_BLOCK: usize = 4 * BLOCK;
/// The shortest line that several blocks share, if there are few: that of a vocabulary, when a token is chosen.
const LONG_LINE: usize = 16 << 10;
const FEW_LINES: usize = 32;
/// Elements of a block's part of it, where that makes no more parts than so many.
const PART: usize = 4 * BLOCK;
const MOST_PARTS: usize = 128;
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

/// What kernels that look for an extreme share.
struct ArgReduce<'a> {
    gpu: Gpu<'a>,
    x: &'a Operand,
    out: &'a Operand,
    dim: usize,
    op: ArgReduceOp,
    lines: Walk,
}

/// `args = [x]`; the output keeps `dim` with extent 1, u32
pub(super) fn arg_reduce(
    gpu: Gpu<'_>,
    x: &Operand,
    out: &Operand,
    dim: usize,
    op: ArgReduceOp,
) -> Call {
    let lines = lines(&[("from", x), ("to", out)], dim);
    let it = ArgReduce { gpu, x, out, dim, op, lines };
    let (extent, count) = (x.layout.shape[dim], it.lines.len());
    // Beside each other, lines are read by neighbouring threads; else elements are.
    let across = x.layout.strides[dim].unsigned_abs() != 1 && count > BLOCK;
    if across || extent <= THREAD_LINE {
        it.whole("arg_thread", gpu.elements(count))
    } else if extent <= SIMD_LINE {
        it.whole("arg_simd", gpu.simd_rows(count))
    } else if extent < LONG_LINE || count > FEW_LINES {
        it.whole("arg_block", it.blocks(count, WIDE_BLOCK))
    } else {
        it.in_parts(extent.div_ceil(PART).min(MOST_PARTS))
    }
}

impl<'a> ArgReduce<'a> {
    fn draft(&self, template: &'static str) -> Draft<'a> {
        Draft::new(self.gpu, "arg_reduce", template)
            .constant("EXTENT", self.x.layout.shape[self.dim] as i64)
            .constant("LARGEST", i64::from(self.op == ArgReduceOp::ArgMax))
            .constant("FROM_ALONG", self.x.layout.strides[self.dim] as i64)
    }

    /// So many blocks, whose threads hand each other elements and their places.
    fn blocks(&self, count: usize, block: usize) -> Launch {
        self.gpu.block_rows(count, block, block / SIMD * PARTIAL_BYTES)
    }

    /// Each line by one team.
    fn whole(&self, template: &'static str, launch: Launch) -> Call {
        let draft = self
            .draft(template)
            .numbers(self.x.dtype)
            .reads(Binding::Arg(0), "x", self.x.dtype)
            .writes(Binding::Out(0), "out", self.out.dtype)
            .walk(&self.lines, reach_along(self.x, self.dim));
        Call { parts: vec![draft.finish(launch)], workspace_bytes: 0 }
    }

    /// Each line by several blocks, and what they found by a SIMD group.
    fn in_parts(&self, parts: usize) -> Call {
        let count = self.lines.len() * parts;
        let found = Binding::Workspace { offset_bytes: 0 };
        let of = format!("Extreme<{}>", scalar::register_type(self.x.dtype));
        let draft = |template| {
            let reach = reach_along(self.x, self.dim).max(count);
            self.draft(template).constant("PARTS", parts as i64).walk(&self.lines, reach)
        };
        let look = draft("arg_parts")
            .numbers(self.x.dtype)
            .reads(Binding::Arg(0), "x", self.x.dtype)
            .operand(found, "parts", &of, true)
            .finish(self.blocks(count, BLOCK));
        let join = draft("arg_join")
            .operand(found, "parts", &of, false)
            .writes(Binding::Out(0), "out", self.out.dtype)
            .finish(self.gpu.simd_rows(self.lines.len()));
        Call { parts: vec![look, join], workspace_bytes: count * PARTIAL_BYTES }
    }
}
