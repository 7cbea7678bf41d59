//! Attention and its cotangents as kernels.
//!
//! ```text
//! attention             a block has a tile of rows, and walks over the keys that they see
//! attention_few         a block has a row, and all keys that it sees
//! attention_part        a block has few rows, and a part of the keys that they see
//! attention_join        a block has a row, and joins its parts
//!
//! attention_grad_rows   a block has a tile of rows: dq, dmask
//! attention_grad_keys   a block has a tile of keys: dk, dv
//! ```
//!
//! Tiles are there twice: for whatever dtype, strides and extents (`attention.h`), and for tensor cores (`flash.h`), whose products
//! are a SIMD group's (`mma.h`) or a block's (`wgmma.h`).

use super::attention_few::Few;
use super::attention_shape::{Shape, Tile};
use super::draft::Gpu;
use super::kernel::{Kernel, Parameter};
use super::{Call, Part};
use crate::Operand;
use crate::render::Source;
use metal_candle_graph::composite::{AttentionAttrs, AttentionInput};

/// `args` as `Composite::Attention`; outputs: y and lse, those that are wanted.
pub(super) fn attention(
    gpu: Gpu<'_>,
    attrs: &AttentionAttrs,
    args: &[Operand],
    outs: &[Operand],
    wants: [bool; 2],
) -> Call {
    let shape = Shape::new(attrs, args, 0);
    let [y, lse] = numbered(wants);
    if let (Some(few), [true, false]) = (Few::new(&shape, gpu), wants) {
        return few.call(&shape, &outs[0], gpu);
    }
    let tile = Tile::forward(&shape, y.map(|y| &outs[y]), gpu);
    let mut constants = shape.constants(&tile);
    constants.wanted("Y", "WANTS_Y", y.map(|y| &outs[y]));
    constants.wanted("Lse", "WANTS_LSE", lse.map(|lse| &outs[lse]));
    let mut parameters = shape.parameters();
    parameters.extend(outs.iter().enumerate().map(|(n, out)| Parameter::output(n, out)));
    let run = format!(
        "{}::forward<{{shape}}>(in, {}, {}, shared, block, tid);",
        tile.namespace(),
        address(y, "T"),
        address(lse, "R")
    );
    let forward = Kernel {
        base: "attention",
        constants: constants.finish(),
        parameters,
        body: [shape.inputs(), run],
        launch: tile.launch(&shape, shape.row_tiles(&tile)),
    };
    Call { parts: vec![Part::Kernel(forward.finish(gpu))], workspace_bytes: 0 }
}

/// Which output each of two is, of those that are wanted.
fn numbered([first, second]: [bool; 2]) -> [Option<usize>; 2] {
    [first.then_some(0), second.then_some(usize::from(first))]
}

/// One output for each of `wrt`; `args = [dy, lse, delta, ..attention's]`.
pub(super) fn attention_grad(
    gpu: Gpu<'_>,
    attrs: &AttentionAttrs,
    wrt: &[AttentionInput],
    args: &[Operand],
    outs: &[Operand],
) -> Call {
    let shape = Shape::new(attrs, args, 3);
    let grads = Grads { gpu, shape: &shape, args, outs, wrt };
    let [rows, keys] = Tile::grad(&shape, &args[0], outs, wrt, gpu);
    let parts = [grads.rows(&rows), grads.keys(&keys)].into_iter().flatten();
    Call { parts: parts.map(Part::Kernel).collect(), workspace_bytes: 0 }
}

struct Grads<'a> {
    gpu: Gpu<'a>,
    shape: &'a Shape,
    args: &'a [Operand],
    outs: &'a [Operand],
    wrt: &'a [AttentionInput],
}

impl Grads<'_> {
    /// The output that takes the cotangent of `input`.
    fn of(&self, input: AttentionInput) -> Option<usize> {
        self.wrt.iter().position(|wrt| *wrt == input)
    }

    fn rows(&self, tile: &Tile) -> Option<Source> {
        let wrt = [AttentionInput::Query, AttentionInput::Mask];
        let tiles = self.shape.row_tiles(tile);
        self.kernel("grad_rows", tile, tiles, [(wrt[0], "T"), (wrt[1], "M")])
    }

    fn keys(&self, tile: &Tile) -> Option<Source> {
        let wrt = [AttentionInput::Key, AttentionInput::Value];
        let tiles = self.shape.key_tiles(tile);
        self.kernel("grad_keys", tile, tiles, [(wrt[0], "T"), (wrt[1], "T")])
    }

    /// Of two cotangents and their types; `None` if neither is wanted.
    fn kernel(
        &self,
        template: &str,
        tile: &Tile,
        tiles: usize,
        wrt: [(AttentionInput, &str); 2],
    ) -> Option<Source> {
        let shape = self.shape;
        let outs = wrt.map(|(input, _)| self.of(input));
        if outs == [None; 2] {
            return None;
        }
        let mut constants = shape.constants(tile);
        constants.operand("DY", &self.args[0]);
        constants.matrix("Lse", 3, Some(&self.args[1]));
        constants.matrix("Delta", 3, Some(&self.args[2]));
        for (input, operand, wants) in [
            (AttentionInput::Query, "DQ", "WANTS_Q"),
            (AttentionInput::Key, "DK", "WANTS_K"),
            (AttentionInput::Value, "DV", "WANTS_V"),
            (AttentionInput::Mask, "DMask", "WANTS_MASK"),
        ] {
            constants.wanted(operand, wants, self.of(input).map(|out| &self.outs[out]));
        }
        let mut parameters: Vec<Parameter> =
            (0..3).map(|n| Parameter::argument(n, &self.args[n])).collect();
        parameters.extend(shape.parameters());
        let given = outs.iter().flatten();
        parameters.extend(given.map(|out| Parameter::output(*out, &self.outs[*out])));
        let run = format!(
            "{}::{template}<{{shape}}>(in, {{in0, in1, in2}}, {}, {}, shared, block, tid);",
            tile.namespace(),
            address(outs[0], wrt[0].1),
            address(outs[1], wrt[1].1)
        );
        let kernel = Kernel {
            base: &format!("attention_{template}"),
            constants: constants.finish(),
            parameters,
            body: [shape.inputs(), run],
            launch: tile.launch(shape, tiles),
        };
        Some(kernel.finish(self.gpu))
    }
}

/// Of an output, which may be missing.
fn address(out: Option<usize>, ty: &str) -> String {
    match out {
        Some(out) => format!("out{out}"),
        None => format!("(DEVICE {{shape}}::{ty}*)0"),
    }
}
