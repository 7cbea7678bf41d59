//! Cross-entropy.

use super::norm::composite;
use crate::error::AtCaller;
use crate::lazy::State;
use crate::{DType, LazyTensor, Result};
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::{BlockFormat, Composite, Error, Scalar, Shape};

/// How a cross-entropy weighs rows and what it makes of their losses.
///
/// By default rows with the label -100 do not count, nothing is smoothed, and the result is the
/// mean over the rows that count.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CrossEntropy {
    ignore_index: Option<i64>,
    label_smoothing: f64,
    reduction: Reduction,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Reduction {
    Mean,
    Sum,
    PerRow,
}

impl Default for CrossEntropy {
    fn default() -> CrossEntropy {
        CrossEntropy { ignore_index: Some(-100), label_smoothing: 0.0, reduction: Reduction::Mean }
    }
}

impl CrossEntropy {
    /// The default.
    pub fn new() -> CrossEntropy {
        CrossEntropy::default()
    }

    /// Rows with this label have loss 0, gradient 0, and do not count for the mean; `None`: every
    /// row counts.
    #[must_use]
    pub fn ignore_index(self, ignore_index: Option<i64>) -> CrossEntropy {
        CrossEntropy { ignore_index, ..self }
    }

    /// `ε` of `(1 - ε) · loss + ε · (the mean loss over all classes)` (Szegedy et al. 2016), within
    /// 0 and 1.
    #[must_use]
    pub fn label_smoothing(self, label_smoothing: f64) -> CrossEntropy {
        CrossEntropy { label_smoothing, ..self }
    }

    /// The mean over the rows that count, 0 if none does: the default.
    #[must_use]
    pub fn mean(self) -> CrossEntropy {
        CrossEntropy { reduction: Reduction::Mean, ..self }
    }

    /// The sum over all rows.
    #[must_use]
    pub fn sum(self) -> CrossEntropy {
        CrossEntropy { reduction: Reduction::Sum, ..self }
    }

    /// The loss of every row, in the shape of the labels.
    #[must_use]
    pub fn per_row(self) -> CrossEntropy {
        CrossEntropy { reduction: Reduction::PerRow, ..self }
    }

    fn attrs(&self) -> CrossEntropyAttrs {
        let label_smoothing = Scalar::from_f64(DType::F64, self.label_smoothing);
        CrossEntropyAttrs { ignore_index: self.ignore_index, label_smoothing, blocks: None }
    }

    /// Looks at labels that are known already, so that a wrong one is an error at the caller's line.
    ///
    /// # Errors
    /// Where one of these labels is no class and not ignored.
    #[track_caller]
    fn check(&self, labels: &[i64], classes: usize) -> Result<()> {
        let is_class = |label: i64| usize::try_from(label).is_ok_and(|label| label < classes);
        let wrong = |label: &i64| !is_class(*label) && self.ignore_index != Some(*label);
        match labels.iter().position(wrong) {
            None => Ok(()),
            Some(position) => {
                let (op, index, extent) = ("cross_entropy", labels[position], classes);
                Err(Error::IndexOutOfRange { op, index, extent, position }).at_caller()
            }
        }
    }

    /// Labels that are not known yet, each looked up among the classes: one that is none of them is
    /// an error of the run.
    #[track_caller]
    fn checked(&self, labels: &LazyTensor, classes: usize) -> Result<LazyTensor> {
        let labels = labels.to_dtype(DType::I64)?;
        let classes = LazyTensor::arange(0, classes as i64, DType::I64, labels.device())?;
        let Some(index) = self.ignore_index else { return classes.index_select(&labels, 0) };
        let index = LazyTensor::constant(Scalar::from_i64(DType::I64, index), labels.device());
        let ignored = labels.eq(&index)?;
        let safe = ignored.where_cond(&labels.scalar_like(0.0), &labels)?;
        ignored.where_cond(&index, &classes.index_select(&safe, 0)?)
    }

    /// The result, from the losses of all rows: `losses: [n]`, `labels: [..]`.
    #[track_caller]
    fn reduced(&self, losses: &LazyTensor, labels: &LazyTensor) -> Result<LazyTensor> {
        match self.reduction {
            Reduction::PerRow => losses.reshape_to(labels.ty().shape),
            Reduction::Sum => losses.sum_all(),
            Reduction::Mean => {
                let sum = losses.sum_all()?;
                let Some(index) = self.ignore_index else {
                    return sum.affine(1.0 / losses.elem_count().max(1) as f64, 0.0);
                };
                // In i64, where no u32 label equals a negative index.
                let index = Scalar::from_i64(DType::I64, index);
                let index = LazyTensor::constant(index, labels.device());
                let counts = labels.to_dtype(DType::I64)?.ne(&index)?.to_dtype(losses.dtype())?;
                let count = counts.sum_all()?;
                sum.div(&count.maximum(&count.scalar_like(1.0))?)
            }
        }
    }
}

