//! The cotangent of the weight.

use super::weight::Rows;
use super::{CLASSES, Linear, ROWS};
use crate::cpu::gemm::gemm_factors;
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Accumulator, Float, Real};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::view::{Arg, Out};
use std::ops::Range;

impl<T: Float> Linear<'_, T> {
    /// `dlogitsᵀ x`: once through the classes for the sums of every row, once more for the gradient.
    pub(super) fn grad_weight(&self, dy: &Arg, out: &mut Out, parallel: bool) {
        let (n, d) = (self.rows.len(), self.d);
        assert_eq!(out.shape().dims(), [self.classes, d], "metal-candle bug: grad_weight");
        let dy = dy.read::<T::Acc>();
        assert_eq!(dy.shape().dims(), [self.n], "metal-candle bug: grad_weight");
        let dy: Vec<T::Acc> = self.rows.iter().map(|row| dy.row(0).get(*row as usize)).collect();
        let mut logsumexp = Vec::with_capacity(n);
        for start in (0..n).step_by(ROWS) {
            self.block(start..(start + ROWS).min(n), 0, parallel, |sums| {
                logsumexp.extend(sums.max.iter().zip(&*sums.sum).map(|(m, s)| *m + s.ln()));
            });
        }
        let chunks = self.classes.div_ceil(CLASSES);
        let out = Parts::new(out.slice::<T>());
        parallel::for_each(parallel, chunks, |chunk| {
            let classes = self.classes_of(chunk);
            let (cols, wide) = (classes.len(), self.weight.wide_len(classes.len() * d));
            let lens = [ROWS * cols, wide, cols * d];
            scratch::split(lens, |[dlogits, wide, dw]: [&mut [T::Acc]; 3]| {
                dw.fill(T::Acc::ZERO);
                for start in (0..n).step_by(ROWS) {
                    let block = start..(start + ROWS).min(n);
                    let dlogits = &mut dlogits[..block.len() * cols];
                    let x = self.x_of(&block);
                    self.logits(Rows::unpacked(&x), classes.clone(), dlogits, wide);
                    self.logits_vjp(block.clone(), &classes, &logsumexp, &dy, dlogits);
                    let dlogits = Mat::dense(dlogits, block.len(), cols).transposed();
                    let dw = MatMut::dense(dw, cols, d);
                    gemm_factors(dw, dlogits, x, T::Acc::from_f64(1.0), true, false);
                }
                // SAFETY: the rows of a chunk belong to its task.
                T::narrow_all(dw, unsafe { out.part(classes.start * d, cols * d) });
            });
        });
    }

    /// `(softmax - target) dy` in place of the logits.
    fn logits_vjp(
        &self,
        block: Range<usize>,
        classes: &Range<usize>,
        logsumexp: &[T::Acc],
        dy: &[T::Acc],
        logits: &mut [T::Acc],
    ) {
        let miss = self.epsilon / self.classes as f64;
        let (hit, miss) = (T::Acc::from_f64(1.0 - self.epsilon), T::Acc::from_f64(miss));
        for (row, logits) in block.zip(logits.chunks_exact_mut(classes.len())) {
            T::Acc::exp_all(logits, logsumexp[row]);
            if self.epsilon != 0.0 {
                logits.iter_mut().for_each(|p| *p = *p - miss);
            }
            let label = self.label(row);
            if classes.contains(&label) {
                let p = &mut logits[label - classes.start];
                *p = *p - hit;
            }
            T::Acc::scale_all(logits, dy[row]);
        }
    }
}
