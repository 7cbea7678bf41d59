//! Cross-entropy of `x weightᵀ` without the logits: they exist for one block of rows and one chunk of classes
//! at a time.
//!
//! The classes are cut into parts, which are walked side by side; each keeps a running maximum and sum of every row, as
//! flash attention does (Dao et al. 2022), and, for the gradient, the running sum of `p weight`. The parts are put
//! together in order. Rows that do not count are left out before anything is computed.

mod grad_weight;
mod sums;
mod weight;

use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Number, Real, for_float, for_index};
use crate::cpu::parallel;
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Out};
use metal_candle_graph::composite::CrossEntropyAttrs;
use metal_candle_graph::{Error, Result};
use std::ops::Range;
use sums::{Sums, larger, rescale};
use weight::{Chunk, Rows, Weight};

/// Rows of one block.
const ROWS: usize = 512;
/// Classes of one chunk.
const CLASSES: usize = 256;
/// The most parts that the classes are cut into: each has sums of its own.
const MAX_PARTS: usize = 16;

/// `args = [x, weight, labels]`; outputs: the losses if `losses`, then the gradient rows if `grad_x`.
pub(crate) fn call(
    args: &[Arg],
    outs: &mut [Out],
    attrs: &CrossEntropyAttrs,
    [losses, grad_x]: [bool; 2],
    parallel: bool,
) -> Result<()> {
    let [x, weight, labels] = args else {
        panic!("metal-candle bug: linear_cross_entropy takes three operands")
    };
    let wanted = usize::from(losses) + usize::from(grad_x);
    assert_eq!(outs.len(), wanted, "metal-candle bug: linear_cross_entropy");
    let mut outs = outs.iter_mut();
    let (losses, grad_x) =
        (losses.then(|| outs.next()).flatten(), grad_x.then(|| outs.next()).flatten());
    for_float!(x.dtype(), T => {
        Linear::<T>::with("linear_cross_entropy", x, weight, labels, attrs, |it| {
            it.forward(losses, grad_x, parallel);
        })
    })
}

/// `args = [dy, x, weight, labels]`
pub(crate) fn call_grad_weight(
    args: &[Arg],
    outs: &mut [Out],
    attrs: &CrossEntropyAttrs,
    parallel: bool,
) -> Result<()> {
    let ([dy, x, weight, labels], [out]) = (args, outs) else {
        panic!("metal-candle bug: linear_cross_entropy_grad_weight takes four operands")
    };
    for_float!(x.dtype(), T => {
        let op = "linear_cross_entropy_grad_weight";
        Linear::<T>::with(op, x, weight, labels, attrs, |it| it.grad_weight(dy, out, parallel))
    })
}

struct Linear<'a, T: Float> {
    weight: Weight<'a, T>,
    /// The rows that count: where they are, their labels, and x itself, `[rows, d]`.
    rows: &'a [i64],
    labels: &'a [i64],
    x: &'a [T],
    n: usize,
    classes: usize,
    d: usize,
    epsilon: f64,
}

impl<'a, T: Float> Linear<'a, T> {
    /// Gives `f` the rows that count.
    fn with(
        op: &'static str,
        x: &Arg,
        weight: &Arg,
        labels: &Arg,
        attrs: &CrossEntropyAttrs,
        f: impl FnOnce(&Linear<T>),
    ) -> Result<()> {
        let x = x.read::<T>();
        let [n, d] = extents(x.shape());
        let weight = Weight::new(op, &x, weight, attrs);
        let classes = weight.classes();
        assert_eq!(labels.shape().dims(), [n], "metal-candle bug: {op} of {}", x.shape());
        let epsilon = attrs.label_smoothing.as_f64();
        scratch::split([n, n], |[rows, found]: [&mut [i64]; 2]| {
            let count = counted(op, labels, classes, attrs.ignore_index, rows, found)?;
            let (rows, labels) = (&rows[..count], &found[..count]);
            scratch::with(count * d, |packed: &mut [T]| {
                for (to, row) in packed.chunks_exact_mut(d.max(1)).zip(rows) {
                    x.row(*row as usize).copy_to(to);
                }
                f(&Linear { weight, rows, labels, x: packed, n, classes, d, epsilon });
            });
            Ok(())
        })
    }

