//! Scaled dot-product attention.

use super::norm::composite;
use crate::error::AtCaller;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::composite::AttentionAttrs;
use metal_candle_graph::{Composite, Error, Scalar, Shape};

/// Scaled dot-product attention (Vaswani et al. 2017): `softmax(scale · q kᵀ + mask) v`, without
/// ever holding the scores where the device has a kernel for it.
///
/// Query `i` stands at position `i + offset` and key `j` at position `j`. Without an offset the
/// last query stands at the last key. A query that sees no key gives 0.
///
/// ```
/// use metal_candle::{Attention, DType, Device, LazyTensor};
/// // [batch, time, heads, features]: four query heads share two key heads.
/// let q = LazyTensor::randn(&[1, 5, 4, 8], DType::F32, 0, &Device::Cpu)?;
/// let k = LazyTensor::randn(&[1, 5, 2, 8], DType::F32, 1, &Device::Cpu)?;
/// let y = Attention::new().causal().forward(&q, &k, &k)?;
/// assert_eq!(y.dims(), [1, 5, 4, 8]);
/// # Ok::<(), metal_candle::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Attention<'a> {
    scale: Option<f64>,
    causal: bool,
    window: Option<usize>,
    mask: Option<&'a LazyTensor>,
    segments: Option<[&'a LazyTensor; 2]>,
    offset: Option<&'a LazyTensor>,
}

impl<'a> Attention<'a> {
    /// Attention in which every query sees every key.
    pub fn new() -> Attention<'a> {
        Attention::default()
    }

    /// Multiplies the scores by `scale` instead of `1 / √features`.
    #[must_use]
    pub fn scale(self, scale: f64) -> Attention<'a> {
        Attention { scale: Some(scale), ..self }
    }

    /// Hides the keys after the query's position.
    #[must_use]
    pub fn causal(self) -> Attention<'a> {
        Attention { causal: true, ..self }
    }

    /// Hides all but the last `window` positions up to the query's own; causal (Beltagy et al.
    /// 2020).
    #[must_use]
    pub fn window(self, window: usize) -> Attention<'a> {
        Attention { window: Some(window), causal: true, ..self }
    }

    /// Adds `mask` to the scores: a float that broadcasts to `[batch, query heads, queries, keys]`;
    /// -inf hides. It has a gradient.
    #[must_use]
    pub fn mask(self, mask: &'a LazyTensor) -> Attention<'a> {
        Attention { mask: Some(mask), ..self }
    }

    /// Packed documents: a query sees the keys of its own segment only. Integer ids that broadcast
    /// to `[batch, queries]` and `[batch, keys]`.
    #[must_use]
    pub fn segments(self, queries: &'a LazyTensor, keys: &'a LazyTensor) -> Attention<'a> {
        Attention { segments: Some([queries, keys]), ..self }
    }

    /// The position of the first query, `i64[]`, known when it runs.
    #[must_use]
    pub fn offset(self, offset: &'a LazyTensor) -> Attention<'a> {
        Attention { offset: Some(offset), ..self }
    }

    /// Attends.
    ///
    /// # Shapes
    /// `q: [b, tq, hq, d]`, `k: [b, tk, hk, d]` and `v: [b, tk, hk, dv]` give `[b, tq, hq, dv]`.
    /// `hq` is a multiple of `hk`: grouped queries (Ainslie et al. 2023) share a key head without
    /// copies of it.
    ///
    /// # Numerics
    /// Scores, softmax and sums are computed in f32 (f64 for f64) and rounded once.
    ///
    /// # Errors
    /// Where shapes, dtypes or devices do not fit, and for a window of 0.
    #[track_caller]
    pub fn forward(&self, q: &LazyTensor, k: &LazyTensor, v: &LazyTensor) -> Result<LazyTensor> {
        let op = "attention";
        for x in [q, k, v] {
            x.check_rank(op, "4 (batch, time, heads, features)", 4)?;
        }
        let ([b, tq, hq, d], tk) = (extents(q), k.dims()[1]);
        // Whatever else does not fit is refused when it is recorded; these would not broadcast.
        let shape = |dims: &[usize]| Shape::new(dims);
        let mut optional: Vec<LazyTensor> = Vec::new();
        if let Some(mask) = self.mask {
            optional.push(mask.broadcast_for(op, shape(&[b, hq, tq, tk]).at_caller()?)?);
        }
        if let Some([queries, keys]) = self.segments {
            optional.push(queries.broadcast_for(op, shape(&[b, tq]).at_caller()?)?);
            optional.push(keys.broadcast_for(op, shape(&[b, tk]).at_caller()?)?);
        }
        optional.extend(self.offset.cloned());
        let inputs: Vec<&LazyTensor> = [q, k, v].into_iter().chain(&optional).collect();
        composite(Composite::Attention(self.attrs(d)?), &inputs)
    }

    /// What the graph is told, for heads of `d` features.
    #[track_caller]
    fn attrs(&self, d: usize) -> Result<AttentionAttrs> {
        let window = match self.window.map(u32::try_from) {
            None => None,
            Some(Ok(window)) => Some(window),
            Some(Err(_)) => {
                let (op, what, expected) = ("attention", "window", "below 2^32");
                let got = self.window.unwrap_or_default().to_string();
                return Err(Error::Attribute { op, what, expected, got }).at_caller();
            }
        };
        // Without features every score is 0, whatever it is multiplied by.
        let scale = self.scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt());
        Ok(AttentionAttrs {
            scale: Scalar::from_f64(DType::F64, scale),
            causal: self.causal,
            window,
            mask: self.mask.is_some(),
            segments: self.segments.is_some(),
            offset: self.offset.is_some(),
        })
    }
}

fn extents(x: &LazyTensor) -> [usize; 4] {
    [0, 1, 2, 3].map(|d| x.dims()[d])
}
