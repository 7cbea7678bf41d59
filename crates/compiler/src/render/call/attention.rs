//! Attention and its cotangents as kernels.
//!
//! ```text
//! attention             a block has a tile of rows, and walks over the keys that they see
//! attention_part        a block has few rows, and a part of the keys that they see
//! attention_join        a block has a row, and joins its parts
//! attention_grad_rows   a block has a tile of rows: their statistics, dq, dmask
//! attention_grad_keys   a block has a tile of keys: dk, dv
//! ```
//!
//! Tiles are there twice: for whatever dtype, strides and extents (`attention.h`), and for tensor cores (`flash.h`).

use super::attention_few::Few;
use super::attention_shape::{Shape, Tile};
use super::draft::Gpu;
use super::kernel::{Kernel, Parameter};
use super::{Call, Part};
use crate::Operand;
use crate::render::Source;
use metal_candle_graph::composite::{AttentionAttrs, AttentionInput};

/// `args` as `Composite::Attention`.
pub(super) fn attention(
    gpu: Gpu<'_>,
    attrs: &AttentionAttrs,
    args: &[Operand],
    outs: &[Operand],
) -> Call {
    let shape = Shape::new(attrs, args, 0);
    if let Some(few) = Few::new(&shape, gpu) {
        return few.call(&shape, &outs[0], gpu);
    }
    let tile = Tile::forward(&shape, &outs[0], gpu);
    let mut constants = shape.constants(&tile);
    constants.operand("Y", &outs[0]);
    let mut parameters = shape.parameters();
    parameters.push(Parameter::output(0, &outs[0]));
    let run = format!("{}::forward<{{shape}}>(in, out0, shared, block, tid);", tile.namespace());
    let forward = Kernel {
        base: "attention",
        constants: constants.finish(),
        parameters,
        body: [shape.inputs(), run],
        launch: tile.launch(&shape, shape.row_tiles(&tile)),
    };
    Call { parts: vec![Part::Kernel(forward.finish(gpu))], workspace_bytes: 0 }
}

/// One output for each of `wrt`; `args = [dy, ..attention's]`.
pub(super) fn attention_grad(
    gpu: Gpu<'_>,
    attrs: &AttentionAttrs,
    wrt: &[AttentionInput],
    args: &[Operand],
    outs: &[Operand],
) -> Call {
    let shape = Shape::new(attrs, args, 1);
    let grads = Grads { gpu, shape: &shape, args, outs, wrt };
    let [rows, keys] = Tile::grad(&shape, &args[0], outs, wrt, gpu);
    let mut parts = vec![Part::Kernel(grads.rows(&rows))];
    if [AttentionInput::Key, AttentionInput::Value].iter().any(|wrt| grads.wants(*wrt)) {
        parts.push(Part::Kernel(grads.keys(&keys)));
    }
    // Two numbers a row.
    let statistics = 2 * shape.pairs() * shape.padded_rows() * shape.register().size_bytes();
    Call { parts, workspace_bytes: statistics }
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

    fn wants(&self, input: AttentionInput) -> bool {
        self.of(input).is_some()
    }

    fn rows(&self, tile: &Tile) -> Source {
        let mut outs = vec![(self.of(AttentionInput::Query), "T")];
        if !tile.tensor_cores() {
            outs.push((self.of(AttentionInput::Mask), "M"));
        }
        self.kernel(tile, "grad_rows", &outs, true)
    }

    fn keys(&self, tile: &Tile) -> Source {
        let outs = [AttentionInput::Key, AttentionInput::Value].map(|input| (self.of(input), "T"));
        self.kernel(tile, "grad_keys", &outs, false)
    }

    fn kernel(
        &self,
        tile: &Tile,
        template: &str,
        outs: &[(Option<usize>, &str)],
        of_rows: bool,
    ) -> Source {
        let shape = self.shape;
        let mut constants = shape.constants(tile);
        constants.operand("DY", &self.args[0]);
        for (input, operand, wants) in [
            (AttentionInput::Query, "DQ", "WANTS_Q"),
            (AttentionInput::Key, "DK", "WANTS_K"),
            (AttentionInput::Value, "DV", "WANTS_V"),
            (AttentionInput::Mask, "DMask", "WANTS_MASK"),
        ] {
            constants.wanted(operand, wants, self.of(input).map(|out| &self.outs[out]));
        }
        let mut parameters = vec![Parameter::argument(0, &self.args[0])];
        parameters.extend(shape.parameters());
        parameters.push(Parameter::workspace("kept", 0, shape.register(), of_rows));
        let given = outs.iter().filter_map(|(out, _)| *out);
        parameters.extend(given.map(|out| Parameter::output(out, &self.outs[out])));
        let addresses: Vec<String> = outs.iter().map(|(out, ty)| address(*out, ty)).collect();
        let run = format!(
            "{}::{template}<{{shape}}>(in, in0, kept, {}, shared, block, tid);",
            tile.namespace(),
            addresses.join(", ")
        );
        let tiles = if of_rows { shape.row_tiles(tile) } else { shape.key_tiles(tile) };
        let kernel = Kernel {
            base: if of_rows { "attention_grad_rows" } else { "attention_grad_keys" },
            constants: constants.finish(),
            parameters,
            body: [shape.inputs(), run],
            launch: tile.launch(shape, tiles),
        };
        kernel.finish(self.gpu)
    }
}

/// Of an output, which may be missing.
fn address(out: Option<usize>, ty: &str) -> String {
    match out {
        Some(out) => format!("out{out}"),
        None => format!("(DEVICE {{shape}}::{ty}*)0"),
    }
}
