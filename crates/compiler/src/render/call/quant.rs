//! Products with weights in blocks.
//!
//! A few rows are multiplied with the blocks as they are, by a kernel that reads each block once. For many, the
//! weight is unpacked a panel of its output's columns at a time, which a product of the library multiplies; so no sum is
//! ever made in parts.

use super::draft::{Draft, Gpu};
use super::factor::{Matrix, Workspace, convert, dense, product, rows};
use super::walk::Walk;
use super::{Call, Part, Place};
use crate::render::Binding;
use crate::render::launch::SIMD;
use crate::{Layout, Operand};
use metal_candle_graph::{BlockFormat, DType};
use std::ops::Range;

/// The most rows that are multiplied with the blocks as they are.
const FEW_ROWS: usize = 8;
/// Panels of a weight take so much of what the workspace may.
const PANEL_PART: usize = 4;
/// Weights that a thread reads together.
const RUN: usize = 8;

/// Blocks of a matrix, or of a part of it.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    binding: Binding,
    format: BlockFormat,
    rows: usize,
    cols: usize,
    row_bytes: usize,
    offset_bytes: usize,
}

impl Blocks {
    pub(super) fn new(
        arg: u32,
        w: &Operand,
        format: BlockFormat,
        [rows, cols]: [usize; 2],
    ) -> Blocks {
        let row_bytes = format.bytes_for(cols).expect("metal-candle bug: a part of a block");
        let offset_bytes = w.layout.offset as usize;
        Blocks { binding: Binding::Arg(arg), format, rows, cols, row_bytes, offset_bytes }
    }

    pub(super) fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Rows (0) `range`, or columns (1), which are whole blocks.
    pub(super) fn narrow(&self, dim: usize, range: Range<usize>) -> Blocks {
        let (start, len) = (range.start, range.len());
        if dim == 0 {
            let offset_bytes = self.offset_bytes + start * self.row_bytes;
            return Blocks { rows: len, offset_bytes, ..*self };
        }
        let bytes = self.format.bytes_for(start).expect("metal-candle bug: a part of a block");
        Blocks { cols: len, offset_bytes: self.offset_bytes + bytes, ..*self }
    }

    /// The words in which blocks can be read, wherever they start: in bytes.
    fn word(&self) -> usize {
        let widest = match self.format {
            BlockFormat::Q4_0 | BlockFormat::Q5_0 | BlockFormat::Q8_0 => 2,
            BlockFormat::Q3K | BlockFormat::Q6K => 2,
            BlockFormat::Q4_1 | BlockFormat::Q5_1 | BlockFormat::Q8_1 => 4,
            BlockFormat::Q2K | BlockFormat::Q8K | BlockFormat::NF4 => 4,
            BlockFormat::Q4K | BlockFormat::Q5K => 8,
        };
        let mut word = widest;
        while !self.offset_bytes.is_multiple_of(word) {
            word /= 2;
        }
        word
    }

    /// Where they begin.
    fn place(&self) -> Binding {
        self.binding.further(self.offset_bytes)
    }

    /// A kernel that reads the blocks.
    fn reads<'a>(&self, draft: Draft<'a>) -> Draft<'a> {
        let word = self.word();
        let format = format!("{:?}<u{}>", self.format, 8 * word);
        draft
            .operand(self.place(), "weight", "u8", false)
            .aligned(word)
            .typedef("FORMAT", &format)
            .type_argument("K::FORMAT")
            .constant("ROW_BYTES", self.row_bytes as i64)
            .constant("RUNS", (self.cols / RUN) as i64)
    }

    /// All weights, dense at `out`.
    pub(super) fn dequantize(
        &self,
        gpu: Gpu<'_>,
        call: &'static str,
        out: Binding,
        dtype: DType,
    ) -> Option<Part> {
        let runs = self.rows * self.cols / RUN;
        let walk = Walk::over(&[runs]);
        let draft = self
            .reads(Draft::new(gpu, call, "dequantize"))
            .writes(out, "out", dtype)
            .aligned(16)
            .walk(&walk, runs * RUN);
        (runs > 0).then(|| draft.finish(gpu.elements(runs)))
    }
}

/// `args = [w]`
pub(super) fn dequantize(
    gpu: Gpu<'_>,
    args: &[Operand],
    outs: &[Operand],
    format: BlockFormat,
    dims: [usize; 2],
) -> Call {
    let out = outs[0].dtype;
    let blocks = Blocks::new(0, &args[0], format, dims);
    let part = blocks.dequantize(gpu, "dequantize", Binding::Out(0), out);
    Call { parts: part.into_iter().collect(), workspace_bytes: 0 }
}

/// `args = [x, w]`: `x wᵀ`, or `x w` if `transposed`.
pub(super) fn gemm(
    gpu: Gpu<'_>,
    args: &[Operand],
    out: &Operand,
    format: BlockFormat,
    dims: [usize; 2],
    transposed: bool,
) -> Call {
    let (x, blocks) = (&args[0], Blocks::new(1, &args[1], format, dims));
    if out.layout.shape.is_empty() {
        return Call { parts: Vec::new(), workspace_bytes: 0 };
    }
    let n = if transposed { blocks.cols } else { blocks.rows };
    let m = out.layout.shape.len() / n;
    if m <= FEW_ROWS && !transposed && blocks.cols > 0 {
        return Call { parts: vec![few(gpu, x, &blocks, out, m)], workspace_bytes: 0 };
    }
    many(gpu, x, &blocks, out, transposed)
}

