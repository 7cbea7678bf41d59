//! Where the elements of a value lie in its buffer.

use metal_candle_graph::{MAX_RANK, Operation, Shape};

/// Element `(i0, i1, ..)` of a value lies at `offset + Σ i·stride` elements into its buffer.
/// Strides may be 0 (broadcast) or negative (flip).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The extents of the value.
    pub shape: Shape,
    /// By dim, in elements; those beyond the rank are of no meaning.
    pub strides: [isize; MAX_RANK],
    /// Of the first element, in elements.
    pub offset: isize,
}

impl Layout {
    /// Row-major, dense, from element 0.
    pub fn contiguous(shape: Shape) -> Layout {
        Layout { shape, strides: shape.contiguous_strides(), offset: 0 }
    }

    /// Those of the value's dims, in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides[..self.shape.rank()]
    }

    /// Row-major, dense, from element 0.
    pub fn is_contiguous(&self) -> bool {
        self.offset == 0 && self.is_dense()
    }

    /// Row-major and dense, wherever it starts.
    pub fn is_dense(&self) -> bool {
        let dense = self.shape.contiguous_strides();
        // The stride of an extent of 1 is never used.
        self.shape.is_empty()
            || (0..self.shape.rank()).all(|d| self.shape[d] == 1 || self.strides[d] == dense[d])
    }

    /// Whether all dims but the last two repeat one matrix.
    pub(crate) fn is_one_matrix(&self) -> bool {
        (0..self.shape.rank() - 2).all(|d| self.shape[d] == 1 || self.strides[d] == 0)
    }

    /// A matrix as its transpose.
    pub(crate) fn transposed(&self) -> Layout {
        let [rows, cols] = [0, 1].map(|d| self.shape[d]);
        let mut layout = Layout { shape: self.shape.with(0, cols).with(1, rows), ..*self };
        layout.strides.swap(0, 1);
        layout
    }

    /// The part of it that has this shape and begins at `start` along `dim`.
    pub(crate) fn part(&self, dim: usize, start: usize, shape: Shape) -> Layout {
        let mut part = *self;
        part.offset += start as isize * part.strides[dim];
        part.shape = shape;
        part
    }

    /// Parts of these shapes, one behind the other along `dim`.
    pub(crate) fn side_by_side(
        &self,
        dim: usize,
        shapes: impl Iterator<Item = Shape>,
    ) -> impl Iterator<Item = Layout> {
        shapes.scan(0, move |start, shape| {
            let part = self.part(dim, *start, shape);
            *start += shape[dim];
            Some(part)
        })
    }

    /// This layout seen through the view `op` of result shape `shape`; `None` if `op` is no view, or needs a copy.
    pub fn view(&self, op: &Operation, shape: Shape) -> Option<Layout> {
        let mut out = Layout { shape, strides: [0; MAX_RANK], offset: self.offset };
        match *op {
            Operation::Reshape(_) => return self.reshape(shape),
            Operation::Permute(p) => {
                for i in 0..p.rank() {
                    out.strides[i] = self.strides[p.source(i)];
                }
            }
            Operation::Broadcast(_) => {
                for d in 0..shape.rank() {
                    out.strides[d] = if self.shape[d] == 1 { 0 } else { self.strides[d] };
                }
            }
            Operation::Slice { dim, start, len, step } => {
                out.strides = self.strides;
                out.offset += start as isize * self.strides[dim];
                // The step of one element may be anything.
                out.strides[dim] *= if len > 1 { step as isize } else { 1 };
            }
            Operation::Flip { dim } => {
                out.strides = self.strides;
                let last = self.shape[dim].saturating_sub(1) as isize;
                out.offset += last * self.strides[dim];
                out.strides[dim] = -self.strides[dim];
            }
            _ => return None,
        }
        Some(out)
    }

    /// The same elements in another shape, where the strides allow it without a copy.
    fn reshape(&self, to: Shape) -> Option<Layout> {
        let mut out = Layout { shape: to, strides: [0; MAX_RANK], offset: self.offset };
        if to.is_empty() {
            return Some(out);
        }
        // Walk both shapes from the inside, matching groups of dims of equal product.
        let (mut i, mut j) = (self.shape.rank(), to.rank());
        while i > 0 && self.shape[i - 1] == 1 {
            i -= 1;
        }
        while j > 0 {
            if to[j - 1] == 1 {
                j -= 1;
                continue;
            }
            // The group starts with the innermost old dim; its stride must carry through the group.
            i -= 1;
            let (mut from_len, mut to_len) = (self.shape[i], to[j - 1]);
            let inner = self.strides[i];
            let mut span = inner * self.shape[i] as isize;
            j -= 1;
            out.strides[j] = inner;
            while from_len != to_len {
                if from_len < to_len {
                    i -= 1;
                    if self.shape[i] != 1 {
                        if self.strides[i] != span {
                            return None;
                        }
                        span *= self.shape[i] as isize;
                        from_len *= self.shape[i];
                    }
                } else {
                    j -= 1;
                    out.strides[j] = inner * to_len as isize;
                    to_len *= to[j];
                }
            }
            while i > 0 && self.shape[i - 1] == 1 {
                i -= 1;
            }
        }
        Some(out)
    }
}
