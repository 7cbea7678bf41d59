//! What can be wrong with a model folder.

/// What is wrong with a model folder; the error beside it names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("model_type is {got:?}: expected one of {known:?}")]
    Architecture { got: String, known: Vec<&'static str> },
    #[error(
        "model_type is {got:?}: expected an encoder, one of {known:?}; MPNet and others, whose positions or layers are \
         of another kind, are not supported"
    )]
    Encoder { got: String, known: Vec<&'static str> },
    #[error(
        "module {index} is {got:?}: expected a Transformer, a Pooling and at most a Normalize, in this order"
    )]
    Module { index: usize, got: String },
    #[error("module {index} is said to be in {name:?}: expected a folder in this one")]
    ModuleFolder { index: usize, name: String },
    #[error("{key} is {value}, which is not supported: expected {expected}")]
    Unsupported { key: &'static str, value: String, expected: &'static str },
    #[error("{key} is {got}: expected {expected}")]
    Inconsistent { key: &'static str, got: String, expected: String },
    #[error("{rope_type} rope scaling needs {key}")]
    RopeKey { rope_type: &'static str, key: &'static str },
    #[error(
        "no model.safetensors and no model.safetensors.index.json here; a pytorch_model.bin is not \
         read: save the model anew as safetensors"
    )]
    NoWeights,
    #[error("no such file, but the index puts tensor {tensor:?} there; is the download complete?")]
    MissingShard { tensor: String },
    #[error("tensor {tensor:?} is said to be in {name:?}: expected a file in the same folder")]
    ShardName { tensor: String, name: String },
    #[error("the file has {len} bytes, its header alone {needed}; is the download complete?")]
    TruncatedHeader { needed: u64, len: u64 },
    #[error("the header has {got} bytes: expected at most {limit}; is this a safetensors file?")]
    HeaderSize { got: u64, limit: u64 },
    #[error("not a safetensors header: {cause}")]
    Header { cause: serde_json::Error },
    #[error(
        "the file has {len} bytes: expected {needed}, where tensor {tensor:?} ends; \
         is the download complete?"
    )]
    Length { tensor: String, needed: u64, len: u64 },
    #[error(
        "{what} cannot be said in a config.json: fuse into a GGUF file (--export-gguf), or take \
         the model's Hugging Face folder as the base"
    )]
    NoConfig { what: String },
    #[error("no tensor {tensor:?}")]
    NoTensor { tensor: String },
    #[error("tensor {tensor:?} says of a weight in four bits what cannot be read: {cause}")]
    QuantState { tensor: String, cause: serde_json::Error },
    #[error(
        "tensor {tensor:?}, written by bitsandbytes: {key} is {got}: expected {expected}; \
         of bitsandbytes' formats NF4 is supported"
    )]
    Bitsandbytes { tensor: String, key: &'static str, got: String, expected: String },
    #[error(
        "tensor {tensor:?} has dtype {dtype}: expected F32, F16 or BF16, or bitsandbytes' NF4 \
         with its quant_state"
    )]
    DType { tensor: String, dtype: String },
}

impl Problem {
    pub(super) fn bitsandbytes(
        tensor: &str,
        key: &'static str,
        got: impl ToString,
        expected: impl ToString,
    ) -> Problem {
        let (got, expected) = (got.to_string(), expected.to_string());
        Problem::Bitsandbytes { tensor: tensor.to_owned(), key, got, expected }
    }
}
