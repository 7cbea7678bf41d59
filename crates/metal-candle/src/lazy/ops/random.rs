//! Dropout.

use crate::error::AtCaller;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::{BinaryOp, Distribution, Error, Operation, Scalar};

impl LazyTensor {
    /// Sets each element to 0 with probability `p` and multiplies the others by `1 / (1 - p)`
    /// (Srivastava et al. 2014).
    ///
    /// The same seed drops the same elements, on every device and in a forward pass that is
    /// computed again.
    ///
    /// # Shapes
    /// Any; the result has the same.
    ///
    /// # Numerics
    /// `p` is met up to 2⁻²⁴. Whether element `i` is dropped depends on `seed` and `i` only (Philox
    /// 4x32-10).
    ///
    /// # Errors
    /// Where `p` is not within 0 and 1, and for an integer dtype.
    #[track_caller]
    pub fn dropout(&self, p: f64, seed: u64) -> Result<LazyTensor> {
        let seed = LazyTensor::constant(Scalar::from_i64(DType::I64, seed as i64), self.device());
        self.dropout_with(p, &seed, 0)
    }

    /// [`LazyTensor::dropout`] by a seed that is known when it runs, so that one plan serves every
    /// step. `stream` tells the places apart that share the seed.
    ///
    /// # Shapes
    /// Any; the result has the same. `seed` is `i64[]`.
    ///
    /// # Errors
    /// As [`LazyTensor::dropout`], and for another seed than `i64[]`.
    #[track_caller]
    pub fn dropout_with(&self, p: f64, seed: &LazyTensor, stream: u32) -> Result<LazyTensor> {
        let (op, got) = ("dropout", self.dtype());
        if !(0.0..=1.0).contains(&p) {
            let (what, expected) = ("p", "within 0 and 1");
            return Err(Error::Attribute { op, what, expected, got: p.to_string() }).at_caller();
        }
        if !got.is_float() {
            return Err(Error::DType { op, expected: "a float", got }).at_caller();
        }
        let (distribution, dtype, shape) = (Distribution::Uniform, DType::F32, self.ty().shape);
        let random = Operation::Random { distribution, stream, dtype, shape };
        let random = LazyTensor::record(random, &[seed])?;
        if p == 0.0 {
            return Ok(self.clone());
        }
        let kept = random.binary(BinaryOp::Ge, &random.scalar_like(p))?;
        // Of nothing that is kept, not even an infinite multiple.
        let scale = if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 };
        kept.where_cond(&self.affine(scale, 0.0)?, &self.scalar_like(0.0))
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Device, LazyTensor, grad};

    const N: usize = 10_000;

    fn ones() -> LazyTensor {
        LazyTensor::ones(&[N], DType::F32, &Device::Cpu).unwrap()
    }

    #[test]
    fn dropout_keeps_the_mean_and_depends_on_seed_and_stream() {
        let seed = LazyTensor::from_vec(vec![7i64], &[], &Device::Cpu).unwrap();
        let run = |x: LazyTensor| x.to_vec1::<f32>().unwrap();
        let y = run(ones().dropout(0.25, 7).unwrap());
        assert_eq!(y, run(ones().dropout_with(0.25, &seed, 0).unwrap()));
        assert_ne!(y, run(ones().dropout_with(0.25, &seed, 1).unwrap()));
        assert_ne!(y, run(ones().dropout(0.25, 8).unwrap()));
        let kept = y.iter().filter(|y| **y != 0.0).count();
        assert!((kept as f64 / N as f64 - 0.75).abs() < 0.02, "{kept}");
        assert!(y.iter().all(|y| *y == 0.0 || *y == (1.0f64 / 0.75) as f32));
    }

    #[test]
    fn the_gradient_is_dropped_where_the_value_is() {
        let x = ones().to_owned_copy().unwrap();
        for p in [0.0, 0.5, 1.0] {
            let y = x.dropout(p, 3).unwrap();
            let g = grad(&y.sum_all().unwrap(), &[&x]).unwrap();
            assert_eq!(y.to_vec1::<f32>().unwrap(), g[0].to_vec1::<f32>().unwrap(), "{p}");
        }
    }

    #[test]
    fn dropout_refuses_what_is_no_probability() {
        for p in [-0.1, 1.5, f64::NAN] {
            assert!(ones().dropout(p, 0).is_err());
        }
        assert!(ones().to_dtype(DType::I64).unwrap().dropout(0.5, 0).is_err());
    }
}
