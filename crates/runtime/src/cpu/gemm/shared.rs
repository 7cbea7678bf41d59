//! Rows that several products have in common, as their left factor, packed once for all of them.

use super::Multiply;
use super::kept::Panels;
use super::pack::{Factor, Kind, Source, Word};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use std::ops::Range;

/// Panels of a factor in words of `P`; who reads others packs it anew.
pub(super) struct Shared<'a, P> {
    factor: &'a dyn Factor,
    panels: Panels,
    packed: &'a [P],
}

/// Gives `f` a factor of `[rows, k]`, packed in scratch memory as the left one of products of `T`; `rounded` as their
/// [`Product`](super::Product) says it.
pub(crate) fn packed_once<T: Multiply, R>(
    factor: &dyn Factor,
    extents: [usize; 2],
    rounded: bool,
    parallel: bool,
    f: impl FnOnce(&dyn Factor) -> R,
) -> R {
    let panels = T::panels(extents, 0, rounded);
    match panels.kind() {
        Kind::Pairs => with::<u32, R>(panels, factor, parallel, f),
        Kind::F32 => with::<f32, R>(panels, factor, parallel, f),
        Kind::F64 => with::<f64, R>(panels, factor, parallel, f),
    }
}

/// The same in words of `P`.
fn with<P, R>(
    panels: Panels,
    factor: &dyn Factor,
    parallel: bool,
    f: impl FnOnce(&dyn Factor) -> R,
) -> R
where
    P: Word + Send + Sync,
    for<'x> dyn Factor + 'x: Source<P>,
    for<'a> Shared<'a, P>: Factor,
{
    scratch::with(panels.words::<P>(), |packed: &mut [P]| {
        let parts = Parts::new(packed);
        parallel::for_each(parallel, panels.count(), |panel| {
            let words = panels.range_of::<P>(panel);
            // SAFETY: a panel belongs to one task.
            let to = unsafe { parts.part(words.start, words.len()) };
            panels.pack_one(panel, factor, to);
        });
        f(&Shared { factor, panels, packed })
    })
}

/// Packed for the first, and packing itself for the others.
macro_rules! packed_for {
    ($word:ty, not $($other:ty),*) => {
        impl Source<$word> for Shared<'_, $word> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$word]) {
                Source::<$word>::pack(self.factor, outer, k, width, to);
            }

            fn packed(&self, outer: Range<usize>, k: Range<usize>, width: usize) -> Option<&[$word]> {
                Some(&self.packed[self.panels.place::<$word>(&outer, &k, width)?])
            }
        }
        $(
            impl Source<$other> for Shared<'_, $word> {
                fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$other]) {
                    Source::<$other>::pack(self.factor, outer, k, width, to);
                }
            }
        )*
    };
}
packed_for!(u32, not f32, f64);
packed_for!(f32, not u32, f64);
packed_for!(f64, not u32, f32);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::gemm::{Multiply, Product};
    use crate::cpu::matrix::{Mat, MatMut};
    use crate::cpu::number::{Accumulator, Float, Real};
    use half::{bf16, f16};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// How often a factor was packed.
    struct Counted<'a> {
        factor: &'a dyn Factor,
        times: AtomicUsize,
    }

    macro_rules! counted {
        ($($word:ty),*) => {$(
            impl Source<$word> for Counted<'_> {
                fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$word]) {
                    self.times.fetch_add(1, Ordering::Relaxed);
                    Source::<$word>::pack(self.factor, outer, k, width, to);
                }
            }
        )*};
    }
    counted!(u32, f32, f64);

    fn values<T: Float>(len: usize, seed: usize) -> Vec<T> {
        let value = |i: usize| ((i * 7919 + seed) % 1013) as f64 / 500.0 - 1.0;
        (0..len).map(|i| T::narrow(<T::Acc as Real>::from_f64(value(i)))).collect()
    }

    fn check<T: Float>([m, n, k]: [usize; 3], rounded: bool) {
        let (x, w) = (values::<T>(m * k, 1), values::<T>(n * k, 2));
        let (a, b) = (Mat::dense(&x, m, k), Mat::dense(&w, n, k));
        let alpha = T::Acc::from_f64(1.0);
        let product = Product { extents: [m, n, k], alpha, accumulate: false, rounded };
        let multiply = |a: &dyn Factor| {
            let mut out = vec![T::Acc::ZERO; m * n];
            let to = MatMut::dense(&mut out, m, n);
            T::Acc::multiply(to, a, T::factor(&b), product, false);
            out
        };
        let counted = Counted { factor: T::factor(&a), times: AtomicUsize::new(0) };
        let twice = packed_once::<T::Acc, _>(&counted, [m, k], rounded, false, |packed| {
            let times = counted.times.load(Ordering::Relaxed);
            let twice = [multiply(packed), multiply(packed)];
            assert_eq!(counted.times.load(Ordering::Relaxed), times, "it was packed again");
            twice
        });
        let once = multiply(T::factor(&a));
        assert!(twice.iter().all(|got| *got == once), "{m} x {n} x {k} of {}", T::DTYPE);
    }

    #[test]
    fn products_of_packed_rows_have_the_bits_of_those_that_pack_them() {
        // Whole panels, a lower one, more rows than columns and fewer, and sums in several slices.
        for extents in [[28, 40, 7], [37, 20, 64], [9, 70, 33], [1, 33, 1], [20, 40, 2600]] {
            for rounded in [false, true] {
                check::<f32>(extents, rounded);
                check::<bf16>(extents, rounded);
                check::<f16>(extents, rounded);
            }
            check::<f64>(extents, false);
        }
    }
}
