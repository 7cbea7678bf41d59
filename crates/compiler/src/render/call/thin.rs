//! Products with a thin side on tensor cores: LoRA's, forward and backward.

use super::Call;
use super::draft::{BLOCK, Draft, Gpu};
use crate::render::Binding;
use crate::{Layout, Operand};
use metal_candle_graph::DType;

/// Columns of the thin factor: a multiple of this, and at most so many.
const COLUMNS: usize = 16;
const MOST_COLUMNS: usize = 64;
/// Fewer rows than these leave most of a device idle.
const LEAST_ROWS: usize = 512;
const LEAST_WIDE: usize = 64;
/// As the header has them: terms of a part at once; rows and columns of the wide factor that a block has at once.
const DEPTH: usize = 128;
const ROWS: usize = 128;
const WIDE: usize = 64;

/// `args = [a: [m, k], b: [k, n]]`
struct Thin<'a> {
    args: [&'a Operand; 2],
    out: &'a Operand,
    alpha: f64,
    accumulate: bool,
}

/// The last two dims' extents and strides.
#[derive(Clone, Copy)]
struct Matrix {
    rows: usize,
    cols: usize,
    down: isize,
    across: isize,
}

pub(super) fn thin(
    gpu: Gpu<'_>,
    [a, b]: [&Operand; 2],
    out: &Operand,
    alpha: f64,
    accumulate: bool,
) -> Option<Call> {
    let factors = matches!(a.dtype, DType::BF16 | DType::F16) && a.dtype == b.dtype;
    let result = out.dtype == a.dtype || out.dtype == DType::F32;
    if !(gpu.limits.tensor_cores && factors && result) {
        return None;
    }
    let thin = Thin { args: [a, b], out, alpha, accumulate };
    thin.rows_by_few(gpu).or_else(|| thin.columns_by_few(gpu))
}

impl Thin<'_> {
    /// Many rows of a, few columns of b.
    fn rows_by_few(&self, gpu: Gpu<'_>) -> Option<Call> {
        let [a, b] = self.args;
        let [x, w, y] = [matrix(&a.layout)?, matrix(&b.layout)?, matrix(&self.out.layout)?];
        let suits = x.rows >= LEAST_ROWS && x.cols >= LEAST_WIDE && x.cols.is_multiple_of(8);
        let pairs = y.across == 1 && even(y.down) && even(self.out.layout.offset);
        if !(is_thin(w.cols) && suits && pairs && wide(x.down, x.across, &a.layout)) {
            return None;
        }
        let (side_by_side, step) = match () {
            () if wide(w.across, w.down, &b.layout) => (true, w.across),
            () if wide(w.down, w.across, &b.layout) => (false, w.down),
            () => return None,
        };
        let groups = row_groups(gpu, x.rows);
        let parts = BLOCK / 32 / groups;
        let blocks = x.rows.div_ceil(16 * groups);
        let few_bytes = match side_by_side {
            true => w.cols * (2 * DEPTH + 64),
            false => DEPTH * (2 * w.cols + 16) + DEPTH / 8 * 32,
        };
        let staged = 2 * parts * few_bytes;
        let joined = if parts > 1 { BLOCK * w.cols / 2 * size_of::<f32>() } else { 0 };
        let launch = gpu.block_rows(blocks, BLOCK, staged.max(joined));
        let reach = x.rows * x.down.unsigned_abs() + x.cols + w.cols * step.unsigned_abs();
        let draft = self
            .draft(gpu, "thin::rows_by_few", reach + x.rows * y.down.unsigned_abs())
            .reads(start(Binding::Arg(0), a), "x", a.dtype)
            .reads(start(Binding::Arg(1), b), "w", b.dtype)
            .writes(start(Binding::Out(0), self.out), "out", self.out.dtype)
            .aligned(16)
            .constant("ROWS", x.rows as i64)
            .constant("INNER", x.cols as i64)
            .constant("COLS", w.cols as i64)
            .constant("ROW_GROUPS", groups as i64)
            .constant("PARTS", parts as i64)
            .constant("FEW_BYTES", few_bytes as i64)
            .constant("BLOCKS", blocks as i64)
            .constant("TERMS_SIDE_BY_SIDE", i64::from(side_by_side))
            .constant("X_STEP", x.down as i64)
            .constant("W_STEP", step as i64)
            .constant("OUT_STEP", y.down as i64);
        Some(Call { parts: vec![draft.waits().finish(launch)], workspace_bytes: 0 })
    }

    /// Sums over many rows: the wide factor's columns times the few of the other; either may be transposed.
    fn columns_by_few(&self, gpu: Gpu<'_>) -> Option<Call> {
        let [a, b] = self.args;
        let [left, right] = [matrix(&a.layout)?, matrix(&b.layout)?];
        let out = matrix(&self.out.layout)?;
        // As [sum, columns] each; which of the two is thin.
        let turned =
            Matrix { rows: left.cols, cols: left.rows, down: left.across, across: left.down };
        let (wide_first, x, few) = match is_thin(right.cols) {
            true => (true, turned, right),
            false => (false, right, turned),
        };
        let [from, from_few] = if wide_first { [0, 1] } else { [1, 0] };
        let operands = [from, from_few].map(|i: u32| self.args[i as usize]);
        let suits = is_thin(few.cols) && x.cols >= LEAST_WIDE && x.cols.is_multiple_of(8);
        let reads = wide(x.down, x.across, &operands[0].layout)
            && wide(few.down, few.across, &operands[1].layout);
        if !(suits && reads && x.rows >= 2 * LEAST_ROWS) {
            return None;
        }
        let steps = if wide_first { [out.down, out.across] } else { [out.across, out.down] };
        let across = x.cols.div_ceil(WIDE);
        // About as many blocks as the device has at once.
        let wanted = gpu.limits.resident_threads / 256;
        let shares = (wanted / across).clamp(1, x.rows.div_ceil(ROWS));
        let share = x.rows.div_ceil(shares).next_multiple_of(ROWS);
        let shares = x.rows.div_ceil(share);
        let shared_bytes = ROWS * (2 * WIDE + 2 * few.cols + 16);
        let launch = gpu.block_rows(across * shares, 128, shared_bytes);
        let reach = x.rows * (x.down.unsigned_abs() + few.down.unsigned_abs());
        let elements = x.cols * few.cols;
        let sums = self
            .draft(gpu, "thin::columns_by_few", reach + shares * elements)
            .reads(start(Binding::Arg(from), operands[0]), "x", operands[0].dtype)
            .reads(start(Binding::Arg(from_few), operands[1]), "few", operands[1].dtype)
            .writes(Binding::Workspace { offset_bytes: 0 }, "shares", DType::F32)
            .aligned(16)
            .constant("INNER", x.rows as i64)
            .constant("WIDE_COLS", x.cols as i64)
            .constant("COLS", few.cols as i64)
            .constant("ACROSS", across as i64)
            .constant("SHARE", share as i64)
            .constant("BLOCKS", (across * shares) as i64)
            .constant("X_STEP", x.down as i64)
            .constant("W_STEP", few.down as i64);
        let all = self
            .draft(gpu, "thin::add_shares", shares * elements + reach_of(&self.out.layout))
            .reads(Binding::Workspace { offset_bytes: 0 }, "shares", DType::F32)
            .writes(start(Binding::Out(0), self.out), "out", self.out.dtype)
            .constant("ELEMENTS", elements as i64)
            .constant("COLS", few.cols as i64)
            .constant("SHARES", shares as i64)
            .constant("OUT_WIDE_STEP", steps[0] as i64)
            .constant("OUT_STEP", steps[1] as i64);
        let parts = vec![sums.waits().finish(launch), all.finish(gpu.elements(4 * elements))];
        Some(Call { parts, workspace_bytes: shares * elements * size_of::<f32>() })
    }

    fn draft<'g>(&self, gpu: Gpu<'g>, template: &'static str, reach: usize) -> Draft<'g> {
        Draft::new(gpu, "gemm", template)
            .numbers(DType::F32)
            .constant("ACCUMULATE", i64::from(self.accumulate))
            .function("A", "alpha", &format!("{:?}", self.alpha))
            .counted_to(reach)
    }
}

