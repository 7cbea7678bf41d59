//! LoRA adapters as PEFT keeps them: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Names, defaults and the rules by which modules are chosen are those of PEFT 0.21 (Hugging Face,
//! <https://github.com/huggingface/peft>). An option that PEFT has and this crate does not carry
//! out is refused where it is set, because ignoring it would compute something else.

mod adapter;
mod config;
mod select;

pub use self::adapter::{LoraPair, PeftAdapter};
pub use self::config::{Bias, InitLoraWeights, LoraConfig, OneOrMany, TargetModules};
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
    #[error("not a safetensors file: {cause}")]
    SafeTensors { cause: safetensors::SafeTensorError },
    #[error("tensor {key:?}: {reason}")]
    Key { key: String, reason: &'static str },
    #[error("tensor {key:?} has dtype {dtype}: expected f32, f16, bf16 or f64")]
    DType { key: String, dtype: String },
    #[error("{module} has {has} and lacks {lacks}")]
    HalfPair { module: String, has: &'static str, lacks: &'static str },
    #[error(
        "{module}: lora_A of shape {a:?} and lora_B of shape {b:?}: expected [r, in], [out, r]"
    )]
    PairShape { module: String, a: Vec<usize>, b: Vec<usize> },
    #[error("{module}: rank {got} in the file, {expected} by adapter_config.json")]
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
}
