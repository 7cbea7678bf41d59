//! Thin products with a factor in common as one product, which reads that factor once: LoRA's branches of one input, and the
//! gradients that come back to them.
//!
//! ```text
//! x A, x B, x C    ->    x [A B C], and its columns
//! A x, B x, C x    ->    [A; B; C] x, and its rows
//! ```

use crate::{ComputationGraph, NodeId, Operation, Result};
use rustc_hash::FxHashMap;

/// A product is thin if its thin side is at most this long, and a quarter of its other extents.
const THIN: usize = 64;
/// Of a joined product.
const MOST: usize = 256;

/// The factor in common, and whether it is the left one.
type Key = (NodeId, bool);

/// Products that are made as one, in the order of their results in it.
struct Group {
    shared: Key,
    products: Vec<NodeId>,
}

/// Joins thin products of rank 2 that share a factor, where none of them needs the result of another.
///
/// # Numerics
/// Every element is the same sum as before; a backend may add its terms in another order.
///
/// # Errors
/// Where a rewritten node is refused by inference, which would be a bug.
pub fn share_factors(g: &ComputationGraph) -> Result<ComputationGraph> {
    let groups = Groups::find(g);
    if groups.list.is_empty() {
        return Ok(g.clone());
    }
    let mut rebuilt = Rebuilt {
        g,
        groups: &groups,
        out: ComputationGraph::default(),
        map: vec![None; g.len()],
        joined: vec![None; groups.list.len()],
    };
    let outputs: Result<Vec<NodeId>> =
        g.outputs.iter().map(|output| rebuilt.node(*output)).collect();
    rebuilt.out.outputs = outputs?;
    Ok(rebuilt.out)
}

struct Groups {
    list: Vec<Group>,
    /// By product: its group.
    of: FxHashMap<NodeId, usize>,
}

impl Groups {
    fn find(g: &ComputationGraph) -> Groups {
        let live = g.live();
        let mut by_key: FxHashMap<Key, Vec<NodeId>> = FxHashMap::default();
        let mut keys: Vec<Key> = Vec::new();
        for id in g.ids().filter(|id| live[id.index()]) {
            if let Some(key) = thin_product(g, id) {
                let products = by_key.entry(key).or_default();
                if products.is_empty() {
                    keys.push(key);
                }
                products.push(id);
            }
        }
        let mut groups = Groups { list: Vec::new(), of: FxHashMap::default() };
        for key in keys {
            groups.add(g, key, &by_key[&key]);
        }
        groups
    }

    /// Adds what can be made together of `products`.
    fn add(&mut self, g: &ComputationGraph, shared: Key, products: &[NodeId]) {
        let (mut group, mut len) = (Group { shared, products: Vec::new() }, 0);
        for product in products {
            len += thin_extent(g, *product, shared.1);
            if len > MOST {
                break;
            }
            group.products.push(*product);
        }
        if group.products.len() < 2 || self.needs_itself(g, &group) {
            return;
        }
        self.of.extend(group.products.iter().map(|product| (*product, self.list.len())));
        self.list.push(group);
    }

    /// Whether a factor of the group's products is made from one of their results, what is in a group being made together.
    fn needs_itself(&self, g: &ComputationGraph, group: &Group) -> bool {
        let mut seen = vec![false; g.len()];
        let factors = |group: &Group| -> Vec<NodeId> {
            group.products.iter().flat_map(|product| g[*product].inputs.to_vec()).collect()
        };
        let mut stack = factors(group);
        while let Some(id) = stack.pop() {
            if std::mem::replace(&mut seen[id.index()], true) {
                continue;
            }
            if group.products.contains(&id) {
                return true;
            }
            match self.of.get(&id) {
                Some(other) => stack.extend(factors(&self.list[*other])),
                None => stack.extend(g[id].inputs.iter().copied()),
            }
        }
        false
    }
}

/// What a thin product can share.
fn thin_product(g: &ComputationGraph, id: NodeId) -> Option<Key> {
    let node = &g[id];
    if node.op != Operation::Dot || node.shape().rank() != 2 {
        return None;
    }
    let [left, right] = [node.inputs[0], node.inputs[1]];
    let [m, k, n] = [node.shape()[0], g.shape(left)[1], node.shape()[1]];
    let is_thin = |thin: usize, other: usize| thin <= THIN && 4 * thin <= k.min(other);
    match () {
        () if is_thin(n, m) => Some((left, true)),
        () if is_thin(m, n) => Some((right, false)),
        () => None,
    }
}

fn thin_extent(g: &ComputationGraph, product: NodeId, left: bool) -> usize {
    g.shape(product)[usize::from(left)]
}

struct Rebuilt<'a> {
    g: &'a ComputationGraph,
    groups: &'a Groups,
    out: ComputationGraph,
    map: Vec<Option<NodeId>>,
    /// By group: its product, and where each member's part begins.
    joined: Vec<Option<NodeId>>,
}

impl Rebuilt<'_> {
    /// The node in the new graph, after all that it needs; not by recursion, for graphs are deep.
    fn node(&mut self, root: NodeId) -> Result<NodeId> {
        let mut stack = vec![root];
        while let Some(id) = stack.last().copied() {
            if self.map[id.index()].is_some() {
                stack.pop();
                continue;
            }
            let missing = self.missing(id);
            if missing.is_empty() {
                self.map[id.index()] = Some(self.make(id)?);
                stack.pop();
            }
            // The first of them comes first.
            stack.extend(missing.into_iter().rev());
        }
        Ok(self.made(root))
    }

    fn missing(&self, id: NodeId) -> Vec<NodeId> {
        let products = match self.groups.of.get(&id) {
            Some(group) => &self.groups.list[*group].products[..],
            None => &[id],
        };
        let needed = products.iter().flat_map(|product| &self.g[*product].inputs).copied();
        needed.filter(|input| self.map[input.index()].is_none()).collect()
    }

    fn made(&self, id: NodeId) -> NodeId {
        self.map[id.index()].expect("metal-candle bug: a node before its inputs")
    }

    fn make(&mut self, id: NodeId) -> Result<NodeId> {
        let node = &self.g[id];
        let Some(number) = self.groups.of.get(&id).copied() else {
            let inputs: Vec<NodeId> = node.inputs.iter().map(|input| self.made(*input)).collect();
            return Ok(self.out.copy(node, &inputs));
        };
        let Group { shared: (shared, left), products } = &self.groups.list[number];
        let dim = usize::from(*left);
        if self.joined[number].is_none() {
            let parts: Vec<NodeId> =
                products.iter().map(|product| self.made(self.g[*product].inputs[dim])).collect();
            let all = self.out.concat(dim, &parts)?;
            let shared = self.made(*shared);
            let factors = if *left { [shared, all] } else { [all, shared] };
            self.joined[number] = Some(self.out.add(Operation::Dot, &factors)?);
        }
        let extent = |product: &NodeId| thin_extent(self.g, *product, *left);
        let before = products.iter().take_while(|product| **product != id).map(extent).sum();
        let joined = self.joined[number].expect("metal-candle bug: a group that is not made");
        self.out.slice(joined, dim, before, extent(&id))
    }
}
