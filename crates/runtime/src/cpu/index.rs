//! Reading and writing at positions that only the run knows.
//!
//! Every index is checked before anything is read or written through it.

use crate::cpu::number::{Number, for_index, for_number};
use crate::cpu::parallel::{self, Parts};
use crate::cpu::view::{Arg, Out, Strided, leading, offset_of};
use metal_candle_graph::{Error, Result, Shape};

/// `args = [x, index]`
pub(crate) fn call_gather(
    args: &[Arg],
    outs: &mut [Out],
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([x, index], [out]) = (args, outs) else {
        panic!("metal-candle bug: gather takes two operands and gives one")
    };
    assert_eq!(index.shape(), out.shape(), "metal-candle bug: gather");
    assert_within(x.shape(), index.shape(), dim);
    for_index!(index.dtype(), I => {
        let index = index.read::<I>();
        check_indices("gather", &index, x.shape()[dim])?;
        for_number!(x.dtype(), T => gather(x.read::<T>(), index, dim, out.slice(), parallel));
    });
    Ok(())
}

/// `args = [x, index: [n]]`
pub(crate) fn call_index_select(
    args: &[Arg],
    outs: &mut [Out],
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([x, index], [out]) = (args, outs) else {
        panic!("metal-candle bug: index_select takes two operands and gives one")
    };
    let selected = x.shape().with(dim, index.shape().len());
    assert_eq!(*out.shape(), selected, "metal-candle bug: index_select");
    let index = positions("index_select", index, x.shape()[dim])?;
    for_number!(x.dtype(), T => index_select(x.read::<T>(), &index, dim, out.slice(), parallel));
    Ok(())
}

/// In place on the output, which holds the base. `args = [index, src]`
pub(crate) fn call_scatter_add(
    args: &[Arg],
    outs: &mut [Out],
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([index, src], [out]) = (args, outs) else {
        panic!("metal-candle bug: scatter_add takes two operands and updates one")
    };
    assert_eq!(index.shape(), src.shape(), "metal-candle bug: scatter_add");
    assert_within(out.shape(), index.shape(), dim);
    let shape = *out.shape();
    for_index!(index.dtype(), I => {
        let index = index.read::<I>();
        check_indices("scatter_add", &index, shape[dim])?;
        for_number!(src.dtype(), T => {
            scatter_add(out.slice(), &shape, index, src.read::<T>(), dim, parallel);
        });
    });
    Ok(())
}

/// In place on the output, which holds the base. `args = [index: [n], src]`
pub(crate) fn call_index_add(
    args: &[Arg],
    outs: &mut [Out],
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([index, src], [out]) = (args, outs) else {
        panic!("metal-candle bug: index_add takes two operands and updates one")
    };
    let shape = *out.shape();
    let expected = shape.with(dim, index.shape().len());
    assert_eq!(*src.shape(), expected, "metal-candle bug: index_add");
    let index = positions("index_add", index, shape[dim])?;
    for_number!(src.dtype(), T => {
        index_add(out.slice(), shape[dim], &index, src.read::<T>(), dim, parallel);
    });
    Ok(())
}

/// In place on the output, which holds the base. `args = [update, start]`
pub(crate) fn call_slice_update(args: &[Arg], outs: &mut [Out], dim: usize) -> Result<()> {
    let ([update, start], [out]) = (args, outs) else {
        panic!("metal-candle bug: slice_update takes two operands and updates one")
    };
    let (shape, len) = (*out.shape(), update.shape()[dim]);
    assert_eq!(*update.shape(), shape.with(dim, len), "metal-candle bug: slice_update");
    let start = checked_start("slice_update", start, shape[dim], len)?;
    for_number!(update.dtype(), T => slice_update(out.slice(), &shape, update.read::<T>(), dim, start));
    Ok(())
}

