//! What every node is to the compiler, and where its elements would lie.

use crate::Layout;
use metal_candle_graph::{Composite, ComputationGraph, Node, NodeId, Operation, Shape};
use rustc_hash::FxHashMap;
use smallvec::SmallVec;

/// How a node comes to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Not reachable from the outputs.
    Dead,
    /// In the caller's memory.
    Input,
    /// Computed wherever it is read, from the element's position alone: constants, iota, random numbers.
    Virtual,
    /// The same elements as its base, seen through a layout.
    View,
    /// Elementwise: may join a region.
    Map,
    /// A reduction: may join a region.
    Reduce,
    /// A library call, or a movement of data that no layout expresses. Always stored.
    Call,
}

/// A value as the elements of `base` read through `layout`. `base` is no view.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Located {
    pub(crate) base: NodeId,
    pub(crate) layout: Layout,
}

/// The graph with one fact table per node.
pub(crate) struct Analysis<'g> {
    pub(crate) g: &'g ComputationGraph,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) located: Vec<Located>,
    /// How often each base is read, by live nodes that are no views and by the outputs.
    pub(crate) uses: Vec<u32>,
    /// By update of a slice: the rotary embedding that is written there, and nowhere else.
    pub(crate) rotated: FxHashMap<NodeId, NodeId>,
}

impl<'g> Analysis<'g> {
    pub(crate) fn new(g: &'g ComputationGraph) -> Analysis<'g> {
        let live = g.live();
        let mut a = Analysis {
            g,
            kinds: Vec::with_capacity(g.len()),
            located: Vec::with_capacity(g.len()),
            uses: vec![0; g.len()],
            rotated: FxHashMap::default(),
        };
        for id in g.ids() {
            let (kind, located) = a.classify(id, live[id.index()]);
            a.kinds.push(kind);
            a.located.push(located);
        }
        for id in g.ids().filter(|id| !matches!(a.kinds[id.index()], Kind::Dead | Kind::View)) {
            for input in &g[id].inputs {
                a.uses[a.located[input.index()].base.index()] += 1;
            }
        }
        for output in &g.outputs {
            a.uses[a.located[output.index()].base.index()] += 1;
        }
        a.absorb_ropes();
        a
    }

    /// A rotary embedding that is only there to update a slice, as that of keys which go to a cache, is no call of its own.
    fn absorb_ropes(&mut self) {
        for id in self.g.ids() {
            let is_update = matches!(self.node(id).op, Operation::SliceUpdate { .. });
            if !is_update || self.kind(id) != Kind::Call {
                continue;
            }
            let Located { base: rope, layout } = self.operand(id, 1);
            let is_rope =
                matches!(self.node(rope).op, Operation::Composite(Composite::Rope { .. }));
            let is_whole = layout == self.located[rope.index()].layout;
            if is_rope && is_whole && self.uses[rope.index()] == 1 {
                self.kinds[rope.index()] = Kind::Dead;
                self.rotated.insert(id, rope);
            }
        }
    }

    fn classify(&self, id: NodeId, live: bool) -> (Kind, Located) {
        let node = &self.g[id];
        let own = Located { base: id, layout: Layout::contiguous(*node.shape()) };
        if !live {
            return (Kind::Dead, own);
        }
        let kind = match node.op {
            Operation::Input(_) => Kind::Input,
            Operation::Const(_) | Operation::Iota { .. } | Operation::Random { .. } => {
                Kind::Virtual
            }
            Operation::Unary(_) | Operation::Binary(_) | Operation::Select | Operation::Cast(_) => {
                Kind::Map
            }
            Operation::Reduce { .. } => Kind::Reduce,
            Operation::Reshape(_)
            | Operation::Permute(_)
            | Operation::Broadcast(_)
            | Operation::Slice { .. }
            | Operation::Flip { .. } => {
                let input = self.located[node.inputs[0].index()];
                return match input.layout.view(&node.op, *node.shape()) {
                    Some(layout) => (Kind::View, Located { base: input.base, layout }),
                    // A reshape across strides: the elements must be laid out anew.
                    None => (Kind::Call, own),
                };
            }
            _ => Kind::Call,
        };
        (kind, own)
    }

    pub(crate) fn kind(&self, id: NodeId) -> Kind {
        self.kinds[id.index()]
    }

    pub(crate) fn node(&self, id: NodeId) -> &'g Node {
        &self.g[id]
    }

    /// Where input `i` of `id` lies.
    pub(crate) fn operand(&self, id: NodeId, i: usize) -> Located {
        self.located[self.g[id].inputs[i].index()]
    }

    pub(crate) fn operands(&self, id: NodeId) -> impl Iterator<Item = Located> + '_ {
        self.g[id].inputs.iter().map(|i| self.located[i.index()])
    }

    /// The value of a constant, seen through any view.
    pub(crate) fn constant(&self, id: NodeId) -> Option<metal_candle_graph::Scalar> {
        match self.g[self.located[id.index()].base].op {
            Operation::Const(c) => Some(c),
            _ => None,
        }
    }
}

/// The extents of `shape` that are not 1, with the dims they stand at.
pub(crate) fn squeezed(shape: &Shape) -> SmallVec<[(usize, usize); 4]> {
    shape.dims().iter().copied().enumerate().filter(|(_, e)| *e != 1).collect()
}

/// How a reader of an operand's shape sees its base, if it sees each element in row-major order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Edge {
    /// Element for element.
    Direct,
    /// Repeated along these squeezed dims of the reader.
    Expand(SmallVec<[usize; 4]>),
    /// In any other way: the base must be in memory.
    Opaque,
}

/// Classifies the way `layout` reads a dense base of shape `base`.
pub(crate) fn edge(layout: &Layout, base: &Shape) -> Edge {
    if layout.offset != 0 || layout.shape.is_empty() {
        return Edge::Opaque;
    }
    let strides = base.contiguous_strides();
    let mut walk = squeezed(base).into_iter();
    let mut repeated = SmallVec::new();
    for (axis, (dim, extent)) in squeezed(&layout.shape).into_iter().enumerate() {
        if layout.strides[dim] == 0 {
            repeated.push(axis);
        } else if walk.next().is_none_or(|(d, e)| e != extent || strides[d] != layout.strides[dim])
        {
            return Edge::Opaque;
        }
    }
    match (walk.next(), repeated.is_empty()) {
        (Some(_), _) => Edge::Opaque,
        (None, true) => Edge::Direct,
        (None, false) => Edge::Expand(repeated),
    }
}
