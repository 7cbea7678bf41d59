//! Products by Candle's Metal kernels (MLX's GEMM and GEMV), asked for with all that these can do and Candle's own calls
//! leave out: a place to start in the result, rows further apart than they are long, a scale, and an addend in place.
//!
//! Plain data: which kernel, its constants and parameters, and how many threads. The test reads them as the kernels do.

use crate::blas::Blas;
use metal_candle_compiler::render::Place;
use metal_candle_graph::DType;
use std::fmt::Write as _;

/// One launch of one of Candle's kernels.
#[derive(Clone, Debug)]
pub(super) struct Product {
    pub(super) kernel: String,
    pub(super) parameters: Parameters,
    /// Blocks and threads, by dimension.
    pub(super) grid: [usize; 3],
    pub(super) block: [usize; 3],
    /// What the kernel calls a is the step's b, and the reverse.
    pub(super) swapped: bool,
    /// Bytes from the start of the step's a, b and out to the first element, for each launch.
    pub(super) starts: Vec<[usize; 3]>,
}

#[derive(Clone, Debug)]
pub(super) enum Parameters {
    /// Of `gemm` in `mlx_gemm.metal`.
    Matrices { gemm: Gemm, add: Add, aligned: [bool; 3] },
    /// Of `gemv` and `gemv_t` in `gemv.metal`.
    Vector(Vector),
}

/// `GEMMParams`
#[allow(dead_code, reason = "the kernel reads them")]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Gemm {
    pub(super) m: i32,
    pub(super) n: i32,
    pub(super) k: i32,
    pub(super) lda: i32,
    pub(super) ldb: i32,
    pub(super) ldd: i32,
    pub(super) tiles_n: i32,
    pub(super) tiles_m: i32,
    pub(super) batch_stride_a: u64,
    pub(super) batch_stride_b: u64,
    pub(super) batch_stride_d: u64,
    pub(super) swizzle_log: i32,
    pub(super) k_iterations_aligned: i32,
    pub(super) batch_ndim: i32,
}

/// `GEMMAddMMParams`: the result is `alpha a b + beta c`.
#[allow(dead_code, reason = "the kernel reads them")]
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Add {
    pub(super) ldc: i32,
    pub(super) fdc: i32,
    pub(super) batch_stride_c: u64,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

/// A matrix times a vector.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vector {
    /// Whether the matrix is `b`, and the vector `a`.
    pub(super) matrix_is_b: bool,
    pub(super) in_len: i32,
    pub(super) out_len: i32,
    pub(super) matrix_ld: i32,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    pub(super) vector_batch_stride: i64,
    pub(super) matrix_batch_stride: i64,
    pub(super) addend_batch_stride: i64,
    pub(super) addend_stride: i32,
}

/// The scale, and whether the result holds an addend.
#[derive(Clone, Copy, Debug)]
struct Scale {
    alpha: f32,
    accumulate: bool,
}

impl Product {
    /// `out = alpha a b`, or `out += alpha a b`, on a GPU of few cores or of many. `None` for what the kernels cannot
    /// take: mixed dtypes, no float of at most 32 bits, strides of which none is 1.
    pub(super) fn new(
        [a, b, out]: [&Place; 3],
        alpha: f64,
        accumulate: bool,
        few_cores: bool,
    ) -> Option<Product> {
        let dtype = Some(out.dtype).filter(|d| [a.dtype, b.dtype].iter().all(|o| o == d))?;
        let blas = Blas::new(&a.layout, &b.layout, &out.layout)?;
        let scale = Scale { alpha: alpha as f32, accumulate };
        let vector = if blas.m == 1 || blas.n == 1 { vector(&blas, dtype, scale) } else { None };
        let (kernel, parameters, grid, block) =
            vector.or_else(|| matrices(&blas, dtype, scale, few_cores))?;
        let bytes = |start: isize| Some(usize::try_from(start).ok()? * dtype.size_bytes());
        let starts =
            blas.outer.iter().map(|[a, b, out]| Some([bytes(*a)?, bytes(*b)?, bytes(*out)?]));
        let starts = starts.collect::<Option<_>>()?;
        Some(Product { kernel, parameters, grid, block, swapped: blas.swapped, starts })
    }

