//! What is measured: every row with its shapes and dtype, its peers, and what it costs at least.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// One row of the table.
pub(super) struct Row {
    /// Work, dtype, shapes.
    pub(super) name: String,
    /// What the workers are asked for.
    pub(super) work: Value,
    pub(super) peers: &'static [&'static str],
    pub(super) unit: Unit,
    pub(super) floor: Floor,
    /// Minutes instead of moments, and in processes of its own, so that their peak of memory is the row's.
    pub(super) is_model: bool,
    /// Where a peer does not do the same.
    pub(super) note: Option<&'static str>,
}

/// What the seconds of a call are shown as.
#[derive(Clone, Copy)]
pub(super) enum Unit {
    Time,
    /// Tokens a second, of so many tokens a call.
    Tokens(f64),
    /// Texts a second, of so many a call.
    Texts(f64),
}

/// What the work cannot do without: the time that the machine's ceilings leave.
#[derive(Default)]
pub(super) struct Floor {
    /// Multiplications and additions, by the ceiling's name.
    arithmetic: Vec<(&'static str, f64)>,
    /// The ceiling's name, and bytes read and written.
    memory: Option<(String, f64)>,
}

impl Floor {
    /// Ceilings that are to be measured; f32 stands in for what a machine has no instruction for.
    pub(super) fn ceilings(&self) -> Vec<String> {
        let memory = self.memory.iter().map(|(name, _)| name.clone());
        let arithmetic = self.arithmetic.iter().map(|(name, _)| (*name).to_owned());
        let stand_in = (!self.arithmetic.is_empty()).then(|| "f32".to_owned());
        let mut names: Vec<String> = memory.chain(arithmetic).chain(stand_in).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Seconds, and what binds. `None` where a ceiling that is needed was not measured.
    pub(super) fn seconds(&self, per_second: &BTreeMap<String, f64>) -> Option<(f64, String)> {
        let mut seconds = 0.0;
        let mut names = Vec::new();
        for (name, operations) in &self.arithmetic {
            let name = if per_second.contains_key(*name) { name } else { "f32" };
            seconds += operations / per_second.get(name)?;
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let arithmetic = (seconds, names.join("+"));
        let Some((name, bytes)) = &self.memory else {
            return (seconds > 0.0).then_some(arithmetic);
        };
        let memory = (bytes / per_second.get(name)?, name.clone());
        Some(if memory.0 > arithmetic.0 { memory } else { arithmetic })
    }
}

/// Every row, for the language model in this file and the encoder in this folder.
pub(super) fn all(model: &Path, encoder: &Path, quick: bool) -> Vec<Row> {
    let mut rows = vec![lora("base+lora", true), lora("lora branch", false)];
    for work in ["softmax", "rms_norm", "silu(x)*x", "relu(gelu(2x+1)*x+x)"] {
        rows.extend([[64, 512], [1024, 1024], [4096, 4096]].map(|dims| map(work, dims)));
    }
    // As in a plan, where the memory of results is there already.
    rows.extend(["softmax in place", "rms_norm in place"].map(|work| map(work, [4096, 4096])));
    for dtype in ["f32", "bf16"] {
        rows.extend([512, 1024, 2048].map(|n| matmul(dtype, n)));
    }
    let trained = [("f32", "qv"), ("bf16", "qv"), ("q4_1", "qv"), ("bf16", "all"), ("q4_1", "all")];
    rows.extend(trained.map(|(base, targets)| train(model, base, targets)));
    rows.push(train_prepacked(model));
    let tokens = if quick { 16 } else { 128 };
    rows.extend([decode(model, tokens), overhead(model, tokens), prefill(model)]);
    rows.extend(["f32", "bf16", "q8_0"].map(|base| embed(encoder, base, [64, 64])));
    // As texts are: of all lengths, in no order.
    rows.extend(["f32", "q8_0"].map(|base| embed(encoder, base, [4, 128])));
    rows
}

const TENSORS: &[&str] = &["candle", "torch", "torch.compile", "torch out="];

fn operation(name: String, work: Value, floor: Floor) -> Row {
    let unit = Unit::Time;
    Row { name, work, peers: TENSORS, unit, floor, is_model: false, note: None }
}

fn lora(work: &str, has_base: bool) -> Row {
    let [m, k, n, rank] = [64, 512, 512, 8];
    let base = if has_base { m * k * n } else { 0 };
    let floor = Floor {
        arithmetic: vec![("f32", 2.0 * (base + m * rank * (k + n)) as f64)],
        // x is read and the result written; both, and the weights, lie in a cache.
        memory: Some((format!("copy {}", 4 * m * n), 4.0 * (m * (k + n)) as f64)),
    };
    let name = format!("{work} f32 {m}x{k}x{n} r{rank}");
    operation(name, json!({"work": work, "dtype": "f32", "dims": [m, k, n], "rank": rank}), floor)
}

fn map(work: &str, [rows, columns]: [usize; 2]) -> Row {
    let bytes = 4 * rows * columns;
    let memory = Some((format!("copy {bytes}"), 2.0 * bytes as f64));
    let work_json = json!({"work": work, "dtype": "f32", "dims": [rows, columns], "rank": 0});
    let floor = Floor { memory, ..Floor::default() };
    operation(format!("{work} f32 {rows}x{columns}"), work_json, floor)
}

fn matmul(dtype: &'static str, n: usize) -> Row {
    let floor = Floor { arithmetic: vec![(dtype, 2.0 * (n * n * n) as f64)], memory: None };
    let work = json!({"work": "matmul", "dtype": dtype, "dims": [n, n, n], "rank": 0});
    operation(format!("matmul {dtype} {n}x{n}x{n}"), work, floor)
}

/// The sizes of SmolLM2-135M.
const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const KEYS: usize = 192;
const INNER: usize = 1536;
const VOCABULARY: usize = 49152;
/// Weights of the linear layers.
const LINEAR: usize = LAYERS * HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * INNER);
/// Weights of the output layer, which is the embedding.
const OUTPUT: usize = VOCABULARY * HIDDEN;

/// Multiplications and additions of causal attention over rows of `seq`, each product half empty.
fn attention(tokens: usize, seq: usize) -> f64 {
    (2 * LAYERS * tokens * seq * HIDDEN) as f64
}

fn train(model: &Path, base: &'static str, targets: &str) -> Row {
    let [batch, seq, rank] = [4, 256, 8];
    let tokens = batch * seq;
    let adapted = match targets {
        "qv" => LAYERS * (2 * HIDDEN + HIDDEN + KEYS),
        _ => LAYERS * (2 * (2 * HIDDEN) + 2 * (HIDDEN + KEYS) + 3 * (HIDDEN + INNER)),
    };
    // Forward, and back to the input: frozen weights have no gradient of their own.
    let frozen = 2.0 * (tokens * (LINEAR + OUTPUT)) as f64;
    let (forward, backward) = match base {
        "q4_1" => ("int8", "bf16"),
        base => (base, base),
    };
    let branches = 3.0 * 2.0 * (tokens * rank * adapted) as f64;
    // A model in bf16 is one in which all is, for the peers; blocks do not say what lies between them.
    let activations = if base == "bf16" { "bf16" } else { "f32" };
    let own = 3.5 * attention(tokens, seq) + branches;
    let arithmetic = vec![(forward, frozen), (backward, frozen), (activations, own)];
    let note = (base == "q4_1").then_some(
        "PEFT does not train on GGUF blocks: its figure is that of the same base taken apart to bf16",
    );
    Row {
        name: format!("LoRA step SmolLM2-135M {base}, {targets}, {batch}x{seq} r{rank}"),
        work: json!({
            "work": "train", "model": model, "base": base, "activations": activations,
            "targets": targets, "batch": batch, "seq": seq, "rank": rank,
        }),
        peers: &["PEFT", "PEFT + compile"],
        unit: Unit::Tokens(tokens as f64),
        floor: Floor { arithmetic, memory: None },
        is_model: true,
        note,
    }
}

/// The step in bf16 whose frozen matrices are laid out once.
fn train_prepacked(model: &Path) -> Row {
    let mut row = train(model, "bf16", "qv");
    row.name += ", prepacked weights";
    row.work["prepack"] = json!(true);
    row.peers = &[];
    row.note = Some("`train --prepack-weights`: the step above, in the memory that is listed");
    row
}

const GENERATION_NOTE: Option<&str> = Some("transformers takes the blocks apart to bf16");

fn decode(model: &Path, tokens: usize) -> Row {
    // Every weight is read for every token. The keys and values come on top of it.
    let bytes = std::fs::metadata(model).map_or(0, |m| m.len());
    let memory = Some(("read 67108864".to_owned(), bytes as f64));
    let prompt = 512;
    Row {
        name: format!("decode SmolLM2-135M q4_1, batch 1, {tokens} tokens after {prompt}"),
        work: json!({
            "work": "decode", "model": model, "base": "q4_1", "prompt": prompt, "tokens": tokens,
        }),
        peers: &["llama.cpp", "transformers"],
        unit: Unit::Tokens(1.0),
        floor: Floor { memory, ..Floor::default() },
        is_model: true,
        note: GENERATION_NOTE,
    }
}

/// What a token costs beside its kernels.
fn overhead(model: &Path, tokens: usize) -> Row {
    let prompt = 512;
    Row {
        name: "a token's overhead outside kernels, SmolLM2-135M q4_1".to_owned(),
        work: json!({
            "work": "overhead", "model": model, "base": "q4_1", "prompt": prompt, "tokens": tokens,
        }),
        peers: &[],
        unit: Unit::Time,
        floor: Floor::default(),
        is_model: true,
        note: Some(
            "the token's time less its steps', and less the looks at the clock between them",
        ),
    }
}

fn prefill(model: &Path) -> Row {
    let tokens = 512;
    let products = 2.0 * (tokens * LINEAR + OUTPUT) as f64;
    let arithmetic = vec![("int8", products), ("f32", attention(tokens, tokens))];
    Row {
        name: format!("prefill SmolLM2-135M q4_1, batch 1, {tokens} tokens"),
        work: json!({"work": "prefill", "model": model, "base": "q4_1", "prompt": tokens}),
        peers: &["llama.cpp", "transformers"],
        unit: Unit::Tokens(tokens as f64),
        floor: Floor { arithmetic, memory: None },
        is_model: true,
        note: GENERATION_NOTE,
    }
}

/// Texts of so many tokens, from the shortest to the longest, made vectors of.
fn embed(encoder: &Path, base: &'static str, [shortest, longest]: [usize; 2]) -> Row {
    let batch: usize = 32;
    let [layers, hidden, inner]: [usize; 3] = [6, 384, 1536];
    let weights = layers * hidden * (4 * hidden + 2 * inner);
    // As `reference/bench.py` has it; the attention of a text grows with the square of its length.
    let texts = if shortest == longest { batch } else { 4 * batch };
    let lens = (0..texts).map(|i| shortest + (longest - shortest) * i / (texts - 1));
    let tokens: usize = lens.clone().sum();
    let products = 2.0 * (tokens * weights) as f64;
    let scores = 4.0 * (layers * hidden) as f64 * lens.map(|len| (len * len) as f64).sum::<f64>();
    let of = match shortest == longest {
        true => format!("{texts} texts of {longest} tokens"),
        false => format!("{texts} texts of {shortest} to {longest} tokens"),
    };
    // Blocks are multiplied in integers; the peer holds its weights in f32, as it does unless it is told otherwise.
    let (by, peers, note): (_, &[&str], _) = match base {
        "q8_0" => {
            let note = "ours quantises f32 weights as it loads them; sentence-transformers' are f32, or int8 by \
                        torch.ao.quantization.quantize_dynamic";
            ("int8", &["sentence-transformers", "sentence-transformers int8"], Some(note))
        }
        "bf16" => {
            let note = "what lies between our products is f32, the faster way on a CPU";
            (base, &["sentence-transformers"], Some(note))
        }
        _ => (base, &["sentence-transformers"], None),
    };
    Row {
        name: format!("embed MiniLM-L6 {base}, {of}"),
        work: json!({
            "work": "embed", "model": encoder.display().to_string(), "base": base, "activations": "f32",
            "texts": texts, "batch": batch, "shortest": shortest, "longest": longest,
        }),
        peers,
        unit: Unit::Texts(texts as f64),
        floor: Floor { arithmetic: vec![(by, products), ("f32", scores)], memory: None },
        is_model: true,
        note,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates() -> BTreeMap<String, f64> {
        [("f32", 100.0), ("copy 8", 10.0)].map(|(name, x)| (name.to_owned(), x)).into()
    }

    #[test]
    fn the_slower_of_memory_and_arithmetic_binds() {
        let floor = |bytes| Floor {
            arithmetic: vec![("f32", 200.0)],
            memory: Some(("copy 8".into(), bytes)),
        };
        assert_eq!(floor(10.0).seconds(&rates()), Some((2.0, "f32".into())));
        assert_eq!(floor(30.0).seconds(&rates()), Some((3.0, "copy 8".into())));
    }

    #[test]
    fn f32_stands_in_for_instructions_that_are_missing() {
        let floor = Floor { arithmetic: vec![("int8", 100.0), ("f32", 50.0)], memory: None };
        assert_eq!(floor.seconds(&rates()), Some((1.5, "f32".into())));
        assert_eq!(floor.ceilings(), ["f32", "int8"]);
    }

    #[test]
    fn no_two_rows_share_a_name() {
        let rows = all(Path::new("model.gguf"), Path::new("encoder"), false);
        let mut names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), rows.len());
        // Those without peers are a part of another row's time, or another way to it.
        let mut compared = rows.iter().filter(|row| !row.peers.is_empty());
        assert!(compared.all(|row| !row.floor.ceilings().is_empty()));
    }
}
