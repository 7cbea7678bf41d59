//! The product of two packed operands, tile by tile (Goto and van de Geijn 2008).
//!
//! The smaller operand is packed as a whole; every task packs a few panels of the other one and multiplies them with
//! all of it. So each element is packed once, and each sum is made by one task, in an order that depends on `k` alone.

use super::Product;
use super::micro::{Kernels, Tile};
use super::pack::Source;
use crate::cpu::matrix::MatMut;
use crate::cpu::number::{Accumulator, Number, Real};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch::{self, Pod};
use crate::element::Element;
use metal_candle_graph::DType;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Packed steps that are summed in registers, at most: a panel stays in the cache.
const MAX_STEPS: usize = 1024;
/// Rows or columns of the operand that is packed as a whole, at most.
const MAX_WHOLE: usize = 2048;
/// Panels that a task packs at a time, where there are many.
const GROUP: usize = 4;
/// Tasks that there should be at least.
const TASKS: usize = 8;
/// Panels of a for which a panel of b is read where it lies: packing it would take longer than it saves.
const FEW_PANELS: usize = 6;
/// Packed words from which on packing is worth a second thread.
const PARALLEL_PACK: usize = 1 << 17;
/// Elements of the largest tile of any kernel.
const MAX_TILE: usize = 14 * 32;

/// The product of two factors, rows of a and columns of b.
pub(super) fn product<P, T>(
    kernels: &'static Kernels<P, T::Acc>,
    mut out: MatMut<'_, T>,
    operands: [&dyn Source<P>; 2],
    product: &Product<T::Acc>,
    parallel: bool,
) where
    P: Pod + Send + Sync,
    T: Number<Acc: Real>,
{
    let [m, n, k] = product.extents;
    // Sums that are rounded when they are stored are made in one go.
    let in_place = T::DTYPE == T::Acc::DTYPE;
    let slices = if in_place { k.div_ceil(MAX_STEPS * kernels.steps) } else { 1 };
    // Whole blocks of every quantised format.
    let slice_len = k.div_ceil(slices).next_multiple_of(256);
    let target = Target { data: out.as_mut_ptr(), strides: [out.row_stride(), out.col_stride()] };
    for start in (0..k).step_by(slice_len) {
        let run = Run {
            kernels,
            out: &target,
            operands,
            extents: [m, n],
            widths: kernels.widths(),
            k: start..(start + slice_len).min(k),
            alpha: product.alpha,
            accumulate: product.accumulate || start != 0,
        };
        run.all(parallel);
    }
}

/// Where the result goes; tasks write disjoint parts of it.
struct Target<T> {
    data: *mut T,
    strides: [isize; 2],
}

// SAFETY: a matrix that is borrowed for the product; every tile of it belongs to one task.
unsafe impl<T: Send> Sync for Target<T> {}

/// One slice of `k`. Index 0 stands for rows and `a`, 1 for columns and `b`.
struct Run<'a, P: 'static, T: Number<Acc: 'static>> {
    kernels: &'static Kernels<P, T::Acc>,
    out: &'a Target<T>,
    operands: [&'a dyn Source<P>; 2],
    extents: [usize; 2],
    /// Of a panel.
    widths: [usize; 2],
    k: Range<usize>,
    alpha: T::Acc,
    accumulate: bool,
}

/// Panels of one operand, one after the other.
struct Panels<'p, P> {
    first: usize,
    count: usize,
    lie: Lie,
    packed: &'p [P],
}

/// Where panels are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// Packed for this product.
    Packed,
    /// Packed before, and kept by the operand.
    Kept,
    /// Those that are as wide as they come are left where the operand lies, the others packed.
    InPlace,
}