    /// Whether an addend is read: the result itself, or a lone zero where only the scale is wanted.
    pub(super) fn addend(&self) -> Option<Addend> {
        let (alpha, beta) = match &self.parameters {
            Parameters::Matrices { add, .. } => (add.alpha, add.beta),
            Parameters::Vector(vector) => (vector.alpha, vector.beta),
        };
        match (beta == 1.0, alpha == 1.0) {
            (true, _) => Some(Addend::Result),
            (false, false) => Some(Addend::Zero),
            (false, true) => None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Addend {
    Result,
    Zero,
}

type Launched = (String, Parameters, [usize; 3], [usize; 3]);

fn i32_of(x: usize) -> Option<i32> {
    i32::try_from(x).ok()
}

fn dtype_name(dtype: DType, names: [&'static str; 3]) -> Option<&'static str> {
    match dtype {
        DType::F32 => Some(names[0]),
        DType::F16 => Some(names[1]),
        DType::BF16 => Some(names[2]),
        DType::U8 | DType::U32 | DType::I64 | DType::F64 => None,
    }
}

/// Rows, columns and depth of a block's tile, and how its SIMD groups share it.
type Tile = [usize; 5];

/// MLX's choice (`GEMM_TPARAM_MACRO` in its `matmul.cpp`) for GPUs of few cores, and of many; the small tile for thin
/// products, as Candle does.
fn tile(blas: &Blas, dtype: DType, few_cores: bool) -> Tile {
    let Blas { batch, m, n, k, .. } = *blas;
    let narrow = dtype != DType::F32;
    let is_nt = !blas.a.transposed && blas.b.transposed;
    let is_large = batch * m * n >= 1 << 20;
    match (few_cores, is_large) {
        _ if m < 16 || n < 16 => [32, 32, 16, 2, 2],
        (true, _) if is_nt => [64, 32, 32, 2, 2],
        (true, _) if narrow => [64, 64, 16, 1, 2],
        (true, _) => [64, 64, 16, 2, 2],
        (false, true) if !narrow => [64, 64, 16, 2, 2],
        (false, true) if 2 * m.max(n) > k => [64, 64, 16, 1, 2],
        (false, true) if is_nt => [64, 32, 32, 2, 2],
        (false, true) => [32, 64, 16, 1, 2],
        (false, false) if narrow && is_nt => [64, 32, 32, 2, 2],
        (false, false) if narrow => [64, 64, 16, 1, 2],
        (false, false) if is_nt => [32, 64, 16, 1, 2],
        (false, false) => [64, 32, 32, 2, 2],
    }
}

fn matrices(blas: &Blas, dtype: DType, scale: Scale, few_cores: bool) -> Option<Launched> {
    let Blas { batch, m, n, k, a, b, out, .. } = *blas;
    let [bm, bn, bk, wm, wn] = tile(blas, dtype, few_cores);
    let (tiles_m, tiles_n) = (m.div_ceil(bm), n.div_ceil(bn));
    let gemm = Gemm {
        m: i32_of(m)?,
        n: i32_of(n)?,
        k: i32_of(k)?,
        lda: i32_of(a.leading)?,
        ldb: i32_of(b.leading)?,
        ldd: i32_of(out.leading)?,
        tiles_n: i32_of(tiles_n)?,
        tiles_m: i32_of(tiles_m)?,
        batch_stride_a: u64::try_from(a.batch_stride).ok()?,
        batch_stride_b: u64::try_from(b.batch_stride).ok()?,
        batch_stride_d: u64::try_from(out.batch_stride).ok()?,
        swizzle_log: 0,
        k_iterations_aligned: i32_of(k / bk)?,
        batch_ndim: 1,
    };
    let (ldc, fdc, batch_stride_c, beta) = match scale.accumulate {
        true => (gemm.ldd, 1, gemm.batch_stride_d, 1.0),
        false => (0, 0, 0, 0.0),
    };
    let add = Add { ldc, fdc, batch_stride_c, alpha: scale.alpha, beta };
    let dtype = dtype_name(dtype, ["f32", "f16", "bf16"])?;
    let letter = |transposed| if transposed { 't' } else { 'n' };
    let order: String = [a.transposed, b.transposed].into_iter().map(letter).collect();
    let mut kernel = format!("gemm_{order}_{dtype}_{dtype}");
    for part in [bm, bn, bk, wm, wn] {
        write!(kernel, "_{part}").expect("writing to a string");
    }
    let aligned = [m.is_multiple_of(bm), n.is_multiple_of(bn), k.is_multiple_of(bk)];
    let parameters = Parameters::Matrices { gemm, add, aligned };
    Some((kernel, parameters, [tiles_n, tiles_m, batch], [32, wn, wm]))
}

/// One row times a matrix, or a matrix times one column, with vectors that lie in a row.
fn vector(blas: &Blas, dtype: DType, scale: Scale) -> Option<Launched> {
    let Blas { batch, m, n, k, a, b, out, .. } = *blas;
    let matrix_is_b = m == 1;
    // Whether the matrix lies so that its rows, one for each element of the result, are apart; and the others in a row.
    let (matrix, by_columns, vector, vector_in_a_row, out_in_a_row) = match matrix_is_b {
        true => (b, !b.transposed, a, !a.transposed, true),
        false => {
            let in_a_row = b.transposed || b.leading == 1 || k == 1;
            (a, a.transposed, b, in_a_row, out.leading == 1 || m == 1)
        }
    };
    let adds = scale.accumulate || scale.alpha != 1.0;
    // These kernels round a sum before they scale it and add.
    if adds && dtype != DType::F32 {
        return None;
    }
    let out_len = if matrix_is_b { n } else { m };
    let out_follows = batch == 1 || out.batch_stride == out_len as isize;
    if !(vector_in_a_row && out_in_a_row && out_follows) {
        return None;
    }
    let (name, [bm, bn, sm, sn, tm, tn]) = vector_tile(by_columns, k, out_len);
    // The last thread starts earlier where its share would reach beyond the end: then two of them add to one element.
    if scale.accumulate && !out_len.is_multiple_of(if by_columns { tn } else { tm }) {
        return None;
    }
    let (beta, addend_stride, addend_batch_stride) = match scale.accumulate {
        true => (1.0, 1, out.batch_stride as i64),
        false => (0.0, 0, 0),
    };
    let axpby = i32::from(adds);
    let dtype = dtype_name(dtype, ["float32", "float16", "bfloat16"])?;
    let kernel =
        format!("{name}_{dtype}_bm{bm}_bn{bn}_sm{sm}_sn{sn}_tm{tm}_tn{tn}_nc0_axpby{axpby}");
    let parameters = Parameters::Vector(Vector {
        matrix_is_b,
        in_len: i32_of(k)?,
        out_len: i32_of(out_len)?,
        matrix_ld: i32_of(matrix.leading)?,
        alpha: scale.alpha,
        beta,
        vector_batch_stride: vector.batch_stride as i64,
        matrix_batch_stride: matrix.batch_stride as i64,
        addend_batch_stride,
        addend_stride,
    });
    let outputs_of_block = if by_columns { bn * sn * tn } else { bm * sm * tm };
    Some((kernel, parameters, [out_len.div_ceil(outputs_of_block), 1, batch], [32, bn, bm]))
}

/// As Candle's `call_mlx_gemv` chooses, from what `gemv.metal` holds.
fn vector_tile(by_columns: bool, in_len: usize, out_len: usize) -> (&'static str, [usize; 6]) {
    let few = out_len < 4;
    if by_columns {
        let [sm, sn] = if in_len >= 8192 && out_len >= 2048 { [4, 8] } else { [8, 4] };
        let bn = match out_len {
            2048.. => 16,
            512.. => 4,
            _ => 2,
        };
        return ("gemv_t", [1, bn, sm, sn, 4, if few { 1 } else { 4 }]);
    }
    let [bm, bn, sm, sn] = match () {
        () if in_len <= 64 => [1, 1, 8, 4],
        () if in_len >= 16 * out_len => [1, 8, 1, 32],
        () if out_len >= 4096 => [8, 1, 1, 32],
        () => [4, 1, 1, 32],
    };
    ("gemv", [bm, bn, sm, sn, if few { 1 } else { 4 }, 4])
}

#[cfg(test)]
mod tests;
