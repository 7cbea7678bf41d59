//! From a graph to ordered steps: regions become kernels, everything else library calls and copies.

use crate::analysis::{Analysis, Kind, Located};
use crate::emit::{self, Draft, Emitter, Stored};
use crate::gemm::{self, Gemm, Gemms};
use crate::library::LibraryCall;
use crate::region::Regions;
use crate::{Layout, PlanInput, Target, Work, low_rank, schedule};
use metal_candle_graph::composite::AttentionInput;
use metal_candle_graph::{
    Composite, ComputationGraph, DType, NodeId, Operation, Shape, TensorType,
};
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

/// Drafted steps in the order in which they run.
pub(crate) struct Lowered {
    pub(crate) drafts: Vec<Draft>,
    /// Calls that update their first output in place: by step, the value that it starts from.
    pub(crate) bases: FxHashMap<usize, Located>,
    pub(crate) types: Vec<TensorType>,
    pub(crate) inputs: Vec<PlanInput>,
    /// By input node: its index.
    pub(crate) input_of: FxHashMap<NodeId, u32>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) output_types: Vec<TensorType>,
    pub(crate) splits: Vec<crate::plan::Split>,
}

/// Where a result is to be found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Output {
    /// A node with a buffer of its own.
    Node(NodeId),
    Input(u32),
    /// Copied together by a step of its own, under this buffer key.
    Copied(NodeId),
}

/// The key of the buffer of the `i`-th output, where that is copied.
fn copied(g: &ComputationGraph, i: usize) -> NodeId {
    NodeId((g.len() + i) as u32)
}

/// What the caller passes, by index. An index that the graph does not name is a placeholder.
pub(crate) fn inputs(g: &ComputationGraph, donated: &[bool]) -> Vec<PlanInput> {
    let mut inputs: Vec<PlanInput> = Vec::new();
    for node in g.nodes() {
        let Operation::Input(index) = node.op else { continue };
        let index = index as usize;
        if inputs.len() <= index {
            let unused = TensorType::new(DType::U8, Shape::SCALAR);
            inputs.resize(index + 1, PlanInput { ty: unused, donated: false });
        }
        let donated = donated.get(index).copied().unwrap_or(false);
        inputs[index] = PlanInput { ty: node.ty, donated };
    }
    inputs
}

pub(crate) fn lower(g: &ComputationGraph, target: &Target, inputs: Vec<PlanInput>) -> Lowered {
    let mut a = Analysis::new(g);
    let mut gemms = gemm::find(&mut a, target);
    let cheap = emit::cheap(&a);
    let regions = Regions::form(&a, &cheap, target);
    low_rank::join(&mut a, &mut gemms, &regions, target.max_low_rank);
    let outputs: Vec<Output> = (0..g.outputs.len()).map(|i| output(&a, i)).collect();
    let mut stored = Stored::new(&a, &regions, cheap);
    let units = units(&a, &gemms, &regions, &outputs, &mut stored);
    let drafts: Vec<Drafts> =
        units.iter().map(|unit| draft(&a, &gemms, &stored, unit, &outputs)).collect();
    let order = schedule::order(&units, &drafts, &regions);
    assemble(&a, &regions, inputs, outputs, drafts, &order)
}

/// The steps of one unit, and what an in-place step starts from.
pub(crate) struct Drafts {
    pub(crate) steps: Vec<Draft>,
    pub(crate) base: Option<Located>,
}

fn output(a: &Analysis, i: usize) -> Output {
    let located = a.located[a.g.outputs[i].index()];
    let base = a.node(located.base);
    let whole = located.layout.is_contiguous() && located.layout.shape.len() == base.shape().len();
    match (a.kind(located.base), base.op) {
        (Kind::Input, Operation::Input(index)) if whole => Output::Input(index),
        (Kind::Map | Kind::Reduce | Kind::Call, _) if whole => Output::Node(located.base),
        _ => Output::Copied(copied(a.g, i)),
    }
}

