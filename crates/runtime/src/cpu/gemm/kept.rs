//! Factors that are packed once, for all products that read them: their panels lie as [`blocked`](super::blocked) would have
//! packed them, so that the results have the same bits.

use super::micro::Kernels;
use super::pack::{Factor, Kind, Source, Word};
use super::{BatchShape, Multiply, is_turned, thin};
use crate::arena::Arena;
use crate::cpu::matrix::Mat;
use crate::cpu::number::for_float;
use crate::{Error, Result};
use metal_candle_compiler::Operand;
use metal_candle_graph::DType;
use std::ops::Range;
use std::sync::Arc;

/// The panels of a factor, one after the other, each of all `k`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Panels {
    kind: Kind,
    /// Rows of `a` or columns of `b`, and `k`.
    extents: [usize; 2],
    /// Of a panel that is as wide as they come, and of the last one.
    widths: [usize; 2],
}

impl Panels {
    /// Those that these kernels read of a factor by `[rows or columns, k]`, as `a` (side 0) or `b` (side 1).
    pub(super) fn new<P: Word, S>(
        kernels: &Kernels<P, S>,
        extents: [usize; 2],
        side: usize,
    ) -> Panels {
        let width = kernels.widths()[side];
        let last = match extents[0] % width {
            0 => width,
            len => kernels.width(side, len),
        };
        Panels { kind: P::KIND, extents, widths: [width, last] }
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    pub(crate) fn len_bytes(&self) -> usize {
        match self.kind {
            Kind::Pairs => self.words::<u32>() * size_of::<u32>(),
            Kind::F32 => self.words::<f32>() * size_of::<f32>(),
            Kind::F64 => self.words::<f64>() * size_of::<f64>(),
        }
    }

    /// Where the words are of a panel and some `k`, if they are in one place.
    pub(super) fn place<P: Word>(
        &self,
        outer: &Range<usize>,
        k: &Range<usize>,
        width: usize,
    ) -> Option<Range<usize>> {
        let (len, panel) = (self.extents[1], outer.start / self.widths[0]);
        let is_panel = P::KIND == self.kind && self.of(panel) == (outer.clone(), width);
        // Words are not cut.
        let cuts = |k: usize| !k.is_multiple_of(P::STEPS) && k != len;
        if !is_panel || k.end > len || cuts(k.start) || cuts(k.end) {
            return None;
        }
        let start = self.range_of::<P>(panel).start + k.start / P::STEPS * width;
        Some(start..start + k.len().div_ceil(P::STEPS) * width)
    }

    pub(super) fn count(&self) -> usize {
        self.extents[0].div_ceil(self.widths[0])
    }

    /// What a panel holds, and how wide it is.
    fn of(&self, panel: usize) -> (Range<usize>, usize) {
        let ([outers, _], [whole, last]) = (self.extents, self.widths);
        let outer = panel * whole..((panel + 1) * whole).min(outers);
        let width = if outer.len() == whole { whole } else { last };
        (outer, width)
    }

    /// Where the words of a panel are.
    pub(super) fn range_of<P: Word>(&self, panel: usize) -> Range<usize> {
        let steps = self.extents[1].div_ceil(P::STEPS);
        let start = panel * steps * self.widths[0];
        start..start + steps * self.of(panel).1
    }

    pub(super) fn pack_one<P: Word>(
        &self,
        panel: usize,
        factor: &(impl Source<P> + ?Sized),
        to: &mut [P],
    ) {
        let (outer, width) = self.of(panel);
        factor.pack(outer, 0..self.extents[1], width, to);
    }

    fn pack<P: Word>(&self, factor: &(impl Source<P> + ?Sized), to: &mut [P]) {
        for panel in 0..self.count() {
            self.pack_one(panel, factor, &mut to[self.range_of::<P>(panel)]);
        }
    }

    pub(super) fn words<P: Word>(&self) -> usize {
        self.count().checked_sub(1).map_or(0, |last| self.range_of::<P>(last).end)
    }
}

/// A factor's panels, and the memory that they lie in.
pub(crate) struct Kept {
    panels: Panels,
    memory: Arc<Arena>,
    start_bytes: usize,
}

/// Of panels: that of vectors.
const ALIGN: usize = 64;

impl Kept {
    /// Packs these factors into one memory, which lasts as long as any of them.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(crate) fn all(factors: &[(Panels, &dyn Factor)]) -> Result<Vec<Kept>> {
        let len = |panels: &Panels| panels.len_bytes().next_multiple_of(ALIGN);
        let bytes = factors.iter().map(|(panels, _)| len(panels)).sum();
        let memory = Arena::new(bytes, ALIGN)
            .map_err(|_| Error::OutOfMemory { what: "prepacked weights".into(), bytes })?;
        let memory = Arc::new(memory);
        let mut start_bytes = 0;
        let kept = factors.iter().map(|(panels, factor)| {
            let kept = Kept { panels: *panels, memory: Arc::clone(&memory), start_bytes };
            start_bytes += len(panels);
            // SAFETY: nobody reads these words yet, and they are apart from those of the others.
            unsafe {
                match panels.kind {
                    Kind::Pairs => panels.pack(*factor, kept.words_mut::<u32>()),
                    Kind::F32 => panels.pack(*factor, kept.words_mut::<f32>()),
                    Kind::F64 => panels.pack(*factor, kept.words_mut::<f64>()),
                }
            }
            kept
        });
        Ok(kept.collect())
    }

