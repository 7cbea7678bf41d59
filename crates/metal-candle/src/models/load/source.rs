//! Weights by Hugging Face's names, whatever holds them.

use crate::fnv::Fnv;
use crate::io::gguf::{self, Encoding, GgufFile, StoredTensor};
use crate::io::{self, Bytes, HfWeights};
use crate::{DType, Device, LazyTensor, Result};
use candle_core::Tensor;
use half::f16;
use metal_candle_graph::BlockFormat;
use std::path::Path;

#[derive(Clone, Copy)]
pub(super) enum WeightSource<'a> {
    Gguf(&'a GgufFile),
    Folder(&'a HfWeights),
    /// Made up: a weight of any name and shape.
    Random {
        seed: u64,
    },
}

impl WeightSource<'_> {
    /// Whether a weight has these dims, by the header.
    pub(super) fn check(&self, name: &str, dims: &[usize]) -> Result<()> {
        let Some((path, shape)) = self.shape(name)? else { return Ok(()) };
        if shape == dims {
            return Ok(());
        }
        let (path, tensor) = (path.to_owned(), name.to_owned());
        let (expected, got) = (dims.to_vec(), shape.to_vec());
        Err(io::Error::WeightShape { path, tensor, expected, got }.into())
    }

    /// How a weight is stored, by the header.
    pub(super) fn encoding(&self, name: &str) -> Result<Encoding> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight_info(name)?.encoding,
            WeightSource::Folder(folder) => folder.weight_encoding(name)?,
            WeightSource::Random { .. } => Encoding::Dense(DType::F32),
        })
    }

    /// What a weight takes in the file, by the header.
    pub(super) fn len_bytes(&self, name: &str) -> Result<usize> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight_info(name)?.len_bytes,
            WeightSource::Folder(folder) => folder.weight_len_bytes(name)?,
            WeightSource::Random { .. } => panic!("metal-candle bug: {name} lies in no file"),
        })
    }

    pub(super) fn read(&self, name: &str) -> Result<StoredTensor> {
        Ok(match self {
            WeightSource::Gguf(file) => file.weight(name)?,
            WeightSource::Folder(folder) => folder.weight(name)?,
            WeightSource::Random { .. } => panic!("metal-candle bug: {name} lies in no file"),
        })
    }

    /// The elements as a float type.
    pub(super) fn dequantise(
        &self,
        name: &str,
        stored: &StoredTensor,
        dtype: DType,
    ) -> Result<Tensor> {
        let path = || {
            let shape = self.shape(name)?;
            let (path, _) = shape.expect("metal-candle bug: a weight of no file");
            Ok::<_, io::Error>(path.to_owned())
        };
        let values = match stored.dequantize() {
            Ok(values) => values,
            Err(problem) => return Err(io::Error::Gguf { path: path()?, problem }.into()),
        };
        if dtype == DType::F16
            && let Some(value) = beyond_f16(&values)?
        {
            let (path, tensor) = (path()?, name.to_owned());
            return Err(io::Error::WeightRange { path, tensor, value }.into());
        }
        let dtype = match dtype {
            DType::BF16 => candle_core::DType::BF16,
            DType::F16 => candle_core::DType::F16,
            _ => candle_core::DType::F32,
        };
        Ok(values.to_dtype(dtype)?)
    }

    /// The elements in blocks.
    pub(super) fn quantise(
        &self,
        name: &str,
        dims: &[usize],
        format: BlockFormat,
        values: &[f32],
    ) -> Result<Bytes> {
        match StoredTensor::encode(values, dims, Encoding::Blocks(format)) {
            Ok(stored) => Ok(stored.bytes),
            Err(problem) => Err(self.unfit(name, format, problem)?.into()),
        }
    }

    /// That a weight cannot be in these blocks.
    pub(super) fn unfit(
        &self,
        name: &str,
        format: BlockFormat,
        problem: gguf::Problem,
    ) -> Result<io::Error> {
        let (path, tensor) = (self.shape(name)?.map(|(path, _)| path.to_owned()), name.to_owned());
        Ok(io::Error::WeightQuantise { path: path.unwrap_or_default(), tensor, format, problem })
    }

    /// The file that a weight lies in, and its shape there.
    fn shape(&self, name: &str) -> io::Result<Option<(&Path, &[usize])>> {
        match self {
            WeightSource::Gguf(file) => Ok(Some((file.path(), file.weight_shape(name)?))),
            WeightSource::Folder(folder) => folder.weight_shape(name).map(Some),
            WeightSource::Random { .. } => Ok(None),
        }
    }
}

/// As a model that was never trained: ones for norms, zeros for biases, else normal numbers of deviation 0.02. Equal for
/// an equal name and seed.
pub(super) fn random(
    name: &str,
    dims: &[usize],
    dtype: DType,
    seed: u64,
    device: &Device,
) -> Result<LazyTensor> {
    let weight = match dims {
        [_] if name.ends_with("bias") => LazyTensor::zeros(dims, dtype, device)?,
        [_] => LazyTensor::ones(dims, dtype, device)?,
        _ => {
            let mut hash = Fnv::default();
            name.bytes().for_each(|byte| hash.add(u64::from(byte)));
            let unit = LazyTensor::randn(dims, DType::F32, seed ^ hash.finish(), device)?;
            unit.affine(0.02, 0.0)?.to_dtype(dtype)?
        }
    };
    weight.into_owned()
}

/// A number that f16 would make infinite.
fn beyond_f16(values: &Tensor) -> Result<Option<f32>> {
    let largest = f16::MAX.to_f32();
    let values: Vec<f32> = values.flatten_all()?.to_vec1()?;
    Ok(values.into_iter().find(|value| value.is_finite() && value.abs() > largest))
}
