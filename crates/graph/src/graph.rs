//! An append-only arena of nodes in topological order.
//!
//! Invariant: every input id is smaller than the id of the node that uses it.
//! Invariant: no two nodes are equal (`add` interns), so common subexpressions meet by construction.

use crate::{Operation, Result, Scalar, Shape, TensorType, infer};
use hashbrown::HashTable;
use rustc_hash::FxBuildHasher;
use smallvec::SmallVec;
use std::fmt;
use std::hash::BuildHasher;

/// The position of a node in its [`ComputationGraph`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u32);

impl NodeId {
    /// As an index of [`ComputationGraph::nodes`].
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "%{}", self.0)
    }
}

/// One value: what is done, to what, and what comes out.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Node {
    /// What is done, with its attributes.
    pub op: Operation,
    /// To what, in the operation's order.
    pub inputs: SmallVec<[NodeId; 3]>,
    /// The dtype and the shape of what comes out.
    pub ty: TensorType,
}

impl Node {
    /// That of the value.
    pub fn shape(&self) -> &Shape {
        &self.ty.shape
    }
}

/// The dense arena. `outputs` are its roots; what they cannot reach is dead and never planned.
#[derive(Clone, Default)]
pub struct ComputationGraph {
    nodes: Vec<Node>,
    /// The ids by the hash of their nodes; the nodes themselves are kept once, above.
    interned: HashTable<NodeId>,
    /// The results, by index; a node may be several of them.
    pub outputs: Vec<NodeId>,
}

/// Two graphs are equal when they would be planned alike: same nodes, same outputs.
impl PartialEq for ComputationGraph {
    fn eq(&self, other: &Self) -> bool {
        self.nodes == other.nodes && self.outputs == other.outputs
    }
}
impl Eq for ComputationGraph {}

impl std::hash::Hash for ComputationGraph {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.nodes.hash(state);
        self.outputs.hash(state);
    }
}

impl std::ops::Index<NodeId> for ComputationGraph {
    type Output = Node;
    fn index(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }
}

impl ComputationGraph {
    /// Without nodes.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of nodes, dead ones among them.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there are no nodes.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All nodes, in topological order.
    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        (0..self.nodes.len() as u32).map(NodeId)
    }

    /// All nodes, in topological order.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The dtype and the shape of a node's value.
    pub fn ty(&self, id: NodeId) -> TensorType {
        self[id].ty
    }

    /// The shape of a node's value.
    pub fn shape(&self, id: NodeId) -> Shape {
        self[id].ty.shape
    }

    /// Adds `op` with its type inferred, or returns the equal node already there.
    ///
    /// # Errors
    /// As [`infer`](fn@crate::infer), where the inputs do not fit.
    pub fn add(&mut self, op: Operation, inputs: &[NodeId]) -> Result<NodeId> {
        debug_assert!(!matches!(op, Operation::Input(_)), "inputs have no inferable type");
        let types: SmallVec<[TensorType; 4]> = inputs.iter().map(|i| self.ty(*i)).collect();
        let ty = infer(&op, &types)?;
        Ok(self.intern(Node { op, inputs: inputs.into(), ty }))
    }

    /// The `index`-th tensor passed by the caller.
    pub fn input(&mut self, index: u32, ty: TensorType) -> NodeId {
        self.intern(Node { op: Operation::Input(index), inputs: SmallVec::new(), ty })
    }

    /// A value known now, of rank 0.
    pub fn constant(&mut self, value: Scalar) -> NodeId {
        let ty = TensorType::new(value.dtype(), Shape::SCALAR);
        self.intern(Node { op: Operation::Const(value), inputs: SmallVec::new(), ty })
    }

    /// Adds a node whose type was inferred before (by the tensor that recorded it, or in another graph).
    pub fn intern(&mut self, node: Node) -> NodeId {
        debug_assert!(node.inputs.iter().all(|i| i.index() < self.nodes.len()));
        let hash = FxBuildHasher.hash_one(&node);
        if let Some(id) = self.interned.find(hash, |id| self.nodes[id.index()] == node) {
            return *id;
        }
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(node);
        let nodes = &self.nodes;
        self.interned.insert_unique(hash, id, |id| FxBuildHasher.hash_one(&nodes[id.index()]));
        id
    }

    /// Rebuilds what the outputs reach, bottom-up, letting `rewrite` choose each replacement.
    ///
    /// Every pass is one call of this: what is unreachable is never visited (dead-code elimination), and
    /// equal results meet in the interner (common-subexpression elimination).
    ///
    /// # Errors
    /// Those of `rewrite`.
    pub fn rebuild(
        &self,
        mut rewrite: impl FnMut(&mut ComputationGraph, &Node, &[NodeId]) -> Result<NodeId>,
    ) -> Result<ComputationGraph> {
        let live = self.live();
        let mut out = ComputationGraph::default();
        let mut map = vec![NodeId(u32::MAX); self.len()];
        let mut inputs: SmallVec<[NodeId; 4]> = SmallVec::new();
        for id in self.ids().filter(|id| live[id.index()]) {
            inputs.clear();
            inputs.extend(self[id].inputs.iter().map(|i| map[i.index()]));
            map[id.index()] = rewrite(&mut out, &self[id], &inputs)?;
        }
        out.outputs = self.outputs.iter().map(|o| map[o.index()]).collect();
        Ok(out)
    }

    /// The identity rewrite of one node.
    pub fn copy(&mut self, node: &Node, inputs: &[NodeId]) -> NodeId {
        self.intern(Node { op: node.op, inputs: inputs.into(), ty: node.ty })
    }

    /// Which nodes the outputs reach.
    pub fn live(&self) -> Vec<bool> {
        let mut live = vec![false; self.len()];
        for o in &self.outputs {
            live[o.index()] = true;
        }
        // One reverse sweep suffices, because inputs precede their users.
        for i in (0..self.len()).rev() {
            if live[i] {
                for input in &self.nodes[i].inputs {
                    live[input.index()] = true;
                }
            }
        }
        live
    }
}
