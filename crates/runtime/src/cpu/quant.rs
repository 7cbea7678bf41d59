//! Weights in GGUF blocks: dequantised a panel of rows at a time, into the cache, and multiplied there.
//!
//! What a block means is Candle's word ([`GgmlType::to_float`]). A single row is multiplied with the blocks as they
//! are.

mod unpack;

use crate::cpu::gemm::gemm;
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
use metal_candle_graph::BlockFormat;
use unpack::{DotFn, UnpackFn};

/// Weights of one panel: 256 KiB of f32, which stay in the L2 cache.
const PANEL: usize = 1 << 16;
/// Columns of one task of the transposed product: whole blocks of every format.
const COLUMNS: usize = 256;

/// A weight of `rows x cols`, row-major in blocks along the columns.
#[derive(Clone, Copy)]
pub(crate) struct Blocks<'a> {
    bytes: &'a [u8],
    format: BlockFormat,
    rows: usize,
    cols: usize,
    loops: Option<(UnpackFn, DotFn)>,
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
    parallel::for_each_row(parallel, out, cols, |row, out| w.dequantize(row, 0, out));
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
        assert_eq!(out.shape().len(), m * to, "metal-candle bug: quant_gemm");
        let out = Parts::new(out.slice::<T>());
        scratch::with(m * from, |packed| {
            for (row, to) in packed.chunks_exact_mut(from.max(1)).enumerate() {
                x.row(row).widen_to(to);
            }
            let row = <T as Number>::Acc::as_f32(packed).filter(|_| m == 1 && !transposed);
            if let (Some(x), Some((_, dot))) = (row, w.loops) {
                times_row::<T>(x, &w, dot, out, parallel);
            } else if transposed {
                times_transposed::<T>(Mat::dense(packed, m, from), &w, out, parallel);
            } else {
                times::<T>(Mat::dense(packed, m, from), &w, out, parallel);
            }
        });
    });
}

/// `out = x wᵀ` for one row x: a task is some rows of the weight, each multiplied as it is.
fn times_row<T: Float>(x: &[f32], w: &Blocks, dot: DotFn, out: Parts<T>, parallel: bool) {
    let row_bytes = w.bytes.len() / w.rows.max(1);
    let panel = (PANEL / w.cols.max(1)).clamp(4, 64);
    scratch::with(unpack::sums_len(x.len()), |sums: &mut [f32]| {
        unpack::block_sums(x, sums);
        let sums = &*sums;
        parallel::for_each(parallel, w.rows.div_ceil(panel), |task| {
            let start = task * panel;
            let len = panel.min(w.rows - start);
            // SAFETY: the rows of a panel belong to its task.
            let out = unsafe { out.part(start, len) };
            for (out, row) in out.iter_mut().zip(w.bytes[start * row_bytes..].chunks(row_bytes)) {
                let mut y = 0.0;
                // SAFETY: this processor has what the loop was compiled for.
                unsafe { dot(row, x, sums, &mut y) };
                let mut wide = [T::Acc::ZERO];
                T::Acc::from_f32_all(&[y], &mut wide);
                *out = T::narrow(wide[0]);
            }
        });
    });
}

/// `out = x wᵀ`: a task is one panel of the weight's rows, which are columns of the result.
fn times<T: Float>(x: Mat<'_, T::Acc>, w: &Blocks, out: Parts<T>, parallel: bool) {
    let panel = (PANEL / w.cols.max(1)).clamp(4, 64);
    parallel::for_each(parallel, w.rows.div_ceil(panel), |task| {
        let start = task * panel;
        let len = panel.min(w.rows - start);
        scratch::split([len * w.cols, x.rows() * len], |[wide, y]: [&mut [T::Acc]; 2]| {
            for (i, to) in wide.chunks_exact_mut(w.cols.max(1)).enumerate() {
                w.dequantize(start + i, 0, to);
            }
            let w_panel = Mat::dense(wide, len, w.cols).transposed();
            let one = T::Acc::from_f64(1.0);
            gemm(MatMut::dense(y, x.rows(), len), x, w_panel, one, false, false);
            store(y, len, start, w.rows, out);
        });
    });
}

/// `out = x w`: a task is some columns of the weight, which are columns of the result. Their sums run over all the
/// weight's rows, panel by panel.
fn times_transposed<T: Float>(x: Mat<'_, T::Acc>, w: &Blocks, out: Parts<T>, parallel: bool) {
    let panel = PANEL / COLUMNS;
    parallel::for_each(parallel, w.cols.div_ceil(COLUMNS), |task| {
        let start = task * COLUMNS;
        let cols = COLUMNS.min(w.cols - start);
        scratch::split([panel * cols, x.rows() * cols], |[wide, y]: [&mut [T::Acc]; 2]| {
            y.fill(T::Acc::ZERO);
            for row in (0..w.rows).step_by(panel) {
                let len = panel.min(w.rows - row);
                for (i, to) in wide.chunks_exact_mut(cols).take(len).enumerate() {
                    w.dequantize(row + i, start, to);
                }
                let w_panel = Mat::dense(&wide[..len * cols], len, cols);
                let (x, one) = (x.col_range(row, len), T::Acc::from_f64(1.0));
                gemm(MatMut::dense(y, x.rows(), cols), x, w_panel, one, true, false);
            }
            store(y, cols, start, w.cols, out);
        });
    });
}

/// Rounds rows of `len` into columns `start..` of the rows of the output.
fn store<T: Float>(y: &[T::Acc], len: usize, start: usize, cols: usize, out: Parts<T>) {
    for (row, y) in y.chunks_exact(len).enumerate() {
        // SAFETY: the columns of a panel belong to its task.
        T::narrow_all(y, unsafe { out.part(row * cols + start, len) });
    }
}

impl<'a> Blocks<'a> {
    fn new(w: &Arg<'a>, format: BlockFormat, rows: usize, cols: usize) -> Blocks<'a> {
        let bytes = w.slice::<u8>();
        let expected = format.bytes_for(cols).map(|row| row * rows);
        assert_eq!(Some(bytes.len()), expected, "metal-candle bug: {format:?} of {rows} x {cols}");
        Blocks { bytes, format, rows, cols, loops: unpack::loops(format) }
    }

    /// The weights of `row` from column `start` on, which is the first of a block.
    fn dequantize<A: Real>(&self, row: usize, start: usize, to: &mut [A]) {
        let block = self.format.block_len();
        let at = (row * self.cols + start) / block * self.format.block_bytes();
        let bytes = &self.bytes[at..at + to.len() / block * self.format.block_bytes()];
        if let (Some((unpack, _)), Some(to)) = (self.loops, A::as_f32_mut(to)) {
            // SAFETY: this processor has what the loop was compiled for.
            return unsafe { unpack(bytes, to) };
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
