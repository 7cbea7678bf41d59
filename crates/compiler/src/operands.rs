//! How many buffers a kernel would read and write, before it is known which values are kept in memory.

use crate::analysis::{Analysis, Kind};
use metal_candle_graph::NodeId;
use rustc_hash::FxHashSet;

/// The most operands that a kernel may have.
pub(crate) struct Bound<'a> {
    pub(crate) a: &'a Analysis<'a>,
    /// Which maps are computed again rather than kept, by node.
    pub(crate) cheap: &'a [bool],
    pub(crate) most: usize,
}

impl Bound<'_> {
    /// Whether the kernel of both regions stays within the bound, whatever of it and before it is kept. A value that
    /// may be computed again counts as itself and as what it is computed from.
    pub(crate) fn holds(
        &self,
        producer: &[NodeId],
        consumer: &[NodeId],
        inside: impl Fn(NodeId) -> bool,
    ) -> bool {
        let nodes = || producer.iter().chain(consumer);
        // Three that an operation reads, and its result.
        if (producer.len() + consumer.len()).saturating_mul(4) <= self.most {
            return true;
        }
        let mut read = FxHashSet::default();
        let mut inner = rustc_hash::FxHashMap::<NodeId, u32>::default();
        for operand in nodes().flat_map(|id| self.a.operands(*id)) {
            if inside(operand.base) {
                *inner.entry(operand.base).or_default() += 1;
            } else {
                self.reads(operand.base, &mut read);
            }
        }
        let is_read_outside =
            |id: &&NodeId| self.a.uses[id.index()] > inner.get(id).copied().unwrap_or(0);
        read.len() + nodes().filter(is_read_outside).count() <= self.most
    }

    /// Adds what reading `id` may read.
    fn reads(&self, id: NodeId, read: &mut FxHashSet<NodeId>) {
        let mut stack = vec![id];
        while let Some(id) = stack.pop() {
            let is_virtual = self.a.kind(id) == Kind::Virtual;
            let is_new = is_virtual || read.insert(id);
            if is_new && (is_virtual || self.cheap[id.index()]) {
                stack.extend(self.a.operands(id).map(|o| o.base));
            }
        }
    }
}
