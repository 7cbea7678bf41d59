//! The two factors of one module's update, and how each tool's files spell them.

use std::collections::{BTreeMap, HashMap};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::Problem;

type Result<T> = std::result::Result<T, Problem>;

/// The two factors of one module's update, row-major: `y += scale · B · (A · x)`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPair {
    /// `[rank, inputs]`.
    pub a: Vec<f32>,
    /// `[outputs, rank]`.
    pub b: Vec<f32>,
    /// Rank.
    pub rank: usize,
    /// Columns of the base's weight.
    pub inputs: usize,
    /// Rows of the base's weight.
    pub outputs: usize,
}

impl LoraPair {
    /// The fields are public: what is written relies on their telling the same story.
    pub(crate) fn check(&self, module: &str) -> Result<()> {
        let LoraPair { rank, inputs, outputs, .. } = *self;
        if self.a.len() == rank * inputs && self.b.len() == outputs * rank {
            return Ok(());
        }
        let (module, a, b) = (module.to_owned(), self.a.len(), self.b.len());
        Err(Problem::PairLength { module, a, b, rank, inputs, outputs })
    }
}

/// Which of the two a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

/// How a file lays the factors out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orientation {
    /// A `[r, in]`, B `[out, r]`: PEFT and GGUF.
    OutIn,
    /// A `[in, r]`, B `[r, out]`: mlx-lm.
    InOut,
}

/// Shape and values.
type Tensor = (Vec<usize>, Vec<f32>);

/// Pairs while their tensors are being collected.
#[derive(Default)]
pub(crate) struct Halves(BTreeMap<String, (Option<Tensor>, Option<Tensor>)>);

impl Halves {
    pub(crate) fn insert(&mut self, module: &str, side: Side, shape: &[usize], values: Vec<f32>) {
        let (a, b) = self.0.entry(module.to_owned()).or_default();
        let half = if side == Side::A { a } else { b };
        *half = Some((shape.to_vec(), values));
    }

    pub(crate) fn pairs(self, orientation: Orientation) -> Result<BTreeMap<String, LoraPair>> {
        if self.0.is_empty() {
            return Err(Problem::NoPairs);
        }
        let pair = |(module, (a, b))| pair(module, a, b, orientation);
        self.0.into_iter().map(pair).collect()
    }
}

fn pair(
    module: String,
    a: Option<Tensor>,
    b: Option<Tensor>,
    orientation: Orientation,
) -> Result<(String, LoraPair)> {
    let ((a_shape, a), (b_shape, b)) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (Some(_), None) => {
            return Err(Problem::HalfPair { module, has: "lora_A", lacks: "lora_B" });
        }
        (None, _) => return Err(Problem::HalfPair { module, has: "lora_B", lacks: "lora_A" }),
    };
    match (orientation, &a_shape[..], &b_shape[..]) {
        (Orientation::OutIn, &[rank, inputs], &[outputs, same]) if rank == same && rank > 0 => {
            Ok((module, LoraPair { a, b, rank, inputs, outputs }))
        }
        (Orientation::InOut, &[inputs, rank], &[same, outputs]) if rank == same && rank > 0 => {
            let (a, b) = (transpose(&a, inputs, rank), transpose(&b, rank, outputs));
            Ok((module, LoraPair { a, b, rank, inputs, outputs }))
        }
        _ => {
            let expected = match orientation {
                Orientation::OutIn => "[r, in], [out, r]",
                Orientation::InOut => "[in, r], [r, out]",
            };
            Err(Problem::PairShape { module, a: a_shape, b: b_shape, expected })
        }
    }
}

/// `[rows, cols]` to `[cols, rows]`.
pub(crate) fn transpose(values: &[f32], rows: usize, cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|c| (0..rows).map(move |r| values[r * cols + c])).collect()
}

/// The pairs of a safetensors file, whose names `parse_key` takes apart.
pub(crate) fn parse(
    bytes: &[u8],
    orientation: Orientation,
    parse_key: impl Fn(&str) -> Result<(&str, Side)>,
) -> Result<BTreeMap<String, LoraPair>> {
    let file = SafeTensors::deserialize(bytes).map_err(|cause| Problem::SafeTensors { cause })?;
    let mut halves = Halves::default();
    for (key, view) in file.iter() {
        let (module, side) = parse_key(key)?;
        halves.insert(module, side, view.shape(), to_f32(key, &view)?);
    }
    halves.pairs(orientation)
}

fn to_f32(key: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    fn read<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks::<N>().0.iter().map(|&element| convert(element)).collect()
    }
    let bytes = view.data();
    Ok(match view.dtype() {
        Dtype::F32 => read(bytes, f32::from_le_bytes),
        Dtype::F64 => read(bytes, |element| f64::from_le_bytes(element) as f32),
        Dtype::F16 => read(bytes, |element| f16::from_le_bytes(element).to_f32()),
        Dtype::BF16 => read(bytes, |element| bf16::from_le_bytes(element).to_f32()),
        other => {
            return Err(Problem::DType { key: key.to_owned(), dtype: format!("{other:?}") });
        }
    })
}

/// A safetensors file of f32 tensors: name, shape, values.
pub(crate) fn serialize(
    tensors: Vec<(String, [usize; 2], Vec<f32>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<Vec<u8>> {
    let bytes = |values: Vec<f32>| -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    };
    let tensors: Vec<_> =
        tensors.into_iter().map(|(key, shape, values)| (key, shape, bytes(values))).collect();
    let views = tensors
        .iter()
        .map(|(key, shape, bytes)| Ok((key, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
        .collect::<std::result::Result<Vec<_>, _>>();
    views
        .and_then(|views| safetensors::serialize(views, metadata))
        .map_err(|cause| Problem::SafeTensors { cause })
}
