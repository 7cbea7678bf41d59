//! Reading and writing at positions that only the run knows.

use super::draft::{Draft, Gpu};
use super::walk::Walk;
use super::{Call, Part};
use crate::render::Binding;
use crate::{Layout, Operand};
use metal_candle_graph::Shape;

/// Bytes that are moved as one, at most.
const MOVED: usize = 16;

/// The index of a call that moves: where each element finds its index, and where that stands among the indices.
struct Index {
    layout: Vec<isize>,
    offset: isize,
    position: Vec<isize>,
}

/// `args = [x, index]`
pub(super) fn gather(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let index = &args[1].layout;
    let position = index.shape.contiguous_strides();
    let position = position[..index.shape.rank()].to_vec();
    let index = Index { layout: index.strides().to_vec(), offset: index.offset, position };
    take(gpu, "gather", args, outs, &index, [dim, args[0].layout.shape[dim], 0])
}

/// `args = [x, index: [n]]`
pub(super) fn index_select(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let (rank, index) = (args[0].layout.shape.rank(), &args[1].layout);
    let along = |stride| (0..rank).map(|d| if d == dim { stride } else { 0 }).collect();
    let index = Index { layout: along(index.strides[0]), offset: index.offset, position: along(1) };
    take(gpu, "index_select", args, outs, &index, [dim, args[0].layout.shape[dim], 0])
}

/// `args = [x, start: i64[]]`
pub(super) fn dynamic_slice(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let starts = args[0].layout.shape[dim] - outs[0].layout.shape[dim] + 1;
    take(gpu, "dynamic_slice", args, outs, &start(&args[1].layout, &outs[0]), [dim, starts, 1])
}

/// One start for all elements.
fn start(layout: &Layout, of: &Operand) -> Index {
    let none = vec![0; of.layout.shape.rank()];
    Index { layout: none.clone(), offset: layout.offset, position: none }
}

/// `walks`: whether an element's own place along `dim` is added to what its index says.
fn take(
    gpu: Gpu<'_>,
    call: &'static str,
    args: &[Operand],
    outs: &[Operand],
    index: &Index,
    [dim, extent, walks]: [usize; 3],
) -> Call {
    let (x, out) = (&args[0], &outs[0]);
    let mut from = x.layout.strides().to_vec();
    let along = from[dim];
    from[dim] *= walks as isize;
    let shape = out.layout.shape;
    let walk = Walk::over(shape.dims())
        .place("from", &from, x.layout.offset)
        .layout("to", &out.layout)
        .place("index", &index.layout, index.offset)
        .place("position", &index.position, 0);
    moves(gpu, call, "take", [x, &args[1]], walk, [along, extent as isize])
}

/// In place on the output, which holds the base. `args = [update, start: i64[]]`
pub(super) fn slice_update(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let (x, out) = (&args[0], &outs[0]);
    let index = start(&args[1].layout, x);
    let walk = Walk::over(x.layout.shape.dims())
        .layout("from", &x.layout)
        .place("to", out.layout.strides(), out.layout.offset)
        .place("index", &index.layout, index.offset)
        .place("position", &index.position, 0);
    let starts = out.layout.shape[dim] - x.layout.shape[dim] + 1;
    moves(
        gpu,
        "slice_update",
        "put",
        [x, &args[1]],
        walk,
        [out.layout.strides[dim], starts as isize],
    )
}

/// Moves as many bytes at once as lie beside each other on both sides.
fn moves(
    gpu: Gpu<'_>,
    call: &'static str,
    template: &'static str,
    [x, index]: [&Operand; 2],
    walk: Walk,
    [along, extent]: [isize; 2],
) -> Call {
    let size = x.dtype.size_bytes();
    let walk = walk.collapsed();
    let n = walk.vector(&["from", "to"], &[along], MOVED / size);
    let walk = walk.by(n, &["from", "to"], true);
    let along = along / n as isize;
    let moved = format!("Moved<{}>", size * n);
    let draft = Draft::new(gpu, call, template)
        .operand(Binding::Arg(0), "x", &moved, false)
        .reads(Binding::Arg(1), "index", index.dtype)
        .operand(Binding::Out(0), "out", &moved, true)
        .reports()
        .aligned(size * n)
        .constant("EXTENT", extent as i64)
        .constant("ALONG", along as i64)
        .walk(&walk, along.unsigned_abs().saturating_mul(extent.unsigned_abs()));
    Call { parts: vec![draft.finish(gpu.elements(walk.len()))], workspace_bytes: 0 }
}

