//! What a user calls.

use super::batch::{Batch, Limits, batches};
use super::{EmbeddingConfig, Embeddings, Pooling, cls_pool, mean_pool, normalize};
use crate::io::tokenizer::Tokenizer;
use crate::io::{self, SentenceFolder};
use crate::models::{BaseWeights, Encoder, load_encoder};
use crate::{Compiled, DType, Device, ErrorKind, LazyTensor, Plan, Result, Timing, compile};
use std::path::Path;
use std::sync::Arc;

/// Texts of a batch at most, as sentence-transformers has it.
const BATCH_SIZE: usize = 32;
/// Tokens of a batch at most: on a CPU enough for its products, and few enough for its caches; a GPU wants more.
const CPU_TOKENS: usize = 2048;
const GPU_TOKENS: usize = 16384;

/// An encoder with its tokenizer: gives every text a vector, as sentence-transformers does.
///
/// ```no_run
/// use metal_candle::Device;
/// use metal_candle::embed::EmbeddingModel;
/// use metal_candle::models::BaseWeights;
/// let folder = "all-MiniLM-L6-v2".as_ref();
/// let model = EmbeddingModel::load(folder, BaseWeights::default(), &Device::Cpu)?;
/// let rows = model.encode(&["A cat sat on a mat.", "Ein Hund bellt."])?;
/// assert_eq!(rows.row(0).len(), model.dimension());
/// # Ok::<(), metal_candle::Error>(())
/// ```
#[derive(Debug)]
pub struct EmbeddingModel {
    encoder: Arc<Encoder>,
    tokenizer: Tokenizer,
    config: EmbeddingConfig,
    batch_size: usize,
    /// Ids and, where there is padding, a mask, `[b, t]` each, to `f32 [b, hidden]`.
    step: Compiled,
}

impl EmbeddingModel {
    /// Loads a folder of sentence-transformers, or one of transformers with an encoder: `config.json`, safetensors,
    /// `tokenizer.json`, and where they are there `modules.json` with what it names.
    ///
    /// With [`BaseWeights::Quantised`] the linear layers are quantised as they are loaded, and all else stays as it is. On a
    /// CPU that multiplies integers, `Q8_0` is the fastest way, and its vectors are all but those of f32.
    ///
    /// ```no_run
    /// # use metal_candle::{BlockFormat, DType, Device, embed::EmbeddingModel, models::BaseWeights};
    /// let base = BaseWeights::Quantised { format: BlockFormat::Q8_0, rest: DType::F32 };
    /// let model = EmbeddingModel::load("all-MiniLM-L6-v2".as_ref(), base, &Device::Cpu)?;
    /// # Ok::<(), metal_candle::Error>(())
    /// ```
    ///
    /// # Errors
    /// Where a file is malformed or missing; for an encoder, a module or a pooling that this crate does not compute; where
    /// a weight does not fit the config or the tokenizer has a token that the embedding lacks.
    pub fn load(folder: &Path, base: BaseWeights, device: &Device) -> Result<EmbeddingModel> {
        if !folder.is_dir() {
            return Err(io::Error::NoEncoder { path: folder.to_owned() }.into());
        }
        let SentenceFolder { transformer, encoder, embedding } = SentenceFolder::open(folder)?;
        let tokenizer = Tokenizer::from_file(transformer.join("tokenizer.json"))?;
        tokenizer.check_vocabulary(encoder.vocab_size)?;
        let encoder = load_encoder(&transformer, base, device)?;
        EmbeddingModel::new(encoder, tokenizer, embedding)
    }

    /// From its parts.
    ///
    /// # Errors
    /// Where the config lets texts be longer than the encoder has positions for, or too short to hold anything.
    pub fn new(
        encoder: Encoder,
        tokenizer: Tokenizer,
        config: EmbeddingConfig,
    ) -> Result<EmbeddingModel> {
        let (expected, got) = (encoder.config.max_tokens(), config.max_seq_length);
        if got > expected {
            return Err(ErrorKind::TextLength { expected, got }.into());
        }
        let tokenizer = tokenizer.cut_at(got)?;
        let tokenizer = if config.lowercase { tokenizer.in_lower_case()? } else { tokenizer };
        let encoder = Arc::new(encoder);
        let step = step(Arc::clone(&encoder), &config);
        Ok(EmbeddingModel { encoder, tokenizer, config, batch_size: BATCH_SIZE, step })
    }

    /// The same model, which takes so many texts at a time at most, and one at least; at first 32.
    #[must_use]
    pub fn with_batch_size(self, texts: usize) -> EmbeddingModel {
        EmbeddingModel { batch_size: texts.max(1), ..self }
    }

    /// The same model with all that lies between its products in another dtype; see
    /// [`Encoder::with_activations`]. Vectors are f32 in any case.
    #[must_use]
    pub fn with_activations(self, dtype: DType) -> EmbeddingModel {
        let encoder = Arc::new(Encoder::clone(&self.encoder).with_activations(dtype));
        let step = step(Arc::clone(&encoder), &self.config);
        EmbeddingModel { encoder, step, ..self }
    }

