//! From a graph to ordered steps: regions become kernels, everything else library calls and copies.

mod call;
mod draft;
mod unit;

pub(crate) use draft::Drafts;
pub(crate) use unit::Unit;

use crate::analysis::{Analysis, Kind, Located};
use crate::emit::{self, Draft, Stored};
use crate::region::Regions;
use crate::{PlanInput, Target, concat, gemm, low_rank, schedule};
use metal_candle_graph::{ComputationGraph, DType, NodeId, Operation, Shape, TensorType};
use rustc_hash::FxHashMap;

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
    let placed = concat::place(&a, &gemms);
    let outputs: Vec<Output> = (0..g.outputs.len()).map(|i| output(&a, i)).collect();
    let mut stored = Stored::new(&a, &regions, cheap);
    let units = unit::units(&a, &gemms, &regions, &outputs, &mut stored);
    let draft = |unit| draft::draft(&a, (&gemms, &placed), &stored, unit, &outputs);
    let drafts: Vec<Drafts> = units.iter().map(draft).collect();
    let order = schedule::order(&units, &drafts, &regions);
    assemble(&a, &regions, inputs, outputs, drafts, &order)
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
