//! What attention's kernels are specialised by.

use super::attention_few::is_wide;
use super::draft::Gpu;
use super::kernel::Parameter;
use crate::render::{Launch, Team, TensorCores, scalar};
use crate::{Layout, Operand};
use metal_candle_graph::DType;
use metal_candle_graph::composite::{AttentionAttrs, AttentionInput};
use std::fmt::Write;

/// Features that go through shared memory at once, in the portable kernels.
const STEP: usize = 32;

/// The extents and attributes of a call, and where its inputs are among the arguments.
pub(super) struct Shape {
    pub(super) attrs: AttentionAttrs,
    pub(super) dtype: DType,
    pub(super) b: usize,
    pub(super) tq: usize,
    pub(super) tk: usize,
    pub(super) hk: usize,
    pub(super) group: usize,
    pub(super) d: usize,
    pub(super) dv: usize,
    inputs: Inputs,
}

/// Arguments by number, with what stands there.
struct Inputs {
    qkv: [(usize, Operand); 3],
    mask: Option<(usize, Operand)>,
    segments: Option<[(usize, Operand); 2]>,
    offset: Option<(usize, Operand)>,
}

impl Shape {
    /// Attention's inputs begin at argument `first`.
    pub(super) fn new(attrs: &AttentionAttrs, args: &[Operand], first: usize) -> Shape {
        let mut rest = args.iter().copied().enumerate().skip(first);
        let mut next = || rest.next().expect("metal-candle bug: attention lacks an input");
        let inputs = Inputs {
            qkv: [next(), next(), next()],
            mask: attrs.mask.then(&mut next),
            segments: attrs.segments.then(|| [next(), next()]),
            offset: attrs.offset.then(&mut next),
        };
        let [q, k, v] = inputs.qkv.map(|(_, x)| x.layout.shape);
        let (b, tq, tk, hk, group) = (q[0], q[1], k[1], k[2], q[2] / k[2]);
        let dtype = inputs.qkv[0].1.dtype;
        Shape { attrs: *attrs, dtype, b, tq, tk, hk, group, d: q[3], dv: v[3], inputs }
    }

    /// How `flash.h` can do it, as far as the shape and the other operands say.
    fn tensor_cores(&self, others: &[&Operand], gpu: Gpu<'_>) -> Option<TensorCores> {
        let wide = |x: &Operand| is_wide(&x.layout, 8);
        let suits = self.dtype.size_bytes() == 2
            && self.d == self.dv
            && [64, 128].contains(&self.d)
            && !self.attrs.mask
            && self.attrs.scale.as_f64() > 0.0
            && self.qkv().chain(others.iter().copied()).all(wide)
            // Of the largest tile.
            && gpu.limits.max_shared_bytes >= 2 * self.d * (2 * 64 + 4 * 64) + 16 * 64;
        gpu.limits.tensor_cores.filter(|_| suits)
    }

    pub(super) fn qkv(&self) -> impl Iterator<Item = &Operand> {
        self.inputs.qkv.iter().map(|(_, x)| x)
    }

    /// What sums and statistics are kept in.
    pub(super) fn register(&self) -> DType {
        register(self.dtype)
    }

    /// Rows of a key head.
    pub(super) fn rows(&self) -> usize {
        self.tq * self.group
    }

    /// Key heads of the whole batch.
    pub(super) fn pairs(&self) -> usize {
        self.b * self.hk
    }

    pub(super) fn row_tiles(&self, tile: &Tile) -> usize {
        self.rows().div_ceil(tile.rows)
    }

    pub(super) fn key_tiles(&self, tile: &Tile) -> usize {
        self.tk.div_ceil(tile.keys)
    }

    pub(super) fn parameters(&self) -> Vec<Parameter> {
        let Inputs { qkv, mask, segments, offset } = &self.inputs;
        let all = qkv.iter().chain(mask).chain(segments.iter().flatten()).chain(offset);
        all.map(|(n, x)| Parameter::argument(*n, x)).collect()
    }

    /// The line of a body that gathers the inputs.
    pub(super) fn inputs(&self) -> String {
        let Inputs { qkv: [q, k, v], mask, segments, offset } = &self.inputs;
        let none = |ty: &str| format!("(DEVICE const {{shape}}::{ty}*)0");
        let mask = mask.map_or_else(|| none("M"), |(n, _)| format!("in{n}"));
        let segments = match segments {
            Some([q, k]) => format!("in{}, in{}", q.0, k.0),
            None => format!("{}, {}", none("I"), none("I")),
        };
        let offset = match offset {
            Some((n, x)) => format!("attention::held(in{n}[{}])", x.layout.offset),
            None => format!("{}", self.tk as i64 - self.tq as i64),
        };
        let (q, k, v) = (q.0, k.0, v.0);
        format!(
            "const attention::Inputs<{{shape}}> in = {{in{q}, in{k}, in{v}, {mask}, {segments}, {offset}}};"
        )
    }