/// Strides of `shape`-like dims with that of `dim` left out: an index takes its place.
fn without(strides: &[isize], dim: usize) -> Vec<isize> {
    let mut strides = strides.to_vec();
    strides[dim] = 0;
    strides
}

/// From the number of an element to its position along `dim`.
fn position_along(shape: &Shape, dim: usize) -> Vec<isize> {
    (0..shape.rank()).map(|d| isize::from(d == dim)).collect()
}

/// In place on the output, which holds the base. `args = [index, src]`
pub(super) fn scatter_add(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let (index, x, out) = (&args[0], &args[1], &outs[0]);
    let shape = x.layout.shape;
    let walk = Walk::over(shape.dims())
        .layout("index", &index.layout)
        .layout("from", &x.layout)
        .place("to", &without(out.layout.strides(), dim), out.layout.offset)
        .place("along", &position_along(&shape, dim), 0)
        .collapsed();
    let draft = sums(gpu, "scatter_add", x, out, dim)
        .reads(Binding::Arg(0), "index", index.dtype)
        .reads(Binding::Arg(1), "x", x.dtype)
        .writes(Binding::Out(0), "out", out.dtype)
        .reports()
        .constant("EXTENT", out.layout.shape[dim] as i64)
        .constant("INDEX_ALONG", index.layout.strides[dim] as i64)
        .walk(&walk, out.layout.shape.len());
    Call { parts: vec![draft.finish(gpu.elements(walk.len()))], workspace_bytes: 0 }
}

/// In place on the output, which holds the base. `args = [index: [n], src]`
pub(super) fn index_add(gpu: Gpu<'_>, args: &[Operand], outs: &[Operand], dim: usize) -> Call {
    let (index, x, out) = (&args[0], &args[1], &outs[0]);
    let n = index.layout.shape.len();
    let shape = x.layout.shape;
    if shape.is_empty() {
        // No sum is made, but its index is an error all the same.
        let (parts, workspace_bytes) = (vec![chain(gpu, index, out, dim)], n * CHAIN_BYTES);
        return Call { parts, workspace_bytes };
    }
    let walk = Walk::over(shape.dims())
        .layout("from", &x.layout)
        .place("to", &without(out.layout.strides(), dim), out.layout.offset)
        .place("along", &position_along(&shape, dim), 0)
        .collapsed();
    let at = Walk::over(&[n]).layout("index", &index.layout);
    let next = Binding::Workspace { offset_bytes: 0 };
    let draft = sums(gpu, "index_add", x, out, dim)
        .reads(Binding::Arg(0), "index", index.dtype)
        .operand(next, "next", "i32", false)
        .reads(Binding::Arg(1), "x", x.dtype)
        .writes(Binding::Out(0), "out", out.dtype)
        .walk(&walk, out.layout.shape.len().max(at.reach()))
        .places(&at);
    let add = draft.finish(gpu.elements(walk.len()));
    Call { parts: vec![chain(gpu, index, out, dim), add], workspace_bytes: n * CHAIN_BYTES }
}

const CHAIN_BYTES: usize = 4;

/// The positions of `index` with one value, one after the other.
fn chain(gpu: Gpu<'_>, index: &Operand, out: &Operand, dim: usize) -> Part {
    let n = index.layout.shape.len();
    let walk = Walk::over(&[n]).layout("index", &index.layout);
    Draft::new(gpu, "index_add", "chain")
        .reads(Binding::Arg(0), "index", index.dtype)
        .operand(Binding::Workspace { offset_bytes: 0 }, "next", "i32", true)
        .reports()
        .constant("EXTENT", out.layout.shape[dim] as i64)
        .walk(&walk, 0)
        .finish(gpu.elements(n))
}

/// What sums at positions along `dim` share.
fn sums<'a>(gpu: Gpu<'a>, call: &'static str, x: &Operand, out: &Operand, dim: usize) -> Draft<'a> {
    assert_eq!(x.dtype, out.dtype, "metal-candle bug: {call}");
    Draft::new(gpu, call, call)
        .numbers(x.dtype)
        .constant("ALONG", out.layout.strides[dim] as i64)
        .constant("LENGTH", x.layout.shape[dim] as i64)
        .constant("FROM_ALONG", x.layout.strides[dim] as i64)
}
