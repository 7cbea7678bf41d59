//! Held factors of products that are packed once, instead of whenever a step reads them.
//!
//! Panels belong to whoever runs with them: executables that hold the same memory, and read it in the same way, share them.

use super::gemm::{Factor, FactorShape, Kept};
use crate::buffer::{Buffer, Memory};
use crate::inputs::Inputs;
use crate::{Result, Workspace};
use metal_candle_compiler::{LibraryCall, Operand, Plan, Slot, Step, Work};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A factor of a step that is an input.
pub(super) struct HeldFactor {
    step: usize,
    arg: usize,
    input: usize,
    shape: FactorShape,
}

impl HeldFactor {
    /// Those of a plan's steps, of inputs that are held.
    pub(super) fn all(plan: &Plan, is_held: impl Fn(usize) -> bool) -> Vec<HeldFactor> {
        let mut all = Vec::new();
        for (step, Step { work, args, outs, .. }) in plan.steps.iter().enumerate() {
            let Work::Call(LibraryCall::Gemm { .. } | LibraryCall::GemmSum { .. }) = work else {
                continue;
            };
            for (pair, [a, b]) in args.as_chunks::<2>().0.iter().enumerate() {
                let shapes = FactorShape::both([a, b, &outs[0]]);
                for (side, (operand, shape)) in [a, b].into_iter().zip(shapes).enumerate() {
                    let input = whole_input(plan, operand).filter(|input| is_held(*input));
                    if let Some((input, shape)) = input.zip(shape) {
                        all.push(HeldFactor { step, arg: 2 * pair + side, input, shape });
                    }
                }
            }
        }
        all
    }
}

/// The input that an operand reads, each element once at most: what is repeated is not packed in its length.
fn whole_input(plan: &Plan, operand: &Operand) -> Option<usize> {
    let Slot::Input(input) = operand.slot else { return None };
    let input = input as usize;
    (operand.layout.shape.len() <= plan.inputs[input].ty.shape.len()).then_some(input)
}

/// What the panels of a plan take, in executables that hold these inputs.
pub(crate) fn workspace(plan: &Plan, is_held: impl Fn(usize) -> bool) -> Workspace {
    let factors = HeldFactor::all(plan, is_held);
    let apart: HashSet<(usize, FactorShape)> =
        factors.into_iter().map(|factor| (factor.input, factor.shape)).collect();
    listed(apart.iter().map(|(_, shape)| shape.panels().len_bytes()).sum())
}

fn listed(bytes: usize) -> Workspace {
    Workspace { name: "prepacked weights", bytes, shared: false }
}

/// What panels are made of: where a buffer starts, and how the factor lies in it.
type Key = (usize, FactorShape);

/// Panels, and the buffer that they are of: as long as it is held, it stays as it is, and no other one starts there.
pub(super) struct Held {
    kept: Kept,
    _buffer: Buffer,
}

/// All that are in use.
static IN_USE: Mutex<BTreeMap<Key, Weak<Held>>> = Mutex::new(BTreeMap::new());

/// The panels of a plan.
pub(super) struct Prepacked {
    by_key: HashMap<Key, Arc<Held>>,
    keys: HashMap<[usize; 2], Key>,
}

impl Prepacked {
    /// Packs what of these inputs is held, unless another executable has. A Candle tensor is not: others may write it.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`](crate::Error::OutOfMemory)
    pub(super) fn new(plan: &Plan, inputs: &Inputs) -> Result<Prepacked> {
        let starts: HashMap<usize, (&Buffer, *const u8)> = inputs
            .held()
            .filter_map(|(i, buffer)| Some((i, (buffer, own_start(buffer)?))))
            .collect();
        let factors = HeldFactor::all(plan, |input| starts.contains_key(&input));
        let key = |f: &HeldFactor| (starts[&f.input].1.addr(), f.shape);
        let mut in_use = IN_USE.lock().unwrap_or_else(PoisonError::into_inner);
        in_use.retain(|_, held| held.strong_count() > 0);
        let mut by_key = HashMap::new();
        let mut missing = BTreeMap::new();
        for factor in &factors {
            match in_use.get(&key(factor)).and_then(Weak::upgrade) {
                Some(held) => drop(by_key.insert(key(factor), held)),
                None => drop(missing.insert(key(factor), starts[&factor.input])),
            }
        }
        // SAFETY: the inputs have the plan's types, and its operands lie within them, as `verify` has seen; what is held is not
        // written meanwhile.
        let matrix = |(key, (_, start)): (&Key, &(&Buffer, *const u8))| unsafe { key.1.of(*start) };
        let matrices: Vec<Box<dyn Factor + '_>> = missing.iter().map(matrix).collect();
        let shapes = missing.keys().map(|(_, shape)| shape.panels());
        let pairs: Vec<_> = shapes.zip(matrices.iter().map(|matrix| &**matrix)).collect();
        for ((key, (buffer, _)), kept) in missing.iter().zip(Kept::all(&pairs)?) {
            let held = Arc::new(Held { kept, _buffer: (*buffer).clone() });
            in_use.insert(*key, Arc::downgrade(&held));
            by_key.insert(*key, held);
        }
        let keys = factors.iter().map(|f| ([f.step, f.arg], key(f))).collect();
        Ok(Prepacked { by_key, keys })
    }

    /// Those of an argument of a step.
    pub(super) fn of(&self, step: usize, arg: usize) -> Option<Arc<Held>> {
        self.by_key.get(self.keys.get(&[step, arg])?).cloned()
    }

    pub(super) fn workspace(&self) -> Workspace {
        listed(self.by_key.values().map(|held| held.kept.panels().len_bytes()).sum())
    }
}

impl Held {
    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }
}

/// Where the elements start of a buffer that nobody writes as long as there is a second handle to it.
fn own_start(buffer: &Buffer) -> Option<*const u8> {
    match buffer.memory() {
        Memory::Owned(data) => Some(data.as_ptr()),
        Memory::Mapped(mapped) => Some(mapped.as_ptr()),
        Memory::Shared(_) | Memory::Device(_) => None,
    }
}

#[cfg(test)]
mod tests;
