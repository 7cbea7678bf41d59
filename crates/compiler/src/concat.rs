//! Which products write their result right where a concatenation wants it, which then copies that part no more.
//!
//! So do LoRA's: the gradients of one x through several branches come from one product of what reached all of them.

use crate::Layout;
use crate::analysis::{Analysis, Kind, Located};
use crate::gemm::Gemms;
use metal_candle_graph::{NodeId, Operation, Shape};
use rustc_hash::FxHashMap;

/// By product: where in a concatenation its result goes.
pub(crate) type Placed = FxHashMap<NodeId, Located>;

/// Finds them: products that start from nothing, and that only a concatenation reads, as they are or transposed.
pub(crate) fn place(a: &Analysis, gemms: &Gemms) -> Placed {
    let mut placed = Placed::default();
    for id in a.g.ids().filter(|id| a.kind(*id) == Kind::Call) {
        let Operation::Concat { dim } = a.node(id).op else { continue };
        let whole = Layout::contiguous(*a.node(id).shape());
        let shapes = a.operands(id).map(|operand| operand.layout.shape);
        for (operand, part) in a.operands(id).zip(whole.side_by_side(dim, shapes)) {
            let Some(gemm) = gemms.get(&operand.base) else { continue };
            let is_free = gemm.addend.is_none() && gemm.low.is_none() && !gemm.is_low;
            if !is_free || a.uses[operand.base.index()] != 1 {
                continue;
            }
            let seen = seen_as(&operand.layout, &gemm.shape(), &part);
            placed.extend(seen.map(|layout| (operand.base, Located { base: id, layout })));
        }
    }
    placed
}

/// Where a dense value of this shape lies, if what `view` sees of it lies at `part`.
fn seen_as(view: &Layout, shape: &Shape, part: &Layout) -> Option<Layout> {
    if *view == Layout::contiguous(*shape) {
        return Some(*part);
    }
    let is_turned = shape.rank() == 2 && *view == Layout::contiguous(*shape).transposed();
    is_turned.then(|| part.transposed())
}
