//! Rows that several products have in common, as their left factor, packed once for all of them.

use super::micro::Kernels;
use super::pack::{Factor, Source, Word};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use std::ops::Range;

/// How kernels have rows packed.
struct Panels {
    /// Rows, and `k`.
    extents: [usize; 2],
    /// Rows of a panel.
    width: usize,
    /// The width of the last panel.
    last: usize,
    /// `k` of a packed word.
    steps: usize,
}

impl Panels {
    fn new<P, S>(kernels: &Kernels<P, S>, extents: [usize; 2]) -> Panels {
        let width = kernels.max_rows();
        let last = match extents[0] % width {
            0 => width,
            rest => kernels.of_rows(rest).0,
        };
        Panels { extents, width, last, steps: kernels.steps }
    }

    fn count(&self) -> usize {
        self.extents[0].div_ceil(self.width)
    }

    /// Words of a panel of the full width.
    fn len(&self) -> usize {
        self.extents[1].div_ceil(self.steps) * self.width
    }

    /// What a panel holds, and how wide it is.
    fn of(&self, panel: usize) -> (Range<usize>, usize) {
        let start = panel * self.width;
        let width = if panel + 1 == self.count() { self.last } else { self.width };
        (start..(start + self.width).min(self.extents[0]), width)
    }
}

/// Panels of a factor, as kernels of `P` read them; others pack it themselves.
pub(super) struct Prepacked<'a, P> {
    factor: &'a dyn Factor,
    panels: Panels,
    packed: &'a [P],
}

/// Gives `f` a factor of `[rows, k]` whose panels lie in scratch memory, for products by these kernels.
pub(super) fn with<P, S, R>(
    kernels: &Kernels<P, S>,
    factor: &dyn Factor,
    extents: [usize; 2],
    parallel: bool,
    f: impl FnOnce(&dyn Factor) -> R,
) -> R
where
    P: Word + Send + Sync,
    for<'x> dyn Factor + 'x: Source<P>,
    for<'a> Prepacked<'a, P>: Factor,
{
    let panels = Panels::new(kernels, extents);
    let len = panels.len();
    let count = if len == 0 { 0 } else { panels.count() };
    scratch::with(count * len, |packed: &mut [P]| {
        let parts = Parts::new(packed);
        parallel::for_each(parallel, count, |panel| {
            let (range, width) = panels.of(panel);
            // SAFETY: a panel belongs to one task.
            let to = unsafe { parts.part(panel * len, len) };
            Source::<P>::pack(factor, range, 0..extents[1], width, to);
        });
        f(&Prepacked { factor, panels, packed })
    })
}

impl<P: Word> Prepacked<'_, P> {
    fn panel(&self, outer: Range<usize>, k: Range<usize>, width: usize) -> &[P] {
        let panel = outer.start / self.panels.width;
        let is_one = self.panels.of(panel) == (outer, width) && k.start.is_multiple_of(P::STEPS);
        assert!(is_one, "metal-candle bug: packed for other products");
        let start = panel * self.panels.len() + k.start / P::STEPS * width;
        &self.packed[start..start + k.len().div_ceil(P::STEPS) * width]
    }
}

/// Packed for the first, and packing itself for the others.
macro_rules! packed_for {
    ($word:ty, not $($other:ty),*) => {
        impl Source<$word> for Prepacked<'_, $word> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$word]) {
                Source::<$word>::pack(self.factor, outer, k, width, to);
            }

            fn packed(&self, outer: Range<usize>, k: Range<usize>, width: usize) -> Option<&[$word]> {
                Some(self.panel(outer, k, width))
            }
        }
        $(
            impl Source<$other> for Prepacked<'_, $word> {
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
        let twice = T::Acc::prepacked(&counted, [m, k], rounded, false, |packed| {
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
