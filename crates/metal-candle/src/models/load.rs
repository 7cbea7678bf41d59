//! From a model file or folder to a decoder, or to an encoder.

mod encoder;
mod source;

pub use self::encoder::load_encoder;
use self::source::{WeightSource, random};
use super::{Decoder, DecoderLayer};
use crate::io::gguf::{self, Encoding, GgufFile};
use crate::io::tokenizer::Tokenizer;
use crate::io::{self, DecoderConfig, GenerationConfig, HfFolder};
use crate::nn::{Embedding, Linear, RmsNorm, Rotary, Weight};
use crate::{BlockFormat, DType, Device, ErrorKind, LazyTensor, Result};
use std::path::Path;

/// How the frozen matrices are held: those of the linear layers, the embedding and the output layer.
/// What is in a file as it is asked for stays there, mapped. Norms and biases are f32 in any case.
///
/// In bf16 and f16 a matrix takes half the memory. Products then round their operands and results to
/// that type and sum in f32; what lies between them is of the decoder's
/// [activations](Decoder::with_activations).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseWeights {
    /// Quantised blocks stay quantised; floats of any width are f32.
    #[default]
    AsStored,
    /// As f32.
    F32,
    /// As bf16.
    BF16,
    /// As f16, if they fit.
    F16,
    /// Those of the linear layers in blocks, into which they are quantised one by one when they are loaded; what is
    /// stored in blocks already stays so, if they are these. As PEFT's users do with NF4 (QLoRA).
    Quantised {
        /// The blocks: any but Q8_1. A layer's inputs must be a multiple of their length.
        format: BlockFormat,
        /// Of the embedding and the output layer: f32, bf16 or f16.
        rest: DType,
    },
}

impl BaseWeights {
    /// Of what is not kept in blocks.
    fn dtype(self) -> DType {
        match self {
            BaseWeights::AsStored | BaseWeights::F32 => DType::F32,
            BaseWeights::BF16 => DType::BF16,
            BaseWeights::F16 => DType::F16,
            BaseWeights::Quantised { rest, .. } => rest,
        }
    }
}

/// A model with what belongs to it.
#[derive(Debug)]
pub struct LoadedModel {
    /// The weights.
    pub decoder: Decoder,
    /// Text to ids and back, and the chat template.
    pub tokenizer: Tokenizer,
    /// How its makers mean it to be run; a GGUF file does not say.
    pub generation: GenerationConfig,
}

/// Loads a decoder, its tokenizer and its chat template from a GGUF file, or from a Hugging Face
/// folder: `config.json`, safetensors in one file or in shards, `tokenizer.json`,
/// `tokenizer_config.json` and `generation_config.json`.
///
/// # Errors
/// Where there is nothing at `path`; where a file is malformed or missing, the architecture is
/// unknown, a weight does not fit the config, or the tokenizer has a token that the embedding lacks.
pub fn load(path: &Path, base: BaseWeights, device: &Device) -> Result<LoadedModel> {
    if !is_folder(path)? {
        return load_gguf(path, base, device);
    }
    // The tokenizer first: it is read in no time, and may be missing.
    let tokenizer = Tokenizer::from_file(path.join("tokenizer.json"))?;
    let generation = GenerationConfig::read(path)?;
    let decoder = load_decoder(path, base, device)?;
    tokenizer.check_vocabulary(decoder.config.vocab_size)?;
    Ok(LoadedModel { decoder, tokenizer, generation })
}

/// As [`load`], the decoder alone.
///
/// # Errors
/// As [`load`].
pub fn load_decoder(path: &Path, base: BaseWeights, device: &Device) -> Result<Decoder> {
    if is_folder(path)? {
        let folder = HfFolder::open(path)?;
        let config = folder.config().clone();
        let source = WeightSource::Folder(folder.weights());
        return Builder { source, read: Read::Weights, base, device }.decoder(config);
    }
    gguf_decoder(&GgufFile::open(path)?, base, device)
}

/// The decoder with a [placeholder](LazyTensor::placeholder) for every weight, to be planned: only
/// `config.json` and the headers of the weights are read, or the header of the GGUF file.
///
/// # Errors
/// As [`load`], but for what lies in the weights.
pub fn load_outline(path: &Path, base: BaseWeights, device: &Device) -> Result<Decoder> {
    let read = Read::Headers;
    if is_folder(path)? {
        let folder = HfFolder::open(path)?;
        let config = folder.config().clone();
        return Builder { source: WeightSource::Folder(folder.weights()), read, base, device }
            .decoder(config);
    }
    let file = GgufFile::open(path)?;
    let config = file.decoder_config()?;
    Builder { source: WeightSource::Gguf(&file), read, base, device }.decoder(config)
}

