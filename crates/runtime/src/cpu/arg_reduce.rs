//! Positions of extreme elements: the first one on ties, and NaN before everything.

use crate::cpu::number::{Accumulator, Number, for_number};
use crate::cpu::view::{Arg, Out, Strided};
use crate::cpu::{parallel, scratch};
use metal_candle_graph::ArgReduceOp;

/// `args = [x]`; the output keeps `dim` with extent 1.
pub(crate) fn call(args: &[Arg], outs: &mut [Out], op: ArgReduceOp, dim: usize, parallel: bool) {
    let ([x], [out]) = (args, outs) else {
        panic!("metal-candle bug: {op} takes one operand and gives one")
    };
    let fits = *out.shape() == x.shape().with(dim, 1) && x.shape()[dim] != 0;
    assert!(fits, "metal-candle bug: {op} of {}", x.shape());
    let out = out.slice::<u32>();
    for_number!(x.dtype(), T => match op {
        ArgReduceOp::ArgMax => arg_reduce(x.read::<T>(), out, dim, parallel, |new, best| new > best),
        ArgReduceOp::ArgMin => arg_reduce(x.read::<T>(), out, dim, parallel, |new, best| new < best),
    });
}

/// `beats(new, best)` of numbers.
fn arg_reduce<T: Number>(
    x: Strided<T>,
    out: &mut [u32],
    dim: usize,
    parallel: bool,
    beats: impl Fn(T::Acc, T::Acc) -> bool + Send + Sync,
) {
    if out.is_empty() {
        return;
    }
    let beats = |new: T::Acc, best: T::Acc| !best.is_nan() && (new.is_nan() || beats(new, best));
    let (extent, last) = (x.shape()[dim], x.shape().rank() - 1);
    if dim == last {
        parallel::for_each_row(parallel, out, 1, |row, out| {
            let mut elements = x.row(row).iter().map(T::widen).enumerate();
            let mut best = elements.next().expect("metal-candle bug: an empty row");
            elements.for_each(|new| best = if beats(new.1, best.1) { new } else { best });
            out[0] = best.0 as u32;
        });
        return;
    }
    // [outer, extent, inner]: every inner position has a best of its own.
    let inner = x.shape().dims()[dim + 1..].iter().product();
    parallel::for_each_chunk(parallel, out, inner, |outer, out| {
        let x = x.outer(dim, outer);
        scratch::split([inner, x.cols()], |[best, wide]: [&mut [T::Acc]; 2]| {
            for i in 0..extent {
                let x = x.index(0, i);
                let rows = best.chunks_exact_mut(x.cols()).zip(out.chunks_exact_mut(x.cols()));
                for (row, (best, out)) in rows.enumerate() {
                    x.row(row).widen_to(wide);
                    for ((best, out), new) in best.iter_mut().zip(out).zip(wide.iter()) {
                        if i == 0 || beats(*new, *best) {
                            (*best, *out) = (*new, i as u32);
                        }
                    }
                }
            }
        });
    });
}
