//! A product of operands that cuBLASLt does not take: integers, and strides that it has no name for.

use metal_candle_compiler::render::{Binding, Launch, Place, Source, Team};
use metal_candle_graph::DType;
use std::fmt::Write;
use std::hash::{DefaultHasher, Hash, Hasher};

/// The plain kernel for any operands: `args = [a, b]`, one output.
pub(super) fn product(places: [&Place; 3], alpha: f64, accumulate: bool) -> Source {
    let [a, b, out] = places;
    let rank = out.layout.shape.rank();
    let (row, col) = (rank - 2, rank - 1);
    let [m, n, k] = [out.layout.shape[row], out.layout.shape[col], a.layout.shape[col]];
    let batch: usize = (0..row).map(|d| out.layout.shape[d]).product();
    let mut text = String::new();
    let mut define = |name: &str, value: &str| {
        writeln!(text, "#define {name} {value}").expect("writing to a string");
    };
    define("TYPE", type_name(a.dtype));
    define("OUT", type_name(out.dtype));
    define("SUM", sum_type(out.dtype));
    for (name, value) in [("M", m), ("N", n), ("K", k), ("BATCH", batch)] {
        define(name, &format!("{value}ll"));
    }
    for (name, place) in [("A", a), ("B", b), ("OUT", out)] {
        define(&format!("{name}_START"), &start(place, &out.layout.shape.dims()[..row]));
        define(&format!("{name}_ROW"), &format!("{}ll", place.layout.strides[row]));
        define(&format!("{name}_COL"), &format!("{}ll", place.layout.strides[col]));
    }
    define("ALPHA", &format!("{alpha:?}"));
    define("ACCUMULATE", if accumulate { "1" } else { "0" });
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    let name = format!("product_{:016x}", hasher.finish());
    let text = format!("{text}{}", include_str!("plain.h").replace("NAME", &name));
    let tiles = batch * m.div_ceil(16) * n.div_ceil(16);
    let launch = Launch {
        team: Team::Block,
        vector: 1,
        grid: tiles.min(1 << 20),
        block: 256,
        shared_bytes: 0,
    };
    let bindings = vec![Binding::Arg(0), Binding::Arg(1), Binding::Out(0)];
    Source { name, text, bindings, launch, align_bytes: 1, is_call: false }
}

/// Where batch number `batch` of a product starts, as C.
fn start(place: &Place, dims: &[usize]) -> String {
    let mut sum = format!("{}ll", place.layout.offset);
    let mut inner: usize = 1;
    for (d, extent) in dims.iter().enumerate().rev() {
        write!(sum, " + batch / {inner}ll % {extent}ll * {}ll", place.layout.strides[d])
            .expect("writing to a string");
        inner *= extent;
    }
    sum
}

const fn type_name(dtype: DType) -> &'static str {
    match dtype {
        DType::U8 => "u8",
        DType::U32 => "u32",
        DType::I64 => "i64",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::F32 => "f32",
        DType::F64 => "f64",
    }
}

const fn sum_type(dtype: DType) -> &'static str {
    match dtype {
        DType::U8 | DType::U32 | DType::I64 => "i64",
        DType::BF16 | DType::F16 | DType::F32 => "f32",
        DType::F64 => "f64",
    }
}
