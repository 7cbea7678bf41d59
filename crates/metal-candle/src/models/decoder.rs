//! A decoder of the Llama family (Touvron et al. 2023), driven by its config.

use crate::error::ErrorKind;
use crate::io::DecoderConfig;
use crate::lazy::one_device;
use crate::nn::{ApplyAdapter, Embedding, Linear, LoRAAdapter, RmsNorm, Rotary, Rotation, Weight};
use crate::{Attention, CrossEntropy, DType, Device, LazyTensor, Result};

/// One block: attention and a gated feed-forward, each after a norm and added to the residual.
#[derive(Clone, Debug)]
pub struct DecoderLayer {
    pub(crate) input_norm: RmsNorm,
    pub(crate) q_proj: Linear,
    pub(crate) k_proj: Linear,
    pub(crate) v_proj: Linear,
    /// Qwen3 normalises every head of q and k.
    pub(crate) q_norm: Option<RmsNorm>,
    pub(crate) k_norm: Option<RmsNorm>,
    pub(crate) o_proj: Linear,
    pub(crate) post_norm: RmsNorm,
    pub(crate) gate_proj: Linear,
    pub(crate) up_proj: Linear,
    pub(crate) down_proj: Linear,
}

impl DecoderLayer {
    pub(super) fn linears(&self) -> [&Linear; 7] {
        [
            &self.q_proj,
            &self.k_proj,
            &self.v_proj,
            &self.o_proj,
            &self.gate_proj,
            &self.up_proj,
            &self.down_proj,
        ]
    }
}

/// A causal language model.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Sizes and constants.
    pub config: DecoderConfig,
    pub(crate) embed: Embedding,
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) norm: RmsNorm,
    /// `[vocabulary, hidden]`; the embedding itself where they are tied.
    pub(crate) output: Weight,
    pub(crate) rotary: Rotary,
    pub(crate) adapter: Option<LoRAAdapter>,
    /// Of the residual stream and all that lies between the products.
    pub(crate) activations: DType,
    /// Of cached keys and values; that of the activations if nothing else was asked for.
    pub(crate) cache: Option<DType>,
}

/// What a cached forward pass reads and updates: `[b, capacity, kv heads, head dim]` per layer, and the
/// position of the first new token.
#[derive(Clone, Copy, Debug)]
pub struct CacheInput<'a> {
    /// Keys, one per layer.
    pub keys: &'a [LazyTensor],
    /// Values, one per layer.
    pub values: &'a [LazyTensor],
    /// `i64[]`
    pub position: &'a LazyTensor,
}

/// Texts of different lengths in one batch, padded on the left.
#[derive(Clone, Copy, Debug)]
pub struct PaddedRows<'a> {
    /// The position of every new token in its own text, `u32 [b, t]`; any for padding.
    pub positions: &'a LazyTensor,
    /// 1 where a new token is one, 0 where it is padding, `u8 [b, t]`.
    pub queries: &'a LazyTensor,
    /// The same for the whole cache, `u8 [b, capacity]`.
    pub keys: &'a LazyTensor,
}

/// Rows that hold several documents, which do not see each other.
#[derive(Clone, Copy, Debug)]
pub struct PackedInput<'a> {
    /// `u32 [b, t]`: equal for the tokens of one document.
    pub segments: &'a LazyTensor,
    /// `u32 [b, t]`: where in its document a token stands.
    pub positions: &'a LazyTensor,
}

impl Decoder {
    /// The linear layers that an adapter may target, with `[out, in]`.
    pub fn modules(&self) -> impl Iterator<Item = (&str, [usize; 2])> {
        let linears = self.layers.iter().flat_map(DecoderLayer::linears);
        linears.map(|l| (l.name.as_str(), l.weight.dims()))
    }

    /// The same model with the residual stream, and all that lies between the products, in another dtype. At first it
    /// is f32. In bf16, what transformers computes in for a bf16 model, it takes half the memory and half the traffic,
    /// which is what a GPU waits for. Sums, norms and the softmax of attention are f32 in any case, an adapter's own
    /// weights too.
    #[must_use]
    pub fn with_activations(self, dtype: DType) -> Decoder {
        Decoder { activations: dtype, ..self }
    }

    /// See [`Decoder::with_activations`].
    pub fn activations(&self) -> DType {
        self.activations
    }

    /// The same model whose keys and values are remembered in another dtype than its activations': f16 or bf16 beside
    /// f32 ones take half the memory, and half the traffic of a decoded token, which grows with what it looks back at.
    /// Scores, their softmax and the sums of weighted values are f32 in any case.
    #[must_use]
    pub fn with_cache(self, dtype: DType) -> Decoder {
        Decoder { cache: Some(dtype), ..self }
    }