    /// The label of a row that counts.
    fn label(&self, row: usize) -> usize {
        self.labels[row] as usize
    }

    fn forward(&self, losses: Option<&mut Out>, grad_x: Option<&mut Out>, parallel: bool) {
        let d = if grad_x.is_some() { self.d } else { 0 };
        let mut losses = losses.map(|out| out.slice::<T::Acc>());
        let mut grad_x = grad_x.map(|out| out.slice::<T::Acc>());
        for out in [&mut losses, &mut grad_x].into_iter().flatten() {
            // The rows that do not count.
            out.fill(T::Acc::ZERO);
        }
        assert!(losses.as_ref().is_none_or(|out| out.len() == self.n));
        assert!(grad_x.as_ref().is_none_or(|out| out.len() == self.n * self.d));
        for start in (0..self.rows.len()).step_by(ROWS) {
            let block = start..(start + ROWS).min(self.rows.len());
            self.block(block.clone(), d, parallel, |sums| {
                for (r, row) in block.enumerate() {
                    let at = self.rows[row] as usize;
                    if let Some(losses) = &mut losses {
                        losses[at] = self.loss(sums, r);
                    }
                    if let Some(grad_x) = &mut grad_x {
                        self.grad_row(sums, r, row, &mut grad_x[at * d..(at + 1) * d]);
                    }
                }
            });
        }
    }

    /// `logsumexp - (1 - ε) logit[label] - ε mean(logit)`
    fn loss(&self, sums: &Sums<T::Acc>, r: usize) -> T::Acc {
        let logsumexp = sums.max[r] + sums.sum[r].ln();
        // Left out at 0, where an infinite logit would make it NaN.
        if self.epsilon == 0.0 {
            return logsumexp - sums.picked[r];
        }
        let miss = T::Acc::from_f64(self.epsilon / self.classes as f64);
        logsumexp - T::Acc::from_f64(1.0 - self.epsilon) * sums.picked[r] - miss * sums.total[r]
    }

    /// `Σ p · weight row - (1 - ε) weight[label] - ε mean(weight row)`
    fn grad_row(&self, sums: &Sums<T::Acc>, r: usize, row: usize, grad: &mut [T::Acc]) {
        let d = self.d;
        grad.copy_from_slice(&sums.weighted[r * d..(r + 1) * d]);
        T::Acc::scale_all(grad, T::Acc::from_f64(1.0) / sums.sum[r]);
        scratch::with(d, |wide: &mut [T::Acc]| {
            let label = self.label(row);
            let weight = match self.weight {
                Weight::Dense(w) => w.row_range(label, 1).packed(wide),
                Weight::Blocks(w) => w.dense_rows(label..label + 1, wide),
            };
            let weight = weight.row_slice(0).expect("metal-candle bug: a packed row is dense");
            T::Acc::axpy(grad, T::Acc::from_f64(self.epsilon - 1.0), weight);
        });
        if self.epsilon != 0.0 {
            let miss = T::Acc::from_f64(-self.epsilon / self.classes as f64);
            T::Acc::axpy(grad, miss, sums.weight_total);
        }
    }

    /// Walks the classes for one block of rows and gives `f` the sums.
    fn block(&self, block: Range<usize>, d: usize, parallel: bool, f: impl FnOnce(&Sums<T::Acc>)) {
        let chunks = self.classes.div_ceil(CLASSES);
        let parts = chunks.clamp(1, MAX_PARTS);
        let (rows, len) = (block.len(), Sums::<T::Acc>::len(block.len(), d));
        scratch::with(parts * len, |memory: &mut [T::Acc]| {
            self.weight.packed(self.x_of(&block), parallel, |x| {
                parallel::for_each_chunk(parallel, memory, len, |part, memory| {
                    let mut sums = Sums::empty(memory, rows, d);
                    for chunk in part * chunks / parts..(part + 1) * chunks / parts {
                        self.chunk(block.clone(), x, chunk, d, &mut sums);
                    }
                });
            });
            let mut parts = memory.chunks_exact_mut(len).map(|memory| Sums::over(memory, rows, d));
            let mut all = parts.next().expect("metal-candle bug: classes in no part");
            parts.for_each(|part| all.add(&part));
            f(&all);
        });
    }

