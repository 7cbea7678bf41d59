//! A product of strided operands as a BLAS wants it: leading dimensions, transpositions, one batch dim.

use metal_candle_compiler::Layout;
use smallvec::SmallVec;

/// `out[m, n] (+)= a[m, k] b[k, n]`, all row-major, `batch` times for each of `outer`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Blas {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) a: Matrix,
    pub(crate) b: Matrix,
    pub(crate) out: Matrix,
    pub(crate) batch: usize,
    /// `out` lies column by column: `a` is what the step calls `b`, transposed, and the reverse.
    pub(crate) swapped: bool,
    /// Where `a`, `b` and `out` start, in elements, for each batch of products.
    pub(crate) outer: Vec<[isize; 3]>,
}

/// How a matrix lies in memory, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Matrix {
    /// Its columns are contiguous, not its rows.
    pub(crate) transposed: bool,
    /// From one row (column, if transposed) to the next.
    pub(crate) leading: usize,
    /// From one of the batch to the next.
    pub(crate) batch_stride: isize,
}

/// The batch dims: extent, and the strides of `a`, `b` and `out`.
type Dims = SmallVec<[(usize, [isize; 3]); 4]>;

impl Blas {
    /// `None` for an operand whose rows and columns both have gaps, and for a sum of nothing.
    pub(crate) fn new(a: &Layout, b: &Layout, out: &Layout) -> Option<Blas> {
        let rank = out.shape.rank();
        let (row, col) = (rank - 2, rank - 1);
        let [mut m, n, k] = [out.shape[row], out.shape[col], a.shape[col]];
        if k == 0 || out.shape.is_empty() {
            return None;
        }
        let matrix = |l: &Layout| {
            Matrix::new([l.shape[row], l.shape[col]], [l.strides[row], l.strides[col]])
        };
        let mut out_matrix = matrix(out)?;
        let (mut a_matrix, mut b_matrix) = (matrix(a)?, matrix(b)?);
        let mut dims = batch_dims(a, b, out);
        // x of [batch, m, k] by one weight: a taller x.
        if let Some((extent, strides)) = dims.last().copied()
            && !a_matrix.transposed
            && !out_matrix.transposed
            && strides == [(m * a_matrix.leading) as isize, 0, (m * out_matrix.leading) as isize]
        {
            m *= extent;
            dims.pop();
        }
        let (batch, strides) = dims.pop().unwrap_or((1, [0; 3]));
        [a_matrix.batch_stride, b_matrix.batch_stride, out_matrix.batch_stride] = strides;
        let outer = starts([a.offset, b.offset, out.offset], &dims);
        let swapped = out_matrix.transposed;
        if swapped {
            let flip = |m: Matrix| Matrix { transposed: !m.transposed, ..m };
            let [new_a, new_b] = [flip(b_matrix), flip(a_matrix)];
            out_matrix.transposed = false;
            return Some(Blas {
                m: n,
                n: m,
                k,
                a: new_a,
                b: new_b,
                out: out_matrix,
                batch,
                swapped,
                outer,
            });
        }
        Some(Blas { m, n, k, a: a_matrix, b: b_matrix, out: out_matrix, batch, swapped, outer })
    }
}

impl Matrix {
    fn new([rows, cols]: [usize; 2], [down, along]: [isize; 2]) -> Option<Matrix> {
        let leading = |outer: usize, inner: usize, outer_stride: isize, inner_stride: isize| {
            let contiguous = inner == 1 || inner_stride == 1;
            let apart = if outer == 1 { inner } else { usize::try_from(outer_stride).unwrap_or(0) };
            (contiguous && apart >= inner).then_some(apart)
        };
        let (transposed, leading) = match leading(rows, cols, down, along) {
            Some(leading) => (false, leading),
            None => (true, leading(cols, rows, along, down)?),
        };
        Some(Matrix { transposed, leading, batch_stride: 0 })
    }
}

