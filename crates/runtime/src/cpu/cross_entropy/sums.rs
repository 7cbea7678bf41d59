//! The running sums of a softmax over classes that come chunk by chunk (Milakov & Gimelshein 2018).

use crate::cpu::number::Real;

/// What one part knows of every row of a block.
pub(super) struct Sums<'s, A> {
    /// The largest logit so far, and `Σ exp(logit - max)`.
    pub(super) max: &'s mut [A],
    pub(super) sum: &'s mut [A],
    /// The label's logit, if it is in this part.
    pub(super) picked: &'s mut [A],
    /// `Σ logit`
    pub(super) total: &'s mut [A],
    /// `Σ exp(logit - max) · weight row`, `[rows, d]`, and `Σ weight row`, `[d]`; empty without a gradient.
    pub(super) weighted: &'s mut [A],
    pub(super) weight_total: &'s mut [A],
}

impl<'s, A: Real> Sums<'s, A> {
    pub(super) const fn len(rows: usize, d: usize) -> usize {
        4 * rows + rows * d + d
    }

    /// The sums in `memory`; `d` is 0 without a gradient.
    pub(super) fn over(memory: &'s mut [A], rows: usize, d: usize) -> Sums<'s, A> {
        let (max, rest) = memory.split_at_mut(rows);
        let (sum, rest) = rest.split_at_mut(rows);
        let (picked, rest) = rest.split_at_mut(rows);
        let (total, rest) = rest.split_at_mut(rows);
        let (weighted, weight_total) = rest.split_at_mut(rows * d);
        Sums { max, sum, picked, total, weighted, weight_total }
    }

    /// Of no classes yet.
    pub(super) fn empty(memory: &'s mut [A], rows: usize, d: usize) -> Sums<'s, A> {
        memory.fill(A::ZERO);
        let sums = Sums::over(memory, rows, d);
        sums.max.fill(A::NEG_INFINITY);
        sums
    }

    /// Takes `more` in, which follows.
    pub(super) fn add(&mut self, more: &Sums<A>) {
        let d = self.weight_total.len();
        for r in 0..self.max.len() {
            let max = larger(self.max[r], more.max[r]);
            let (own, their) = (rescale(self.max[r], max), rescale(more.max[r], max));
            self.max[r] = max;
            self.sum[r] = self.sum[r] * own + more.sum[r] * their;
            self.picked[r] += more.picked[r];
            self.total[r] += more.total[r];
            let row = &mut self.weighted[r * d..(r + 1) * d];
            A::scale_all(row, own);
            A::axpy(row, their, &more.weighted[r * d..(r + 1) * d]);
        }
        A::axpy(self.weight_total, A::from_f64(1.0), more.weight_total);
    }
}

pub(super) fn larger<A: Real>(a: A, b: A) -> A {
    if b > a || b.is_nan() { b } else { a }
}

/// `exp(from - to)`, and 0 of a sum that is empty.
pub(super) fn rescale<A: Real>(from: A, to: A) -> A {
    if from == A::NEG_INFINITY { A::ZERO } else { (from - to).exp() }
}