/// A decoder that was never trained, its weights made on the device: to measure what a model of this shape would take,
/// without its files. The same seed gives the same weights on every device.
///
/// # Errors
/// Where the config contradicts itself; where the device has no memory for the weights.
pub fn random_decoder(
    config: DecoderConfig,
    base: BaseWeights,
    seed: u64,
    device: &Device,
) -> Result<Decoder> {
    let source = WeightSource::Random { seed };
    Builder { source, read: Read::Weights, base, device }.decoder(config)
}

/// Loads a decoder, its tokenizer and its chat template from a GGUF file.
///
/// Module names are Hugging Face's, and q and k rows are put back into its order, so that adapters
/// are those of the original model.
///
/// # Errors
/// Where the file is malformed, of an unknown architecture, or misses a tensor; where the tokenizer has a
/// token that the embedding lacks.
pub fn load_gguf(path: &Path, base: BaseWeights, device: &Device) -> Result<LoadedModel> {
    let file = GgufFile::open(path)?;
    let decoder = gguf_decoder(&file, base, device)?;
    let tokenizer = Tokenizer::from_gguf(&file)?;
    tokenizer.check_vocabulary(decoder.config.vocab_size)?;
    Ok(LoadedModel { decoder, tokenizer, generation: GenerationConfig::default() })
}

fn gguf_decoder(file: &GgufFile, base: BaseWeights, device: &Device) -> Result<Decoder> {
    let config = file.decoder_config()?;
    Builder { source: WeightSource::Gguf(file), read: Read::Weights, base, device }.decoder(config)
}

pub(super) fn is_folder(path: &Path) -> Result<bool> {
    if !path.exists() {
        return Err(io::Error::NoModel { path: path.to_owned() }.into());
    }
    Ok(path.is_dir())
}

/// How much of the files is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Read {
    Weights,
    Headers,
}

struct Builder<'a> {
    source: WeightSource<'a>,
    read: Read,
    base: BaseWeights,
    device: &'a Device,
}

