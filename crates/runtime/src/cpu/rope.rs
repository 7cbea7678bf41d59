//! Rotary position embedding: `(a cos - b sin, b cos + a sin)` of every pair.

use crate::cpu::number::{Float, Number, Real, for_float};
use crate::cpu::view::{Arg, Out};
use crate::cpu::{parallel, scratch};
use metal_candle_graph::composite::RopeLayout;

/// `args = [x: [.., d], cos: [.., d/2], sin: [.., d/2]]`
pub(crate) fn call(args: &[Arg], outs: &mut [Out], layout: RopeLayout, parallel: bool) {
    let ([x, cos, sin], [out]) = (args, outs) else {
        panic!("metal-candle bug: rope takes three operands and gives one")
    };
    for_float!(x.dtype(), T => rope::<T>(x, [cos, sin], out, layout, parallel));
}

fn rope<T: Float>(x: &Arg, tables: [&Arg; 2], out: &mut Out, layout: RopeLayout, parallel: bool) {
    let x = x.read::<T>();
    let (d, half) = (x.cols(), x.cols() / 2);
    let expected = x.shape().with(x.shape().rank() - 1, half);
    let fits = out.shape() == x.shape() && tables.iter().all(|t| *t.shape() == expected);
    assert!(fits, "metal-candle bug: rope of {}", x.shape());
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

/// A row of cos or sin, which may be of any float dtype.
fn table_row<A: Real>(table: &Arg, row: usize, to: &mut [A]) {
    for_float!(table.dtype(), C => {
        let row = table.read::<C>().row(row);
        for (to, x) in to.iter_mut().zip(row.iter()) {
            *to = A::from_f64(x.widen().to_f64());
        }
    });
}
