//! Products that sum over few, on tensor cores: LoRA's second one, `out = low b`, of many rows. It takes the time to write its
//! result, and a library that is made for large tiles takes longer.

use super::draft::{BLOCK, Draft, Gpu};
use super::factor::{at_start, index_type, matrix, one_matrix, strides};
use super::{Part, Product};
use crate::render::launch::SIMD;
use crate::render::{Launch, Team};

/// The most that is summed over.
const THIN: usize = 64;
/// Columns of a SIMD group.
const STRIP: usize = 64;
/// Rows of a tile, and what one product of the unit sums over.
const TILE: usize = 16;
/// Fewer rows leave a device idle.
const FEW: usize = 256;
/// Elements of an access.
const RUN: usize = 8;

/// A kernel for the product. In any number of leading dims that can be rows of one matrix; with one b for all.
///
/// None where it is not thin, or lies so that the kernel cannot read it.
pub(super) fn product(gpu: Gpu<'_>, product: &Product) -> Option<Part> {
    let dtype = product.out.dtype;
    let is_half = product.places().all(|p| p.dtype == dtype && dtype.size_bytes() == 2);
    if gpu.limits.tensor_cores.is_none() || !is_half {
        return None;
    }
    let bias = product.bias.as_ref().map(at_start);
    let [a, b, out] = [matrix(&product.a)?, one_matrix(&product.b)?, matrix(&product.out)?];
    let [rows, cols] = [0, 1].map(|dim| out.layout.shape[dim]);
    let depth = b.layout.shape[0];
    let is_thin = (RUN..=THIN).contains(&depth) && depth.is_multiple_of(RUN);
    let is_wide = rows >= FEW && cols >= 2 * STRIP && cols.is_multiple_of(STRIP);
    let in_runs = [&a, &out].iter().all(|place| {
        let [row, col] = strides(place);
        col == 1 && is_run(row) && is_run(place.layout.offset)
    });
    let in_runs = in_runs && product.bias.iter().all(|bias| is_run(bias.layout.offset));
    if !(is_thin && is_wide && in_runs) {
        return None;
    }
    let [a, b, out] = [&a, &b, &out].map(at_start);
    let (strips, tiles) = (cols / STRIP, rows.div_ceil(TILE));
    // Half of what can run: each has some rows to use its part of b for.
    let slices = (gpu.limits.resident_threads / 2 / SIMD).div_ceil(strips);
    let slices = slices.clamp(1, tiles.div_ceil(2));
    let [b_row, b_col] = strides(&b);
    let draft = Draft::new(gpu, "gemm", "thin::product")
        .reads(a.binding, "a", dtype)
        .reads(b.binding, "b", dtype)
        .reads_if(bias.as_ref().map(|bias| bias.binding), "bias", dtype)
        .writes(out.binding, "out", dtype)
        .aligned(RUN * dtype.size_bytes())
        .typedef("I", index_type([&a, &b, &out]))
        .function("f32", "alpha", &format!("{:?}", product.alpha))
        .constant("ROWS", rows as i64)
        .constant("COLS", cols as i64)
        .constant("INNER", depth as i64)
        .constant("WIDTH", depth.next_multiple_of(TILE) as i64)
        .constant("SLICES", slices as i64)
        .constant("A_ROW", strides(&a)[0] as i64)
        .constant("B_START", b.layout.offset as i64)
        .constant("B_ROW", b_row as i64)
        .constant("B_COL", b_col as i64)
        .constant("OUT_ROW", strides(&out)[0] as i64)
        .constant("ACCUMULATE", i64::from(product.accumulate));
    let launch = Launch {
        team: Team::Block,
        vector: 1,
        grid: (strips * slices).div_ceil(BLOCK / SIMD),
        block: BLOCK,
        resident: 1,
        shared_bytes: 0,
    };
    Some(draft.finish(launch))
}

fn is_run(elements: isize) -> bool {
    elements >= 0 && elements.unsigned_abs().is_multiple_of(RUN)
}
