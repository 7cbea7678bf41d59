//! Operations that move elements.

use super::scalar::wrap;
use super::{Value, flat, unflat};
use crate::{Error, Node, Operation, Result, Shape};

pub(super) fn apply(node: &Node, x: &[&Value]) -> Result<Vec<f64>> {
    let shape = *node.shape();
    // y[index] = x[source(index)]
    let from = |source: &dyn Fn(&mut Vec<usize>)| -> Vec<f64> {
        let element = |i: usize| {
            let mut index = unflat(&shape, i);
            source(&mut index);
            x[0].at(&index)
        };
        (0..shape.len()).map(element).collect()
    };
    Ok(match node.op {
        Operation::Reshape(_) => x[0].data.clone(),
        Operation::Permute(p) => from(&|index| {
            let y = index.clone();
            (0..p.rank()).for_each(|i| index[p.source(i)] = y[i]);
        }),
        Operation::Broadcast(_) => from(&|index| {
            let extents = x[0].ty.shape;
            (0..index.len()).filter(|d| extents[*d] == 1).for_each(|d| index[d] = 0);
        }),
        Operation::Slice { dim, start, step, .. } => {
            from(&|index| index[dim] = start + index[dim] * step)
        }
        Operation::Flip { dim } => from(&|index| index[dim] = shape[dim] - 1 - index[dim]),
        Operation::Pad { dim, before, value, .. } => {
            let mut out = vec![value.as_f64(); shape.len()];
            place(&mut out, &shape, x[0], |index| index[dim] += before);
            out
        }
        Operation::Concat { dim } => {
            let mut out = vec![0.0; shape.len()];
            let mut start = 0;
            for part in x {
                place(&mut out, &shape, part, |index| index[dim] += start);
                start += part.ty.shape[dim];
            }
            out
        }
        _ => indexed(node, x)?,
    })
}

/// Writes the elements of `part` to `out`, each at the place that `to` makes of its index.
fn place(out: &mut [f64], shape: &Shape, part: &Value, to: impl Fn(&mut Vec<usize>)) {
    for (i, value) in part.data.iter().enumerate() {
        let mut index = unflat(&part.ty.shape, i);
        to(&mut index);
        out[flat(shape, &index)] = *value;
    }
}

fn indexed(node: &Node, x: &[&Value]) -> Result<Vec<f64>> {
    let (name, shape) = (node.op.name(), *node.shape());
    match node.op {
        Operation::Gather { dim } => {
            let row = |i: usize| checked(name, x[1].data[i], x[0].ty.shape[dim], i);
            (0..shape.len()).map(|i| Ok(x[0].at(&with(&shape, i, dim, row(i)?)))).collect()
        }
        Operation::IndexSelect { dim } => {
            let element = |i: usize| {
                let k = unflat(&shape, i)[dim];
                let row = checked(name, x[1].data[k], x[0].ty.shape[dim], k)?;
                Ok(x[0].at(&with(&shape, i, dim, row)))
            };
            (0..shape.len()).map(element).collect()
        }
        Operation::ScatterAdd { dim } => {
            let mut out = x[0].data.clone();
            for (i, value) in x[2].data.iter().enumerate() {
                let row = checked(name, x[1].data[i], shape[dim], i)?;
                let sum = &mut out[flat(&shape, &with(&x[2].ty.shape, i, dim, row))];
                *sum = wrap(*sum + value, node.ty.dtype);
            }
            Ok(out)
        }
        Operation::IndexAdd { dim } => {
            let mut out = x[0].data.clone();
            for (i, value) in x[2].data.iter().enumerate() {
                let k = unflat(&x[2].ty.shape, i)[dim];
                let row = checked(name, x[1].data[k], shape[dim], k)?;
                let sum = &mut out[flat(&shape, &with(&x[2].ty.shape, i, dim, row))];
                *sum = wrap(*sum + value, node.ty.dtype);
            }
            Ok(out)
        }
        Operation::SliceUpdate { dim } => {
            let room = shape[dim] - x[1].ty.shape[dim] + 1;
            let start = checked(name, x[2].data[0], room, 0)?;
            let mut out = x[0].data.clone();
            place(&mut out, &shape, x[1], |index| index[dim] += start);
            Ok(out)
        }
        Operation::DynamicSlice { dim, len } => {
            let start = checked(name, x[1].data[0], x[0].ty.shape[dim] - len + 1, 0)?;
            let element = |i: usize| {
                let k = unflat(&shape, i)[dim];
                x[0].at(&with(&shape, i, dim, start + k))
            };
            Ok((0..shape.len()).map(element).collect())
        }
        op => panic!("metal-candle bug: {op} moves nothing"),
    }
}

/// The index of element `i`, with another position along `dim`.
fn with(shape: &Shape, i: usize, dim: usize, position: usize) -> Vec<usize> {
    let mut index = unflat(shape, i);
    index[dim] = position;
    index
}

fn checked(op: &'static str, index: f64, extent: usize, position: usize) -> Result<usize> {
    let ok = index >= 0.0 && index < extent as f64;
    let error = Error::IndexOutOfRange { op, index: index as i64, extent, position };
    if ok { Ok(index as usize) } else { Err(error) }
}
