//! Attention of few queries to many keys: two kernels, so that one token's attention fills the device.

use super::attention_shape::{Constants, Shape, Tile};
use super::draft::Gpu;
use super::kernel::{Kernel, Parameter};
use super::{Call, Part};
use crate::{Layout, Operand};
use metal_candle_graph::DType;

/// Threads of a block; eight have a key in common.
const THREADS: usize = 128;
/// More rows of a key head than these are tiles' work.
const MOST_ROWS: usize = 16;
/// Fewer keys than these are not worth a second kernel.
const LEAST_KEYS: usize = 64;
/// Rows that a block has at once: their sums fill its registers.
const AT_ONCE: usize = 4;
/// Of a head, for the same reason.
const MOST_FEATURES: usize = 256;

/// How the work is divided.
pub(super) struct Few {
    at_once: usize,
    splits: usize,
    /// Features that are moved as one.
    vector: usize,
}

impl Few {
    /// `None` where tiles do better.
    pub(super) fn new(shape: &Shape, gpu: Gpu<'_>) -> Option<Few> {
        let rows = shape.rows();
        let suits = (1..=MOST_ROWS).contains(&rows)
            && shape.tk >= LEAST_KEYS
            && shape.d.max(shape.dv) <= MOST_FEATURES
            && shape.register() == DType::F32;
        if !suits || shape.pairs() == 0 {
            return None;
        }
        let chunks = rows.div_ceil(AT_ONCE);
        // Half of the threads at once: what a block has fills more registers than most.
        let blocks = gpu.limits.resident_threads / (2 * THREADS);
        let splits = (blocks / (chunks * shape.pairs())).clamp(1, shape.tk.div_ceil(LEAST_KEYS));
        let vector = 16 / shape.dtype.size_bytes();
        let wide = |x: &Operand| is_wide(&x.layout, vector);
        let vector = if shape.qkv().all(wide) { vector } else { 1 };
        Some(Few { at_once: rows.div_ceil(chunks), splits: splits.min(64), vector })
    }

    pub(super) fn call(&self, shape: &Shape, out: &Operand, gpu: Gpu<'_>) -> Call {
        let (dv, rows) = (shape.dv, shape.pairs() * shape.rows());
        let chunks = shape.rows().div_ceil(self.at_once);
        let shared_bytes = (4 * self.at_once * (dv + 2) * size_of::<f32>()).next_multiple_of(16);
        let tile = Tile::of(self.at_once, THREADS, shared_bytes);
        let mut parameters = shape.parameters();
        parameters.push(Parameter::workspace("parts", 0, DType::F32, true));
        let run = "attention::forward_few<{shape}>(in, parts, shared, block, tid);";
        let part = Kernel {
            base: "attention_part",
            constants: self.constants(shape, &tile, out).finish(),
            parameters,
            body: [shape.inputs(), run.to_owned()],
            launch: tile.launch(shape, chunks * self.splits),
        };
        let join = Kernel {
            base: "attention_join",
            constants: self.constants(shape, &tile, out).finish(),
            parameters: vec![
                Parameter::workspace("parts", 0, DType::F32, false),
                Parameter::output(0, out),
            ],
            body: ["attention::join<{shape}>(parts, out0, block, tid);".to_owned(), String::new()],
            launch: Tile::of(self.at_once, THREADS, 16).launch(shape, shape.rows()),
        };
        let parts = [part, join].map(|kernel| Part::Kernel(kernel.finish(gpu))).to_vec();
        Call { parts, workspace_bytes: rows * self.splits * (dv + 2) * size_of::<f32>() }
    }

    fn constants(&self, shape: &Shape, tile: &Tile, out: &Operand) -> Constants {
        let mut constants = shape.constants(tile);
        constants.operand("Y", out);
        let pieces = |features: usize| features.div_ceil(8 * self.vector).max(1);
        constants.numbers(&[
            ("AT_ONCE", self.at_once),
            ("SPLITS", self.splits),
            ("VECTOR", self.vector),
            ("D_PIECES", pieces(shape.d)),
            ("DV_PIECES", pieces(shape.dv)),
            ("V_FEATURES", shape.dv),
        ]);
        constants
    }
}

/// Whether a head's features lie side by side, in whole vectors of `n` that are aligned.
pub(super) fn is_wide(layout: &Layout, n: usize) -> bool {
    let Layout { shape, strides, offset } = layout;
    let multiple = |x: isize| x.unsigned_abs().is_multiple_of(n);
    let outer = (0..3).all(|d| shape[d] == 1 || multiple(strides[d]));
    strides[3] == 1 && shape[3].is_multiple_of(n) && multiple(*offset) && outer
}
