//! The steps of a unit: a kernel, a library call, or copies around one.

use super::Output;
use super::call::library_call;
use super::unit::Unit;
use crate::analysis::{Analysis, Kind, Located};
use crate::concat::Placed;
use crate::emit::{Draft, Emitter, Stored};
use crate::gemm::{Gemm, Gemms};
use crate::library::LibraryCall;
use crate::{Layout, Work};
use metal_candle_graph::{Composite, NodeId, Operation};

/// The steps of one unit, and what an in-place step starts from.
pub(crate) struct Drafts {
    pub(crate) steps: Vec<Draft>,
    pub(crate) base: Option<Located>,
}

pub(super) fn draft(
    a: &Analysis,
    (gemms, placed): (&Gemms, &Placed),
    stored: &Stored,
    unit: &Unit,
    outputs: &[Output],
) -> Drafts {
    let one = |draft| Drafts { steps: vec![draft], base: None };
    match unit {
        Unit::Region(index) => one(Emitter::region(stored, *index)),
        Unit::Gemm(id) => draft_gemm(a, gemms, placed, *id),
        Unit::Materialise(id) => one(Emitter::position(stored, own(a, *id))),
        Unit::Output(i) => {
            let Output::Copied(key) = outputs[*i] else {
                panic!("metal-candle bug: output {i} is not copied")
            };
            let value = a.located[a.g.outputs[*i].index()];
            let out = Located { base: key, layout: Layout::contiguous(value.layout.shape) };
            one(Emitter::copy(stored, value, out, a.node(value.base).ty.dtype))
        }
        Unit::Call(ids) => draft_call(a, placed, stored, ids),
    }
}

fn draft_gemm(a: &Analysis, gemms: &Gemms, placed: &Placed, id: NodeId) -> Drafts {
    let gemm = &gemms[&id];
    // The result has the shape of the product, whatever view the addition saw.
    let result = |id: NodeId, gemm: &Gemm| {
        let own = Located { base: id, layout: Layout::contiguous(gemm.shape()) };
        placed.get(&id).copied().unwrap_or(own)
    };
    let mut outs = vec![result(id, gemm)];
    let base = gemm.addend.map(|id| result(id, gemm));
    let (call, label, args) = match (gemm.low, base) {
        (Some(low), _) => {
            let product = &gemms[&low];
            if a.kind(low) == Kind::Call {
                outs.push(result(low, product));
            }
            let call = LibraryCall::LowRank { low_scale: product.alpha, scale: gemm.alpha };
            (call, "low_rank".to_owned(), vec![product.a, product.b, gemm.b])
        }
        (None, base) => {
            let accumulate = base.is_some();
            let label = format!("matmul{}", if accumulate { "+add" } else { "" });
            let label = "matmul+".repeat(gemm.more.len()) + &label;
            let label = label + if gemm.bias.is_some() { "+bias" } else { "" };
            let call = match gemm.more[..] {
                [] => LibraryCall::Gemm { alpha: gemm.alpha, accumulate },
                _ => LibraryCall::GemmSum { alphas: gemm.alphas().collect(), accumulate },
            };
            (call, label, gemm.operands().collect())
        }
    };
    let draft = Draft { work: Work::Call(call), args, outs, label };
    Drafts { steps: vec![draft], base }
}

fn draft_call(a: &Analysis, placed: &Placed, stored: &Stored, ids: &[NodeId]) -> Drafts {
    let id = ids[0];
    let operands: Vec<Located> = a.operands(id).collect();
    let copy = |value: Located, layout: Layout| {
        Emitter::copy(stored, value, Located { base: id, layout }, a.node(id).ty.dtype)
    };
    let whole = own(a, id);
    let done = |steps| Drafts { steps, base: None };
    match a.node(id).op {
        Operation::Concat { dim } => {
            let parts = operands.iter().map(|part| part.layout.shape);
            let places = whole.layout.side_by_side(dim, parts);
            let copied = operands.iter().zip(places);
            // The others are made there.
            let copied = copied.filter(|(part, _)| !placed.contains_key(&part.base));
            done(copied.map(|(part, place)| copy(*part, place)).collect())
        }
        Operation::Pad { dim, before, value, .. } => {
            let inner = whole.layout.part(dim, before, operands[0].layout.shape);
            done(vec![Emitter::fill(stored, whole, value), copy(operands[0], inner)])
        }
        Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::AllReduce => {
            let (call, args) = match a.rotated.get(&id) {
                Some(rope) => rope_update(a, id, *rope),
                None => (library_call(a, ids), operands[1..].to_vec()),
            };
            let steps = vec![copy(operands[0], whole.layout), plain(a, call, args, ids)];
            Drafts { steps, base: Some(operands[0]) }
        }
        Operation::Reshape(_)
        | Operation::Permute(_)
        | Operation::Broadcast(_)
        | Operation::Slice { .. }
        | Operation::Flip { .. } => {
            // Laid out anew in the input's shape, which has the same elements in the same order.
            let layout = Layout::contiguous(operands[0].layout.shape);
            done(vec![copy(operands[0], layout)])
        }
        _ => done(vec![plain(a, library_call(a, ids), operands, ids)]),
    }
}

/// A node's value in a buffer of its own.
fn own(a: &Analysis, id: NodeId) -> Located {
    Located { base: id, layout: Layout::contiguous(*a.node(id).shape()) }
}

/// The call that makes the values of `ids`.
fn plain(a: &Analysis, call: LibraryCall, args: Vec<Located>, ids: &[NodeId]) -> Draft {
    let outs = ids.iter().map(|id| own(a, *id)).collect();
    Draft { label: call.name().into(), work: Work::Call(call), args, outs }
}

/// The update of a slice with a rotary embedding.
fn rope_update(a: &Analysis, update: NodeId, rope: NodeId) -> (LibraryCall, Vec<Located>) {
    let (Operation::SliceUpdate { dim }, Operation::Composite(Composite::Rope { layout })) =
        (a.node(update).op, a.node(rope).op)
    else {
        panic!("metal-candle bug: {} with {}", a.node(update).op.name(), a.node(rope).op.name())
    };
    let args = a.operands(rope).chain([a.operand(update, 2)]).collect();
    (LibraryCall::RopeUpdate { layout, dim }, args)
}
