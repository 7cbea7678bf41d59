//! Rotary position embedding: `(a cos - b sin, b cos + a sin)` of every pair.

use crate::cpu::cell::Cell;
use crate::cpu::index::checked_start;
use crate::cpu::matrix::Mat;
use crate::cpu::number::{Float, Number, Real, for_float};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::simd::widest;
use crate::cpu::view::{Arg, Out, Strided, leading, offset_of};
use half::{bf16, f16};
use metal_candle_graph::composite::RopeLayout;
use metal_candle_graph::{DType, Result};
use std::ops::Range;

/// `args = [x: [.., d], cos: [.., d/2], sin: [.., d/2]]`
pub(crate) fn call(args: &[Arg], outs: &mut [Out], layout: RopeLayout, parallel: bool) {
    let ([x, cos, sin], [out]) = (args, outs) else {
        panic!("metal-candle bug: rope takes three operands and gives one")
    };
    assert_eq!(out.shape(), x.shape(), "metal-candle bug: rope");
    let d = x.shape().last().unwrap_or(1);
    Rotation { x, tables: [cos, sin], layout, parallel, place: |row| row * d }.run(out);
}

/// In place on the output, which holds the base. `args = [x, cos, sin, start]`
///
/// # Errors
/// [`metal_candle_graph::Error::IndexOutOfRange`]
pub(crate) fn call_update(
    args: &[Arg],
    outs: &mut [Out],
    layout: RopeLayout,
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([x, cos, sin, start], [out]) = (args, outs) else {
        panic!("metal-candle bug: rope_update takes four operands and updates one")
    };
    let (shape, len) = (*out.shape(), x.shape()[dim]);
    assert_eq!(*x.shape(), shape.with(dim, len), "metal-candle bug: rope_update");
    let start = checked_start("slice_update", start, shape[dim], len)?;
    let strides = shape.contiguous_strides();
    let (first, rows) = (start * strides[dim] as usize, leading(x.shape()));
    let place = |row| first + offset_of(row, rows, &strides) as usize;
    Rotation { x, tables: [cos, sin], layout, parallel, place }.run(out);
    Ok(())
}

/// Rows of x, each turned by its rows of cos and sin.
struct Rotation<'a, P> {
    x: &'a Arg<'a>,
    tables: [&'a Arg<'a>; 2],
    layout: RopeLayout,
    parallel: bool,
    /// Where the elements of each row go: every row has a place of its own.
    place: P,
}

impl<P: Fn(usize) -> usize + Send + Sync> Rotation<'_, P> {
    fn run(&self, out: &mut Out) {
        let Rotation { x, tables, .. } = self;
        let half = x.shape().last().unwrap_or(1) / 2;
        let expected = x.shape().with(x.shape().rank() - 1, half);
        let fits = tables.iter().all(|t| *t.shape() == expected);
        assert!(fits, "metal-candle bug: rope of {}", x.shape());
        let f32_tables = tables.iter().all(|t| t.dtype() == DType::F32);
        match x.dtype() {
            DType::F32 if f32_tables => self.in_f32::<f32>(out),
            DType::BF16 if f32_tables => self.in_f32::<bf16>(out),
            DType::F16 if f32_tables => self.in_f32::<f16>(out),
            dtype => for_float!(dtype, T => self.in_any::<T>(out)),
        }
    }

    /// `f(first row, rows)` for some rows at a time.
    fn for_each_rows(&self, f: impl Fn(usize, usize) + Send + Sync) {
        let cols = self.x.shape().last().unwrap_or(1);
        if self.x.shape().is_empty() {
            return;
        }
        let (all, most) = (self.x.shape().len() / cols, (parallel::GRAIN / cols).max(1));
        parallel::for_each(self.parallel, all.div_ceil(most), |chunk| {
            f(chunk * most, most.min(all - chunk * most));
        });
    }

    /// With tables of any float dtype.
    fn in_any<T: Float>(&self, out: &mut Out) {
        let (x, out) = (self.x.read::<T>(), Parts::new(out.slice::<T>()));
        let d = x.cols();
        self.for_each_rows(|first, n| {
            let lens = [d, d / 2, d / 2, d];
            scratch::split(lens, |[wide, cos, sin, turned]: [&mut [T::Acc]; 4]| {
                for row in first..first + n {
                    x.row(row).widen_to(wide);
                    table_row(self.tables[0], row, cos);
                    table_row(self.tables[1], row, sin);
                    turn(wide, cos, sin, self.layout, turned);
                    // SAFETY: every row has a place of its own.
                    T::narrow_all(turned, unsafe { out.part((self.place)(row), d) });
                }
            });
        });
    }

    /// What most models have.
    fn in_f32<T: Float + Cell<Register = f32>>(&self, out: &mut Out) {
        let (x, tables) = (self.x.read::<T>(), self.tables.map(|t| t.read::<f32>()));
        let (layout, out) = (self.layout, Parts::new(out.slice::<T>()));
        let f = widest!([T: Float + Cell<Register = f32>, P: Fn(usize) -> usize] turn_rows<T, P>(
            rows: Range<usize>, x: Strided<'_, T>, tables: [Strided<'_, f32>; 2], layout: RopeLayout, out: Parts<T>, place: &P));
        self.for_each_rows(|first, n| {
            // SAFETY: this processor has what the function was compiled for; every row has a place of its own.
            unsafe { f(first..first + n, x, tables, layout, out, &self.place) };
        });
    }
}