/// Everything that has to run, and what has to be stored for it.
fn units(
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
            None => vec![gemm.a, gemm.b],
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

fn draft(a: &Analysis, gemms: &Gemms, stored: &Stored, unit: &Unit, outputs: &[Output]) -> Drafts {
    let one = |draft| Drafts { steps: vec![draft], base: None };
    match unit {
        Unit::Region(index) => one(Emitter::region(stored, *index)),
        Unit::Gemm(id) => draft_gemm(a, gemms, *id),
        Unit::Materialise(id) => {
            let own = Located { base: *id, layout: Layout::contiguous(*a.node(*id).shape()) };
            one(Emitter::position(stored, own))
        }
        Unit::Output(i) => {
            let Output::Copied(key) = outputs[*i] else {
                panic!("metal-candle bug: output {i} is not copied")
            };
            let value = a.located[a.g.outputs[*i].index()];
            let out = Located { base: key, layout: Layout::contiguous(value.layout.shape) };
            one(Emitter::copy(stored, value, out, a.node(value.base).ty.dtype))
        }
        Unit::Call(ids) => draft_call(a, stored, ids),
    }
}

fn draft_gemm(a: &Analysis, gemms: &Gemms, id: NodeId) -> Drafts {
    let gemm = &gemms[&id];
    // The result has the shape of the product, whatever view the addition saw.
    let own = |id: NodeId, gemm: &Gemm| {
        let (l, r) = (&gemm.a.layout.shape, &gemm.b.layout.shape);
        let rank = l.rank();
        Located { base: id, layout: Layout::contiguous(l.with(rank - 1, r[rank - 1])) }
    };
    let mut outs = vec![own(id, gemm)];
    let base = gemm.addend.map(|id| own(id, gemm));
    let (call, label, args) = match (gemm.low, base) {
        (Some(low), _) => {
            let product = &gemms[&low];
            if a.kind(low) == Kind::Call {
                outs.push(own(low, product));
            }
            let call = LibraryCall::LowRank { low_scale: product.alpha, scale: gemm.alpha };
            (call, "low_rank", vec![product.a, product.b, gemm.b])
        }
        (None, base) => {
            let call = LibraryCall::Gemm { alpha: gemm.alpha, accumulate: base.is_some() };
            let label = if base.is_some() { "matmul+add" } else { "matmul" };
            (call, label, vec![gemm.a, gemm.b])
        }
    };
    let draft = Draft { work: Work::Call(call), args, outs, label: label.into() };
    Drafts { steps: vec![draft], base }
}

fn draft_call(a: &Analysis, stored: &Stored, ids: &[NodeId]) -> Drafts {
    let id = ids[0];
    let node = a.node(id);
    let own = |id: NodeId| Located { base: id, layout: Layout::contiguous(*a.node(id).shape()) };
    let dtype = node.ty.dtype;
    let copy = |value: Located, layout: Layout| {
        Emitter::copy(stored, value, Located { base: id, layout }, dtype)
    };
    let plain = |call: LibraryCall, args: Vec<Located>| Draft {
        label: call.name().into(),
        work: Work::Call(call),
        args,
        outs: ids.iter().map(|id| own(*id)).collect(),
    };
    let operands: Vec<Located> = a.operands(id).collect();
    let done = |steps| Drafts { steps, base: None };
    match node.op {
        Operation::Concat { dim } => {
            let mut start = 0;
            let mut steps = Vec::new();
            for part in operands {
                let mut layout = own(id).layout;
                layout.offset += start as isize * layout.strides[dim];
                layout.shape = part.layout.shape;
                start += part.layout.shape[dim];
                steps.push(copy(part, layout));
            }
            done(steps)
        }
        Operation::Pad { dim, before, value, .. } => {
            let mut inner = own(id).layout;
            inner.offset += before as isize * inner.strides[dim];
            inner.shape = operands[0].layout.shape;
            done(vec![Emitter::fill(stored, own(id), value), copy(operands[0], inner)])
        }
        Operation::ScatterAdd { .. }
        | Operation::IndexAdd { .. }
        | Operation::SliceUpdate { .. }
        | Operation::AllReduce => {
            let (call, args) = match a.rotated.get(&id) {
                Some(rope) => rope_update(a, id, *rope),
                None => (library_call(a, ids), operands[1..].to_vec()),
            };
            let steps = vec![copy(operands[0], own(id).layout), plain(call, args)];
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
        _ => done(vec![plain(library_call(a, ids), operands)]),
    }
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

fn library_call(a: &Analysis, ids: &[NodeId]) -> LibraryCall {
    let op = a.node(ids[0]).op;
    match op {
        Operation::ScatterAdd { dim } => LibraryCall::ScatterAdd { dim },
        Operation::IndexAdd { dim } => LibraryCall::IndexAdd { dim },
        Operation::SliceUpdate { dim } => LibraryCall::SliceUpdate { dim },
        Operation::DynamicSlice { dim, .. } => LibraryCall::DynamicSlice { dim },
        Operation::Gather { dim } => LibraryCall::Gather { dim },
        Operation::IndexSelect { dim } => LibraryCall::IndexSelect { dim },
        Operation::CumSum { dim, reverse } => LibraryCall::CumSum { dim, reverse },
        Operation::ArgReduce { op, dim } => LibraryCall::ArgReduce { op, dim },
        Operation::QuantDot { format, rows, cols, transposed } => {
            LibraryCall::QuantGemm { format, rows, cols, transposed }
        }
        Operation::Dequantize { format, rows, cols } => {
            LibraryCall::Dequantize { format, rows, cols }
        }
        Operation::AllReduce => LibraryCall::AllReduce,
        Operation::Composite(c) => composite_call(a, c, ids),
        op => panic!("metal-candle bug: {} is no library call", op.name()),
    }
}

fn composite_call(a: &Analysis, composite: Composite, ids: &[NodeId]) -> LibraryCall {
    let composites = ids.iter().filter_map(|id| match a.node(*id).op {
        Operation::Composite(composite) => Some(composite),
        _ => None,
    });
    let has = |which: fn(&Composite) -> bool| composites.clone().any(|c| which(&c));
    match composite {
        Composite::Rope { layout } => LibraryCall::Rope { layout },
        Composite::Attention(attrs) | Composite::AttentionLogSumExp(attrs) => {
            LibraryCall::Attention {
                attrs,
                y: has(|c| matches!(c, Composite::Attention(_))),
                lse: has(|c| matches!(c, Composite::AttentionLogSumExp(_))),
            }
        }
        Composite::AttentionGrad { attrs, .. } => {
            let wrt = composites.filter_map(|c| match c {
                Composite::AttentionGrad { wrt, .. } => Some(wrt),
                _ => None,
            });
            LibraryCall::AttentionGrad { attrs, wrt: wrt.collect() }
        }
        Composite::LinearCrossEntropy(attrs) | Composite::LinearCrossEntropyGradX(attrs) => {
            LibraryCall::LinearCrossEntropy {
                attrs,
                losses: has(|c| matches!(c, Composite::LinearCrossEntropy(_))),
                grad_x: has(|c| matches!(c, Composite::LinearCrossEntropyGradX(_))),
            }
        }
        Composite::LinearCrossEntropyGradWeight(attrs) => {
            LibraryCall::LinearCrossEntropyGradWeight(attrs)
        }
        c => panic!("metal-candle bug: {} should have been expanded", c.as_str()),
    }
}

/// Puts the units' steps in order and looks up what the next stage asks.
fn assemble(
    a: &Analysis,
    regions: &Regions,
    inputs: Vec<PlanInput>,
    outputs: Vec<Output>,
    mut drafts: Vec<Drafts>,
    order: &[usize],
) -> Lowered {
    let mut types: Vec<TensorType> = a.g.nodes().iter().map(|n| n.ty).collect();
    let output_types: Vec<TensorType> = a.g.outputs.iter().map(|o| a.g.ty(*o)).collect();
    types.extend(&output_types);
    let mut input_of = FxHashMap::default();
    for id in a.g.ids() {
        if let Operation::Input(index) = a.node(id).op {
            input_of.insert(id, index);
        }
    }
    let (mut steps, mut bases) = (Vec::new(), FxHashMap::default());
    for unit in order {
        let unit = &mut drafts[*unit];
        steps.append(&mut unit.steps);
        if let Some(base) = unit.base {
            bases.insert(steps.len() - 1, base);
        }
    }
    let splits = splits(regions, &steps);
    Lowered { drafts: steps, bases, types, inputs, input_of, outputs, output_types, splits }
}

/// The edges that did not fuse, between the steps where they ended up.
fn splits(regions: &Regions, steps: &[Draft]) -> Vec<crate::plan::Split> {
    let mut writer: FxHashMap<usize, usize> = FxHashMap::default();
    for (step, draft) in steps.iter().enumerate() {
        for region in draft.outs.iter().filter_map(|out| regions.of(out.base)) {
            writer.entry(region).or_insert(step);
        }
    }
    let step = |id: NodeId| regions.of(id).and_then(|r| writer.get(&r)).copied();
    let mut splits: Vec<crate::plan::Split> = regions
        .splits
        .iter()
        .filter_map(|(from, to, reason)| {
            let (producer, consumer) = (step(*from)?, step(*to)?);
            (producer != consumer).then_some(crate::plan::Split { producer, consumer, reason })
        })
        .collect();
    splits.sort_unstable_by_key(|s| (s.consumer, s.producer, s.reason));
    splits.dedup();
    splits
}