    /// The dtype of a [`KVCache`](crate::generate::KVCache) of this model.
    pub fn cache(&self) -> DType {
        self.cache.unwrap_or(self.activations)
    }

    /// Where its weights are, and so where it computes.
    pub fn device(&self) -> &Device {
        self.norm.weight.device()
    }

    /// One that is where all are.
    pub(crate) fn weight(&self) -> &LazyTensor {
        &self.norm.weight
    }

    /// The hidden states after the last norm, with the branches of `adapter`. One that [`ApplyAdapter`] put on the model counts
    /// only if it is passed: [`ApplyAdapter::adapter`] gives it.
    ///
    /// # Shapes
    /// `ids: u32 [b, t]` gives `[b, t, hidden]`.
    ///
    /// # Errors
    /// Where `t` exceeds the model's context.
    pub fn hidden(&self, ids: &LazyTensor, adapter: Option<&LoRAAdapter>) -> Result<LazyTensor> {
        self.hidden_packed(ids, None, adapter)
    }

    /// [`Decoder::hidden`] of rows that may hold several documents, each as if it were alone.
    fn hidden_packed(
        &self,
        ids: &LazyTensor,
        packed: Option<PackedInput<'_>>,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<LazyTensor> {
        let rotation = match packed {
            Some(PackedInput { positions, .. }) => self.rotary.at_each(positions)?,
            None => self.rotary.at(None, ids.dims()[1])?,
        };
        let attention = match packed {
            Some(PackedInput { segments, .. }) => self.attention().segments(segments, segments),
            None => self.attention(),
        };
        let mut x = self.embed.forward(ids, self.activations)?;
        for layer in &self.layers {
            let keep = |k: LazyTensor, v: LazyTensor| Ok((k, v, attention));
            let kept = self.activations;
            x = self.layer(layer, &x, &rotation, adapter, kept, keep)?;
        }
        self.norm.forward(&x)
    }

    /// The hidden states of new tokens, seen after those in the cache; and the cache with the new tokens in it.
    ///
    /// # Errors
    /// Where the new tokens do not fit into the cache (when it runs).
    pub fn hidden_cached(
        &self,
        ids: &LazyTensor,
        cache: CacheInput<'_>,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<(LazyTensor, Vec<LazyTensor>, Vec<LazyTensor>)> {
        let rotation = self.rotary.at(Some(cache.position), ids.dims()[1])?;
        let attention = self.attention().offset(cache.position);
        self.cached(ids, cache, &rotation, attention, adapter)
    }

    /// As [`Decoder::hidden_cached`] for texts of different lengths, padded on the left: padding is
    /// not seen by the tokens.
    ///
    /// # Errors
    /// As [`Decoder::hidden_cached`]; where `rows` are of other shapes.
    pub fn hidden_padded(
        &self,
        ids: &LazyTensor,
        cache: CacheInput<'_>,
        rows: PaddedRows<'_>,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<(LazyTensor, Vec<LazyTensor>, Vec<LazyTensor>)> {
        let rotation = self.rotary.at_each(rows.positions)?;
        let attention = self.attention().offset(cache.position).segments(rows.queries, rows.keys);
        self.cached(ids, cache, &rotation, attention, adapter)
    }

