//! What the CPU does of the work that peers are timed at.
//!
//! ```text
//! cargo bench -p metal-candle --bench cpu [-- FILTER]     operations, one JSON line each
//! cargo bench -p metal-candle --bench cpu -- --serve WHO  answers `cargo xtask bench`, which puts peers beside it
//! cargo bench -p metal-candle --bench cpu -- --steps ROW  what the steps of a plan take
//! cargo bench -p metal-candle --bench cpu -- --random-model FOLDER HIDDEN LAYERS
//! ```
//!
//! WHO is `ours`, or `candle` for the same operations by eager Candle. Every row is what a program that repeats the
//! work would use: a compiled function, a `TrainStep`, a `Generator`.

#[path = "cpu/embed.rs"]
mod embed;
#[path = "support/kinds.rs"]
mod kinds;
#[path = "cpu/model.rs"]
mod model;
#[path = "cpu/ops.rs"]
mod ops;
#[path = "../tests/support/random_model.rs"]
#[allow(dead_code, reason = "the tests use the rest")]
mod random_model;
#[path = "cpu/serve.rs"]
mod serve;
#[path = "cpu/steps.rs"]
mod steps;

use candle_core::DType;
use ops::Op;
use serve::{Budget, Prepared};
use std::error::Error;
use std::path::Path;

/// Why a row cannot be measured.
type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["--serve", who] => serve::lines(who),
        ["--steps", row] => steps::print(row),
        ["--random-model", folder, hidden, layers] => {
            random_model(folder.as_ref(), hidden.parse()?, layers.parse()?)
        }
        ref filter => operations(filter),
    }
}

fn operations(filter: &[&str]) -> Result<(), Failure> {
    let budget = Budget { warmup: 3, calls: 7, seconds: 1.0 };
    let wanted = |op: &Op| filter.is_empty() || filter.iter().any(|f| op.name().contains(f));
    for op in own_rows().into_iter().filter(wanted) {
        let us = Prepared::lazy(&op).measure(budget)?.seconds * 1e6;
        println!(
            r#"{{"work": "{}", "us": {us:.1}, "gflops": {:.1}, "gbytes": {:.1}}}"#,
            op.name(),
            op.flops() / us / 1e3,
            op.bytes() / us / 1e3
        );
    }
    Ok(())
}

/// What peers are timed at, and the products of which a model consists.
fn own_rows() -> Vec<Op> {
    let lora =
        |work| Op { work, dtype: DType::F32, dims: vec![64, 512, 512], rank: 8, in_place: false };
    let mut rows = vec![lora("lora branch"), lora("base+lora")];
    for dims in [[64, 512], [1024, 1024], [4096, 4096]] {
        for work in ["softmax", "rms_norm", "silu(x)*x", "relu(gelu(2x+1)*x+x)"] {
            rows.push(Op { work, dtype: DType::F32, dims: dims.into(), rank: 0, in_place: false });
        }
    }
    for dtype in [DType::F32, DType::BF16] {
        let product = |work, dims: [usize; 3]| Op {
            work,
            dtype,
            dims: dims.into(),
            rank: 0,
            in_place: false,
        };
        rows.extend([512, 1024, 2048].map(|n| product("matmul", [n, n, n])));
        // The projections of SmolLM2-135M on 4 x 256 tokens, a thin product of LoRA, the output layer of one token.
        let projections = [[1024, 576, 576], [1024, 576, 1536], [1024, 1536, 576]];
        rows.extend(projections.map(|dims| product("matmul_t", dims)));
        rows.extend([[1024, 576, 8], [1024, 8, 576]].map(|dims| product("matmul", dims)));
        rows.push(product("matmul_t", [1, 576, 49152]));
    }
    rows
}

/// SmolLM2's proportions at another width, for `cargo xtask bench scaling`.
fn random_model(folder: &Path, hidden: usize, layers: usize) -> Result<(), Failure> {
    let unit = hidden / 192;
    if unit * 192 != hidden || unit == 0 {
        return Err(format!("a width of {hidden}: expected a multiple of 192").into());
    }
    let sizes = random_model::Sizes {
        hidden,
        inner: 512 * unit,
        vocabulary: model::VOCABULARY,
        layers,
        heads: 3 * unit,
        kv_heads: unit,
        context: 2048,
    };
    std::fs::create_dir_all(folder)?;
    random_model::write(folder, sizes, DType::F32, DType::F32);
    Ok(())
}
