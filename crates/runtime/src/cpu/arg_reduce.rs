//! Positions of extreme elements: the first one on ties, and NaN before everything.

use crate::cpu::number::{Accumulator, Number, for_number};
use crate::cpu::view::{Arg, Out, Row, Strided};
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
    // Without branches, so that compilers vectorise it.
    let beats = |new: T::Acc, best: T::Acc| !best.is_nan() & (new.is_nan() | beats(new, best));
    let (extent, last) = (x.shape()[dim], x.shape().rank() - 1);
    if dim == last {
        parallel::for_each_row(parallel, out, 1, |row, out| {
            out[0] = first_best(x.row(row), beats) as u32;
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

/// Elements that are looked at together: a better one than the best so far seldom comes, as among a vocabulary's logits.
const BLOCK: usize = 64;

/// The position of the first element that none beats.
fn first_best<T: Number>(row: Row<T>, beats: impl Fn(T::Acc, T::Acc) -> bool) -> usize {
    let (mut best, mut at) = (row.get(0).widen(), 0);
    let mut start = 0;
    while start < row.len() {
        let end = (start + BLOCK).min(row.len());
        let block = row.as_slice().map(|row| &row[start..end]);
        let better = |block: &[T]| block.iter().fold(false, |any, x| any | beats(x.widen(), best));
        if block.is_none_or(better) {
            for i in start..end {
                let new = row.get(i).widen();
                if beats(new, best) {
                    (best, at) = (new, i);
                }
            }
        }
        start = end;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;
    use metal_candle_compiler::{Layout, Operand, Slot};
    use metal_candle_graph::{DType, Shape};

    /// Of every `step`-th number, by the definition and by [`call`].
    fn both(numbers: &[f32], step: usize, op: ArgReduceOp) -> [u32; 2] {
        let len = numbers.len().div_ceil(step);
        let dense = |len| Layout::contiguous(Shape::new(&[len]).unwrap());
        let mut layout = dense(len);
        layout.strides[0] = step as isize;
        let x = Operand { slot: Slot::Input(0), dtype: DType::F32, layout };
        let to = Operand { slot: Slot::Output(0), dtype: DType::U32, layout: dense(1) };
        let mut got = [u32::MAX];
        // SAFETY: the numbers that the layout reaches, and one result.
        let (x, to) = unsafe {
            (Arg::new(numbers.as_ptr().cast(), &x), Out::new(got.as_mut_ptr().cast(), &to))
        };
        call(&[x], &mut [to], op, 0, false);
        let mut best = 0;
        for i in 1..len {
            let (new, old) = (numbers[i * step], numbers[best * step]);
            let better = if op == ArgReduceOp::ArgMax { new > old } else { new < old };
            if !old.is_nan() && (new.is_nan() || better) {
                best = i;
            }
        }
        [best as u32, got[0]]
    }

    #[test]
    fn the_first_of_equals_is_found_and_nan_before_all() {
        for len in [1, 2, 63, 64, 65, 128, 1000] {
            // Few values, so that every one comes again.
            let numbers: Vec<f32> = (0..len).map(|i| ((i * 7919 + 13) % 31) as f32).collect();
            let nans = [None, Some(0), Some(len / 2), Some(len - 1)];
            for (nan, step) in nans.into_iter().flat_map(|nan| [(nan, 1), (nan, 3)]) {
                let mut numbers = numbers.clone();
                nan.into_iter().for_each(|nan| numbers[nan..].fill(f32::NAN));
                for op in [ArgReduceOp::ArgMax, ArgReduceOp::ArgMin] {
                    let [expected, got] = both(&numbers, step, op);
                    assert_eq!(got, expected, "{op} of {len}, NaN from {nan:?}, step {step}");
                }
            }
        }
    }
}
