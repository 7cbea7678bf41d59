//! Running sums along a dim.

use crate::cpu::number::{Accumulator, Number, for_number};
use crate::cpu::view::{Arg, Out, Strided};
use crate::cpu::{parallel, scratch};

/// `args = [x]`
pub(crate) fn call(args: &[Arg], outs: &mut [Out], dim: usize, reverse: bool, parallel: bool) {
    let ([x], [out]) = (args, outs) else {
        panic!("metal-candle bug: cumsum takes one operand and gives one")
    };
    assert_eq!(x.shape(), out.shape(), "metal-candle bug: cumsum");
    for_number!(x.dtype(), T => cumsum(x.read::<T>(), out.slice::<T>(), dim, reverse, parallel));
}

fn cumsum<T: Number>(x: Strided<T>, out: &mut [T], dim: usize, reverse: bool, parallel: bool) {
    if out.is_empty() {
        return;
    }
    let (extent, last) = (x.shape()[dim], x.shape().rank() - 1);
    let order = |i: usize| if reverse { extent - 1 - i } else { i };
    if dim == last {
        parallel::for_each_row(parallel, out, extent, |row, out| {
            let (row, mut sum) = (x.row(row), T::Acc::ZERO);
            for i in (0..extent).map(order) {
                sum = sum.plus(row.get(i).widen());
                out[i] = T::narrow(sum);
            }
        });
        return;
    }
    // [outer, extent, inner]: every inner position has a sum of its own.
    let inner: usize = x.shape().dims()[dim + 1..].iter().product();
    parallel::for_each_chunk(parallel, out, extent * inner, |outer, out| {
        let x = x.outer(dim, outer);
        scratch::split([inner, x.cols()], |[sums, wide]: [&mut [T::Acc]; 2]| {
            sums.fill(T::Acc::ZERO);
            for i in (0..extent).map(order) {
                let x = x.index(0, i);
                for (row, sums) in sums.chunks_exact_mut(x.cols()).enumerate() {
                    x.row(row).widen_to(wide);
                    sums.iter_mut().zip(wide.iter()).for_each(|(sum, x)| *sum = sum.plus(*x));
                }
                T::narrow_all(sums, &mut out[i * inner..(i + 1) * inner]);
            }
        });
    });
}
