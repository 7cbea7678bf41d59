//! Attention and its cotangents as kernels.
//!
//! ```text
//! attention             a block has a tile of rows, and walks over the keys that they see
//! attention_part        a block has few rows, and a part of the keys that they see
//! attention_join        a block has a row, and joins its parts
//!
//! attention_grad_rows   a block has a tile of rows: dq, dmask
//! attention_grad_keys   a block has a tile of keys: dk, dv
//! attention_grad        on tensor cores: a block has a tile of keys: dk, dv, and its part of dq
//! ```
//!
//! Tiles are there twice: for whatever dtype, strides and extents (`attention.h`), and for tensor cores (`flash.h`).

use super::attention_few::Few;
use super::attention_shape::{Constants, Shape, Tile};
use super::draft::Gpu;
use super::kernel::{Kernel, Parameter};
use super::{Call, Part};
use crate::Operand;
use crate::render::{Launch, Source, Team};
use metal_candle_graph::DType;
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
    let tensor_cores = Tile::grad(&shape, &args[0], outs, wrt, gpu);
    match tensor_cores {
        Some(tile) => grads.in_one_pass(&tile),
        None => grads.in_two(),
    }
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

    fn wants(&self, inputs: &[AttentionInput]) -> bool {
        inputs.iter().any(|input| self.of(*input).is_some())
    }

    fn in_two(&self) -> Call {
        use AttentionInput::{Key, Mask, Query, Value};
        let tile = Tile::portable(self.shape);
        let of_rows = self.wants(&[Query, Mask]).then(|| {
            let tiles = self.shape.row_tiles(&tile);
            let run = "attention::grad_rows<{shape}>(in, of, {DQ}, {DMask}, shared, block, tid);";
            self.kernel("attention_grad_rows", &tile, tiles, run, &[Query, Mask], Vec::new())
        });
        let of_keys = self.wants(&[Key, Value]).then(|| {
            let tiles = self.shape.key_tiles(&tile);
            let run = "attention::grad_keys<{shape}>(in, of, {DK}, {DV}, shared, block, tid);";
            self.kernel("attention_grad_keys", &tile, tiles, run, &[Key, Value], Vec::new())
        });
        let parts = of_rows.into_iter().chain(of_keys).map(Part::Kernel).collect();
        Call { parts, workspace_bytes: 0 }
    }

    /// The cotangent of q is summed in the workspace, over the blocks that have a part of it.
    fn in_one_pass(&self, tile: &Tile) -> Call {
        use AttentionInput::{Key, Query, Value};
        let shape = self.shape;
        let tiles = shape.pairs() * shape.row_tiles(tile);
        let turns = 1 + tiles * tile.rows / 16;
        let turns_bytes = (turns * size_of::<u32>()).next_multiple_of(256);
        let sums_bytes = tiles * tile.rows * shape.d * size_of::<f32>();
        let (mut parts, mut own, mut workspace_bytes) = (Vec::new(), Vec::new(), 0);
        let mut sums = "{0, 0}";
        if self.wants(&[Query]) {
            let numbers = || Parameter::workspace("turns", 0, DType::U32, true);
            parts.push(Part::Kernel(self.clear(turns, numbers())));
            own = vec![numbers(), Parameter::workspace("sums", turns_bytes, DType::F32, true)];
            workspace_bytes = turns_bytes + sums_bytes;
            sums = "{turns, sums}";
        }
        let run = format!(
            "flash::grad<{{shape}}>(in, of, flash::RowSums{sums}, {{DQ}}, {{DK}}, {{DV}}, shared, block, tid);"
        );
        let tiles = shape.key_tiles(tile);
        let wrt = [Query, Key, Value];
        let grad = self.kernel("attention_grad", tile, tiles, &run, &wrt, own);
        parts.push(Part::Kernel(grad));
        Call { parts, workspace_bytes }
    }

    /// Zeros for `n` words.
    fn clear(&self, n: usize, words: Parameter) -> Source {
        const THREADS: usize = 256;
        let mut constants = Constants::default();
        constants.numbers(&[("WORDS", n)]);
        let at = format!("const u32 at = block * {THREADS} + tid;");
        let clear = Kernel {
            base: "clear",
            constants: constants.finish(),
            parameters: vec![words],
            body: [at, "if (at < {shape}::WORDS) turns[at] = 0;".to_owned()],
            launch: Launch {
                team: Team::Block,
                vector: 1,
                grid: n.div_ceil(THREADS),
                block: THREADS,
                shared_bytes: 16,
            },
        };
        clear.finish(self.gpu)
    }

    /// `{DQ}` and the like in `run` stand for the outputs, those of `wrt`.
    fn kernel(
        &self,
        base: &str,
        tile: &Tile,
        tiles: usize,
        run: &str,
        wrt: &[AttentionInput],
        own: Vec<Parameter>,
    ) -> Source {
        let shape = self.shape;
        let mut constants = shape.constants(tile);
        constants.operand("DY", &self.args[0]);
        constants.matrix("Lse", 3, Some(&self.args[1]));
        constants.matrix("Delta", 3, Some(&self.args[2]));
        let mut parameters: Vec<Parameter> =
            (0..3).map(|n| Parameter::argument(n, &self.args[n])).collect();
        parameters.extend(shape.parameters());
        parameters.extend(own);
        let mut run = run.to_owned();
        for (input, operand, wants, ty) in [
            (AttentionInput::Query, "DQ", "WANTS_Q", "T"),
            (AttentionInput::Key, "DK", "WANTS_K", "T"),
            (AttentionInput::Value, "DV", "WANTS_V", "T"),
            (AttentionInput::Mask, "DMask", "WANTS_MASK", "M"),
        ] {
            let out = self.of(input).filter(|_| wrt.contains(&input));
            constants.wanted(operand, wants, out.map(|out| &self.outs[out]));
            parameters.extend(out.map(|out| Parameter::output(out, &self.outs[out])));
            run = run.replace(&format!("{{{operand}}}"), &address(out, ty));
        }
        let of = "const attention::Cotangents<{shape}> of = {in0, in1, in2};";
        let kernel = Kernel {
            base,
            constants: constants.finish(),
            parameters,
            body: [format!("{}\n    {of}", shape.inputs()), run],
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
