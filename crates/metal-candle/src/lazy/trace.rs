//! From handles to a dense graph.

use super::{LazyTensor, Node, State};
use metal_candle_graph::{ComputationGraph, NodeId, Operation, TensorType};
use metal_candle_runtime::Buffer;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// What an input of the traced graph is.
#[derive(Clone)]
pub(crate) enum Leaf {
    Value(Buffer),
    Argument(u32),
    Placeholder(TensorType),
    /// Gradients stop here; only where they are traced.
    Detached,
}

/// A graph with its way back to the handles.
pub(crate) struct Trace {
    pub(crate) graph: ComputationGraph,
    /// By input index.
    pub(crate) leaves: Vec<Leaf>,
    /// By node: a handle that recorded it.
    pub(crate) handles: Vec<LazyTensor>,
    ids: FxHashMap<*const Node, NodeId>,
}

impl Trace {
    pub(crate) fn id(&self, x: &LazyTensor) -> Option<NodeId> {
        self.ids.get(&x.key()).copied()
    }

    /// The node of `x`, added as an input if nothing reached it.
    pub(crate) fn id_or_input(&mut self, x: &LazyTensor) -> NodeId {
        self.id(x).unwrap_or_else(|| self.leaf(x, Leaf::Detached))
    }

    /// The handles of the inputs, by input index.
    pub(crate) fn inputs(&self) -> Vec<&LazyTensor> {
        let mut inputs: Vec<(u32, &LazyTensor)> = Vec::new();
        for (node, handle) in self.graph.nodes().iter().zip(&self.handles) {
            if let Operation::Input(index) = node.op {
                inputs.push((index, handle));
            }
        }
        inputs.sort_unstable_by_key(|(index, _)| *index);
        inputs.into_iter().map(|(_, handle)| handle).collect()
    }

    fn leaf(&mut self, x: &LazyTensor, leaf: Leaf) -> NodeId {
        let id = self.graph.input(self.leaves.len() as u32, x.ty());
        self.leaves.push(leaf);
        self.note(x, id);
        id
    }

    fn note(&mut self, x: &LazyTensor, id: NodeId) {
        self.ids.insert(x.key(), id);
        // Two handles that recorded the same are one node; either will do.
        if id.index() == self.handles.len() {
            self.handles.push(x.clone());
        }
    }
}

/// Makes a dense graph of all that `roots` need, in the order of a depth-first walk, without recursion.
/// With `for_gradients`, detached tensors become inputs.
pub(crate) fn trace(roots: &[&LazyTensor], for_gradients: bool) -> Trace {
    let mut t = Trace {
        graph: ComputationGraph::new(),
        leaves: Vec::new(),
        handles: Vec::new(),
        ids: FxHashMap::default(),
    };
    // (handle, its operation once its inputs are pushed)
    let mut stack: Vec<(LazyTensor, Option<State>)> = Vec::new();
    for root in roots {
        stack.push(((*root).clone(), None));
        while let Some((x, entered)) = stack.pop() {
            if t.id(&x).is_some() {
                continue;
            }
            match entered.unwrap_or_else(|| x.0.read()) {
                State::Ready(buffer) => {
                    t.leaf(&x, Leaf::Value(buffer));
                }
                State::Argument(index) => {
                    t.leaf(&x, Leaf::Argument(index));
                }
                State::Placeholder => {
                    t.leaf(&x, Leaf::Placeholder(x.ty()));
                }
                State::Op { .. } if for_gradients && x.0.detached => {
                    t.leaf(&x, Leaf::Detached);
                }
                State::Op { op, inputs } => {
                    let ids: Option<SmallVec<[NodeId; 3]>> =
                        inputs.iter().map(|input| t.id(input)).collect();
                    if let Some(inputs) = ids {
                        let node = metal_candle_graph::Node { op, inputs, ty: x.ty() };
                        let id = t.graph.intern(node);
                        t.note(&x, id);
                        continue;
                    }
                    let waiting: SmallVec<[LazyTensor; 3]> =
                        inputs.iter().filter(|input| t.id(input).is_none()).cloned().collect();
                    stack.push((x, Some(State::Op { op, inputs })));
                    // The first input is traced first.
                    stack.extend(waiting.into_iter().rev().map(|input| (input, None)));
                }
            }
        }
        let id = t.id(root).expect("metal-candle bug: a root was not traced");
        t.graph.outputs.push(id);
    }
    t
}
