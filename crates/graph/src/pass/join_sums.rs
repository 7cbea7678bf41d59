//! Thin products that are added up as one product, which writes the sum once: what LoRA's branches give to the gradient of the
//! input that they share.
//!
//! ```text
//! x A + y B + z C    ->    [x y z] [A; B; C]
//! ```

use crate::{BinaryOp, ComputationGraph, NodeId, Operation, Result};
use rustc_hash::{FxHashMap, FxHashSet};

/// A product is thin if it sums over at most so many, and a quarter of its extents.
const THIN: usize = 64;
/// What a joined product sums over, at most.
const MOST: usize = 256;

/// Joins thin products of rank 2 whose sum is all that anyone reads of them.
///
/// # Numerics
/// Every element is the same sum as before, with its terms in another order; between them, less is rounded to the dtype.
///
/// # Errors
/// Where a rewritten node is refused by inference, which would be a bug.
pub fn join_sums(g: &ComputationGraph) -> Result<ComputationGraph> {
    let sums = Sums::find(g);
    if sums.at_last.is_empty() {
        return Ok(g.clone());
    }
    let live = g.live();
    let mut out = ComputationGraph::default();
    // None for what is in a joined product by now.
    let mut map: Vec<Option<NodeId>> = vec![None; g.len()];
    for id in g.ids().filter(|id| live[id.index()]) {
        let made =
            |id: NodeId| map[id.index()].expect("metal-candle bug: a node before its inputs");
        map[id.index()] = if let Some(products) = sums.at_last.get(&id) {
            let factors =
                |side: usize| products.iter().map(move |product| g[*product].inputs[side]);
            let left: Vec<NodeId> = factors(0).map(made).collect();
            let right: Vec<NodeId> = factors(1).map(made).collect();
            Some(joined(&mut out, &left, &right)?)
        } else if sums.joined.contains(&id) {
            None
        } else if sums.additions.contains(&id) {
            match [0, 1].map(|side| map[g[id].inputs[side].index()]) {
                [Some(a), Some(b)] => Some(out.copy(&g[id], &[a, b])),
                [a, b] => a.or(b),
            }
        } else {
            let inputs: Vec<NodeId> = g[id].inputs.iter().map(|input| made(*input)).collect();
            Some(out.copy(&g[id], &inputs))
        };
    }
    let made = |id: &NodeId| map[id.index()].expect("metal-candle bug: an output that is gone");
    out.outputs = g.outputs.iter().map(made).collect();
    Ok(out)
}

/// `[left..] [right..]`. The right factors are put together as transposed columns, which LoRA's other product of them reads.
fn joined(out: &mut ComputationGraph, left: &[NodeId], right: &[NodeId]) -> Result<NodeId> {
    let left = out.concat(1, left)?;
    let columns: Result<Vec<NodeId>> =
        right.iter().map(|factor| transposed(out, *factor)).collect();
    let right = out.concat(1, &columns?)?;
    let right = out.transpose(right)?;
    out.add(Operation::Dot, &[left, right])
}

fn transposed(g: &mut ComputationGraph, matrix: NodeId) -> Result<NodeId> {
    match g[matrix].op {
        // Of two dims, there is one order other than that in which they are.
        Operation::Permute(p) if !p.is_identity() => Ok(g[matrix].inputs[0]),
        _ => g.transpose(matrix),
    }
}

/// Which products are joined, by the last of them in the graph.
#[derive(Default)]
struct Sums {
    at_last: FxHashMap<NodeId, Vec<NodeId>>,
    /// All of them.
    joined: FxHashSet<NodeId>,
    /// The additions that lead to them.
    additions: FxHashSet<NodeId>,
}

impl Sums {
    fn find(g: &ComputationGraph) -> Sums {
        let (uses, live) = (uses(g), g.live());
        let known = concatenations(g, &live);
        let mut sums = Sums::default();
        let mut seen = vec![false; g.len()];
        let ids: Vec<NodeId> = g.ids().filter(|id| live[id.index()]).collect();
        // The sum of all comes after those of some.
        for root in ids.into_iter().rev() {
            if is_addition(g, root) && !seen[root.index()] {
                sums.add(g, root, &uses, &known, &mut seen);
            }
        }
        sums
    }

    /// Adds those of the sum `root`.
    fn add(
        &mut self,
        g: &ComputationGraph,
        root: NodeId,
        uses: &[u32],
        known: &FxHashMap<Vec<NodeId>, Vec<NodeId>>,
        seen: &mut [bool],
    ) {
        let (mut stack, mut additions, mut products) = (vec![root], Vec::new(), Vec::new());
        while let Some(id) = stack.pop() {
            if is_addition(g, id) && (id == root || uses[id.index()] == 1) {
                seen[id.index()] = true;
                additions.push(id);
                stack.extend(g[id].inputs.iter().rev());
            } else if uses[id.index()] == 1 && thin_depth(g, id).is_some() {
                products.push(id);
            }
        }
        let mut depth = 0;
        products.retain(|product| {
            depth += thin_depth(g, *product).unwrap_or(0);
            depth <= MOST
        });
        let Some(last) = products.iter().max().copied().filter(|_| products.len() > 1) else {
            return;
        };
        sort_as_known(g, &mut products, known);
        self.joined.extend(&products);
        self.additions.extend(additions);
        self.at_last.insert(last, products);
    }
}

/// How often each node is read.
fn uses(g: &ComputationGraph) -> Vec<u32> {
    let mut uses = vec![0; g.len()];
    let live = g.live();
    let inputs = g.ids().filter(|id| live[id.index()]).flat_map(|id| &g[id].inputs);
    inputs.chain(&g.outputs).for_each(|id| uses[id.index()] += 1);
    uses
}

fn is_addition(g: &ComputationGraph, id: NodeId) -> bool {
    g[id].op == Operation::Binary(BinaryOp::Add) && g.shape(id).rank() == 2
}

/// What a thin product sums over.
fn thin_depth(g: &ComputationGraph, id: NodeId) -> Option<usize> {
    let node = &g[id];
    if node.op != Operation::Dot || node.shape().rank() != 2 {
        return None;
    }
    let [m, n, k] = [node.shape()[0], node.shape()[1], g.shape(node.inputs[0])[1]];
    (k <= THIN && 4 * k <= m.min(n)).then_some(k)
}

/// What is concatenated by columns, by its parts in order of their ids.
fn concatenations(g: &ComputationGraph, live: &[bool]) -> FxHashMap<Vec<NodeId>, Vec<NodeId>> {
    let ids = g.ids().filter(|id| live[id.index()] && g[*id].op == Operation::Concat { dim: 1 });
    let parts = ids.map(|id| g[id].inputs.to_vec());
    parts.map(|parts| (sorted(parts.clone()), parts)).collect()
}

fn sorted(mut ids: Vec<NodeId>) -> Vec<NodeId> {
    ids.sort_unstable();
    ids
}

/// In the order in which their left factors lie side by side anyway, if they do.
fn sort_as_known(
    g: &ComputationGraph,
    products: &mut [NodeId],
    known: &FxHashMap<Vec<NodeId>, Vec<NodeId>>,
) {
    let left = |product: &NodeId| g[*product].inputs[0];
    let Some(parts) = known.get(&sorted(products.iter().map(left).collect())) else { return };
    products.sort_by_key(|product| parts.iter().position(|part| *part == left(product)));
}