    pub(super) fn constants(&self, tile: &Tile) -> Constants {
        let Inputs { qkv: [q, k, v], mask, segments, .. } = &self.inputs;
        let mut text = Constants::default();
        text.types(
            self.dtype,
            mask.as_ref().map(|m| m.1.dtype),
            segments.as_ref().map(|s| s[0].1.dtype),
        );
        let flag = usize::from;
        text.numbers(&[
            ("HEADS", self.hk),
            ("PAIRS", self.pairs().max(1)),
            ("GROUP", self.group),
            ("TQ", self.tq),
            ("TK", self.tk),
            ("LEN", self.rows()),
            ("CAUSAL", flag(self.attrs.causal)),
            ("WINDOW", self.attrs.window.map_or(0, |w| (w as usize).min(i32::MAX as usize))),
            ("MASK", flag(self.attrs.mask)),
            ("SEGMENTS", flag(self.attrs.segments)),
            ("THREADS", tile.threads),
            ("STEP", STEP),
            ("ROWS", tile.rows),
            ("KEYS", tile.keys),
            ("ROW_TILES", self.row_tiles(tile)),
            ("D", self.d),
            ("Q_CHUNKS", self.d.div_ceil(STEP).max(1)),
            ("V_CHUNKS", self.dv.div_ceil(STEP).max(1)),
            ("WGMMA", flag(tile.tensor_cores == Some(TensorCores::Wgmma))),
        ]);
        text.scale(self.attrs.scale.as_f64(), self.register());
        text.operand("Q", &q.1);
        text.operand("K", &k.1);
        text.operand("V", &v.1);
        let pair = |n: usize| segments.as_ref().map(|s| &s[n].1);
        text.matrix("Mask", 4, mask.as_ref().map(|m| &m.1));
        text.matrix("OfQ", 2, pair(0));
        text.matrix("OfK", 2, pair(1));
        text
    }
}

/// Rows and keys that a block works on at once, and how.
pub(super) struct Tile {
    pub(super) rows: usize,
    pub(super) keys: usize,
    threads: usize,
    shared_bytes: usize,
    tensor_cores: Option<TensorCores>,
}

impl Tile {
    pub(super) fn forward(shape: &Shape, out: Option<&Operand>, gpu: Gpu<'_>) -> Tile {
        let Some(cores) = shape.tensor_cores(out.as_slice(), gpu) else {
            return Tile::portable(shape);
        };
        let rows = match cores {
            TensorCores::Mma if shape.rows() > 64 => 128,
            _ => 64,
        };
        // q, and twice k and v
        Tile::of_tensor_cores(cores, [rows, 64], 2 * shape.d * (rows + 4 * 64))
    }

    /// The rows' and the keys'.
    pub(super) fn grad(
        shape: &Shape,
        dy: &Operand,
        outs: &[Operand],
        wrt: &[AttentionInput],
        gpu: Gpu<'_>,
    ) -> [Tile; 2] {
        let all: Vec<&Operand> = [dy].into_iter().chain(outs).collect();
        let cores = shape.tensor_cores(&all, gpu).filter(|_| !wrt.contains(&AttentionInput::Mask));
        let Some(cores) = cores else {
            return [Tile::portable(shape), Tile::portable(shape)];
        };
        // As much as registers hold without spilling.
        let (rows, keys) = match cores {
            TensorCores::Mma => (128, 32),
            TensorCores::Wgmma => (64, 64),
        };
        // q and dy, and twice k and v
        let bytes = 2 * shape.d * (2 * rows + 4 * keys);
        let of_rows = Tile::of_tensor_cores(cores, [rows, keys], bytes);
        let (rows, keys) = (64, 64);
        // k and v, and twice q, dy, lse and delta
        let bytes = 2 * shape.d * (2 * keys + 4 * rows) + 16 * rows;
        [of_rows, Tile::of_tensor_cores(cores, [rows, keys], bytes)]
    }

    fn of_tensor_cores(cores: TensorCores, [rows, keys]: [usize; 2], shared_bytes: usize) -> Tile {
        Tile { rows, keys, threads: 128, shared_bytes, tensor_cores: Some(cores) }
    }

    pub(super) fn portable(shape: &Shape) -> Tile {
        let most = if shape.register() == DType::F64 { 32 } else { 64 };
        let (rows, keys) = (shape.rows().next_power_of_two().clamp(16, most), most);
        // Two factors of a product, or the scores and a factor.
        let factors = (rows + keys) * (STEP + 1);
        let scores = rows * (keys + 1) + rows.max(keys) * (STEP + 1);
        let shared_bytes = factors.max(scores) * shape.register().size_bytes();
        let shared_bytes = shared_bytes.next_multiple_of(16);
        Tile { rows, keys, threads: 256, shared_bytes, tensor_cores: None }
    }

