//! Weights in blocks.
//!
//! ```text
//! format ── what a block of each format means     isa ── what the loops ask of an instruction set
//! unpack ── blocks to f32                         dot ── rows of blocks times a rounded vector
//!                                                 vnni ─ the same of Q4_1, two blocks to an instruction
//! nf4 ───── both loops of NF4, a table of f32     int8 ─ many rows times panels of blocks
//! ```
//!
//! A few rows of activations are multiplied with the blocks as they are, in integers (NF4 in f32); so are many, panel by panel, where
//! the processor has AVX-512 VNNI. Elsewhere, for other formats and for `x w`, they are multiplied by the blocked product, which
//! unpacks the weights as it packs them: as bf16, to which it then rounds the activations too, where the processor multiplies
//! bf16; else as f32. The weight never exists as a whole.

mod dot;
mod format;
#[cfg(target_arch = "x86_64")]
mod int8;
mod isa;
mod nf4;
mod unpack;
#[cfg(target_arch = "x86_64")]
mod vnni;

use crate::cpu::gemm::{Multiply, Source, gemm_packed};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Out};
use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K,
    BlockQ8_0, BlockQ8_1, BlockQ8K,
};
use dot::{DotFn, Rounded};
use metal_candle_graph::BlockFormat;
use std::ops::Range;
use unpack::UnpackFn;

/// Rows of activations that are multiplied with the blocks as they are, at most.
const FEW_ROWS: usize = 4;
/// Weights of one task of such a product, about.
const TASK: usize = 1 << 16;
/// The tasks are a multiple of so many, so that two or four threads have equal parts.
const EVENLY: usize = 4;
/// Rows of the weight that are multiplied with one row of activations before the next.
const AT_A_TIME: usize = 32;

/// A weight of `rows x cols`, row-major in blocks along the columns.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    bytes: &'a [u8],
    format: BlockFormat,
    rows: usize,
    cols: usize,
    loops: Option<(UnpackFn, Dot)>,
}

/// A row of blocks times a vector.
#[derive(Clone, Copy)]
enum Dot {
    /// By the vector in eight bits.
    Rounded(DotFn),
    /// By the vector as it is.
    Exact(nf4::DotFn),
}

/// `f32[rows, cols]` from blocks. `args = [w]`
pub(crate) fn call_dequantize(
    args: &[Arg],
    outs: &mut [Out],
    format: BlockFormat,
    [rows, cols]: [usize; 2],
    parallel: bool,
) {
    let ([w], [out]) = (args, outs) else {
        panic!("metal-candle bug: dequantize takes one operand and gives one")
    };
    let w = Blocks::new(w, format, rows, cols);
    let out = out.slice::<f32>();
    assert_eq!(out.len(), rows * cols, "metal-candle bug: dequantize");
    parallel::for_each_row(parallel, out, cols, |row, out| w.row(row, 0..cols, out));
}

/// `x wᵀ`, or `x w` if `transposed`. `args = [x, w]`
pub(crate) fn call_gemm(
    args: &[Arg],
    outs: &mut [Out],
    format: BlockFormat,
    [rows, cols]: [usize; 2],
    transposed: bool,
    parallel: bool,
) {
    let ([x, w], [out]) = (args, outs) else {
        panic!("metal-candle bug: quant_gemm takes two operands and gives one")
    };
    let w = Blocks::new(w, format, rows, cols);
    let (from, to) = if transposed { (rows, cols) } else { (cols, rows) };
    let fits = x.shape().last() == Some(from) && out.shape().last() == Some(to);
    assert!(fits, "metal-candle bug: quant_gemm of {} to {}", x.shape(), out.shape());
    for_float!(x.dtype(), T => {
        let x = x.read::<T>();
        let m = x.rows();
        let out = out.slice::<T>();
        assert_eq!(out.len(), m * to, "metal-candle bug: quant_gemm");
        if m == 0 || to == 0 {
            return;
        }
        if m > FEW_ROWS && let Some(x) = x.as_rows() {
            return w.product(x, out, transposed, parallel);
        }
        scratch::with(m * from, |packed: &mut [<T as Number>::Acc]| {
            for (row, to) in packed.chunks_exact_mut(from.max(1)).enumerate() {
                x.row(row).widen_to(to);
            }
            let narrow = <T as Number>::Acc::as_f32(packed).filter(|_| m <= FEW_ROWS && !transposed);
            match (narrow, w.loops) {
                (Some(x), Some((_, dot))) => times_few::<T>(x, &w, dot, out, parallel),
                _ => w.product(Mat::dense(packed, m, from), out, transposed, parallel),
            }
        });
    });
}

