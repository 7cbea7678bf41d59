//! From the vectors of tokens to one of a text.

use crate::{DType, LazyTensor, Result};

/// Below it a length is taken for it, as PyTorch does, so that zeros stay zeros.
const SHORTEST: f64 = 1e-12;

/// The mean of a text's tokens. Padding does not count; where all is padding the mean is 0.
///
/// # Shapes
/// `hidden: [b, t, n]` and `mask: [b, t]`, 1 for a token and 0 for padding, of any dtype, give `[b, n]`. Without a mask all
/// are tokens.
///
/// # Errors
/// Where the shapes differ.
pub fn mean_pool(hidden: &LazyTensor, mask: Option<&LazyTensor>) -> Result<LazyTensor> {
    let Some(mask) = mask else { return hidden.mean([1]) };
    let mask = mask.to_dtype(hidden.dtype())?;
    let sum = hidden.mul(&mask.unsqueeze(2)?)?.sum([1])?;
    let count = mask.sum_keepdim([1])?; // [b, 1]
    sum.div(&count.maximum(&count.ones_like()?)?)
}

/// The first token's vector.
///
/// # Shapes
/// `[b, t, n]` gives `[b, n]`.
///
/// # Errors
/// Where there are no tokens.
pub fn cls_pool(hidden: &LazyTensor) -> Result<LazyTensor> {
    hidden.narrow(1, 0, 1)?.squeeze(1)
}

/// Vectors of length 1 that point where these do: `x / max(‖x‖, 1e-12)` over the last dim.
///
/// # Numerics
/// Computed in f32 (f64 for f64).
///
/// # Errors
/// For rank 0 and for an integer dtype.
pub fn normalize(x: &LazyTensor) -> Result<LazyTensor> {
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let y = x.to_dtype(wide)?;
    let length = y.sqr()?.sum_keepdim([-1])?.sqrt()?;
    let shortest = LazyTensor::full(SHORTEST, &[], wide, x.device())?;
    y.div(&length.maximum(&shortest)?)?.to_dtype(x.dtype())
}