/// Where an operand's first element is.
fn start(binding: Binding, operand: &Operand) -> Binding {
    binding.further(operand.layout.offset as usize * operand.dtype.size_bytes())
}

/// One matrix, whatever dims of extent 1 it has before its rows.
fn matrix(layout: &Layout) -> Option<Matrix> {
    let [rows, cols] = [layout.shape.rank().checked_sub(2)?, layout.shape.rank() - 1];
    let one = (0..rows).all(|d| layout.shape[d] == 1) && layout.offset >= 0;
    let strides = [layout.strides[rows], layout.strides[cols]];
    let forwards = strides.iter().all(|stride| *stride >= 0);
    (one && forwards).then(|| Matrix {
        rows: layout.shape[rows],
        cols: layout.shape[cols],
        down: strides[0],
        across: strides[1],
    })
}

fn is_thin(columns: usize) -> bool {
    columns.is_multiple_of(COLUMNS) && (COLUMNS..=MOST_COLUMNS).contains(&columns)
}

/// Whether rows `down` from each other are read in accesses of eight elements.
fn wide(down: isize, across: isize, layout: &Layout) -> bool {
    across == 1 && down % 8 == 0 && layout.offset % 8 == 0
}

fn even(x: isize) -> bool {
    x % 2 == 0
}

fn reach_of(layout: &Layout) -> usize {
    let steps = layout.shape.dims().iter().zip(layout.strides());
    steps.map(|(extent, stride)| extent * stride.unsigned_abs()).sum()
}

/// Groups of 16 rows that a block has: as many as leave work for all multiprocessors.
fn row_groups(gpu: Gpu<'_>, rows: usize) -> usize {
    let busy = 3 * gpu.limits.resident_threads / 4096;
    [8, 4].into_iter().find(|groups| rows.div_ceil(16 * groups) >= busy).unwrap_or(2)
}
