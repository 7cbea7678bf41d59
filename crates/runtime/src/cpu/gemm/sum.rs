//! Sums of products, as that of a base layer and its LoRA branch: one product of the factors side by side.
//!
//! ```text
//! a B + c D  =  [a c] [B]
//!                     [D]
//! ```
//!
//! So the result is written once, and of 16 bits, rounded once.

use super::kept::Keeping;
use super::pack::{Factor, Source, Word};
use super::{Batch, Product};
use crate::cpu::matrix::{Mat, MatMut};
use crate::cpu::number::{Float, Number, Real, for_float};
use crate::cpu::view::{Arg, Out};
use metal_candle_graph::DType;
use smallvec::SmallVec;
use std::ops::Range;

/// Results of fewer rows or columns are made product by product, for which there are ways that pack nothing of a deep one.
const MIN_ROWS: usize = 96;
const MIN_COLS: usize = 33;
/// As are sums of which all products are thin.
const MIN_DEPTH: usize = 64;
/// Every factor begins at a whole packed word, of any kernel.
const ALIGN: usize = 2;

/// `out = Σ alphas[i] · args[2 i] args[2 i + 1]`, added to what is there if `accumulate`.
pub(crate) fn call(
    args: &[Arg],
    outs: &mut [Out],
    alphas: &[f64],
    accumulate: bool,
    parallel: bool,
) {
    let [out] = outs else { panic!("metal-candle bug: a sum of products gives one result") };
    assert_eq!(args.len(), 2 * alphas.len(), "metal-candle bug: a sum of pairs");
    for_float!(out.dtype(), T => {
        let pairs = args.as_chunks::<2>().0;
        let terms: SmallVec<[Batch<T>; 4]> =
            pairs.iter().map(|[a, b]| Batch::new(a, b, out)).collect();
        if !as_one(&terms, alphas, accumulate, parallel) {
            for (i, (term, alpha)) in terms.iter().zip(alphas).enumerate() {
                let alpha = <T as Number>::Acc::from_f64(*alpha);
                term.run(parallel, |out, a, b, kept, parallel| {
                    super::gemm_keeping(out, [a, b], kept, alpha, accumulate || i > 0, parallel);
                });
            }
        }
    });
}

/// All of it as one product, if that is worth it; whether it was made.
fn as_one<T: Float>(terms: &[Batch<T>], alphas: &[f64], accumulate: bool, parallel: bool) -> bool {
    let Some((alpha, [m, n])) =
        alphas.first().zip(terms.first().map(|term| [term.shape.m, term.shape.n]))
    else {
        return false;
    };
    // What they are scaled by in front of the scale of all.
    let scales = alphas.iter().map(|a| a / alpha);
    let is_exact = |scale: f64| T::DTYPE != DType::BF16 || scale.log2().fract() == 0.0;
    let shapes = || terms.iter().map(|term| &term.shape);
    let fits = shapes().all(|shape| shape.extents.is_empty() && [shape.m, shape.n] == [m, n])
        && shapes().any(|shape| shape.k >= MIN_DEPTH)
        && m >= MIN_ROWS
        && n >= MIN_COLS
        && terms[0].shape.strides[2][1] == 1
        && scales.clone().all(|scale| scale.is_normal() && is_exact(scale));
    if !fits {
        return false;
    }
    // SAFETY: the operands' elements, as `Arg` promises.
    let rows =
        |term: &Batch<T>| unsafe { Mat::new(term.a, [m, term.shape.k], term.shape.strides[0]) };
    // SAFETY: the same.
    let cols =
        |term: &Batch<T>| unsafe { Mat::new(term.b, [term.shape.k, n], term.shape.strides[1]) };
    let a: SmallVec<[Mat<T>; 4]> = terms.iter().map(rows).collect();
    let b: SmallVec<[Mat<T>; 4]> = terms.iter().map(|term| cols(term).transposed()).collect();
    let keeping = |rows, kept| Keeping { factor: T::factor(rows), kept };
    let factors: SmallVec<[[Keeping; 2]; 4]> = a
        .iter()
        .zip(&b)
        .zip(terms)
        .map(|((a, b), term)| [keeping(a, term.kept[0]), keeping(b, term.kept[1])])
        .collect();
    let (mut left, mut right) = (Beside::default(), Beside::default());
    for (([a, b], term), scale) in factors.iter().zip(terms).zip(scales) {
        left.push(a, term.shape.k, scale);
        right.push(b, term.shape.k, 1.0);
    }
    // SAFETY: the result's elements, as `Out` promises.
    let out = unsafe { MatMut::new(terms[0].out, [m, n], terms[0].shape.strides[2]) };
    let alpha = T::Acc::from_f64(*alpha);
    let product = Product { extents: [m, n, left.k], alpha, accumulate, rounded: false };
    T::multiply(out, &left, &right, product, parallel);
    true
}

/// Factors side by side along `k`, each scaled.
#[derive(Default)]
struct Beside<'a> {
    parts: SmallVec<[Part<'a>; 4]>,
    k: usize,
}

struct Part<'a> {
    factor: &'a dyn Factor,
    scale: f64,
    /// Where it begins, and how long it is.
    start: usize,
    len: usize,
}

impl<'a> Beside<'a> {
    fn push(&mut self, factor: &'a dyn Factor, len: usize, scale: f64) {
        self.parts.push(Part { factor, scale, start: self.k, len });
        self.k += len.next_multiple_of(ALIGN);
    }
}

/// Packed as what they are packed to.
macro_rules! packed_to {
    ($($word:ty),*) => {$(
        impl Source<$word> for Beside<'_> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$word]) {
                for Part { factor, scale, start, len } in &self.parts {
                    let end = start + len;
                    let (first, last) = (k.start.max(*start), k.end.min(end));
                    if first >= last {
                        continue;
                    }
                    let padded = end.next_multiple_of(ALIGN).min(k.end);
                    let word = |at: usize| (at - k.start).div_ceil(<$word>::STEPS) * width;
                    let to = &mut to[word(first)..word(padded)];
                    let (to, padding) = to.split_at_mut(word(last) - word(first));
                    padding.fill(<$word>::ZERO);
                    Source::<$word>::pack(*factor, outer.clone(), first - start..last - start, width, to);
                    if *scale != 1.0 {
                        to.iter_mut().for_each(|word| *word = word.scaled(*scale));
                    }
                }
            }

            fn packed(&self, outer: Range<usize>, k: Range<usize>, width: usize) -> Option<&[$word]> {
                let covers = |part: &&Part| part.start <= k.start && k.end <= part.start + part.len;
                let Part { factor, scale, start, .. } = self.parts.iter().find(covers)?;
                let own = k.start - start..k.end - start;
                if *scale == 1.0 { factor.packed(outer, own, width) } else { None }
            }
        }
    )*};
}
packed_to!(u32, f32, f64);

#[cfg(test)]
mod tests {
    use crate::cpu::low_rank::tests::{branch, results};
    use metal_candle_compiler::{LibraryCall, Target};

    #[test]
    fn a_plan_with_sums_gives_what_one_with_products_apart_does() {
        let is_sum = |call: &LibraryCall| matches!(call, LibraryCall::GemmSum { .. });
        // As many rows as are made as one product, and fewer.
        for rows in [130, 20] {
            let graph = branch([rows, 96, 70, 5], false);
            let products = Target { max_products: 1, ..Target::CPU };
            let (as_one, got) = results(&graph, &Target::CPU, is_sum);
            let (apart, want) = results(&graph, &products, is_sum);
            assert!(as_one && !apart);
            assert_eq!(got, want, "{rows} rows");
        }
    }
}