impl LazyTensor {
    /// `logsumexp(logits) - logits[label]` of every row, reduced as the options say.
    ///
    /// # Shapes
    /// Logits `[.., classes]` and integer labels `[..]` give rank 0, or the labels' shape per row.
    ///
    /// # Numerics
    /// Computed and given in f32 (f64 for f64). The logits' gradient is rounded once.
    ///
    /// # Errors
    /// Where the shapes do not fit, the logits are integers, the labels floats, or the smoothing is
    /// not within 0 and 1. Where a label is no class and not ignored: at once if it is in memory,
    /// else when it runs.
    #[track_caller]
    pub fn cross_entropy(&self, labels: &LazyTensor, options: CrossEntropy) -> Result<LazyTensor> {
        let [logits, rows] = self.rows("cross_entropy", labels)?;
        let classes = logits.dims()[1];
        let rows = match labels.known_integers() {
            Some(known) => options.check(&known, classes).map(|()| rows)?,
            // Floats are refused below, as what they are.
            None if rows.dtype().is_float() => rows,
            None => options.checked(&rows, classes)?,
        };
        let losses = composite(Composite::CrossEntropy(options.attrs()), &[&logits, &rows])?;
        options.reduced(&losses, labels)
    }

    /// [`LazyTensor::cross_entropy`] of the logits `x weightᵀ`, which are computed in chunks of the
    /// vocabulary and never held, neither forward nor backward.
    ///
    /// # Shapes
    /// `x: [.., features]`, `weight: [classes, features]` and integer labels `[..]` give rank 0, or
    /// the labels' shape per row.
    ///
    /// # Numerics
    /// Logits, losses and their sums are f32 (f64 for f64); gradients are rounded once.
    ///
    /// # Errors
    /// As [`LazyTensor::cross_entropy`], and where x and the weight differ in features, dtype or
    /// device.
    #[track_caller]
    pub fn linear_cross_entropy(
        &self,
        weight: &LazyTensor,
        labels: &LazyTensor,
        options: CrossEntropy,
    ) -> Result<LazyTensor> {
        let [x, rows] = self.rows("linear_cross_entropy", labels)?;
        let loss = Composite::LinearCrossEntropy(options.attrs());
        let losses = composite(loss, &[&x, weight, &rows])?;
        options.reduced(&losses, labels)
    }

    /// [`LazyTensor::linear_cross_entropy`] with a weight that stays in its GGUF blocks, which are unpacked
    /// chunk by chunk.
    ///
    /// The gradient goes to x only.
    ///
    /// # Shapes
    /// `x: [.., features]`, `blocks: u8[bytes]`, the blocks of `features` weights of one class after the other,
    /// and integer labels `[..]` give rank 0, or the labels' shape per row.
    ///
    /// # Numerics
    /// As [`LazyTensor::quant_matmul`]; losses and sums are f32 (f64 for f64).
    ///
    /// # Errors
    /// As [`LazyTensor::cross_entropy`], and where the blocks are not those of whole classes.
    #[track_caller]
    pub fn quant_linear_cross_entropy(
        &self,
        blocks: &LazyTensor,
        format: BlockFormat,
        labels: &LazyTensor,
        options: CrossEntropy,
    ) -> Result<LazyTensor> {
        let [x, rows] = self.rows("linear_cross_entropy", labels)?;
        let attrs = CrossEntropyAttrs { blocks: Some(format), ..options.attrs() };
        let losses = composite(Composite::LinearCrossEntropy(attrs), &[&x, blocks, &rows])?;
        options.reduced(&losses, labels)
    }

    /// The elements of an integer tensor that is in memory.
    fn known_integers(&self) -> Option<Vec<i64>> {
        let State::Ready(buffer) = self.0.read() else { return None };
        match self.dtype() {
            DType::U8 => Some(buffer.to_vec::<u8>().ok()?.into_iter().map(i64::from).collect()),
            DType::U32 => Some(buffer.to_vec::<u32>().ok()?.into_iter().map(i64::from).collect()),
            DType::I64 => buffer.to_vec().ok(),
            DType::BF16 | DType::F16 | DType::F32 | DType::F64 => None,
        }
    }

    /// This tensor as `[n, last]` and the labels, of its other extents, as `[n]`.
    #[track_caller]
    fn rows(&self, op: &'static str, labels: &LazyTensor) -> Result<[LazyTensor; 2]> {
        let Some((last, outer)) = self.dims().split_last() else {
            return Err(Error::Rank { op, expected: "at least 1", got: 0 }).at_caller();
        };
        let (expected, got) = (Shape::new(outer).at_caller()?, labels.ty().shape);
        if expected != got {
            return Err(Error::Shape { op, expected, got }).at_caller();
        }
        Ok([self.reshape(&[expected.len(), *last])?, labels.flatten_all()?])
    }
}
