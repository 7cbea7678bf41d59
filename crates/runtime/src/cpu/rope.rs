//! Rotary position embedding: `(a cos - b sin, b cos + a sin)` of every pair.

use crate::cpu::index::checked_start;
use crate::cpu::number::{Float, Number, Real, for_float};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::scratch;
use crate::cpu::simd::multiversion;
use crate::cpu::view::{Arg, Out, Row, leading, offset_of};
use half::{bf16, f16};
use metal_candle_graph::composite::RopeLayout;
use metal_candle_graph::{DType, Result};

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

    /// What most models have: rows are read where they lie, if their elements do so side by side.
    fn in_f32<T: Float + Number<Acc = f32>>(&self, out: &mut Out) {
        let (x, tables) = (self.x.read::<T>(), self.tables.map(|t| t.read::<f32>()));
        let (out, d) = (Parts::new(out.slice::<T>()), x.cols());
        self.for_each_rows(|first, n| {
            let lens = [d, d / 2, d / 2, d];
            scratch::split(lens, |[wide, of_cos, of_sin, turned]: [&mut [f32]; 4]| {
                let tables = tables[0].rows_from(first).zip(tables[1].rows_from(first));
                let rows = (first..first + n).zip(x.rows_from(first)).zip(tables);
                for ((row, x), (cos, sin)) in rows {
                    let (x, cos, sin) = (row_in(x, wide), row_in(cos, of_cos), row_in(sin, of_sin));
                    // SAFETY: every row has a place of its own.
                    let out = unsafe { out.part((self.place)(row), d) };
                    T::accumulate_into(out, turned, |to| match self.layout {
                        RopeLayout::Half => turn_halves(x, cos, sin, to),
                        RopeLayout::Interleaved => turn(x, cos, sin, self.layout, to),
                    });
                }
            });
        });
    }
}

fn turn<A: Real>(x: &[A], cos: &[A], sin: &[A], layout: RopeLayout, turned: &mut [A]) {
    for i in 0..cos.len() {
        let (first, second) = match layout {
            RopeLayout::Half => (i, i + cos.len()),
            RopeLayout::Interleaved => (2 * i, 2 * i + 1),
        };
        let (a, b) = (x[first], x[second]);
        turned[first] = a * cos[i] - b * sin[i];
        turned[second] = b * cos[i] + a * sin[i];
    }
}

/// The row in f32: in place if it is, or in `wide`.
fn row_in<'a, T: Number<Acc = f32>>(row: Row<'a, T>, wide: &'a mut [f32]) -> &'a [f32] {
    match row.as_slice().and_then(T::as_acc) {
        Some(row) => row,
        None => {
            row.widen_to(wide);
            wide
        }
    }
}

multiversion! {
    fn turn_halves(x: &[f32], cos: &[f32], sin: &[f32], out: &mut [f32]) {
        let half = cos.len();
        let ((a, b), (first, second)) = (x.split_at(half), out.split_at_mut(half));
        let tables = cos.iter().zip(sin);
        let outs = first.iter_mut().zip(second);
        for (((a, b), (cos, sin)), (first, second)) in a.iter().zip(b).zip(tables).zip(outs) {
            *first = a * cos - b * sin;
            *second = b * cos + a * sin;
        }
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
