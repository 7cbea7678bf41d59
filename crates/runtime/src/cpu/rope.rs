//! Rotary position embedding: `(a cos - b sin, b cos + a sin)` of every pair.

use crate::cpu::number::{Float, Number, Real, for_float};
use crate::cpu::simd::multiversion;
use crate::cpu::view::{Arg, Out, Row, Strided};
use crate::cpu::{parallel, scratch};
use metal_candle_graph::DType;
use metal_candle_graph::composite::RopeLayout;

/// `args = [x: [.., d], cos: [.., d/2], sin: [.., d/2]]`
pub(crate) fn call(args: &[Arg], outs: &mut [Out], layout: RopeLayout, parallel: bool) {
    let ([x, cos, sin], [out]) = (args, outs) else {
        panic!("metal-candle bug: rope takes three operands and gives one")
    };
    for_float!(x.dtype(), T => rope::<T>(x, [cos, sin], out, layout, parallel));
}

fn rope<T: Float>(x: &Arg, tables: [&Arg; 2], out: &mut Out, layout: RopeLayout, parallel: bool) {
    let d = x.shape().last().unwrap_or(1);
    let half = d / 2;
    let expected = x.shape().with(x.shape().rank() - 1, half);
    let fits = out.shape() == x.shape() && tables.iter().all(|t| *t.shape() == expected);
    assert!(fits, "metal-candle bug: rope of {}", x.shape());
    let all_f32 = x.dtype() == DType::F32 && tables.iter().all(|t| t.dtype() == DType::F32);
    if all_f32 && layout == RopeLayout::Half {
        return rope_halves_f32(&x.read(), tables.map(|t| t.read()), out, parallel);
    }
    let x = x.read::<T>();
    parallel::for_each_row(parallel, out.slice::<T>(), d, |row, out| {
        let lens = [d, half, half, d];
        scratch::split(lens, |[wide, cos, sin, turned]: [&mut [T::Acc]; 4]| {
            x.row(row).widen_to(wide);
            table_row(tables[0], row, cos);
            table_row(tables[1], row, sin);
            for i in 0..half {
                let (first, second) = match layout {
                    RopeLayout::Half => (i, i + half),
                    RopeLayout::Interleaved => (2 * i, 2 * i + 1),
                };
                let (a, b) = (wide[first], wide[second]);
                turned[first] = a * cos[i] - b * sin[i];
                turned[second] = b * cos[i] + a * sin[i];
            }
            T::narrow_all(turned, out);
        });
    });
}

/// What most models have: rows are read where they lie, if their elements do so side by side.
fn rope_halves_f32(x: &Strided<f32>, tables: [Strided<f32>; 2], out: &mut Out, parallel: bool) {
    let d = x.cols();
    parallel::for_each_row(parallel, out.slice::<f32>(), d, |row, out| {
        scratch::split([d, d / 2, d / 2], |[wide, of_cos, of_sin]: [&mut [f32]; 3]| {
            let x = row_in(x.row(row), wide);
            let cos = row_in(tables[0].row(row), of_cos);
            let sin = row_in(tables[1].row(row), of_sin);
            turn_halves(x, cos, sin, out);
        });
    });
}

/// The row in place, or a copy of it.
fn row_in<'a>(row: Row<'a, f32>, copy: &'a mut [f32]) -> &'a [f32] {
    row.as_slice().unwrap_or_else(|| {
        row.copy_to(copy);
        copy
    })
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
