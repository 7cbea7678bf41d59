//! Composites that a target has no call for become what they mean.

use crate::composite::decompose;
use crate::{Composite, ComputationGraph, Operation, Result};

/// Replaces every composite that `keeps` refuses by its decomposition, and those in the decomposition likewise.
///
/// # Errors
/// Where a decomposition is refused by inference, which would be a bug of the composite.
pub fn expand(
    g: &ComputationGraph,
    keeps: impl Fn(&Composite) -> bool,
) -> Result<ComputationGraph> {
    let mut out = None;
    // A decomposition may hold composites of its own; they get simpler each time.
    while out.as_ref().unwrap_or(g).nodes().iter().any(|node| expands(&node.op, &keeps)) {
        out = Some(out.as_ref().unwrap_or(g).rebuild(|next, node, inputs| match &node.op {
            Operation::Composite(c) if !keeps(c) => decompose(next, c, inputs),
            _ => Ok(next.copy(node, inputs)),
        })?);
    }
    Ok(out.unwrap_or_else(|| g.clone()))
}

fn expands(op: &Operation, keeps: &impl Fn(&Composite) -> bool) -> bool {
    matches!(op, Operation::Composite(c) if !keeps(c))
}