impl Builder<'_> {
    fn check_base(&self) -> Result<()> {
        match self.base.dtype() {
            got @ (DType::U8 | DType::U32 | DType::I64 | DType::F64) => {
                Err(ErrorKind::BaseType { got }.into())
            }
            DType::F32 | DType::BF16 | DType::F16 => Ok(()),
        }
    }

    fn decoder(&self, config: DecoderConfig) -> Result<Decoder> {
        self.check_base()?;
        let table = [config.vocab_size, config.hidden_size];
        let embed = self.matrix("model.embed_tokens.weight", table)?;
        let output = match config.tie_word_embeddings {
            true => embed.clone(),
            false => self.matrix("lm_head.weight", table)?,
        };
        let layers = (0..config.num_layers).map(|i| self.layer(i, &config));
        let layers = layers.collect::<Result<Vec<_>>>()?;
        Ok(Decoder {
            embed: Embedding { weight: embed },
            layers,
            norm: self.norm("model.norm", config.hidden_size, &config)?,
            output,
            rotary: self.rotary(&config)?,
            adapter: None,
            activations: DType::F32,
            cache: None,
            config,
        })
    }

    fn layer(&self, i: usize, config: &DecoderConfig) -> Result<DecoderLayer> {
        let c = config;
        let name = |module: &str| format!("model.layers.{i}.{module}");
        let norm = |module: &str, len: usize| self.norm(&name(module), len, c);
        let head_norm = |module: &str| match c.qk_norm {
            true => norm(module, c.head_dim).map(Some),
            false => Ok(None),
        };
        let linear =
            |module: &str, dims: [usize; 2], bias: bool| self.linear(name(module), dims, bias);
        let [q, kv] = [c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim];
        let (hidden, inner) = (c.hidden_size, c.intermediate_size);
        Ok(DecoderLayer {
            input_norm: norm("input_layernorm", hidden)?,
            q_proj: linear("self_attn.q_proj", [q, hidden], c.attention_bias)?,
            k_proj: linear("self_attn.k_proj", [kv, hidden], c.attention_bias)?,
            v_proj: linear("self_attn.v_proj", [kv, hidden], c.attention_bias)?,
            q_norm: head_norm("self_attn.q_norm")?,
            k_norm: head_norm("self_attn.k_norm")?,
            o_proj: linear("self_attn.o_proj", [hidden, q], c.attention_output_bias)?,
            post_norm: norm("post_attention_layernorm", hidden)?,
            gate_proj: linear("mlp.gate_proj", [inner, hidden], false)?,
            up_proj: linear("mlp.up_proj", [inner, hidden], false)?,
            down_proj: linear("mlp.down_proj", [hidden, inner], false)?,
        })
    }

    fn norm(&self, module: &str, len: usize, config: &DecoderConfig) -> Result<RmsNorm> {
        let weight = self.float(&format!("{module}.weight"), &[len])?;
        Ok(RmsNorm { weight, eps: config.rms_norm_eps })
    }

    fn linear(&self, module: String, dims: [usize; 2], bias: bool) -> Result<Linear> {
        let name = format!("{module}.weight");
        let weight = match self.base {
            BaseWeights::Quantised { format, .. } => self.quantised(&name, dims, format)?,
            _ => self.matrix(&name, dims)?,
        };
        let bias = match bias {
            true => Some(self.float(&format!("{module}.bias"), &dims[..1])?),
            false => None,
        };
        Ok(Linear { name: module, weight, bias })
    }

    fn rotary(&self, c: &DecoderConfig) -> Result<Rotary> {
        let (theta, positions) = (c.rope_theta, c.max_position_embeddings);
        let rotary =
            Rotary::new(c.head_dim, theta, &c.rope_scaling, positions, c.rope_layout, self.device)?;
        match self.read {
            Read::Weights => Ok(rotary),
            Read::Headers => rotary.without_values(),
        }
    }

    /// As f32.
    fn float(&self, name: &str, dims: &[usize]) -> Result<LazyTensor> {
        self.dense(name, dims, DType::F32)
    }

    fn matrix(&self, name: &str, dims: [usize; 2]) -> Result<Weight> {
        match (self.source.encoding(name)?, self.base) {
            (Encoding::Blocks(format), BaseWeights::AsStored | BaseWeights::Quantised { .. }) => {
                let ([rows, cols], blocks) = (dims, self.blocks(name, &dims)?);
                Ok(Weight::Quantised { blocks, format, rows, cols })
            }
            _ => Ok(Weight::Dense(self.dense(name, &dims, self.base.dtype())?)),
        }
    }

    /// In blocks of this format, which they are or become.
    fn quantised(&self, name: &str, dims: [usize; 2], format: BlockFormat) -> Result<Weight> {
        let [rows, cols] = dims;
        let unfit = |problem| self.source.unfit(name, format, problem);
        let blocks = match (self.source.encoding(name)?, format.bytes_for(cols)) {
            (Encoding::Blocks(stored), _) if stored == format => self.blocks(name, &dims)?,
            (Encoding::Blocks(stored), _) => {
                return Err(unfit(gguf::Problem::InBlocks { stored })?.into());
            }
            (Encoding::Dense(_), None) => {
                let (row, block) = (cols, format.block_len());
                return Err(unfit(gguf::Problem::RowOfBlocks { row, block })?.into());
            }
            (Encoding::Dense(_), Some(row_bytes)) => {
                self.quantised_blocks(name, &dims, format, rows * row_bytes)?
            }
        };
        Ok(Weight::Quantised { blocks, format, rows, cols })
    }

    fn quantised_blocks(
        &self,
        name: &str,
        dims: &[usize],
        format: BlockFormat,
        len_bytes: usize,
    ) -> Result<LazyTensor> {
        self.source.check(name, dims)?;
        let values = match (self.read, self.source) {
            (Read::Headers, _) => {
                let blocks = LazyTensor::placeholder(&[len_bytes], DType::U8, self.device)?;
                return Ok(blocks.named(name));
            }
            (Read::Weights, WeightSource::Random { seed }) => {
                random(name, dims, DType::F32, seed, self.device)?.to_vec()?
            }
            (Read::Weights, _) => {
                let stored = self.source.read(name)?;
                self.source.dequantise(name, &stored, DType::F32)?.flatten_all()?.to_vec1()?
            }
        };
        let bytes = self.source.quantise(name, dims, format, &values)?;
        Ok(LazyTensor::from_bytes(bytes, DType::U8, &[len_bytes], self.device)?.named(name))
    }

    /// As stored.
    fn blocks(&self, name: &str, dims: &[usize]) -> Result<LazyTensor> {
        self.source.check(name, dims)?;
        let blocks = match self.read {
            Read::Weights => {
                let bytes = self.source.read(name)?.bytes;
                let len = bytes.len();
                LazyTensor::from_bytes(bytes, DType::U8, &[len], self.device)?
            }
            Read::Headers => {
                let len = self.source.len_bytes(name)?;
                LazyTensor::placeholder(&[len], DType::U8, self.device)?
            }
        };
        Ok(blocks.named(name))
    }

    /// As floats of this type.
    fn dense(&self, name: &str, dims: &[usize], dtype: DType) -> Result<LazyTensor> {
        self.source.check(name, dims)?;
        let weight = match (self.read, self.source) {
            (Read::Weights, WeightSource::Random { seed }) => {
                random(name, dims, dtype, seed, self.device)?
            }
            (Read::Weights, _) => {
                let stored = self.source.read(name)?;
                if stored.encoding == Encoding::Dense(dtype) {
                    LazyTensor::from_bytes(stored.bytes, dtype, &stored.shape, self.device)?
                } else {
                    let floats = self.source.dequantise(name, &stored, dtype)?;
                    // Memory of its own: Candle's would be locked in every run, as others may write it.
                    LazyTensor::from_tensor(&floats)?.to_device(self.device)?.into_owned()?
                }
            }
            (Read::Headers, _) => LazyTensor::placeholder(dims, dtype, self.device)?,
        };
        Ok(weight.named(name))
    }
}