/// `out = x wᵀ` for a few rows x.
fn times_few<T: Float>(x: &[f32], w: &Blocks, dot: Dot, out: &mut [T], parallel: bool) {
    match dot {
        Dot::Rounded(dot) => Rounded::with(x, w.cols, |x| {
            times_rows(|| x.rows(), w, dot, out, parallel);
        }),
        Dot::Exact(dot) => {
            let rows = || x.chunks_exact(w.cols.max(1));
            times_rows(rows, w, dot, out, parallel);
        }
    }
}

/// A task is some rows of the weight.
fn times_rows<'x, T: Float, X: Sync + 'x, R: Iterator<Item = &'x [X]>>(
    x: impl Fn() -> R + Sync,
    w: &Blocks,
    dot: unsafe fn(&[u8], &[X], &mut [f32]),
    out: &mut [T],
    parallel: bool,
) {
    let row_bytes = w.bytes.len() / w.rows;
    let tasks = (w.rows * w.cols).div_ceil(TASK).max(1).next_multiple_of(EVENLY);
    let len = w.rows.div_ceil(tasks).next_multiple_of(4);
    let out = Parts::new(out);
    parallel::for_each(parallel, w.rows.div_ceil(len), |task| {
        let end = ((task + 1) * len).min(w.rows);
        for first in (task * len..end).step_by(AT_A_TIME) {
            let rows = AT_A_TIME.min(end - first);
            let blocks = &w.bytes[first * row_bytes..(first + rows) * row_bytes];
            for (i, x) in x().enumerate() {
                let (mut y, mut wide) = ([0.0; AT_A_TIME], [T::Acc::ZERO; AT_A_TIME]);
                // SAFETY: this processor has what the loop was compiled for.
                unsafe { dot(blocks, x, &mut y[..rows]) };
                T::Acc::from_f32_all(&y, &mut wide);
                // SAFETY: the results of a row of the weight belong to its task.
                T::narrow_all(&wide[..rows], unsafe { out.part(i * w.rows + first, rows) });
            }
        }
    });
}

/// A weight as a factor whose rows are columns of the result: `x wᵀ`.
struct ByRows<'a>(Blocks<'a>);
/// A weight as a factor whose columns are columns of the result: `x w`.
struct ByColumns<'a>(Blocks<'a>);

/// Both factors, packed as `$packed` from weights unpacked as `$wide`.
macro_rules! sources {
    ($($packed:ty: $wide:ty),*) => {$(
        impl Source<$packed> for ByRows<'_> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$packed]) {
                let (rows, cols) = (outer.len(), k.len());
                scratch::with(rows * cols, |wide: &mut [$wide]| {
                    for (row, wide) in outer.zip(wide.chunks_exact_mut(cols)) {
                        self.0.row(row, k.clone(), wide);
                    }
                    Mat::dense(wide, rows, cols).pack(0..rows, 0..cols, width, to);
                });
            }
        }

        impl Source<$packed> for ByColumns<'_> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$packed]) {
                let unit = self.0.unit();
                let start = outer.start / unit * unit;
                let cols = outer.end.next_multiple_of(unit) - start;
                let rows = k.len();
                scratch::with(rows * cols, |wide: &mut [$wide]| {
                    for (row, wide) in k.zip(wide.chunks_exact_mut(cols)) {
                        self.0.row(row, start..start + cols, wide);
                    }
                    let by_columns = Mat::dense(wide, rows, cols).transposed();
                    by_columns.pack(outer.start - start..outer.end - start, 0..rows, width, to);
                });
            }
        }
    )*};
}
sources!(u32: f32, f32: f32, f64: f64);

/// What integer products are added up in.
#[cfg(target_arch = "x86_64")]
fn is_f32<A: crate::element::Element>() -> bool {
    A::DTYPE == metal_candle_graph::DType::F32
}