/// `x wᵀ` for m rows, by the blocks as they are.
fn few(gpu: Gpu<'_>, x: &Operand, blocks: &Blocks, out: &Operand, m: usize) -> Part {
    let rank = x.layout.shape.rank();
    let step = x.layout.strides[rank - 1];
    let row = |o: &Operand| o.layout.shape.with(rank - 1, 1);
    let from = row(x);
    let walk = Walk::over(from.dims())
        .place("from", x.layout.strides(), x.layout.offset)
        .place("to", out.layout.strides(), out.layout.offset)
        .collapsed();
    let vector = vector(&walk, step, x.dtype);
    // As many as sums fit into registers, where there are enough for the whole device.
    let plenty = blocks.rows * SIMD >= gpu.limits.resident_threads;
    let at_once = if m <= 4 && plenty { 2 } else { 1 };
    let draft = Draft::new(gpu, "quant_gemm", "quant_rows").asks_first(blocks.place()).reads(
        Binding::Arg(0),
        "x",
        x.dtype,
    );
    let draft = blocks
        .reads(draft)
        .template(m)
        .template(at_once)
        .writes(Binding::Out(0), "out", out.dtype)
        .numbers(x.dtype)
        .constant("ROWS", blocks.rows as i64)
        .constant("VECTOR", vector as i64)
        .constant("STEP", step as i64)
        .aligned(vector * x.dtype.size_bytes())
        .walk(&walk, blocks.cols * step.unsigned_abs() + blocks.rows);
    draft.finish(gpu.simd_rows(blocks.rows.div_ceil(at_once)))
}

/// How many of eight neighbours of x can be loaded as one.
pub(super) fn vector(walk: &Walk, step: isize, dtype: DType) -> usize {
    let mut vector = (16 / dtype.size_bytes()).min(RUN);
    while vector > 1 && !(step == 1 && walk.starts_at_multiples("from", vector)) {
        vector /= 2;
    }
    vector
}

/// Unpacks panels of the weight, and multiplies them.
fn many(gpu: Gpu<'_>, x: &Operand, blocks: &Blocks, out: &Operand, transposed: bool) -> Call {
    let call = "quant_gemm";
    let (mut parts, mut workspace) = (Vec::new(), Workspace::default());
    let factor = factor(gpu, x.dtype);
    let x = rows_of(gpu, (Binding::Arg(0), x), factor, &mut workspace, &mut parts);
    let out_layout = rows(&out.layout).expect("metal-candle bug: a result that is not dense");
    let out = Place { binding: Binding::Out(0), dtype: out.dtype, layout: out_layout };
    let (dim, n) = if transposed { (1, blocks.cols) } else { (0, blocks.rows) };
    let inner = if transposed { blocks.rows } else { blocks.cols };
    let panel = panel(gpu, n, inner * factor.size_bytes());
    let at = workspace.take(panel * inner * factor.size_bytes());
    let weight = Matrix::Blocks(*blocks);
    for start in (0..n).step_by(panel) {
        let range = start..(start + panel).min(n);
        let w = weight.part(gpu, call, (dim, range.clone()), factor, at, &mut parts);
        let b = if transposed { w } else { w.transposed() };
        let to = out.narrow(1, range.clone());
        parts.push(product(&x, &b, &to, false));
    }
    Call { parts, workspace_bytes: workspace.bytes() }
}

/// Columns of a panel, of so many bytes each: a multiple of the longest block.
pub(super) fn panel(gpu: Gpu<'_>, n: usize, column_bytes: usize) -> usize {
    let most = gpu.limits.workspace_bytes / PANEL_PART / column_bytes.max(1);
    if n <= most { n.max(1) } else { (most / 256 * 256).max(256) }
}

/// The dtype in which a quantised weight and what it is multiplied with are factors: 16 bits, but for f64; f32 where
/// products of 16 bits would give 16 bits only.
pub(super) fn factor(gpu: Gpu<'_>, x: DType) -> DType {
    match x {
        DType::F64 | DType::F16 | DType::BF16 => x,
        _ if gpu.limits.widening_products => DType::BF16,
        _ => DType::F32,
    }
}

/// x as a matrix of rows and a factor of this dtype.
pub(super) fn rows_of(
    gpu: Gpu<'_>,
    (binding, x): (Binding, &Operand),
    factor: DType,
    workspace: &mut Workspace,
    parts: &mut Vec<Part>,
) -> Place {
    if let (Some(layout), true) = (rows(&x.layout), x.dtype == factor) {
        return Place { binding, dtype: x.dtype, layout };
    }
    let shape = x.layout.shape;
    let cols = shape[shape.rank() - 1];
    let dims = [shape.len() / cols.max(1), cols];
    let to = dense(workspace.take(shape.len() * factor.size_bytes()), factor, dims);
    let from = Place { binding, dtype: x.dtype, layout: x.layout };
    let all = Place { layout: Layout::contiguous(shape), ..to.clone() };
    parts.extend(convert(gpu, "convert", &from, &all));
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_the_values_of_nf4() {
        let header = include_str!("quant.h");
        let (_, list) = header.split_once("NF4_VALUES[16] = {").unwrap();
        let (list, _) = list.split_once("};").unwrap();
        let values = list.split(',').map(str::trim).filter(|value| !value.is_empty());
        let values: Vec<f32> = values.map(|x| x.trim_end_matches('f').parse().unwrap()).collect();
        assert_eq!(values, BlockFormat::NF4_VALUES);
    }
}
