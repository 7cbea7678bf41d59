//! Products with a thin side on tensor cores: `x a` with few columns, and `a b` that sums over few. They are LoRA's, and take
//! the time to read x or to write the result, which a library that is made for large tiles does not come near.
//!
//! The gradients of LoRA's factors, which sum over rows, are the library's.

use super::draft::{BLOCK, Draft, Gpu};
use super::factor::{at_start, rows};
use super::{Part, Place};
use crate::render::launch::SIMD;
use crate::render::{Launch, Team};
use metal_candle_graph::DType;

/// The longest thin side.
const THIN: usize = 64;
/// What is read of a row at once.
const PIECE: usize = 64;
/// Rows of a tile.
const TILE: usize = 16;
/// Products of fewer rows do not fill a device so.
const FEW: usize = 256;
/// SIMD groups of a block at most.
const GROUPS: usize = 16;
/// Elements of an access.
const RUN: usize = 8;

/// A product `out = alpha a b`, or that much more, of matrices.
pub(super) struct Thin {
    a: Place,
    b: Place,
    out: Place,
    alpha: f64,
    accumulate: bool,
}

impl Thin {
    /// If it is one for tensor cores, of matrices in any number of leading dims that can be rows.
    pub(super) fn new(
        gpu: Gpu<'_>,
        [a, b, out]: [&Place; 3],
        alpha: f64,
        accumulate: bool,
    ) -> Option<Thin> {
        let rank = b.layout.shape.rank();
        let is_one = (0..rank - 2).all(|d| b.layout.shape[d] == 1 || b.layout.strides[d] == 0);
        let is_half = [a, b, out].iter().all(|p| p.dtype == out.dtype && p.dtype.size_bytes() == 2);
        if gpu.limits.tensor_cores.is_none() || !is_one || !is_half {
            return None;
        }
        let matrix = |place: &Place| Some(Place { layout: rows(&place.layout)?, ..place.clone() });
        let (a, out) = (matrix(a)?, matrix(out)?);
        let mut b = b.clone();
        let [k, n] = [b.layout.shape[rank - 2], b.layout.shape[rank - 1]];
        let steps = [b.layout.strides[rank - 2], b.layout.strides[rank - 1]];
        b.layout.shape = out.layout.shape.with(0, k).with(1, n);
        b.layout.strides[..2].copy_from_slice(&steps);
        let starts = |place: &Place| place.layout.offset >= 0 && is_run(place.layout.offset);
        let lies = |place: &Place| {
            let [row, col] = strides(place);
            col == 1 && is_run(row) && starts(place)
        };
        let fits = lies(&a) && lies(&out) && starts(&b) && out.layout.shape[0] >= FEW;
        let [a, b, out] = [&a, &b, &out].map(at_start);
        fits.then_some(Thin { a, b, out, alpha, accumulate })
    }

    /// Its kernel, if a side is thin.
    pub(super) fn part(&self, gpu: Gpu<'_>) -> Option<Part> {
        let [k, n] = [0, 1].map(|dim| self.b.layout.shape[dim]);
        let is_thin = |thin: usize| (RUN..=THIN).contains(&thin) && thin.is_multiple_of(RUN);
        if is_thin(n) && k >= PIECE && k.is_multiple_of(PIECE) {
            return self.few_columns(gpu);
        }
        (is_thin(k) && n >= 2 * THIN && n.is_multiple_of(PIECE)).then(|| self.few_inner(gpu))
    }

