//! What a graph has to run, and what it has to store for that.

use super::Output;
use crate::analysis::{Analysis, Kind, Located};
use crate::emit::Stored;
use crate::gemm::Gemms;
use crate::region::Regions;
use metal_candle_graph::composite::AttentionInput;
use metal_candle_graph::{Composite, NodeId, Operation};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// What runs as a whole.
#[derive(Clone, Debug)]
pub(crate) enum Unit {
    Region(usize),
    /// Calls that share one pass over their inputs, by node; usually one.
    Call(SmallVec<[NodeId; 1]>),
    Gemm(NodeId),
    /// A value that is computed from positions only, but needed in memory.
    Materialise(NodeId),
    /// The `i`-th output, where it is no stored value in row-major order.
    Output(usize),
}

/// Everything that has to run, and what has to be stored for it.
pub(super) fn units(
    a: &Analysis,
    gemms: &Gemms,
    regions: &Regions,
    outputs: &[Output],
    stored: &mut Stored,
) -> Vec<Unit> {
    let mut found: Vec<NodeId> = Vec::new();
    let mut units: Vec<Unit> = Vec::new();
    for (i, output) in outputs.iter().enumerate() {
        match output {
            Output::Node(id) => stored.require(*id, &mut found),
            Output::Input(_) => {}
            Output::Copied(_) => {
                require_copied(a.located[a.g.outputs[i].index()], stored, &mut found);
                units.push(Unit::Output(i));
            }
        }
    }
    for id in a.g.ids().filter(|id| a.kind(*id) == Kind::Call) {
        require_operands(a, gemms, id, stored, &mut found);
    }
    units.extend(calls(a, gemms));
    units.extend(required_units(a, regions, stored, found));
    units
}

/// The regions and positions behind what was found to be needed, and behind what those need.
fn required_units(
    a: &Analysis,
    regions: &Regions,
    stored: &mut Stored,
    mut found: Vec<NodeId>,
) -> Vec<Unit> {
    let mut needed = Vec::new();
    let mut seen = vec![false; a.g.len()];
    while let Some(id) = found.pop() {
        if a.kind(id) == Kind::Virtual {
            needed.push(Unit::Materialise(id));
            stored.require_for(None, &[id], &mut found);
        } else {
            let index = regions.of(id).expect("metal-candle bug: a map in no region");
            stored.require_for(Some(index), &[id], &mut found);
            let first = regions.get(index).nodes[0].index();
            if !std::mem::replace(&mut seen[first], true) {
                needed.push(Unit::Region(index));
            }
        }
    }
    needed
}

/// What a call reads must be in memory; what it copies part by part may be computed on the way.
fn require_operands(
    a: &Analysis,
    gemms: &Gemms,
    id: NodeId,
    stored: &mut Stored,
    found: &mut Vec<NodeId>,
) {
    if let Some(gemm) = gemms.get(&id) {
        let operands = match gemm.low.map(|low| &gemms[&low]) {
            Some(low) => vec![low.a, low.b, gemm.b],
            None => gemm.operands().collect(),
        };
        operands.iter().for_each(|operand| stored.require(operand.base, found));
        return;
    }
    let copied = copied_operands(&a.node(id).op);
    let rotated = a.rotated.get(&id);
    rotated.iter().flat_map(|rope| a.operands(**rope)).for_each(|x| stored.require(x.base, found));
    for (i, operand) in a.operands(id).enumerate() {
        if rotated == Some(&operand.base) {
            continue;
        }
        if copied.contains(&i) {
            require_copied(operand, stored, found);
        } else {
            stored.require(operand.base, found);
        }
    }
}

/// The operands that reach a call's output through a copy kernel.
fn copied_operands(op: &Operation) -> std::ops::Range<usize> {
    match op {
        Operation::Concat { .. } | Operation::Pad { .. } | Operation::Reshape(_) => 0..usize::MAX,
        Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::AllReduce => 0..1,
        _ => 0..0,
    }
}

fn require_copied(value: Located, stored: &mut Stored, found: &mut Vec<NodeId>) {
    let mut inner = Vec::new();
    stored.require_operand(None, &value, &mut inner, found);
    stored.require_for(None, &inner, found);
}

/// The library calls, those that share a pass together.
fn calls(a: &Analysis, gemms: &Gemms) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    let mut shared: FxHashMap<(Composite, &[NodeId]), usize> = FxHashMap::default();
    for id in a.g.ids() {
        if let Some(gemm) = gemms.get(&id) {
            units.extend((!gemm.is_low).then_some(Unit::Gemm(id)));
        } else if a.kind(id) == Kind::Call {
            let node = a.node(id);
            let Some(group) = sharing(&node.op) else {
                units.push(Unit::Call([id].into_iter().collect()));
                continue;
            };
            let is_first = node.op == Operation::Composite(group);
            match shared.get(&(group, &node.inputs[..])).map(|at| &mut units[*at]) {
                Some(Unit::Call(ids)) => ids.insert(if is_first { 0 } else { ids.len() }, id),
                _ => {
                    shared.insert((group, &node.inputs[..]), units.len());
                    units.push(Unit::Call([id].into_iter().collect()));
                }
            }
        }
    }
    units
}

/// Calls of one group with equal inputs run as one; the one that the group is named after gives the first output.
fn sharing(op: &Operation) -> Option<Composite> {
    match *op {
        Operation::Composite(
            Composite::Attention(attrs) | Composite::AttentionLogSumExp(attrs),
        ) => Some(Composite::Attention(attrs)),
        Operation::Composite(Composite::AttentionGrad { attrs, .. }) => {
            Some(Composite::AttentionGrad { attrs, wrt: AttentionInput::Query })
        }
        Operation::Composite(
            Composite::LinearCrossEntropy(attrs) | Composite::LinearCrossEntropyGradX(attrs),
        ) => Some(Composite::LinearCrossEntropy(attrs)),
        _ => None,
    }
}
