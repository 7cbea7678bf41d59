//! One low-rank branch (Hu et al. 2021).

use crate::io::peft::Target;
use crate::{DType, Device, LazyTensor, Result};

/// One branch: `scale · (x Aᵀ) Bᵀ`.
#[derive(Clone, Debug)]
pub struct LoRALayer {
    /// `[rank, in]`
    pub a: LazyTensor,
    /// `[out, rank]`
    pub b: LazyTensor,
    /// `alpha / rank`, or `alpha / √rank`.
    pub scale: f64,
    /// What is dropped of x, while training.
    pub dropout: Option<LoRADropout>,
}

/// Dropout before A.
#[derive(Clone, Debug)]
pub struct LoRADropout {
    /// The probability of dropping an element.
    pub p: f64,
    /// `i64[]`, another one each step.
    pub seed: LazyTensor,
    /// Tells the layers apart.
    pub stream: u32,
}

impl LoRALayer {
    /// PEFT's initial values: A uniform in ±1/√in (Kaiming with a = √5), B zero, so that the branch
    /// starts as nothing. The same `seed` and `stream` give the same A on every device.
    ///
    /// # Errors
    /// Where the shapes are too large to be addressed.
    pub fn new(
        [out, input]: [usize; 2],
        target: &Target,
        seed: u64,
        stream: u32,
        device: &Device,
    ) -> Result<LoRALayer> {
        let bound = 1.0 / (input as f64).sqrt();
        let seed = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(u64::from(stream));
        let unit = LazyTensor::rand(&[target.rank, input], DType::F32, seed, device)?;
        let a = unit.affine(2.0 * bound, -bound)?;
        let b = LazyTensor::zeros(&[out, target.rank], DType::F32, device)?;
        Ok(LoRALayer { a, b, scale: target.scale, dropout: None })
    }

    /// `x: [.., in]` gives `[.., out]`, computed in x's dtype.
    ///
    /// # Errors
    /// Where the last dim of x is not the layer's input size.
    pub fn branch(&self, x: &LazyTensor) -> Result<LazyTensor> {
        let x = match &self.dropout {
            Some(LoRADropout { p, seed, stream }) => x.dropout_with(*p, seed, *stream)?,
            None => x.clone(),
        };
        let (a, b) = (self.a.to_dtype(x.dtype())?, self.b.to_dtype(x.dtype())?);
        x.matmul(&a.t()?)?.matmul(&b.t()?)?.affine(self.scale, 0.0)
    }

    /// `W + scale · B A`, `[out, in]`.
    ///
    /// # Errors
    /// Where the weight has another shape.
    pub fn merge(&self, weight: &LazyTensor) -> Result<LazyTensor> {
        weight.add(&self.b.matmul(&self.a)?.affine(self.scale, 0.0)?)
    }
}
