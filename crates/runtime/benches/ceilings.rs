//! What this machine can do at most, all threads: bytes read and copied, multiplications and additions. One JSON line a
//! ceiling.
//!
//! ```text
//! cargo bench -p metal-candle-runtime --bench ceilings [-- NAME...]
//! ```
//!
//! A name is `copy BYTES`, `read BYTES`, `f32`, `bf16` or `int8`; with none, all are measured. `--serve` takes names from
//! standard input, a line each: so `cargo xtask bench cpu` measures a ceiling in turn with the work beneath it.
//!
//! `copy BYTES` is that of a tensor of so many bytes to another, which both stay where they are: small ones in a cache.
//! `per_second` counts what is read and what is written, and a fused multiplication and addition as two operations.

#[path = "ceilings/arithmetic.rs"]
mod arithmetic;
#[path = "ceilings/memory.rs"]
mod memory;

use std::fmt;
use std::io::{BufRead, Write};
use std::time::{Duration, Instant};

/// One measured ceiling.
struct Ceiling {
    /// Bytes or operations.
    per_second: f64,
    /// The instructions that reached it.
    by: &'static str,
}

/// Ceilings that are measured where none is named.
const ALL: [&str; 8] = [
    "copy 131072",
    "copy 4194304",
    "copy 67108864",
    "read 67108864",
    "read 268435456",
    "f32",
    "bf16",
    "int8",
];

fn main() {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    match &args[..] {
        [serve] if serve == "--serve" => serve_lines(),
        [] => drop(ALL.iter().all(|name| answer(name))),
        words => drop(answer(&words.join(" "))),
    }
}

fn serve_lines() {
    // Nobody listens any more where the one who asked was stopped.
    let mut lines = std::io::stdin().lock().lines().map_while(Result::ok);
    lines.all(|line| answer(line.trim()));
}

/// False where standard output is closed.
fn answer(name: &str) -> bool {
    let answer = Answer { name, ceiling: measure(name) };
    let mut out = std::io::stdout().lock();
    writeln!(out, "{answer}").and_then(|()| out.flush()).is_ok()
}

/// `Err` says why there is none.
fn measure(name: &str) -> Result<Ceiling, String> {
    let none = |what: &str| Err(format!("none: this machine has no instruction for {what}"));
    match name.split_whitespace().collect::<Vec<_>>()[..] {
        ["copy", bytes] => Ok(memory::copy(size(bytes)?)),
        ["read", bytes] => Ok(memory::read(size(bytes)?)),
        ["f32"] => Ok(arithmetic::f32()),
        ["bf16"] => arithmetic::bf16().map_or_else(|| none("bf16 dot products"), Ok),
        ["int8"] => arithmetic::int8().map_or_else(|| none("int8 dot products"), Ok),
        _ => Err(format!("no ceiling is called {name:?}")),
    }
}

fn size(bytes: &str) -> Result<usize, String> {
    let n: usize = bytes.parse().map_err(|_| format!("{bytes:?} is no number of bytes"))?;
    if n < 4096 { Err(format!("{n} bytes: expected 4096 at least")) } else { Ok(n) }
}

struct Answer<'a> {
    name: &'a str,
    ceiling: Result<Ceiling, String>,
}

impl fmt::Display for Answer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, threads) = (self.name, rayon::current_num_threads());
        match &self.ceiling {
            Ok(Ceiling { per_second, by }) => write!(
                f,
                r#"{{"ceiling": {name:?}, "threads": {threads}, "per_second": {per_second:.4e}, "by": {by:?}}}"#
            ),
            Err(missing) => write!(f, r#"{{"ceiling": {name:?}, "missing": {missing:?}}}"#),
        }
    }
}

/// The shortest time of a call, of the calls of about a fifth of a second: a ceiling is what can be had.
fn shortest(mut call: impl FnMut()) -> Duration {
    call();
    let (mut best, start) = (Duration::MAX, Instant::now());
    let mut calls = 0;
    while calls < 5 || start.elapsed() < Duration::from_millis(200) {
        let start = Instant::now();
        call();
        best = best.min(start.elapsed());
        calls += 1;
    }
    best
}
