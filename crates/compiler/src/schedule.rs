//! The order of the steps: every unit after what it reads, otherwise as the graph was recorded.

use crate::emit::Draft;
use crate::lower::{Drafts, Unit};
use crate::region::Regions;
use metal_candle_graph::NodeId;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The positions of `units` in the order in which they run.
pub(crate) fn order(units: &[Unit], drafts: &[Drafts], regions: &Regions) -> Vec<usize> {
    // Parts of a value may be written by several.
    let mut writers: FxHashMap<NodeId, SmallVec<[usize; 1]>> = FxHashMap::default();
    for (unit, drafts) in drafts.iter().enumerate() {
        for out in drafts.steps.iter().flat_map(|d| &d.outs) {
            writers.entry(out.base).or_default().push(unit);
        }
    }
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); units.len()];
    let mut waiting = vec![0usize; units.len()];
    for (unit, drafts) in drafts.iter().enumerate() {
        let mut needs: Vec<usize> = drafts
            .reads()
            .filter_map(|id| writers.get(&id))
            .flatten()
            .copied()
            .filter(|needed| *needed != unit)
            .collect();
        needs.sort_unstable();
        needs.dedup();
        waiting[unit] = needs.len();
        for needed in needs {
            readers[needed].push(unit);
        }
    }
    let key = |unit: usize| (recorded(&units[unit], regions), unit);
    let mut ready: BinaryHeap<Reverse<(u32, usize)>> =
        (0..units.len()).filter(|u| waiting[*u] == 0).map(|u| Reverse(key(u))).collect();
    let mut order = Vec::with_capacity(units.len());
    while let Some(Reverse((_, unit))) = ready.pop() {
        order.push(unit);
        for reader in &readers[unit] {
            waiting[*reader] -= 1;
            if waiting[*reader] == 0 {
                ready.push(Reverse(key(*reader)));
            }
        }
    }
    assert_eq!(order.len(), units.len(), "metal-candle bug: the steps wait for each other");
    order
}

impl Drafts {
    /// The buffers that the unit reads, those it updates in place included.
    fn reads(&self) -> impl Iterator<Item = NodeId> + '_ {
        let args = self.steps.iter().flat_map(|d: &Draft| d.args.iter().map(|a| a.base));
        args.chain(self.base.map(|b| b.base))
    }
}

/// When the unit was recorded: ready units run in this order.
fn recorded(unit: &Unit, regions: &Regions) -> u32 {
    match unit {
        Unit::Region(index) => regions.get(*index).nodes.last().map_or(0, |id| id.0),
        Unit::Call(ids) => ids[0].0,
        Unit::Gemm(id) | Unit::Materialise(id) => id.0,
        Unit::Output(_) => u32::MAX,
    }
}