impl<P: Pod + Send + Sync, T: Number<Acc: Real>> Run<'_, P, T> {
    fn all(&self, parallel: bool) {
        let whole = usize::from(self.extents[1] <= self.extents[0]);
        let other = 1 - whole;
        let panels = [0, 1].map(|side| self.extents[side].div_ceil(self.widths[side]));
        let at_a_time = (MAX_WHOLE / self.widths[whole]).max(1);
        let group = if panels[other] >= TASKS * GROUP { GROUP } else { 1 };
        let lie = [0, 1].map(|side| self.lie(side, panels[0]));
        let room = |side: usize, count| match lie[side] {
            Lie::Kept => 0,
            Lie::Packed | Lie::InPlace => count * self.panel_len(side),
        };
        for first in (0..panels[whole]).step_by(at_a_time) {
            let count = at_a_time.min(panels[whole] - first);
            scratch::with(room(whole, count), |packed: &mut [P]| {
                // All tasks read them: what lies in place would be read anew by each.
                let lie_whole = if lie[whole] == Lie::Kept { Lie::Kept } else { Lie::Packed };
                if lie_whole == Lie::Packed {
                    self.pack_all(whole, first, count, packed, parallel);
                }
                let whole_panels = Panels { first, count, lie: lie_whole, packed };
                parallel::for_each(parallel, panels[other].div_ceil(group), |task| {
                    let first = task * group;
                    let count = group.min(panels[other] - first);
                    scratch::with(room(other, count), |packed: &mut [P]| {
                        for (i, to) in packed.chunks_exact_mut(self.panel_len(other)).enumerate() {
                            if lie[other] == Lie::Packed || !self.is_whole(other, first + i) {
                                self.pack(other, first + i, to);
                            }
                        }
                        let panels = Panels { first, count, lie: lie[other], packed };
                        if whole == 0 {
                            self.tiles(&whole_panels, &panels);
                        } else {
                            self.tiles(&panels, &whole_panels);
                        }
                    });
                });
            });
        }
    }

    /// Where the panels of an operand are to be read, of so many panels of a.
    fn lie(&self, side: usize, a_panels: usize) -> Lie {
        if self.kept(side, 0).is_some() {
            return Lie::Kept;
        }
        let few = side == 1 && a_panels <= FEW_PANELS;
        match few && self.operands[1].in_place(0, self.k.start).is_some() {
            true => Lie::InPlace,
            false => Lie::Packed,
        }
    }

    /// A panel that the operand keeps.
    fn kept(&self, side: usize, panel: usize) -> Option<&[P]> {
        let range = self.range(side, panel);
        let width = self.kernels.width(side, range.len());
        self.operands[side].packed(range, self.k.clone(), width)
    }

    /// Packed steps of this slice.
    fn packed_k(&self) -> usize {
        self.k.len().div_ceil(self.kernels.steps)
    }

    fn panel_len(&self, side: usize) -> usize {
        self.packed_k() * self.widths[side]
    }

    /// What a panel holds.
    fn range(&self, side: usize, panel: usize) -> Range<usize> {
        let start = panel * self.widths[side];
        start..(start + self.widths[side]).min(self.extents[side])
    }

    fn pack(&self, side: usize, panel: usize, to: &mut [P]) {
        let range = self.range(side, panel);
        let width = self.kernels.width(side, range.len());
        self.operands[side].pack(range, self.k.clone(), width, to);
    }

    fn pack_all(&self, side: usize, first: usize, count: usize, to: &mut [P], parallel: bool) {
        let len = self.panel_len(side);
        let tasks = if parallel && to.len() >= PARALLEL_PACK { count.min(TASKS) } else { 1 };
        let parts = Parts::new(to);
        parallel::for_each(parallel, tasks, |task| {
            for i in task * count / tasks..(task + 1) * count / tasks {
                // SAFETY: a panel belongs to one task.
                self.pack(side, first + i, unsafe { parts.part(i * len, len) });
            }
        });
    }

    /// Whether a panel is as wide as they come.
    fn is_whole(&self, side: usize, panel: usize) -> bool {
        self.range(side, panel).len() == self.widths[side]
    }

    /// Panel `i` of these.
    fn panel<'p>(&'p self, side: usize, of: &Panels<'p, P>, i: usize) -> &'p [P] {
        if of.lie == Lie::Kept {
            let kept = self.kept(side, of.first + i);
            return kept.expect("metal-candle bug: not all panels are kept");
        }
        let len = self.panel_len(side);
        &of.packed[i * len..(i + 1) * len]
    }

    /// Every panel of `a` with every panel of `b`.
    fn tiles(&self, a: &Panels<P>, b: &Panels<P>) {
        for j in 0..b.count {
            let cols = self.range(1, b.first + j);
            let lies = match b.lie == Lie::InPlace && self.is_whole(1, b.first + j) {
                true => self.operands[1].in_place(cols.start, self.k.start),
                false => None,
            };
            let b_panel = lies.unwrap_or_else(|| {
                (self.panel(1, b, j).as_ptr(), self.kernels.width(1, cols.len()))
            });
            for i in 0..a.count {
                self.tile(self.panel(0, a, i), b_panel, self.range(0, a.first + i), cols.clone());
            }
        }
    }

    /// `b` is the panel's start and how far it is from one `k` to the next.
    fn tile(&self, a: &[P], b: (*const P, usize), rows: Range<usize>, cols: Range<usize>) {
        let (height, by_vectors) = self.kernels.of_rows(rows.len());
        let vectors = cols.len().div_ceil(self.kernels.lanes);
        let width = vectors * self.kernels.lanes;
        let [row_stride, col_stride] = self.out.strides;
        let at = rows.start as isize * row_stride + cols.start as isize * col_stride;
        let c = self.out.data.wrapping_offset(at);
        let mut tile = Tile {
            k: self.packed_k(),
            a: a.as_ptr(),
            b: b.0,
            b_stride: b.1,
            c: c.cast::<T::Acc>(),
            row_stride: row_stride.unsigned_abs(),
            alpha: self.alpha,
            accumulate: self.accumulate,
        };
        let same = T::DTYPE == T::Acc::DTYPE;
        let fits =
            *height == rows.len() && width == cols.len() && col_stride == 1 && row_stride > 0;
        let into = match T::DTYPE {
            DType::BF16 => self.kernels.to_bf16,
            _ => Some(self.kernels).filter(|_| same),
        };
        if let Some(kernels) = into.filter(|_| fits) {
            let (_, by_vectors) = kernels.of_rows(rows.len());
            // SAFETY: the panels hold the tile's rows and columns; all of it is within the result, ours alone.
            unsafe { by_vectors[vectors - 1](&tile) };
            return;
        }
        let mut sums = MaybeUninit::<[T::Acc; MAX_TILE]>::uninit();
        assert!(height * width <= MAX_TILE, "metal-candle bug: a tile of {height} x {width}");
        (tile.c, tile.row_stride, tile.accumulate) = (sums.as_mut_ptr().cast(), width, false);
        // SAFETY: as above, into memory of the tile's size, all of which it writes.
        let sums = unsafe {
            by_vectors[vectors - 1](&tile);
            std::slice::from_raw_parts(sums.as_ptr().cast::<T::Acc>(), height * width)
        };
        for (i, sums) in sums.chunks_exact(width).take(rows.len()).enumerate() {
            let (to, sums) = (c.wrapping_offset(i as isize * row_stride), &sums[..cols.len()]);
            if col_stride == 1 && !self.accumulate && !same {
                // SAFETY: within the result, ours alone, and of a type whose results are initialised.
                T::narrow_all(sums, unsafe { std::slice::from_raw_parts_mut(to, sums.len()) });
                continue;
            }
            for (j, sum) in sums.iter().enumerate() {
                let to = to.wrapping_offset(j as isize * col_stride);
                // SAFETY: within the result; read only where it is accumulated onto.
                unsafe {
                    let base = if self.accumulate { (*to).widen() } else { T::Acc::ZERO };
                    to.write(T::narrow(if self.accumulate { base + *sum } else { *sum }));
                }
            }
        }
    }
}