    /// Elements of a vector.
    pub fn dimension(&self) -> usize {
        self.encoder.config.hidden_size
    }

    /// What is done before and after the encoder.
    pub fn config(&self) -> &EmbeddingConfig {
        &self.config
    }

    /// The weights.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// Every text's vector. What is longer than [`EmbeddingConfig::max_seq_length`] is cut.
    ///
    /// # Errors
    /// Where the tokenizer or the device fails.
    pub fn encode<S: AsRef<str>>(&self, texts: &[S]) -> Result<Embeddings> {
        self.encode_with(texts, |_| {})
    }

    /// [`EmbeddingModel::encode`]; `done` is told how many texts more have their vectors.
    ///
    /// # Errors
    /// As [`EmbeddingModel::encode`].
    pub fn encode_with<S: AsRef<str>>(
        &self,
        texts: &[S],
        mut done: impl FnMut(usize),
    ) -> Result<Embeddings> {
        let dimension = self.dimension();
        let (texts, cut) = self.tokenize(texts)?;
        let mut values = vec![0.0; texts.len() * dimension];
        for batch in self.batches(&texts) {
            let vectors = self.step.call(self.arguments(&texts, &batch)?)?;
            let vectors: Vec<f32> = vectors[0].to_vec()?;
            for (&text, vector) in batch.texts.iter().zip(vectors.chunks_exact(dimension)) {
                values[text * dimension..(text + 1) * dimension].copy_from_slice(vector);
            }
            done(batch.texts.len());
        }
        Ok(Embeddings::new(dimension, values, cut))
    }

    /// The plan of the first batch of these texts, and the seconds that a run of it takes, of each step or in all.
    ///
    /// # Errors
    /// As [`EmbeddingModel::encode`]; where there are no texts.
    pub fn profile<S: AsRef<str>>(&self, texts: &[S], timing: Timing) -> Result<(Plan, Vec<f64>)> {
        let (texts, _) = self.tokenize(texts)?;
        let batches = self.batches(&texts);
        let batch = batches.first().ok_or(ErrorKind::NoTexts)?;
        let args = self.arguments(&texts, batch)?;
        let plan = self.step.plan(&args)?;
        Ok((plan, self.step.profile(args, timing)?.1))
    }

    /// The ids of every text, and how many were cut.
    fn tokenize<S: AsRef<str>>(&self, texts: &[S]) -> Result<(Vec<Vec<u32>>, usize)> {
        let prompted = |text: &S| format!("{}{}", self.config.prompt, text.as_ref());
        let texts = self.tokenizer.encode_cut(texts.iter().map(prompted).collect())?;
        let cut = texts.iter().filter(|text| text.is_cut).count();
        Ok((texts.into_iter().map(|text| text.ids).collect(), cut))
    }

    fn batches(&self, texts: &[Vec<u32>]) -> Vec<Batch> {
        let lens: Vec<usize> = texts.iter().map(Vec::len).collect();
        let tokens = match self.encoder.device() {
            Device::Cpu => CPU_TOKENS,
            _ => GPU_TOKENS,
        };
        batches(&lens, Limits { texts: self.batch_size, tokens, len: self.config.max_seq_length })
    }

    /// Ids and, where there is padding, the mask.
    fn arguments(&self, texts: &[Vec<u32>], batch: &Batch) -> Result<Vec<LazyTensor>> {
        let dims = [batch.texts.len(), batch.len];
        let padding = self.tokenizer.special().pad.unwrap_or(0);
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for &text in &batch.texts {
            let text = &texts[text];
            ids.extend_from_slice(text);
            ids.resize(ids.len() + batch.len - text.len(), padding);
            mask.resize(mask.len() + text.len(), 1u8);
            mask.resize(mask.len() + batch.len - text.len(), 0);
        }
        let device = self.encoder.device();
        let is_padded = mask.contains(&0);
        let mut args = vec![LazyTensor::from_vec(ids, &dims, device)?];
        if is_padded {
            args.push(LazyTensor::from_vec(mask, &dims, device)?);
        }
        Ok(args)
    }
}

fn step(encoder: Arc<Encoder>, config: &EmbeddingConfig) -> Compiled {
    let (pooling, is_normalized) = (config.pooling, config.normalize);
    compile(move |args: &[LazyTensor]| {
        let mask = args.get(1);
        let hidden = encoder.hidden(&args[0], mask)?.to_dtype(DType::F32)?;
        let pooled = match pooling {
            Pooling::Mean => mean_pool(&hidden, mask)?,
            Pooling::Cls => cls_pool(&hidden)?,
        };
        Ok(vec![if is_normalized { normalize(&pooled)? } else { pooled }])
    })
}
