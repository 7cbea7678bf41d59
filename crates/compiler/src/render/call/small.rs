//! Products of f32 whose result is a few tiles: a library that gives each block a long sum leaves a device idle.

use super::draft::{BLOCK, Draft, Gpu};
use super::factor::{at_start, index_type, matrix, one_matrix, strides};
use super::{Part, Product};
use crate::render::launch::SIMD;
use crate::render::scalar;
use metal_candle_graph::DType;

/// Rows and columns of a tile.
const TILE: usize = 16;
/// Elements of an access.
const PATCH: usize = 4;
/// The most that is summed over.
const MOST: usize = 1024;

/// A kernel for the product, if it is one of few tiles and short sums. In any number of leading dims that can be rows of one
/// matrix; with one b for all.
pub(super) fn product(gpu: Gpu<'_>, product: &Product) -> Option<Part> {
    let dtype = product.out.dtype;
    // Of 16 bits, the library's take no longer: they have tensor cores.
    if dtype != DType::F32 || product.places().any(|place| place.dtype != dtype) {
        return None;
    }
    let [a, b, out] = [matrix(&product.a)?, one_matrix(&product.b)?, matrix(&product.out)?];
    let [rows, cols] = [0, 1].map(|dim| out.layout.shape[dim]);
    let inner = b.layout.shape[0];
    let tiles = rows.div_ceil(TILE) * cols.div_ceil(TILE);
    let is_small = (1..=gpu.limits.few_tiles).contains(&tiles) && (1..=MOST).contains(&inner);
    if !is_small || strides(&out)[1] != 1 {
        return None;
    }
    let bias = product.bias.as_ref().map(at_start);
    let ([a_row, a_col], [b_row, b_col]) = (strides(&a), strides(&b));
    let a_reads = reads([a_row, a_col], [rows, inner], a.layout.offset);
    let b_reads = reads([b_col, b_row], [cols, inner], b.layout.offset);
    let draft = Draft::new(gpu, "gemm", "small::product")
        .reads(a.binding, "a", dtype)
        .reads(b.binding, "b", dtype)
        .reads_if(bias.as_ref().map(|bias| bias.binding), "bias", dtype)
        .writes(out.binding, "out", dtype)
        .numbers(dtype)
        .aligned(PATCH * dtype.size_bytes())
        .typedef("I", index_type([&a, &b, &out]))
        .function("A", "alpha", &format!("{:?}", product.alpha))
        .constant("ROWS", rows as i64)
        .constant("COLS", cols as i64)
        .constant("INNER", inner as i64)
        .constant("TILES", tiles as i64)
        .constant("A_START", a.layout.offset as i64)
        .constant("A_ROW", a_row as i64)
        .constant("A_COL", a_col as i64)
        .constant("A_READS", a_reads as i64)
        .constant("B_START", b.layout.offset as i64)
        .constant("B_ROW", b_row as i64)
        .constant("B_COL", b_col as i64)
        .constant("B_READS", b_reads as i64)
        .constant("OUT_START", out.layout.offset as i64)
        .constant("OUT_ROW", strides(&out)[0] as i64)
        .constant("ACCUMULATE", i64::from(product.accumulate))
        .constant("BIAS", bias.map_or(0, |bias| bias.layout.offset as i64));
    let shared_bytes = BLOCK / SIMD * TILE * TILE * scalar::register_bytes(dtype);
    Some(draft.finish(gpu.block_rows(tiles, BLOCK, shared_bytes)))
}

/// How elements of a factor are read: as `small.h` names them.
#[derive(Clone, Copy)]
enum Reads {
    Apart,
    AlongK,
    AcrossK,
}

/// By the strides and extents of the dim that is kept and of the one that is summed over.
fn reads([outer_step, k_step]: [isize; 2], [outers, depth]: [usize; 2], start: isize) -> Reads {
    let multiple = |x: usize| x.is_multiple_of(PATCH);
    if !multiple(start.unsigned_abs()) {
        Reads::Apart
    } else if k_step == 1 && multiple(outer_step.unsigned_abs()) && multiple(depth) {
        Reads::AlongK
    } else if outer_step == 1 && multiple(k_step.unsigned_abs()) && multiple(outers) {
        Reads::AcrossK
    } else {
        Reads::Apart
    }
}
