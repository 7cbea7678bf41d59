//! A product as a plain kernel: any strides, any floats. Backends have faster ones, which take less.

use super::Source;
use super::call::{Place, Product};
use super::dialect::{Dialect, Shared};
use super::launch::{Launch, Limits, Team};
use super::scalar::{memory_type, register_bytes, register_type, to_memory, to_register};
use super::text::Text;
use std::fmt::Write as _;

/// Rows and columns of a block's tile, and the depth of its steps.
const TILE: usize = 16;
/// A column more than are used, so that threads below each other are in different banks.
const PITCH: usize = TILE + 1;
const BLOCK: usize = TILE * TILE;

/// `product`, of any operands, summed in f32 (f64 for f64). A thread computes one result at a time, a block a tile of them.
pub fn product(product: &Product, dialect: &Dialect, limits: &Limits) -> Source {
    let launch = product.launch(limits);
    let name = "product";
    Source {
        name: name.into(),
        text: product.text(dialect, &launch, name),
        bindings: product.places().map(|place| place.binding).collect(),
        launch,
        align_bytes: product.places().map(|place| place.dtype.size_bytes()).max().unwrap_or(1),
        is_call: false,
        asks_first: None,
    }
}

impl Product {
    /// Rows, columns, and what is summed over.
    fn extents(&self) -> [usize; 3] {
        let rank = self.out.layout.shape.rank();
        let (row, col) = (rank - 2, rank - 1);
        [self.out.layout.shape[row], self.out.layout.shape[col], self.a.layout.shape[col]]
    }

    fn batches(&self) -> usize {
        let dims = self.out.layout.shape.dims();
        dims[..dims.len() - 2].iter().product()
    }

    fn launch(&self, limits: &Limits) -> Launch {
        let [m, n, _] = self.extents();
        let tiles = self.batches() * m.div_ceil(TILE) * n.div_ceil(TILE);
        let most = (4 * limits.resident_threads / BLOCK).clamp(1, limits.max_grid);
        let shared_bytes = 2 * TILE * PITCH * register_bytes(self.out.dtype);
        let fits = BLOCK <= limits.max_block && shared_bytes <= limits.max_shared_bytes;
        assert!(fits, "metal-candle bug: {shared_bytes} bytes");
        Launch {
            team: Team::Block,
            vector: 1,
            grid: tiles.min(most),
            block: BLOCK,
            resident: 1,
            shared_bytes,
        }
    }

    fn text(&self, dialect: &Dialect, launch: &Launch, name: &str) -> String {
        let [m, n, k] = self.extents();
        let (down, across) = (m.div_ceil(TILE), n.div_ceil(TILE));
        let sum = register_type(self.out.dtype);
        let mut text = Text::default();
        text.line(format!("// {} times {m} x {n} of {k}, in tiles.", self.batches()));
        self.signature(&mut text, dialect, launch, name);
        text.line(format!("SHARED {sum}* const left = (SHARED {sum}*)shared;"));
        text.line(format!("SHARED {sum}* const right = left + {};", TILE * PITCH));
        text.line(format!("const i32 x = tid % {TILE}, y = tid / {TILE};"));
        let tiles = self.batches() * down * across;
        text.open(format!("for (i64 tile = block; tile < {tiles}; tile += blocks)"));
        text.line(format!("const i64 row = tile / {across} % {down} * {TILE} + y;"));
        text.line(format!("const i64 col = tile % {across} * {TILE} + x;"));
        let index = ["row", "col"];
        if [&self.a, &self.b, &self.out].iter().any(|p| self.place(p, index).contains("batch")) {
            text.line(format!("const i64 batch = tile / {};", down * across));
        }
        text.line(format!("{sum} sum = 0;"));
        text.open(format!("for (i64 at = 0; at < {k}; at += {TILE})"));
        self.fetch(&mut text, "left", (&self.a, "in0"), ["row", "at + x"], [m, k]);
        self.fetch(&mut text, "right", (&self.b, "in1"), ["at + y", "col"], [k, n]);
        text.line("barrier();");
        text.unrolled(format!("for (i32 i = 0; i < {TILE}; ++i)"));
        text.line(format!("sum += left[y * {PITCH} + i] * right[i * {PITCH} + x];"));
        text.close();
        text.line("barrier();");
        text.close();
        text.open(format!("if (row < {m} && col < {n})"));
        text.line(format!("const i64 to = {};", self.place(&self.out, ["row", "col"])));
        let suffix = if sum == "f32" { "f" } else { "" };
        let mut value = format!("{:?}{suffix} * sum", self.alpha);
        if let Some(bias) = &self.bias {
            let at = format!("bias[{} + col]", bias.layout.offset);
            value = format!("{value} + {}", to_register(bias.dtype, &at));
        }
        if self.accumulate {
            value = format!("{} + {value}", to_register(self.out.dtype, "out0[to]"));
        }
        text.line(format!("out0[to] = {};", to_memory(self.out.dtype, &value)));
        text.close();
        text.close();
        text.close();
        text.finish()
    }

