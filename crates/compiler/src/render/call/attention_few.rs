//! Attention of few queries to many keys: one block for each row, or two kernels, so that one token's attention to very many keys fills
//! the device.

use super::attention_shape::{Constants, Shape, Tile};
use super::draft::Gpu;
use super::kernel::{Kernel, Parameter};
use super::{Call, Part};
use crate::{Layout, Operand};
use metal_candle_graph::DType;

/// More rows of a key head than these are tiles' work.
const MOST_ROWS: usize = 16;
/// Fewer keys than these are not worth a block.
const LEAST_KEYS: usize = 64;
/// Up to so many keys, a second kernel takes longer than one block that has them all.
const WHOLE_KEYS: usize = 1024;
/// Rows that a block with a part of the keys has at once: their sums fill its registers.
const AT_ONCE: usize = 4;
/// Of a head, for the same reason.
const MOST_FEATURES: usize = 256;
/// Of the keys that a block asks for at once, and of their values, of each eight lanes: for the same reason, too.
const FEATURES_AHEAD: usize = 256;

/// How the work is divided.
pub(super) struct Few {
    at_once: usize,
    /// Parts of the keys.
    splits: usize,
    /// Of a block; eight have a key in common.
    threads: usize,
    /// Rounds of keys that are loaded together.
    ahead: usize,
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
        let vector = 16 / shape.dtype.size_bytes();
        let wide = |x: &Operand| is_wide(&x.layout, vector);
        let vector = if shape.qkv().all(wide) { vector } else { 1 };
        if shape.tk <= WHOLE_KEYS {
            let ahead = (FEATURES_AHEAD / shape.d.max(shape.dv)).clamp(1, 4);
            return Some(Few { at_once: 1, splits: 1, threads: 512, ahead, vector });
        }
        let threads = 128;
        let chunks = rows.div_ceil(AT_ONCE);
        // Half of the threads at once: what a block has fills more registers than most.
        let blocks = gpu.limits.resident_threads / (2 * threads);
        let splits = (blocks / (chunks * shape.pairs())).clamp(2, shape.tk.div_ceil(LEAST_KEYS));
        let at_once = rows.div_ceil(chunks);
        Some(Few { at_once, splits: splits.min(64), threads, ahead: 1, vector })
    }

    pub(super) fn call(&self, shape: &Shape, out: &Operand, gpu: Gpu<'_>) -> Call {
        let (dv, rows) = (shape.dv, shape.pairs() * shape.rows());
        let chunks = shape.rows().div_ceil(self.at_once);
        let groups = self.threads / 32;
        let shared_bytes = groups * self.at_once * (dv + 2) * size_of::<f32>();
        let tile = Tile::of(self.at_once, self.threads, shared_bytes.next_multiple_of(16));
        let is_split = self.splits > 1;
        let parts = |written| Parameter::workspace("parts", 0, DType::F32, written);
        let (result, to) = match is_split {
            true => (parts(true), "parts, (DEVICE {shape}::T*)0"),
            false => (Parameter::output(0, out), "(DEVICE f32*)0, out0"),
        };
        let attend = Kernel {
            base: if is_split { "attention_part" } else { "attention_few" },
            constants: self.constants(shape, &tile, out).finish(),
            parameters: shape.parameters().into_iter().chain([result]).collect(),
            body: [
                shape.inputs(),
                format!("attention::forward_few<{{shape}}>(in, {to}, shared, block, tid);"),
            ],
            launch: tile.launch(shape, chunks * self.splits),
        };
        let join = || Kernel {
            base: "attention_join",
            constants: self.constants(shape, &tile, out).finish(),
            parameters: vec![parts(false), Parameter::output(0, out)],
            body: ["attention::join<{shape}>(parts, out0, block, tid);".to_owned(), String::new()],
            launch: Tile::of(self.at_once, self.threads, 16).launch(shape, shape.rows()),
        };
        let join = is_split.then(join);
        let kernels = [attend].into_iter().chain(join);
        let workspace_bytes =
            if is_split { rows * self.splits * (dv + 2) * size_of::<f32>() } else { 0 };
        Call { parts: kernels.map(|k| Part::Kernel(k.finish(gpu))).collect(), workspace_bytes }
    }

    fn constants(&self, shape: &Shape, tile: &Tile, out: &Operand) -> Constants {
        let mut constants = shape.constants(tile);
        constants.operand("Y", out);
        let pieces = |features: usize| features.div_ceil(8 * self.vector).max(1);
        constants.numbers(&[
            ("AT_ONCE", self.at_once),
            ("SPLITS", self.splits),
            ("VECTOR", self.vector),
            ("AHEAD", self.ahead),
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