    fn few_columns(&self, gpu: Gpu<'_>) -> Option<Part> {
        let [k, n] = [0, 1].map(|dim| self.b.layout.shape[dim]);
        let [b_row, b_col] = strides(&self.b);
        let by_rows = b_col == 1 && is_run(b_row);
        if !by_rows && !(b_row == 1 && is_run(b_col)) {
            return None;
        }
        let width = n.next_multiple_of(TILE);
        // A line of a piece, and as much more as keeps lines that are read together in other banks.
        let (pitch, lines) =
            if by_rows { (2 * width + 16, PIECE) } else { (2 * PIECE + 64, width) };
        let piece_bytes = pitch * lines;
        let groups = self.row_groups(gpu);
        let bytes = |split: usize| {
            let sums = split * groups * TILE * width * size_of::<f32>();
            sums.max(2 * split * piece_bytes)
        };
        let most = GROUPS / groups;
        let fitting = (1..=most).filter(|split| bytes(*split) <= gpu.limits.max_shared_bytes);
        // All of them have the same to do, if that leaves enough of them.
        let pieces = k / PIECE;
        let even = fitting.clone().filter(|split| pieces.is_multiple_of(*split)).max()?;
        let split = if even * 2 >= most { even } else { fitting.max()?.min(pieces) };
        let launch = Launch {
            team: Team::Block,
            vector: 1,
            grid: self.out.layout.shape[0].div_ceil(groups * TILE),
            block: groups * split * SIMD,
            shared_bytes: bytes(split),
        };
        let draft = self
            .draft(gpu, "thin::few_columns", width)
            .constant("GROUPS", groups as i64)
            .constant("SPLIT", split as i64)
            .constant("PITCH", pitch as i64)
            .constant("PIECE_BYTES", piece_bytes as i64)
            .constant("A_ROW", strides(&self.a)[0] as i64)
            .constant("B_ROW", b_row as i64)
            .constant("B_COL", b_col as i64)
            .constant("B_BY_ROWS", i64::from(by_rows));
        Some(draft.finish(launch))
    }

    /// How many tiles of rows a block has: as many as leave one for nearly every multiprocessor, for they share b.
    fn row_groups(&self, gpu: Gpu<'_>) -> usize {
        let blocks = |groups: usize| self.out.layout.shape[0].div_ceil(groups * TILE);
        let multiprocessors = gpu.limits.resident_threads / (4 * GROUPS * SIMD);
        let fills = |groups: &usize| blocks(*groups) * 10 >= multiprocessors * 9;
        [4, 2].into_iter().find(fills).unwrap_or(1)
    }

    fn few_inner(&self, gpu: Gpu<'_>) -> Part {
        let (strips, tiles) =
            (self.out.layout.shape[1] / PIECE, self.out.layout.shape[0].div_ceil(TILE));
        // Half of what can run: each has some rows to use its part of b for.
        let slices = (gpu.limits.resident_threads / 2 / SIMD).div_ceil(strips);
        let slices = slices.clamp(1, tiles.div_ceil(2));
        let [b_row, b_col] = strides(&self.b);
        let launch = Launch {
            team: Team::Block,
            vector: 1,
            grid: (strips * slices).div_ceil(BLOCK / SIMD),
            block: BLOCK,
            shared_bytes: 0,
        };
        self.draft(gpu, "thin::few_inner", self.b.layout.shape[0].next_multiple_of(TILE))
            .constant("SLICES", slices as i64)
            .constant("A_ROW", strides(&self.a)[0] as i64)
            .constant("B_ROW", b_row as i64)
            .constant("B_COL", b_col as i64)
            .finish(launch)
    }

    /// What both kernels are told. `width` is the thin side, in whole tiles.
    fn draft<'g>(&self, gpu: Gpu<'g>, template: &'static str, width: usize) -> Draft<'g> {
        let [m, n] = [0, 1].map(|dim| self.out.layout.shape[dim]);
        let k = self.b.layout.shape[0];
        let places = [&self.a, &self.b, &self.out];
        let reach = |place: &&Place| {
            let [row, col] = strides(place).map(isize::unsigned_abs);
            place.layout.shape[0] * row + place.layout.shape[1] * col
        };
        let furthest = places.iter().map(reach).max().unwrap_or(0);
        let dtype: DType = self.out.dtype;
        Draft::new(gpu, "gemm", template)
            .reads(self.a.binding, "a", dtype)
            .reads(self.b.binding, "b", dtype)
            .writes(self.out.binding, "out", dtype)
            .aligned(RUN * dtype.size_bytes())
            .typedef("I", if furthest < 1 << 30 { "i32" } else { "i64" })
            .function("f32", "alpha", &format!("{:?}", self.alpha))
            .constant("ROWS", m as i64)
            .constant("COLS", n as i64)
            .constant("INNER", k as i64)
            .constant("WIDTH", width as i64)
            .constant("OUT_ROW", strides(&self.out)[0] as i64)
            .constant("ACCUMULATE", i64::from(self.accumulate))
    }
}

fn strides(place: &Place) -> [isize; 2] {
    [place.layout.strides[0], place.layout.strides[1]]
}

fn is_run(elements: isize) -> bool {
    elements.unsigned_abs().is_multiple_of(RUN)
}
