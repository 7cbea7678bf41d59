//! Plans that have been made before.

use crate::{Device, Executable, Result};
use metal_candle_graph::{ComputationGraph, Node, NodeId};
use rustc_hash::{FxHashMap, FxHasher};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Scratch memory that cached executables may keep together; the last one is kept whatever it holds.
const ARENA_LIMIT_BYTES: usize = 4 << 30;

/// The executables of the graphs that were asked for last: at most so many, keeping at most so much scratch memory.
pub struct PlanCache {
    capacity: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By hash; graphs of one hash are told apart by comparing them.
    entries: FxHashMap<u64, Vec<Entry>>,
    len: usize,
    /// Counts the lookups: who was asked for last.
    clock: u64,
}

struct Entry {
    nodes: Vec<Node>,
    outputs: Vec<NodeId>,
    donated: Vec<bool>,
    device: Device,
    executable: Arc<Executable>,
    used: u64,
}

impl Entry {
    fn is_of(&self, graph: &ComputationGraph, donated: &[bool], device: &Device) -> bool {
        self.nodes == graph.nodes()
            && self.outputs == graph.outputs
            && self.donated == donated
            && self.device == *device
    }
}

impl PlanCache {
    /// Keeps the last `capacity` executables (at least one).
    pub fn new(capacity: usize) -> PlanCache {
        PlanCache { capacity: capacity.max(1), state: Mutex::default() }
    }

    /// The executable of `graph` for `device`, planned now unless it is kept. `donated[i]` says that input `i` is
    /// given away.
    ///
    /// # Errors
    /// Those of [`metal_candle_compiler::plan`] and [`Executable::new`].
    pub fn get(
        &self,
        graph: &ComputationGraph,
        donated: &[bool],
        device: &Device,
    ) -> Result<Arc<Executable>> {
        let hash = hash(graph, donated, device);
        if let Some(found) = self.lock().find(hash, graph, donated, device) {
            return Ok(found);
        }
        // Outside of the lock: planning takes its time, and other graphs are asked for meanwhile.
        let plan = metal_candle_compiler::plan(graph, device.target(), donated)?;
        let executable = Arc::new(Executable::new(plan, device)?);
        let mut state = self.lock();
        if let Some(found) = state.find(hash, graph, donated, device) {
            return Ok(found);
        }
        let entry = Entry {
            nodes: graph.nodes().to_vec(),
            outputs: graph.outputs.clone(),
            donated: donated.to_vec(),
            device: *device,
            executable: Arc::clone(&executable),
            used: state.clock,
        };
        state.entries.entry(hash).or_default().push(entry);
        state.len += 1;
        while state.len > 1
            && (state.len > self.capacity || state.arena_bytes() > ARENA_LIMIT_BYTES)
        {
            state.evict();
        }
        Ok(executable)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for PlanCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PlanCache")
            .field("len", &self.lock().len)
            .field("capacity", &self.capacity)
            .finish()
    }
}

fn hash(graph: &ComputationGraph, donated: &[bool], device: &Device) -> u64 {
    let mut hasher = FxHasher::default();
    graph.hash(&mut hasher);
    donated.hash(&mut hasher);
    device.hash(&mut hasher);
    hasher.finish()
}

impl State {
    fn find(
        &mut self,
        hash: u64,
        graph: &ComputationGraph,
        donated: &[bool],
        device: &Device,
    ) -> Option<Arc<Executable>> {
        self.clock += 1;
        let entries = self.entries.get_mut(&hash)?;
        let entry = entries.iter_mut().find(|e| e.is_of(graph, donated, device))?;
        entry.used = self.clock;
        Some(Arc::clone(&entry.executable))
    }

    fn arena_bytes(&self) -> usize {
        let entries = self.entries.values().flatten();
        entries.map(|e| e.executable.allocated_arena_bytes()).sum()
    }

    /// Drops the entry that was not asked for the longest.
    fn evict(&mut self) {
        let all = self.entries.iter().flat_map(|(hash, entries)| {
            entries.iter().enumerate().map(move |(i, entry)| (entry.used, *hash, i))
        });
        let Some((_, hash, i)) = all.min() else { return };
        if let Some(entries) = self.entries.get_mut(&hash) {
            entries.swap_remove(i);
            self.len -= 1;
            if entries.is_empty() {
                self.entries.remove(&hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use metal_candle_graph::{DType, Shape, TensorType, UnaryOp};

    /// `relu` of so many elements.
    fn graph(len: usize) -> ComputationGraph {
        let mut graph = ComputationGraph::new();
        let x = graph.input(0, TensorType::new(DType::F32, Shape::new(&[len]).unwrap()));
        graph.outputs = vec![graph.unary(UnaryOp::Relu, x).unwrap()];
        graph
    }

    #[test]
    fn the_executable_that_was_asked_for_longest_ago_is_dropped() {
        let cache = PlanCache::new(2);
        let get = |len| cache.get(&graph(len), &[false], &Device::Cpu).unwrap();
        let (one, two) = (get(1), get(2));
        assert!(Arc::ptr_eq(&one, &get(1)), "kept, and asked for again");
        let three = get(3);
        assert!(Arc::ptr_eq(&one, &get(1)) && Arc::ptr_eq(&three, &get(3)));
        assert!(!Arc::ptr_eq(&two, &get(2)), "dropped for the third");
    }
}
