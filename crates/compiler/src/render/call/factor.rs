//! Matrices as factors of products: where they lie, or unpacked a part at a time.

use super::draft::{Draft, Gpu};
use super::quant::Blocks;
use super::walk::Walk;
use super::{Part, Place, Product};
use crate::render::Binding;
use crate::{Layout, Operand};
use metal_candle_graph::{DType, MAX_RANK, Shape};
use std::ops::Range;

/// Parts of the workspace start at multiples of this.
const ALIGN: usize = 256;

/// The workspace of a call, given out from its start.
#[derive(Default)]
pub(super) struct Workspace {
    bytes: usize,
}

impl Workspace {
    pub(super) fn take(&mut self, bytes: usize) -> usize {
        let at = self.bytes;
        self.bytes = (at + bytes).next_multiple_of(ALIGN);
        at
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// A dense `[rows, cols]` of the workspace.
pub(super) fn dense(offset_bytes: usize, dtype: DType, dims: [usize; 2]) -> Place {
    let shape = Shape::new(&dims).expect("metal-candle bug: a part that cannot be addressed");
    let layout = Layout::contiguous(shape);
    Place { binding: Binding::Workspace { offset_bytes }, dtype, layout }
}

impl Place {
    /// Rows or columns `range` of a matrix.
    pub(super) fn narrow(&self, dim: usize, range: Range<usize>) -> Place {
        let mut layout = self.layout;
        layout.offset += range.start as isize * layout.strides[dim];
        layout.shape = layout.shape.with(dim, range.len());
        Place { layout, ..self.clone() }
    }

    pub(super) fn transposed(&self) -> Place {
        Place { layout: self.layout.transposed(), ..self.clone() }
    }
}

/// `a b`, or that much more, of matrices.
pub(super) fn product(a: &Place, b: &Place, out: &Place, accumulate: bool) -> Part {
    let [a, b, out] = [a, b, out].map(Place::clone);
    Part::Product(Product { alpha: 1.0, accumulate, a, b, bias: None, out })
}

/// A matrix `[rows, cols]`.
pub(super) enum Matrix {
    Dense(Place),
    Blocks(Blocks),
}

impl Matrix {
    /// The argument `arg`, as a matrix with rows as it has leading elements.
    pub(super) fn dense(arg: u32, operand: &Operand) -> Matrix {
        let (binding, dtype) = (Binding::Arg(arg), operand.dtype);
        Matrix::Dense(Place { binding, dtype, layout: operand.layout })
    }

    /// Whether a product can read it as it is.
    pub(super) fn is(&self, factor: DType) -> bool {
        matches!(self, Matrix::Dense(place) if place.dtype == factor)
    }

    /// Rows (0) or columns (1) `range` as a factor of this dtype: where they are, or unpacked to `offset_bytes` by a
    /// kernel that is pushed to `parts`.
    pub(super) fn part(
        &self,
        gpu: Gpu<'_>,
        call: &'static str,
        (dim, range): (usize, Range<usize>),
        factor: DType,
        offset_bytes: usize,
        parts: &mut Vec<Part>,
    ) -> Place {
        match self {
            Matrix::Dense(place) if place.dtype == factor => place.narrow(dim, range),
            Matrix::Dense(place) => {
                let from = place.narrow(dim, range);
                let to = dense(offset_bytes, factor, [0, 1].map(|d| from.layout.shape[d]));
                parts.extend(convert(gpu, call, &from, &to));
                to
            }
            Matrix::Blocks(blocks) => {
                let blocks = blocks.narrow(dim, range);
                let to = dense(offset_bytes, factor, blocks.dims());
                parts.extend(blocks.dequantize(gpu, call, to.binding, factor));
                to
            }
        }
    }
}

/// `to = from`, in another dtype or elsewhere.
pub(super) fn convert(gpu: Gpu<'_>, call: &'static str, from: &Place, to: &Place) -> Option<Part> {
    if from.layout.shape.is_empty() {
        return None;
    }
    let (from, to) = (at_start(from), at_start(to));
    let walk = Walk::over(from.layout.shape.dims())
        .layout("from", &from.layout)
        .layout("to", &to.layout)
        .collapsed();
    let widest = from.dtype.size_bytes().max(to.dtype.size_bytes());
    let n = walk.vector(&["from", "to"], &[], 16 / widest);
    let walk = walk.by(n, &["from", "to"], false);
    let draft = Draft::new(gpu, call, "convert")
        .template(n)
        .reads(from.binding, "from", from.dtype)
        .writes(to.binding, "to", to.dtype)
        .numbers(from.dtype)
        .aligned(n * widest)
        .walk(&walk, 0);
    Some(draft.finish(gpu.elements(walk.len())))
}

/// The same elements with an offset of 0: parts of one matrix have one kernel.
pub(super) fn at_start(place: &Place) -> Place {
    let offset = place.layout.offset * place.dtype.size_bytes() as isize;
    let mut out = place.clone();
    // Backwards from the offset, an address says nothing.
    if offset > 0 && place.layout.strides().iter().all(|stride| *stride >= 0) {
        out.binding = place.binding.further(offset.unsigned_abs());
        out.layout.offset = 0;
    }
    out
}

/// `x` as a matrix of rows: all leading dims as one, where strides allow it.
pub(super) fn rows(layout: &Layout) -> Option<Layout> {
    let rank = layout.shape.rank();
    let (cols, step) = (layout.shape[rank - 1], layout.strides[rank - 1]);
    let leading = 0..rank - 1;
    let rows: usize = leading.clone().map(|d| layout.shape[d]).product();
    let mut stride = None;
    let mut inner = 1;
    for d in leading.rev().filter(|d| layout.shape[*d] != 1) {
        let first = *stride.get_or_insert(layout.strides[d]);
        if layout.strides[d] != first * inner {
            return None;
        }
        inner *= layout.shape[d] as isize;
    }
    let mut strides = [0; MAX_RANK];
    (strides[0], strides[1]) = (stride.unwrap_or(cols as isize * step), step);
    let shape = Shape::new(&[rows, cols]).expect("metal-candle bug: fewer dims");
    Some(Layout { shape, strides, offset: layout.offset })
}

/// Its leading dims as rows.
pub(super) fn matrix(place: &Place) -> Option<Place> {
    Some(Place { layout: rows(&place.layout)?, ..place.clone() })
}

/// The last two dims, if there is one matrix for all others.
pub(super) fn one_matrix(place: &Place) -> Option<Place> {
    let (mut layout, rank) = (place.layout, place.layout.shape.rank());
    let dims = [rank - 2, rank - 1];
    layout.shape = Shape::new(&dims.map(|dim| layout.shape[dim])).ok()?;
    layout.strides[..2].copy_from_slice(&dims.map(|dim| place.layout.strides[dim]));
    place.layout.is_one_matrix().then(|| Place { layout, ..place.clone() })
}

/// Of rows and columns, of a matrix.
pub(super) fn strides(place: &Place) -> [isize; 2] {
    [place.layout.strides[0], place.layout.strides[1]]
}

/// No further element of a matrix is counted.
fn reach(place: &Place) -> usize {
    let of_dim = |dim: usize| place.layout.shape[dim] * strides(place)[dim].unsigned_abs();
    place.layout.offset.unsigned_abs() + of_dim(0) + of_dim(1)
}

/// What counts the elements of matrices: a loop may count a tile of every slice too far before it ends.
pub(super) fn index_type(matrices: [&Place; 3]) -> &'static str {
    let furthest = matrices.into_iter().map(reach).max().unwrap_or(0);
    if furthest < 1 << 30 { "i32" } else { "i64" }
}
