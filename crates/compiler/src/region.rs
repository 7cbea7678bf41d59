//! Which elementwise operations and reductions run as one kernel.
//!
//! A region has one iteration space: the extents of its widest values, some of them reduced. Its values are
//! of two levels: *full* (one per point) and *row* (one per point of the dims that are not reduced).
//! Regions grow greedily along the edges of the graph, consumer by consumer, as long as the spaces unify and no
//! path leaves the region and comes back.

use crate::Target;
use crate::analysis::{Analysis, Edge, Kind, edge, squeezed};
use crate::operands::Bound;
use metal_candle_graph::{NodeId, Operation, Shape};
use smallvec::SmallVec;

/// The iteration space of a region: extents without 1s, and which of them are reduced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Space {
    pub(crate) full: SmallVec<[usize; 4]>,
    /// Sorted positions in `full`; empty for a region of maps.
    pub(crate) reduced: SmallVec<[usize; 4]>,
}

impl Space {
    fn of(shape: &Shape) -> Space {
        let full = squeezed(shape).into_iter().map(|(_, e)| e).collect();
        Space { full, reduced: SmallVec::new() }
    }

    pub(crate) fn rows(&self) -> SmallVec<[usize; 4]> {
        let kept = |i: &usize| !self.reduced.contains(i);
        (0..self.full.len()).filter(kept).map(|i| self.full[i]).collect()
    }

    /// Whether a value of `shape` has one element per point, rather than one per row.
    pub(crate) fn is_full(&self, shape: &Shape) -> bool {
        squeezed(shape).len() == self.full.len()
    }

    /// The space in which values of both spaces live, if there is one.
    fn unify(&self, other: &Space) -> Option<Space> {
        if self.full == other.full {
            return match (self.reduced.is_empty(), other.reduced.is_empty()) {
                (true, _) => Some(other.clone()),
                (_, true) => Some(self.clone()),
                _ => (self.reduced == other.reduced).then(|| self.clone()),
            };
        }
        let rows_of = |maps: &Space, wide: &Space| {
            maps.reduced.is_empty() && !wide.reduced.is_empty() && maps.full == wide.rows()
        };
        if rows_of(self, other) {
            Some(other.clone())
        } else if rows_of(other, self) {
            Some(self.clone())
        } else {
            None
        }
    }
}

/// What a kernel of the target may be.
struct Limits<'a> {
    max_tape: usize,
    operands: Bound<'a>,
}

pub(crate) struct Region {
    pub(crate) space: Space,
    /// In topological order.
    pub(crate) nodes: Vec<NodeId>,
}

impl Region {
    fn first(&self) -> NodeId {
        self.nodes[0]
    }
    fn last(&self) -> NodeId {
        self.nodes[self.nodes.len() - 1]
    }
}

/// The partition of all maps and reductions into regions.
pub(crate) struct Regions {
    regions: Vec<Option<Region>>,
    of: Vec<u32>,
    /// `(producer, consumer, reason)` for edges that did not fuse.
    pub(crate) splits: Vec<(NodeId, NodeId, &'static str)>,
}

const NONE: u32 = u32::MAX;

/// How many units a search for a cycle may visit before the merge is given up.
const CYCLE_BUDGET: usize = 512;

impl Regions {
    /// `cheap`: which maps are computed again rather than kept, by node.
    pub(crate) fn form(a: &Analysis, cheap: &[bool], target: &Target) -> Regions {
        let limits = Limits {
            max_tape: target.max_tape,
            operands: Bound { a, cheap, most: target.max_operands },
        };
        let mut r = Regions { regions: Vec::new(), of: vec![NONE; a.g.len()], splits: Vec::new() };
        for id in a.g.ids() {
            if matches!(a.kind(id), Kind::Map | Kind::Reduce) {
                r.open(a, id);
                r.grow(a, id, &limits);
            }
        }
        r
    }

    pub(crate) fn of(&self, id: NodeId) -> Option<usize> {
        // Keys beyond the graph name copied outputs, which are in no region.
        let r = self.of.get(id.index()).copied().unwrap_or(NONE);
        (r != NONE).then_some(r as usize)
    }

    pub(crate) fn get(&self, index: usize) -> &Region {
        self.regions[index].as_ref().expect("metal-candle bug: a merged region was asked for")
    }

    fn open(&mut self, a: &Analysis, id: NodeId) {
        let mut space = Space::of(a.node(id).shape());
        if let Operation::Reduce { dims, .. } = a.node(id).op {
            let operand = squeezed(&a.operand(id, 0).layout.shape);
            space.full = operand.iter().map(|(_, e)| *e).collect();
            let reduced = |i: &usize| dims.contains(operand[*i].0);
            space.reduced = (0..operand.len()).filter(reduced).collect();
        }
        self.of[id.index()] = self.regions.len() as u32;
        self.regions.push(Some(Region { space, nodes: vec![id] }));
    }