/// `args = [x, start]`
pub(crate) fn call_dynamic_slice(
    args: &[Arg],
    outs: &mut [Out],
    dim: usize,
    parallel: bool,
) -> Result<()> {
    let ([x, start], [out]) = (args, outs) else {
        panic!("metal-candle bug: dynamic_slice takes two operands and gives one")
    };
    let len = out.shape()[dim];
    assert_eq!(*out.shape(), x.shape().with(dim, len), "metal-candle bug: dynamic_slice");
    let start = checked_start("dynamic_slice", start, x.shape()[dim], len)?;
    for_number!(x.dtype(), T => {
        let x = x.read::<T>().narrow(dim, start, len);
        let cols = x.cols();
        parallel::for_each_row(parallel, out.slice(), cols, |row, out| x.row(row).copy_to(out));
    });
    Ok(())
}

/// The index lies within `x` in every dim but `dim`.
fn assert_within(x: &Shape, index: &Shape, dim: usize) {
    let within = x.rank() == index.rank() && (0..x.rank()).all(|d| d == dim || index[d] <= x[d]);
    assert!(within, "metal-candle bug: an index of {index} into {x}");
}

fn check_indices<I: Number<Acc = i64>>(
    op: &'static str,
    index: &Strided<I>,
    extent: usize,
) -> Result<()> {
    let cols = index.cols();
    if cols == 0 {
        return Ok(());
    }
    for row in 0..index.rows() {
        for (col, i) in index.row(row).iter().enumerate() {
            let index = i.widen();
            if !usize::try_from(index).is_ok_and(|index| index < extent) {
                let position = row * cols + col;
                return Err(Error::IndexOutOfRange { op, index, extent, position });
            }
        }
    }
    Ok(())
}

/// The values of a rank-1 index.
fn positions(op: &'static str, index: &Arg, extent: usize) -> Result<Vec<usize>> {
    assert_eq!(index.shape().rank(), 1, "metal-candle bug: {op}");
    for_index!(index.dtype(), I => {
        let index = index.read::<I>();
        check_indices(op, &index, extent)?;
        Ok(index.row(0).iter().map(|i| i.widen() as usize).collect())
    })
}

/// A run-time start from which `len` positions fit into `extent`.
pub(super) fn checked_start(
    op: &'static str,
    start: &Arg,
    extent: usize,
    len: usize,
) -> Result<usize> {
    let starts =
        extent.checked_sub(len).expect("metal-candle bug: a slice longer than its dim") + 1;
    let index = start.scalar::<i64>();
    let start = usize::try_from(index).ok().filter(|start| *start < starts);
    start.ok_or(Error::IndexOutOfRange { op, index, extent: starts, position: 0 })
}

/// The strides with that of `dim` left out: an index takes its place.
fn without<const N: usize>(mut strides: [isize; N], dim: usize) -> [isize; N] {
    strides[dim] = 0;
    strides
}

fn gather<T: Number, I: Number<Acc = i64>>(
    x: Strided<T>,
    index: Strided<I>,
    dim: usize,
    out: &mut [T],
    parallel: bool,
) {
    let (along, others) = (x.stride(dim), without(x.strides(), dim));
    let across = others[x.shape().rank() - 1];
    parallel::for_each_row(parallel, out, index.cols(), |row, out| {
        let base = offset_of(row, leading(index.shape()), &others);
        for (col, (out, i)) in out.iter_mut().zip(index.row(row).iter()).enumerate() {
            let offset = base + col as isize * across + i.widen() as isize * along;
            // SAFETY: the index was checked along `dim`, and lies within x in every other dim.
            *out = unsafe { x.at_offset(offset) };
        }
    });
}

fn index_select<T: Number>(
    x: Strided<T>,
    index: &[usize],
    dim: usize,
    out: &mut [T],
    parallel: bool,
) {
    let (extent, cols) = (x.shape()[dim], x.cols());
    if dim == x.shape().rank() - 1 {
        parallel::for_each_row(parallel, out, index.len(), |row, out| {
            let row = x.row(row);
            out.iter_mut().zip(index).for_each(|(out, i)| *out = row.get(*i));
        });
        return;
    }
    // Rows are [outer, dim, inner].
    let inner: usize = leading(x.shape())[dim + 1..].iter().product();
    parallel::for_each_row(parallel, out, cols, |row, out| {
        let (outer, at, row) = (row / inner / index.len(), row / inner % index.len(), row % inner);
        x.row((outer * extent + index[at]) * inner + row).copy_to(out);
    });
}