    fn signature(&self, text: &mut Text, dialect: &Dialect, launch: &Launch, name: &str) {
        let read = [("in0", &self.a), ("in1", &self.b)].into_iter();
        let read = read.chain(self.bias.iter().map(|bias| ("bias", bias)));
        let operands = read.map(|(name, place)| (dialect.argument, name, place)).chain([(
            dialect.output,
            "out0",
            &self.out,
        )]);
        let parameter = |(i, (form, name, place)): (usize, (&str, &str, &Place))| {
            let form = form.replace("{type}", memory_type(place.dtype)).replace("{name}", name);
            form.replace("{n}", &i.to_string())
        };
        let mut parameters: Vec<String> = operands.enumerate().map(parameter).collect();
        parameters.extend(dialect.ids.iter().map(|id| (*id).to_owned()));
        let mut lines: Vec<&str> = [dialect.first_lines, dialect.wait].concat();
        match dialect.shared {
            Shared::Parameter(shared) => parameters.push(shared.to_owned()),
            Shared::Line(shared) => lines.push(shared),
        }
        let head = dialect.head(launch);
        let head = head.replace("{name}", name);
        text.open(format!("{head}(\n    {}\n)", parameters.join(",\n    ")));
        lines.iter().for_each(|line| text.line(line));
    }

    /// This thread's element of a tile; zero beyond the matrix.
    fn fetch(
        &self,
        text: &mut Text,
        tile: &str,
        (place, name): (&Place, &str),
        at: [&str; 2],
        extents: [usize; 2],
    ) {
        let value = to_register(place.dtype, &format!("{name}[{}]", self.place(place, at)));
        // What an operand holds is computed with as the sum is.
        let value = format!("{}({value})", register_type(self.out.dtype));
        let [row, col] = extents;
        let inside = format!("{} < {row} && {} < {col}", at[0], at[1]);
        text.line(format!("{tile}[y * {PITCH} + x] = {inside} ? {value} : 0;"));
    }

    /// Where an element is, of the batch `batch`.
    fn place(&self, place: &Place, [row, col]: [&str; 2]) -> String {
        let dims = self.out.layout.shape.dims();
        let strides = place.layout.strides();
        let last = dims.len() - 2;
        let mut text = format!("{}", place.layout.offset);
        let mut add = |index: &str, stride: isize| match stride {
            0 => {}
            1 => write!(text, " + {index}").expect("writing to a string"),
            _ => write!(text, " + {index} * i64({stride})").expect("writing to a string"),
        };
        let mut inner = 1;
        for dim in (0..last).rev() {
            if dims[dim] > 1 {
                add(&format!("batch / {inner} % {}", dims[dim]), strides[dim]);
            }
            inner *= dims[dim];
        }
        add(&format!("({row})"), strides[last]);
        add(&format!("({col})"), strides[last + 1]);
        text
    }
}