/// The dims before the last two, outermost first, without those of extent 1; neighbours that all operands walk as
/// one are one.
fn batch_dims(a: &Layout, b: &Layout, out: &Layout) -> Dims {
    let mut dims = Dims::new();
    for d in 0..out.shape.rank() - 2 {
        let (extent, strides) = (out.shape[d], [a.strides[d], b.strides[d], out.strides[d]]);
        if extent == 1 {
            continue;
        }
        match dims.last_mut() {
            Some((outer, outer_strides))
                if (0..3).all(|i| outer_strides[i] == strides[i] * extent as isize) =>
            {
                *outer *= extent;
                *outer_strides = strides;
            }
            _ => dims.push((extent, strides)),
        }
    }
    dims
}

fn starts(first: [isize; 3], dims: &Dims) -> Vec<[isize; 3]> {
    let mut starts = vec![first];
    for (extent, strides) in dims {
        let step = |start: &[isize; 3], i: usize| {
            let at = i as isize;
            [0, 1, 2].map(|o| start[o] + at * strides[o])
        };
        starts = starts.iter().flat_map(|s| (0..*extent).map(move |i| step(s, i))).collect();
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;
    use metal_candle_graph::Shape;

    fn layout(dims: &[usize], strides: &[isize]) -> Layout {
        let mut layout = Layout::contiguous(Shape::new(dims).unwrap());
        layout.strides[..strides.len()].copy_from_slice(strides);
        layout
    }

    fn dense(dims: &[usize]) -> Layout {
        Layout::contiguous(Shape::new(dims).unwrap())
    }

    #[test]
    fn a_batch_by_one_weight_is_one_tall_product() {
        let blas = Blas::new(
            &dense(&[2, 3, 5, 7]),
            &layout(&[2, 3, 7, 4], &[0, 0, 4, 1]),
            &dense(&[2, 3, 5, 4]),
        );
        let blas = blas.unwrap();
        assert_eq!([blas.m, blas.n, blas.k, blas.batch, blas.outer.len()], [30, 4, 7, 1, 1]);
    }

    #[test]
    fn a_transposed_weight_keeps_its_memory() {
        let blas = Blas::new(&dense(&[5, 7]), &layout(&[7, 4], &[1, 7]), &dense(&[5, 4])).unwrap();
        assert_eq!(blas.b, Matrix { transposed: true, leading: 7, batch_stride: 0 });
        assert!(!blas.a.transposed);
    }

    #[test]
    fn a_result_by_columns_swaps_the_factors() {
        let out = layout(&[5, 4], &[1, 5]);
        let blas = Blas::new(&dense(&[5, 7]), &dense(&[7, 4]), &out).unwrap();
        assert!(blas.swapped);
        assert_eq!([blas.m, blas.n], [4, 5]);
        assert_eq!(blas.a, Matrix { transposed: true, leading: 4, batch_stride: 0 });
        assert_eq!(blas.out, Matrix { transposed: false, leading: 5, batch_stride: 0 });
    }

    #[test]
    fn heads_beside_each_other_are_batches() {
        // q [batch, head, t, d] in memory [batch, t, head, d].
        let q = layout(&[2, 3, 8, 4], &[96, 4, 12, 1]);
        let k = layout(&[2, 3, 4, 8], &[96, 4, 1, 12]);
        let blas = Blas::new(&q, &k, &dense(&[2, 3, 8, 8])).unwrap();
        assert_eq!((blas.batch, blas.outer.len()), (3, 2));
        assert_eq!(blas.outer[1], [96, 96, 192]);
        assert_eq!(blas.a, Matrix { transposed: false, leading: 12, batch_stride: 4 });
        assert!(blas.b.transposed);
    }

    #[test]
    fn gaps_both_ways_are_for_the_plain_kernel() {
        assert_eq!(Blas::new(&layout(&[5, 7], &[14, 2]), &dense(&[7, 4]), &dense(&[5, 4])), None);
        assert_eq!(Blas::new(&layout(&[5, 7], &[0, 1]), &dense(&[7, 4]), &dense(&[5, 4])), None);
        assert_eq!(Blas::new(&dense(&[5, 0]), &dense(&[0, 4]), &dense(&[5, 4])), None);
        let none = [dense(&[0, 5, 7]), dense(&[0, 7, 4]), dense(&[0, 5, 4])];
        assert_eq!(Blas::new(&none[0], &none[1], &none[2]), None);
    }
}