    /// Rows alone.
    pub(super) fn of(rows: usize, threads: usize, shared_bytes: usize) -> Tile {
        Tile { rows, keys: 1, threads, shared_bytes, tensor_cores: None }
    }

    /// Of the templates.
    pub(super) fn namespace(&self) -> &'static str {
        if self.tensor_cores.is_some() { "flash" } else { "attention" }
    }

    pub(super) fn launch(&self, shape: &Shape, tiles: usize) -> Launch {
        let Tile { threads: block, shared_bytes, .. } = *self;
        Launch {
            team: Team::Block,
            vector: 1,
            grid: shape.pairs() * tiles,
            block,
            resident: 1,
            shared_bytes,
        }
    }
}

/// The members of the type that a kernel is specialised by.
#[derive(Default)]
pub(super) struct Constants(String);

impl Constants {
    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "    {line}").expect("a string takes all");
    }

    fn types(&mut self, dtype: DType, mask: Option<DType>, segments: Option<DType>) {
        let (mask, segments) = (mask.unwrap_or(dtype), segments.unwrap_or(DType::I64));
        let types = [("T", dtype), ("R", register(dtype)), ("M", mask), ("I", segments)];
        for (name, dtype) in types {
            self.line(format_args!("typedef {} {name};", scalar::memory_type(dtype)));
        }
    }

    pub(super) fn numbers(&mut self, numbers: &[(&str, usize)]) {
        let all: Vec<String> = numbers.iter().map(|(name, n)| format!("{name} = {n}")).collect();
        self.line(format_args!("enum : i32 {{ {} }};", all.join(", ")));
    }

    fn scale(&mut self, scale: f64, register: DType) {
        let log2_e = std::f32::consts::LOG2_E;
        let scale = match register {
            DType::F64 => format!("{scale:?}"),
            _ => format!("{:?}f", scale as f32),
        };
        self.line(format_args!("FN R scale() {{ return {scale}; }}"));
        // For powers of 2.
        self.line(format_args!("FN R scale2() {{ return R({log2_e:?}f) * scale(); }}"));
    }

    /// Where element (b, t, h, feature) of `operand` lies, and how many features it has.
    pub(super) fn operand(&mut self, name: &str, operand: &Operand) {
        let features = operand.layout.shape[3];
        self.line(format_args!("struct {name} {{"));
        self.line(format_args!("    enum : i32 {{ FEATURES = {features} }};"));
        self.line(format_args!("    {}", position(&operand.layout)));
        self.line(format_args!("}};"));
    }

    /// Where an element of `operand`, which may be missing, lies.
    pub(super) fn matrix(&mut self, name: &str, rank: usize, operand: Option<&Operand>) {
        let position = match operand {
            Some(operand) => position(&operand.layout),
            None => format!("FN i32 at({}) {{ return 0; }}", vec!["i32"; rank].join(", ")),
        };
        self.line(format_args!("struct {name} {{ {position} }};"));
    }

    /// An output, which may be missing: of features, of rows, or of the mask.
    pub(super) fn wanted(&mut self, name: &str, wants: &str, operand: Option<&Operand>) {
        self.numbers(&[(wants, usize::from(operand.is_some()))]);
        match (name, operand) {
            ("Lse", operand) => self.matrix(name, 3, operand),
            ("DMask", operand) => self.matrix(name, 4, operand),
            (_, Some(operand)) => self.operand(name, operand),
            (_, None) => {
                self.line(format_args!("struct {name} {{"));
                self.line(format_args!("    enum : i32 {{ FEATURES = 0 }};"));
                self.line(format_args!("    FN i32 at(i32, i32, i32, i32) {{ return 0; }}"));
                self.line(format_args!("}};"));
            }
        }
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

/// The dtype that sums of `dtype` are kept in.
fn register(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

/// The function that says where an element lies.
fn position(layout: &Layout) -> String {
    let names = ["i", "j", "k", "l"];
    let reach = |d: usize| layout.strides()[d].unsigned_abs() * layout.shape[d];
    let farthest: usize = (0..layout.shape.rank()).map(reach).sum();
    let far = farthest + layout.offset.unsigned_abs() > i32::MAX as usize;
    let ty = if far { "i64" } else { "i32" };
    let used = |d: &usize| layout.shape[*d] > 1 && layout.strides()[*d] != 0;
    let term = |d: usize| match layout.strides()[d] {
        1 => format!("{ty}({})", names[d]),
        stride => format!("{ty}({}) * {stride}", names[d]),
    };
    let mut terms = vec![layout.offset.to_string()];
    terms.extend((0..layout.shape.rank()).filter(used).map(term));
    if layout.offset == 0 && terms.len() > 1 {
        terms.remove(0);
    }
    let parameters: Vec<String> =
        names[..layout.shape.rank()].iter().map(|name| format!("i32 {name}")).collect();
    format!("FN {ty} at({}) {{ return {}; }}", parameters.join(", "), terms.join(" + "))
}