    /// The classes of a chunk.
    fn classes_of(&self, chunk: usize) -> Range<usize> {
        chunk * CLASSES..((chunk + 1) * CLASSES).min(self.classes)
    }

    /// The rows of a block, `[rows, d]`.
    fn x_of(&self, block: &Range<usize>) -> Mat<'_, T> {
        Mat::dense(&self.x[block.start * self.d..block.end * self.d], block.len(), self.d)
    }

    fn chunk(
        &self,
        block: Range<usize>,
        x: Rows<'_, T>,
        chunk: usize,
        d: usize,
        sums: &mut Sums<T::Acc>,
    ) {
        let classes = self.classes_of(chunk);
        let (rows, cols) = (block.len(), classes.len());
        let wide = self.weight.wide_len(cols * self.d);
        scratch::split([rows * cols, wide], |[logits, wide]: [&mut [T::Acc]; 2]| {
            let weight = self.logits(x, classes.clone(), logits, wide);
            for (r, logits) in logits.chunks_exact_mut(cols).enumerate() {
                let label = self.label(block.start + r);
                if classes.contains(&label) {
                    sums.picked[r] = logits[label - classes.start];
                }
                if self.epsilon != 0.0 {
                    sums.total[r] += logits.iter().fold(T::Acc::ZERO, |a, b| a + *b);
                }
                let max = larger(sums.max[r], T::Acc::max_of(logits));
                let own = rescale(sums.max[r], max);
                // Logits of -inf alone: their exponentials are 0, not those of NaN.
                let shift = if max == T::Acc::NEG_INFINITY { T::Acc::ZERO } else { max };
                sums.max[r] = max;
                sums.sum[r] = sums.sum[r] * own + T::Acc::exp_all(logits, shift);
                // Rarely another maximum, once a few chunks have been seen.
                if own != T::Acc::from_f64(1.0) {
                    T::Acc::scale_all(&mut sums.weighted[r * d..(r + 1) * d], own);
                }
            }
            if d != 0 {
                let p = Mat::dense(logits, rows, cols);
                weight.add_weighted(MatMut::dense(sums.weighted, rows, d), p);
                if self.epsilon != 0.0 {
                    weight.add_rows(sums.weight_total);
                }
            }
        });
    }

    /// `logits = x weightᵀ` of a block and a chunk; gives the chunk's weight, `[classes, d]`.
    fn logits<'b>(
        &self,
        x: Rows<'_, T>,
        classes: Range<usize>,
        logits: &mut [T::Acc],
        wide: &'b mut [T::Acc],
    ) -> Chunk<'b, T>
    where
        'a: 'b,
    {
        let out = MatMut::dense(logits, x.len(), classes.len());
        let weight = self.weight.rows(classes, wide);
        weight.logits(out, x);
        weight
    }
}

fn extents(shape: &metal_candle_graph::Shape) -> [usize; 2] {
    let dims = shape.dims();
    dims.try_into().unwrap_or_else(|_| panic!("metal-candle bug: cross-entropy of {shape}"))
}

/// Writes the rows whose label is not `ignored`, and their labels; gives their number.
fn counted(
    op: &'static str,
    labels: &Arg,
    classes: usize,
    ignored: Option<i64>,
    rows: &mut [i64],
    found: &mut [i64],
) -> Result<usize> {
    let mut count = 0;
    for_index!(labels.dtype(), I => {
        for (position, label) in labels.read::<I>().row(0).iter().enumerate() {
            let label = label.widen();
            if ignored == Some(label) {
                continue;
            }
            if usize::try_from(label).is_ok_and(|label| label < classes) {
                (rows[count], found[count]) = (position as i64, label);
                count += 1;
            } else {
                return Err(Error::IndexOutOfRange { op, index: label, extent: classes, position });
            }
        }
    });
    Ok(count)
}