    pub(crate) fn panels(&self) -> &Panels {
        &self.panels
    }

    /// # Safety
    /// Nobody else reads or writes them.
    #[expect(clippy::mut_from_ref, reason = "they lie in memory that is shared")]
    unsafe fn words_mut<P: Word>(&self) -> &mut [P] {
        let data = self.memory.as_ptr().wrapping_add(self.start_bytes).cast();
        // SAFETY: `all` has made the memory for as many, aligned and zeroed; any bytes are a word. They are the caller's.
        unsafe { std::slice::from_raw_parts_mut(data, self.panels.words::<P>()) }
    }

    fn panel<P: Word>(&self, outer: &Range<usize>, k: &Range<usize>, width: usize) -> Option<&[P]> {
        let place = self.panels.place::<P>(outer, k, width)?;
        let data = self.memory.as_ptr().wrapping_add(self.start_bytes).cast::<P>().cast_const();
        // SAFETY: the words that `all` has written, of this kind, as `place` has seen; nobody writes them any more.
        let words = unsafe { std::slice::from_raw_parts(data, self.panels.words::<P>()) };
        Some(&words[place])
    }
}

/// A factor of a call that is a matrix of its own, and not one of many or of few rows: it is packed whenever the call is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct FactorShape {
    pub(crate) dtype: DType,
    /// Rows of `a` or columns of `b`, and `k`.
    pub(crate) extents: [usize; 2],
    pub(crate) strides: [isize; 2],
    /// Of the first element.
    pub(crate) offset: isize,
    /// Whether it is multiplied as `a` (0) or as `b` (1).
    pub(crate) side: usize,
}

impl FactorShape {
    /// Those of a product of a and b.
    pub(crate) fn both([a, b, out]: [&Operand; 3]) -> [Option<FactorShape>; 2] {
        let shape = BatchShape::new([&a.layout, &b.layout, &out.layout]);
        // Others may be read where they lie.
        let is_packed = shape.extents.iter().product::<usize>() == 1
            && shape.m.min(shape.n) > thin::LONGEST
            && shape.k > thin::LONGEST;
        let side = usize::from(is_turned(shape.strides[2]));
        let [[a_row, a_k], [b_k, b_col], _] = shape.strides;
        let factor = |operand: &Operand, rows, strides, side| FactorShape {
            dtype: out.dtype,
            extents: [rows, shape.k],
            strides,
            offset: operand.layout.offset,
            side,
        };
        let a = factor(a, shape.m, [a_row, a_k], side);
        let b = factor(b, shape.n, [b_col, b_k], 1 - side);
        [a, b].map(|factor| Some(factor).filter(|_| is_packed))
    }

    pub(crate) fn panels(&self) -> Panels {
        for_float!(self.dtype, T => <T as Multiply>::panels(self.extents, self.side, false))
    }

    /// The factor, in a buffer that starts there.
    ///
    /// # Safety
    /// Its elements are initialised floats of this dtype within memory that may be read and is not written during `'a`.
    pub(crate) unsafe fn of<'a>(&self, start: *const u8) -> Box<dyn Factor + 'a> {
        for_float!(self.dtype, T => {
            let data = start.cast::<T>().wrapping_offset(self.offset);
            // SAFETY: the caller's promise.
            Box::new(unsafe { Mat::<'a, T>::new(data, self.extents, self.strides) })
        })
    }
}

/// A factor, and its panels if they are kept.
pub(super) struct Keeping<'a> {
    pub(super) factor: &'a dyn Factor,
    pub(super) kept: Option<&'a Kept>,
}

/// For every kind of word, with the same lines.
macro_rules! packed_to {
    ($($word:ty),*) => {$(
        impl Source<$word> for Keeping<'_> {
            fn pack(&self, outer: Range<usize>, k: Range<usize>, width: usize, to: &mut [$word]) {
                match self.packed(outer.clone(), k.clone(), width) {
                    Some(panel) => to[..panel.len()].copy_from_slice(panel),
                    None => Source::<$word>::pack(self.factor, outer, k, width, to),
                }
            }

            fn in_place(&self, outer: usize, k: usize) -> Option<(*const $word, usize)> {
                self.factor.in_place(outer, k)
            }

            fn packed(&self, outer: Range<usize>, k: Range<usize>, width: usize) -> Option<&[$word]> {
                self.kept?.panel(&outer, &k, width)
            }
        }
    )*};
}
packed_to!(u32, f32, f64);