    fn cached(
        &self,
        ids: &LazyTensor,
        cache: CacheInput<'_>,
        rotation: &Rotation,
        attention: Attention<'_>,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<(LazyTensor, Vec<LazyTensor>, Vec<LazyTensor>)> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        let mut x = self.embed.forward(ids, self.activations)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let remember = |k: LazyTensor, v: LazyTensor| {
                let k = cache.keys[i].slice_update(1, &k, cache.position)?;
                let v = cache.values[i].slice_update(1, &v, cache.position)?;
                keys.push(k.clone());
                values.push(v.clone());
                Ok((k, v, attention))
            };
            x = self.layer(layer, &x, rotation, adapter, self.cache(), remember)?;
        }
        Ok((self.norm.forward(&x)?, keys, values))
    }

    /// The logits of hidden states: `[.., hidden]` gives `[.., vocabulary]`.
    ///
    /// # Errors
    /// Where the last dim is not the hidden size.
    pub fn logits(&self, hidden: &LazyTensor) -> Result<LazyTensor> {
        self.output.product(hidden)
    }

    /// The mean loss of the next token over the labels that count (not -100).
    ///
    /// # Shapes
    /// `ids: u32 [b, t]`, `labels: i64 [b, t]`, already shifted: `labels[i]` follows `ids[i]`.
    ///
    /// # Errors
    /// Where the shapes differ.
    pub fn loss(
        &self,
        ids: &LazyTensor,
        labels: &LazyTensor,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<LazyTensor> {
        self.loss_packed(ids, labels, None, adapter)
    }

    /// [`Decoder::loss`] of rows that may hold several documents, each as if it were alone.
    ///
    /// # Errors
    /// As [`Decoder::loss`]; where a position exceeds the model's context (when it runs).
    pub fn loss_packed(
        &self,
        ids: &LazyTensor,
        labels: &LazyTensor,
        packed: Option<PackedInput<'_>>,
        adapter: Option<&LoRAAdapter>,
    ) -> Result<LazyTensor> {
        let hidden = self.hidden_packed(ids, packed, adapter)?;
        let rows = ids.dims()[0] * ids.dims()[1];
        let hidden = hidden.reshape(&[rows, self.config.hidden_size])?;
        let labels = labels.reshape(&[rows])?;
        self.output.cross_entropy(&hidden, &labels, CrossEntropy::default())
    }

    /// How every layer attends.
    fn attention<'c>(&self) -> Attention<'c> {
        let causal = Attention::new().causal();
        self.config.sliding_window.map_or(causal, |window| causal.window(window))
    }

    /// One block. `remember` takes the new keys and values, of dtype `kept`, and says which ones to attend to, and how.
    fn layer<'c>(
        &self,
        layer: &DecoderLayer,
        x: &LazyTensor,
        rotation: &Rotation,
        adapter: Option<&LoRAAdapter>,
        kept: DType,
        remember: impl FnOnce(LazyTensor, LazyTensor) -> Result<(LazyTensor, LazyTensor, Attention<'c>)>,
    ) -> Result<LazyTensor> {
        let linear = |l: &Linear, x: &LazyTensor| {
            l.forward(x, adapter.and_then(|adapter| adapter.layer(&l.name)))
        };
        let [b, t] = [x.dims()[0], x.dims()[1]];
        let c = &self.config;
        let heads = |x: LazyTensor, n: usize| x.reshape(&[b, t, n, c.head_dim]);

        let normed = layer.input_norm.forward(x)?;
        let q = heads(linear(&layer.q_proj, &normed)?, c.num_heads)?;
        let k = heads(linear(&layer.k_proj, &normed)?, c.num_kv_heads)?;
        let q = rotation.apply(&norm_heads(layer.q_norm.as_ref(), q)?.to_dtype(kept)?)?;
        let k = rotation.apply(&norm_heads(layer.k_norm.as_ref(), k)?.to_dtype(kept)?)?;
        let v = heads(linear(&layer.v_proj, &normed)?, c.num_kv_heads)?.to_dtype(kept)?;
        let (k, v, attention) = remember(k, v)?;
        let seen = attention.forward(&q, &k, &v)?.to_dtype(self.activations)?;
        let seen = seen.reshape(&[b, t, c.num_heads * c.head_dim])?;
        let x = x.add(&linear(&layer.o_proj, &seen)?)?;

        let normed = layer.post_norm.forward(&x)?;
        let gate = linear(&layer.gate_proj, &normed)?.silu()?;
        let inner = gate.mul(&linear(&layer.up_proj, &normed)?)?;
        x.add(&linear(&layer.down_proj, &inner)?)
    }
}

fn norm_heads(norm: Option<&RmsNorm>, x: LazyTensor) -> Result<LazyTensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

impl ApplyAdapter for Decoder {
    fn apply_adapter(&mut self, adapter: LoRAAdapter) -> Result<Option<LoRAAdapter>> {
        for (module, layer) in adapter.layers() {
            let dims = self.modules().find(|(name, _)| *name == module).map(|(_, dims)| dims);
            let Some([out, input]) = dims else {
                return Err(ErrorKind::AdapterModule { module: module.to_string() }.into());
            };
            let got = [layer.b.dims()[0], layer.a.dims()[1]];
            if got != [out, input] {
                let module = module.to_string();
                return Err(ErrorKind::AdapterShape { module, expected: [out, input], got }.into());
            }
            one_device("apply_adapter", [&self.norm.weight, &layer.a, &layer.b])?;
        }
        Ok(self.adapter.replace(adapter))
    }

    fn remove_adapter(&mut self) -> Option<LoRAAdapter> {
        self.adapter.take()
    }

    fn adapter(&self) -> Option<&LoRAAdapter> {
        self.adapter.as_ref()
    }
}