/// Rows are read where they lie.
///
/// # Safety
/// Each of the rows has a place of its own in `out`, which nobody else touches.
#[inline(always)]
unsafe fn turn_rows<T: Float + Cell<Register = f32>, P: Fn(usize) -> usize>(
    rows: Range<usize>,
    x: Strided<'_, T>,
    [cos, sin]: [Strided<'_, f32>; 2],
    layout: RopeLayout,
    out: Parts<T>,
    place: &P,
) {
    let mut next = rows.start;
    while next < rows.end {
        let (x, cos, sin) = (x.run(next), cos.run(next), sin.run(next));
        let run = next..rows.end.min(next + x.rows());
        next = run.end;
        for (i, row) in run.enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { out.part(place(row), x.cols()) };
            let tables = [cos.row_range(i, 1), sin.row_range(i, 1)];
            turn_row(x.row_range(i, 1), tables, layout, out);
        }
    }
}

/// One row, in place of what `out` held.
#[inline(always)]
fn turn_row<T: Float + Cell<Register = f32>>(
    x: Mat<'_, T>,
    [cos, sin]: [Mat<'_, f32>; 2],
    layout: RopeLayout,
    out: &mut [T],
) {
    let half = cos.cols();
    let turned = |a: T, b: T, cos: f32, sin: f32| {
        let (a, b) = (a.to_register(), b.to_register());
        let round = T::of_register;
        (round(a * cos - b * sin), round(b * cos + a * sin))
    };
    match (layout, x.row_slice(0), cos.row_slice(0), sin.row_slice(0)) {
        (RopeLayout::Half, Some(x), Some(cos), Some(sin)) => {
            let ((a, b), (first, second)) = (x.split_at(half), out.split_at_mut(half));
            let tables = cos.iter().zip(sin);
            let outs = first.iter_mut().zip(second);
            for (((a, b), (cos, sin)), (first, second)) in a.iter().zip(b).zip(tables).zip(outs) {
                (*first, *second) = turned(*a, *b, *cos, *sin);
            }
        }
        _ => {
            for i in 0..half {
                let (first, second) = pair(layout, i, half);
                (out[first], out[second]) =
                    turned(x.get(0, first), x.get(0, second), cos.get(0, i), sin.get(0, i));
            }
        }
    }
}

/// The elements that are turned together.
fn pair(layout: RopeLayout, i: usize, half: usize) -> (usize, usize) {
    match layout {
        RopeLayout::Half => (i, i + half),
        RopeLayout::Interleaved => (2 * i, 2 * i + 1),
    }
}

fn turn<A: Real>(x: &[A], cos: &[A], sin: &[A], layout: RopeLayout, turned: &mut [A]) {
    for i in 0..cos.len() {
        let (first, second) = pair(layout, i, cos.len());
        let (a, b) = (x[first], x[second]);
        turned[first] = a * cos[i] - b * sin[i];
        turned[second] = b * cos[i] + a * sin[i];
    }
}

/// A row of cos or sin, which may be of any float dtype.
fn table_row<A: Real>(table: &Arg, row: usize, to: &mut [A]) {
    for_float!(table.dtype(), C => {
        let row = table.read::<C>().row(row);
        for (to, x) in to.iter_mut().zip(row.iter()) {
            *to = A::from_f64(x.widen().to_f64());
        }
    });
}