impl<'a> Blocks<'a> {
    pub(crate) fn new(w: &Arg<'a>, format: BlockFormat, rows: usize, cols: usize) -> Blocks<'a> {
        let bytes = w.slice::<u8>();
        let expected = format.bytes_for(cols).map(|row| row * rows);
        assert_eq!(Some(bytes.len()), expected, "metal-candle bug: {format:?} of {rows} x {cols}");
        Blocks { bytes, format, rows, cols, loops: unpack::loops(format) }
    }

    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Some rows in `to`.
    pub(crate) fn dense_rows<'b, A: Real>(
        &self,
        range: Range<usize>,
        to: &'b mut [A],
    ) -> Mat<'b, A> {
        let to = &mut to[..range.len() * self.cols];
        for (row, to) in range.clone().zip(to.chunks_exact_mut(self.cols.max(1))) {
            self.row(row, 0..self.cols, to);
        }
        Mat::dense(to, range.len(), self.cols)
    }

    /// How many weights can be unpacked by themselves.
    fn unit(&self) -> usize {
        if self.loops.is_some() { format::LEN } else { self.format.block_len() }
    }

    /// `x wᵀ` or `x w` of many rows.
    fn product<T: Float, X: Multiply<Acc: Real>>(
        self,
        x: Mat<'_, X>,
        out: &mut [T],
        transposed: bool,
        parallel: bool,
    ) {
        #[cfg(target_arch = "x86_64")]
        if !transposed
            && is_f32::<X::Acc>()
            && let Some(loops) = int8::loops(self.format)
        {
            return loops.product(x, &self, out, parallel);
        }
        let n = if transposed { self.cols } else { self.rows };
        let out = MatMut::dense(out, x.rows(), n);
        if transposed {
            gemm_packed(out, x, &ByColumns(self), parallel);
        } else {
            gemm_packed(out, x, &ByRows(self), parallel);
        }
    }

    /// The weights of `row` in columns `range`, which are whole units.
    fn row<A: Real>(&self, row: usize, range: Range<usize>, to: &mut [A]) {
        let block = self.format.block_len();
        let at = |col: usize| (row * self.cols + col) / block * self.format.block_bytes();
        let bytes = &self.bytes[at(range.start)..at(range.end.next_multiple_of(block))];
        if let (Some((unpack, _)), Some(to)) = (self.loops, A::as_f32_mut(to)) {
            // SAFETY: this processor has what the loop was compiled for.
            return unsafe { unpack(bytes, range.start % block / format::LEN, to) };
        }
        if !range.start.is_multiple_of(block) || !range.end.is_multiple_of(block) {
            // Part of a block, for a format whose blocks are unpacked as a whole.
            let (start, end) = (range.start / block * block, range.end.next_multiple_of(block));
            return scratch::with(end - start, |wide: &mut [A]| {
                self.row(row, start..end, wide);
                to.copy_from_slice(&wide[range.start - start..range.end - start]);
            });
        }
        match self.format {
            BlockFormat::Q4_0 => blocks_to_float::<BlockQ4_0, A>(bytes, to),
            BlockFormat::Q4_1 => blocks_to_float::<BlockQ4_1, A>(bytes, to),
            BlockFormat::Q5_0 => blocks_to_float::<BlockQ5_0, A>(bytes, to),
            BlockFormat::Q5_1 => blocks_to_float::<BlockQ5_1, A>(bytes, to),
            BlockFormat::Q8_0 => blocks_to_float::<BlockQ8_0, A>(bytes, to),
            BlockFormat::Q8_1 => blocks_to_float::<BlockQ8_1, A>(bytes, to),
            BlockFormat::Q2K => blocks_to_float::<BlockQ2K, A>(bytes, to),
            BlockFormat::Q3K => blocks_to_float::<BlockQ3K, A>(bytes, to),
            BlockFormat::Q4K => blocks_to_float::<BlockQ4K, A>(bytes, to),
            BlockFormat::Q5K => blocks_to_float::<BlockQ5K, A>(bytes, to),
            BlockFormat::Q6K => blocks_to_float::<BlockQ6K, A>(bytes, to),
            BlockFormat::Q8K => blocks_to_float::<BlockQ8K, A>(bytes, to),
            BlockFormat::NF4 => scratch::with(to.len(), |wide: &mut [f32]| {
                // SAFETY: this processor has what the loop was compiled for.
                unsafe { nf4::loops().0(bytes, 0, wide) };
                A::from_f32_all(wide, to);
            }),
        }
    }
}

/// Dequantises whole blocks, a few at a time: the bytes may lie at any address, the blocks may not.
fn blocks_to_float<B: Block, A: Real>(bytes: &[u8], to: &mut [A]) {
    const AT_A_TIME: usize = 4;
    let mut aligned: [B; AT_A_TIME] = std::array::from_fn(|_| B::zeros());
    let mut wide = [0f32; AT_A_TIME * 256];
    let bytes = bytes.chunks(AT_A_TIME * size_of::<B>());
    for (bytes, to) in bytes.zip(to.chunks_mut(AT_A_TIME * B::BLCK_SIZE)) {
        let (blocks, wide) = (&mut aligned[..bytes.len() / size_of::<B>()], &mut wide[..to.len()]);
        // SAFETY: as many bytes as the blocks have; any bytes are a block.
        unsafe {
            let blocks = blocks.as_mut_ptr().cast::<u8>();
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), blocks, bytes.len());
        }
        B::to_float(blocks, wide);
        A::from_f32_all(wide, to);
    }
}

/// A block format of Candle's.
///
/// # Safety
/// Any bytes are a block.
unsafe trait Block: GgmlType {}
macro_rules! blocks {
    ($($block:ty),*) => {$(
        // SAFETY: `repr(C)` structs of integers and floats, without padding.
        unsafe impl Block for $block {}
    )*};
}
blocks!(BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0, BlockQ8_1);
blocks!(BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K);
