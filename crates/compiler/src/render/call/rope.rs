//! Rotary position embedding.

use super::Call;
use super::draft::{Draft, Gpu};
use super::walk::Walk;
use crate::Operand;
use crate::render::Binding;
use metal_candle_graph::composite::RopeLayout;

/// The bytes of an access, at most.
const ACCESS: usize = 16;

/// `args = [x: [.., d], cos: [.., d/2], sin: [.., d/2]]`
pub(super) fn rope(gpu: Gpu<'_>, args: &[Operand], out: &Operand, layout: RopeLayout) -> Call {
    rotate(gpu, args, out, layout, None)
}

/// In place on the output, which holds the base. `args = [x, cos, sin, start: i64[]]`
pub(super) fn rope_update(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    layout: RopeLayout,
    dim: usize,
) -> Call {
    rotate(gpu, args, out, layout, Some(dim))
}

/// The first elements of an operand's pairs, and how far from each the second one is.
struct Pairs {
    strides: Vec<isize>,
    second: isize,
}

impl Pairs {
    fn of(operand: &Operand, layout: RopeLayout, half: usize) -> Pairs {
        let mut strides = operand.layout.strides().to_vec();
        let last = strides.last_mut().expect("metal-candle bug: rope of a scalar");
        let stride = *last;
        let (step, second) = match layout {
            RopeLayout::Half => (stride, half as isize * stride),
            RopeLayout::Interleaved => (2 * stride, stride),
        };
        *last = step;
        Pairs { strides, second }
    }
}

/// Along `dim`, if any, the result begins where the fourth operand says.
fn rotate(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    layout: RopeLayout,
    dim: Option<usize>,
) -> Call {
    let [x, cos, sin] = [&args[0], &args[1], &args[2]];
    let shape = x.layout.shape;
    let last = shape.rank() - 1;
    let half = shape[last] / 2;
    let [from, to] = [x, out].map(|o| Pairs::of(o, layout, half));
    let walk = Walk::over(shape.with(last, half).dims())
        .place("from", &from.strides, x.layout.offset)
        .place("to", &to.strides, out.layout.offset)
        .layout("cos", &cos.layout)
        .layout("sin", &sin.layout)
        .collapsed();
    // From one start along `dim` to the next, and how many there are.
    let along = dim.map_or(0, |dim| out.layout.strides[dim]);
    let starts = dim.map_or(0, |dim| out.layout.shape[dim] - shape[dim] + 1);
    let widest = [x, out, cos, sin].map(|o| o.dtype.size_bytes()).into_iter().max().expect("four");
    let moved = ["from", "to", "cos", "sin"];
    let n = walk.vector(&moved, &[from.second, to.second, along], ACCESS / widest);
    let walk = walk.by(n, &moved, false);
    let farthest = from.second.unsigned_abs().max(to.second.unsigned_abs());
    let (call, template) = match dim {
        Some(_) => ("slice_update", "rope_put"),
        None => ("rope", "rope"),
    };
    let mut draft = Draft::new(gpu, call, template)
        .template(n)
        .reads(Binding::Arg(0), "x", x.dtype)
        .reads(Binding::Arg(1), "cos", cos.dtype)
        .reads(Binding::Arg(2), "sin", sin.dtype);
    if dim.is_some() {
        draft = draft.reads(Binding::Arg(3), "index", args[3].dtype);
    }
    draft = draft.writes(Binding::Out(0), "out", out.dtype);
    if dim.is_some() {
        draft = draft
            .reports()
            .constant("START", args[3].layout.offset as i64)
            .constant("EXTENT", starts as i64)
            .constant("ALONG", along as i64);
    }
    let draft = draft
        .numbers(x.dtype)
        .aligned(n * widest)
        .constant("SECOND", from.second as i64)
        .constant("OUT_SECOND", to.second as i64)
        .walk(&walk, farthest.max(along.unsigned_abs().saturating_mul(starts)));
    Call { parts: vec![draft.finish(gpu.elements(walk.len()))], workspace_bytes: 0 }
}
