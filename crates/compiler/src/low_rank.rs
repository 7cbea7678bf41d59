//! Which two thin products, one after the other, are one step: `out += s (x a) b`, a LoRA branch.
//!
//! The product x a then stays within the step, unless something else reads it too, as the gradients of a and b do. That of
//! x is such a branch again, of the transposed factors.

use crate::analysis::{Analysis, Kind};
use crate::gemm::Gemms;
use crate::region::Regions;
use metal_candle_graph::{DType, NodeId, Operation, Shape};
use rustc_hash::FxHashMap;

/// Joins them, where x a has at most `max_rank` columns.
pub(crate) fn join(a: &mut Analysis, gemms: &mut Gemms, regions: &Regions, max_rank: usize) {
    if max_rank == 0 {
        return;
    }
    // By x a: the product that it is one step with.
    let mut joined: FxHashMap<NodeId, NodeId> = FxHashMap::default();
    for up in a.g.ids() {
        let Some(low) = candidate(a, gemms, up, max_rank) else { continue };
        if joined.contains_key(&low) || waits_for(a, gemms, regions, &joined, up, low) {
            continue;
        }
        joined.insert(low, up);
        gemms.get_mut(&up).expect("metal-candle bug: no product").low = Some(low);
        gemms.get_mut(&low).expect("metal-candle bug: no thin product").is_low = true;
        if a.uses[low.index()] == 1 {
            a.kinds[low.index()] = Kind::Dead;
        }
    }
}

/// The product x a, if `up` is that times b, onto something: row for row, with one a and one b for all of them.
fn candidate(a: &Analysis, gemms: &Gemms, up: NodeId, max_rank: usize) -> Option<NodeId> {
    let up = gemms.get(&up)?;
    up.addend?;
    if up.bias.is_some() {
        return None;
    }
    let (low, down) = (up.a.base, gemms.get(&up.a.base)?);
    let (shape, ty) = (up.a.layout.shape, a.node(low).ty);
    let is_thin = shape.last().is_some_and(|rank| (1..=max_rank).contains(&rank));
    let is_whole = up.a.layout.is_contiguous() && shape.len() == ty.shape.len();
    let rows = |shape: &Shape| shape.with(shape.rank() - 1, 1);
    let is_row_by_row = rows(&shape) == rows(&down.a.layout.shape);
    let is_float = matches!(ty.dtype, DType::F32 | DType::F16 | DType::BF16);
    let fits = is_thin && is_whole && is_row_by_row && is_float && down.is_plain();
    (fits && down.b.layout.is_one_matrix() && up.b.layout.is_one_matrix()).then_some(low)
}

/// Whether what `up` needs besides `low` waits for `low`: as one step, it would wait for itself.
fn waits_for(
    a: &Analysis,
    gemms: &Gemms,
    regions: &Regions,
    joined: &FxHashMap<NodeId, NodeId>,
    up: NodeId,
    low: NodeId,
) -> bool {
    let mut seen = vec![false; a.g.len()];
    let product = &gemms[&up];
    let mut waiting: Vec<NodeId> = product.addend.into_iter().chain([product.b.base]).collect();
    while let Some(id) = waiting.pop() {
        if id == low {
            return true;
        }
        if std::mem::replace(&mut seen[id.index()], true) {
            continue;
        }
        if let Some(region) = regions.of(id) {
            for id in &regions.get(region).nodes {
                seen[id.index()] = true;
                waiting.extend(a.operands(*id).map(|operand| operand.base));
            }
        } else if let Some(product) = gemms.get(&id) {
            waiting.extend(product.factors().map(|factor| factor.base));
            waiting.extend(product.addend);
            // Where x a is kept, it is there when the whole step is.
            waiting.extend(joined.get(&id));
        } else if !matches!(a.node(id).op, Operation::Input(_)) {
            waiting.extend(a.operands(id).map(|operand| operand.base));
        }
    }
    false
}