    /// Merges the region of `id` with those of its operands, where that is possible.
    fn grow(&mut self, a: &Analysis, id: NodeId, limits: &Limits) {
        for operand in a.operands(id) {
            let Some(producer) = self.of(operand.base) else { continue };
            let consumer = self.of[id.index()] as usize;
            if producer == consumer {
                continue;
            }
            match self.unified(a, producer, consumer, operand.base, id, limits) {
                Ok(space) => self.merge(producer, consumer, space),
                Err(reason) => self.splits.push((operand.base, id, reason)),
            }
        }
    }

    /// The space of the merged region, or why there must be two.
    fn unified(
        &self,
        a: &Analysis,
        producer: usize,
        consumer: usize,
        from: NodeId,
        to: NodeId,
        limits: &Limits,
    ) -> Result<Space, &'static str> {
        let (p, c) = (self.get(producer), self.get(consumer));
        if p.nodes.len() + c.nodes.len() > limits.max_tape {
            return Err("the kernel would be too long");
        }
        let space = p
            .space
            .unify(&c.space)
            .or_else(|| expanded(a, p, c, from, to))
            .ok_or("their iteration spaces differ")?;
        let inside = |id: NodeId| self.of(id).is_some_and(|r| r == producer || r == consumer);
        // The producer's own edges stay as they are, unless its space changed or it reads the consumer's region.
        let old = if c.nodes.len() == 1 && p.space == space { &[][..] } else { &p.nodes };
        if !old.iter().chain(&c.nodes).all(|id| aligned(a, &space, *id, inside)) {
            return Err("an operand is read in another order than it is made");
        }
        if !limits.operands.holds(&p.nodes, &c.nodes, inside) {
            return Err("the kernel would have too many operands");
        }
        if self.makes_cycle(a, producer, consumer) {
            return Err("a step between them needs the first one's result");
        }
        Ok(space)
    }

    fn merge(&mut self, producer: usize, consumer: usize, space: Space) {
        let mut into = self.regions[producer].take().expect("metal-candle bug: no producer region");
        let from = self.regions[consumer].take().expect("metal-candle bug: no consumer region");
        for id in &from.nodes {
            self.of[id.index()] = producer as u32;
        }
        let sorted = into.last() < from.first();
        into.nodes.extend(from.nodes);
        if !sorted {
            into.nodes.sort_unstable();
        }
        into.space = space;
        self.regions[producer] = Some(into);
    }

    /// Whether something outside both regions needs the producer and is needed by the consumer.
    fn makes_cycle(&self, a: &Analysis, producer: usize, consumer: usize) -> bool {
        let first = self.get(producer).first();
        let mut seen = rustc_hash::FxHashSet::default();
        let mut stack: Vec<NodeId> = vec![self.get(consumer).first()];
        while let Some(id) = stack.pop() {
            let region = self.of(id);
            if !seen.insert(region.map_or(u64::from(id.0), |r| (1 << 32) | r as u64)) {
                continue;
            }
            if seen.len() > CYCLE_BUDGET {
                return true;
            }
            for node in self.unit(&id) {
                for operand in a.operands(*node).map(|o| o.base) {
                    let direct = region == Some(consumer);
                    if self.of(operand) == Some(producer) {
                        if !direct {
                            return true;
                        }
                    } else if self.unit(&operand).last().is_some_and(|last| *last > first) {
                        // Only what has a node after the producer's first can depend on it.
                        stack.push(operand);
                    }
                }
            }
        }
        false
    }

    /// The nodes that run together with `id`.
    fn unit<'s>(&'s self, id: &'s NodeId) -> &'s [NodeId] {
        self.of(*id).map_or(std::slice::from_ref(id), |r| &self.get(r).nodes)
    }
}

/// A map region that reads row values of another map region: the repeated dims become the columns.
fn expanded(a: &Analysis, p: &Region, c: &Region, from: NodeId, to: NodeId) -> Option<Space> {
    let maps = p.space.reduced.is_empty() && c.space.reduced.is_empty();
    // A lone scalar is loaded, not recomputed: rows of one would leave nothing to run in parallel.
    if !maps || p.space.full.is_empty() {
        return None;
    }
    let operand = a.operands(to).find(|o| o.base == from)?;
    let Edge::Expand(reduced) = edge(&operand.layout, a.node(from).shape()) else { return None };
    let space = Space { full: c.space.full.clone(), reduced };
    (space.rows() == p.space.full).then_some(space)
}

/// Whether every operand of `id` that is made inside the region can be read from a register.
fn aligned(a: &Analysis, space: &Space, id: NodeId, inside: impl Fn(NodeId) -> bool) -> bool {
    let node = a.node(id);
    if let Operation::Reduce { dims, .. } = node.op {
        let operand = squeezed(&a.operand(id, 0).layout.shape);
        let reduced = (0..operand.len()).filter(|i| dims.contains(operand[*i].0));
        if !reduced.eq(space.reduced.iter().copied()) {
            return false;
        }
    }
    a.operands(id).filter(|o| inside(o.base)).all(|o| {
        let base = a.node(o.base).shape();
        let reads_full = space.is_full(&o.layout.shape);
        match edge(&o.layout, base) {
            Edge::Direct => reads_full == space.is_full(base),
            Edge::Expand(dims) => reads_full && !space.is_full(base) && dims == space.reduced,
            Edge::Opaque => false,
        }
    })
}