/// Adds in the order of the index. Positions of the first dim are independent, unless it is the one indexed.
fn scatter_add<T: Number, I: Number<Acc = i64>>(
    out: &mut [T],
    shape: &Shape,
    index: Strided<I>,
    src: Strided<T>,
    dim: usize,
    parallel: bool,
) {
    if out.is_empty() || index.shape().is_empty() {
        return;
    }
    if dim == 0 {
        let strides = &shape.contiguous_strides();
        T::accumulate(out, |acc| scatter_add_in_order(acc, strides, index, src, 0));
        return;
    }
    let mut inner = shape.contiguous_strides();
    let len = inner[0] as usize;
    inner.rotate_left(1);
    let out = &mut out[..index.shape()[0] * len];
    parallel::for_each_chunk(parallel, out, len, |outer, out| {
        let (index, src) = (index.index(0, outer), src.index(0, outer));
        T::accumulate(out, |acc| scatter_add_in_order(acc, &inner, index, src, dim - 1));
    });
}

fn scatter_add_in_order<T: Number, I: Number<Acc = i64>, const N: usize>(
    acc: &mut [T::Acc],
    strides: &[isize; N],
    index: Strided<I>,
    src: Strided<T>,
    dim: usize,
) {
    use crate::cpu::number::Accumulator;
    let (along, others) = (strides[dim], without(*strides, dim));
    let across = others[index.shape().rank() - 1];
    for row in 0..index.rows() {
        let base = offset_of(row, leading(index.shape()), &others);
        for (col, (i, x)) in index.row(row).iter().zip(src.row(row).iter()).enumerate() {
            let at = base + col as isize * across + i.widen() as isize * along;
            let sum = &mut acc[at as usize];
            *sum = sum.plus(x.widen());
        }
    }
}

/// Positions that are added to the same place form a task, which adds them in the order of the index.
fn index_add<T: Number>(
    out: &mut [T],
    extent: usize,
    index: &[usize],
    src: Strided<T>,
    dim: usize,
    parallel: bool,
) {
    use crate::cpu::number::Accumulator;
    let (cols, last) = (src.cols(), src.shape().rank() - 1);
    if dim == last {
        parallel::for_each_row(parallel, out, extent, |row, out| {
            T::accumulate(out, |acc| {
                for (i, x) in index.iter().zip(src.row(row).iter()) {
                    acc[*i] = acc[*i].plus(x.widen());
                }
            });
        });
        return;
    }
    // Rows are [outer, dim, inner].
    let dims = leading(src.shape());
    let outer: usize = dims[..dim].iter().product();
    let inner: usize = dims[dim + 1..].iter().product();
    let mut order: Vec<usize> = (0..index.len()).collect();
    order.sort_by_key(|at| index[*at]);
    let groups: Vec<&[usize]> = order.chunk_by(|a, b| index[*a] == index[*b]).collect();
    let out = Parts::new(out);
    parallel::for_each(parallel, groups.len() * outer, |task| {
        let (group, outer) = (groups[task % groups.len()], task / groups.len());
        for row in 0..inner {
            let to = (outer * extent + index[group[0]]) * inner + row;
            // SAFETY: a row of the output belongs to one group and one outer position.
            T::accumulate(unsafe { out.part(to * cols, cols) }, |acc| {
                for at in group {
                    src.row((outer * index.len() + at) * inner + row).add_to(acc);
                }
            });
        }
    });
}

fn slice_update<T: Number>(
    out: &mut [T],
    shape: &Shape,
    update: Strided<T>,
    dim: usize,
    start: usize,
) {
    let strides = shape.contiguous_strides();
    let (first, cols) = (start * strides[dim] as usize, update.cols());
    if update.shape().is_empty() {
        return;
    }
    for row in 0..update.rows() {
        let at = first + offset_of(row, leading(update.shape()), &strides) as usize;
        update.row(row).copy_to(&mut out[at..at + cols]);
    }
}
