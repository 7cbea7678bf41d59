//! LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Names, defaults and the rules by which modules are chosen are those of PEFT 0.21 (Hugging Face,
//! <https://github.com/huggingface/peft>). An option that PEFT has and this crate does not carry
//! out is refused where it is set, because ignoring it would compute something else.

mod adapter;
mod config;
mod describe;
mod last_layers;
pub(crate) mod pair;
mod select;

pub use self::adapter::PeftAdapter;
pub(crate) use self::adapter::{CONFIG, WEIGHTS};
pub use self::config::{Bias, InitLoraWeights, LoraConfig, OneOrMany, TargetModules};
pub use self::pair::LoraPair;
pub use self::select::Target;

/// What can be wrong with an adapter or its configuration.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("peft_type is {got:?}: expected \"LORA\"")]
    PeftType { got: String },
    #[error("not a LoRA configuration: {cause}")]
    Json { cause: serde_json::Error },
    #[error("{option} is {value}, which is not supported: {reason}")]
    Unsupported { option: String, value: String, reason: &'static str },
    #[error("{option} is {got}: expected {expected}")]
    Option { option: String, got: String, expected: &'static str },
    #[error("{option}: {pattern:?} is no valid regular expression: {cause}")]
    Regex { option: &'static str, pattern: String, cause: Box<fancy_regex::Error> },
    #[error("target_modules {targets} match none of the base's {modules} linear modules")]
    NoTarget { targets: String, modules: usize },
    #[error("the last {count} layers of a base that has {layers}: expected 1 to {layers}")]
    LastLayers { count: usize, layers: usize },
    #[error("not a safetensors file: {cause}")]
    SafeTensors { cause: safetensors::SafeTensorError },
    #[error("tensor {key:?}: {reason}")]
    Key { key: String, reason: &'static str },
    #[error("tensor {key:?} has dtype {dtype}: expected f32, f16, bf16 or f64")]
    DType { key: String, dtype: String },
    #[error("{module} has {has} and lacks {lacks}")]
    HalfPair { module: String, has: &'static str, lacks: &'static str },
    #[error("{module}: A of shape {a:?} and B of shape {b:?}: expected {expected}")]
    PairShape { module: String, a: Vec<usize>, b: Vec<usize>, expected: &'static str },
    #[error("{module}: {a} and {b} numbers in A and B of rank {rank} for [{outputs}, {inputs}]")]
    PairLength { module: String, a: usize, b: usize, rank: usize, inputs: usize, outputs: usize },
    #[error("it adapts nothing: there is no pair of A and B in it")]
    NoPairs,
    #[error("{module}: rank {got} in the file, {expected} by its configuration")]
    Rank { module: String, expected: usize, got: usize },
    #[error(
        "the adapter lacks {modules:?}, which its target_modules name: \
         is it for another base, or cut short?"
    )]
    Missing { modules: Vec<String> },
    #[error("the adapter has {modules:?}, which are no targets in this base: is it for another?")]
    Unexpected { modules: Vec<String> },
    #[error(
        "{module}: the adapter is for {got:?} weights, the base has {expected:?} [out, in]: \
         it is for another base"
    )]
    BaseShape { module: String, expected: [usize; 2], got: [usize; 2] },
    #[error("{problem} (it says that it is for {base:?})")]
    OtherBase { problem: Box<Problem>, base: String },
    #[error(
        "no adapter in it: expected adapter_config.json beside adapter_model.safetensors (PEFT) or \
         adapters.safetensors (mlx-lm), or the path of a GGUF file"
    )]
    NoAdapter,
    #[error("{name} is not read: save the adapter anew as safetensors")]
    Pickle { name: &'static str },
    #[error(
        "{first} has {what} {first_value} and {other} has {other_value}, but {format} holds one \
         {what} for all modules: keep the adapter in PEFT's format"
    )]
    Varies {
        what: &'static str,
        first: String,
        first_value: f64,
        other: String,
        other_value: f64,
        format: &'static str,
    },
    #[error("a scale of {scale} (alpha 0) cannot be written: llama.cpp takes alpha 0 for scale 1")]
    NoScale { scale: f64 },
    #[error("{module} has no name in a GGUF file of architecture {architecture:?}")]
    GgufName { module: String, architecture: String },
    #[error(
        "the adapter is for architecture {got:?}, the base is {base:?}: it is for another base"
    )]
    Architecture { got: String, base: String },
    #[error(
        "llama.cpp permutes the rows of q and k by heads, which only the base counts: \
         name the base too (--model)"
    )]
    NeedsBase,
    #[error("{module}: {outputs} rows do not split into {heads} heads: it is for another base")]
    Heads { module: String, outputs: usize, heads: usize },
    #[error(
        "{file} of another adapter lies here, and would share adapter_config.json: \
         choose another folder"
    )]
    Occupied { file: &'static str },
}
