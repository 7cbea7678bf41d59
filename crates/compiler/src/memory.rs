//! Where every byte lives: who shares a buffer, who updates in place, and at which offset of the arena.

use crate::emit::Draft;
use crate::kernel::{Affine, KernelOp};
use crate::lower::{Lowered, Output};
use crate::plan::{OutputSource, PlanOutput, Step};
use crate::{Error, LibraryCall, Operand, Plan, Result, Slot, Target, Work, cost};
use metal_candle_graph::NodeId;
use rustc_hash::FxHashMap;
use std::cmp::Reverse;

/// Memory for one value, or for several that take turns in it.
#[derive(Clone, Copy, Debug)]
struct Buffer {
    home: Home,
    len_bytes: usize,
    /// The first and the last step that touch it.
    first: usize,
    last: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Home {
    Input(u32),
    Output(u32),
    Arena,
}

struct Buffers {
    list: Vec<Buffer>,
    of: FxHashMap<NodeId, usize>,
}

/// Gives every value a place and writes the plan.
pub(crate) fn place(mut lowered: Lowered, target: &Target) -> Result<Plan> {
    let uses = Uses::of(&lowered);
    let in_place = drop_copies(&mut lowered, &uses);
    let uses = Uses::of(&lowered);
    let mut buffers = Buffers { list: Vec::new(), of: FxHashMap::default() };
    let mut taken: Vec<bool> = lowered.inputs.iter().map(|_| false).collect();
    for step in 0..lowered.drafts.len() {
        open_buffers(&lowered, &uses, &in_place, step, &mut buffers, &mut taken, target);
    }
    let outputs = place_outputs(&lowered, &uses, &mut buffers, &mut taken);
    let arena = place_arena(&buffers, target)?;
    let unshared_bytes = buffers
        .of
        .iter()
        .filter(|(_, b)| buffers.list[**b].home == Home::Arena)
        .map(|(id, _)| lowered.types[id.index()].size_bytes())
        .sum();
    let slot = |id: NodeId| match lowered.input_of.get(&id) {
        Some(index) => Slot::Input(*index),
        None => {
            let Some(&at) = buffers.of.get(&id) else {
                panic!("metal-candle bug: {id:?} is read but no step writes it")
            };
            match buffers.list[at].home {
                Home::Input(i) => Slot::Input(i),
                Home::Output(i) => Slot::Output(i),
                Home::Arena => Slot::Arena {
                    offset_bytes: arena.offsets[at],
                    len_bytes: buffers.list[at].len_bytes,
                },
            }
        }
    };
    let operand = |l: &crate::analysis::Located| Operand {
        slot: slot(l.base),
        dtype: lowered.types[l.base.index()].dtype,
        layout: l.layout,
    };
    let steps = lowered.drafts.iter().map(|d| step(d, &operand)).collect();
    Ok(Plan {
        target: target.name,
        steps,
        inputs: lowered.inputs,
        outputs,
        arena_bytes: arena.bytes,
        unshared_bytes,
        splits: lowered.splits,
    })
}

fn step(draft: &Draft, operand: &impl Fn(&crate::analysis::Located) -> Operand) -> Step {
    let args: Vec<Operand> = draft.args.iter().map(operand).collect();
    let outs: Vec<Operand> = draft.outs.iter().map(operand).collect();
    let (flops, bytes) = cost::of(&draft.work, &args, &outs);
    Step { work: draft.work.clone(), args, outs, label: draft.label.clone(), flops, bytes }
}

/// When each value is last touched, by step; outputs live for ever.
struct Uses {
    last: FxHashMap<NodeId, usize>,
}

impl Uses {
    fn of(lowered: &Lowered) -> Uses {
        let mut last = FxHashMap::default();
        for (step, draft) in lowered.drafts.iter().enumerate() {
            for operand in draft.args.iter().chain(&draft.outs) {
                last.insert(operand.base, step);
            }
            if let Some(base) = lowered.bases.get(&step) {
                last.insert(base.base, step);
            }
        }
        for output in &lowered.outputs {
            match output {
                Output::Node(id) | Output::Copied(id) => drop(last.insert(*id, usize::MAX)),
                Output::Input(index) => {
                    let id = lowered.input_of.iter().find(|(_, i)| *i == index);
                    id.map(|(id, _)| last.insert(*id, usize::MAX));
                }
            }
        }
        Uses { last }
    }

    fn last(&self, id: NodeId) -> usize {
        self.last.get(&id).copied().unwrap_or(0)
    }
}

/// Removes the copies before in-place calls whose base nobody needs afterwards.
/// Returns, by step, the base in whose buffer the call's output lives.
fn drop_copies(lowered: &mut Lowered, uses: &Uses) -> FxHashMap<usize, NodeId> {
    let mut removed = vec![false; lowered.drafts.len()];
    let mut written = FxHashMap::default();
    for (step, draft) in lowered.drafts.iter().enumerate() {
        for out in &draft.outs {
            written.entry(out.base).or_insert(step);
        }
    }
    lowered.bases.retain(|step, base| {
        let draft = &lowered.drafts[*step];
        let adds = match draft.work {
            Work::Call(
                LibraryCall::Gemm { accumulate, .. } | LibraryCall::GemmSum { accumulate, .. },
            ) => accumulate,
            Work::Call(LibraryCall::LowRank { .. }) => true,
            _ => false,
        };
        // No copy stands before these.
        if adds {
            return true;
        }
        let base_len = lowered.types[base.base.index()].shape.len();
        let whole = base.layout.is_contiguous() && base.layout.shape.len() == base_len;
        let writable = match lowered.input_of.get(&base.base) {
            Some(input) => lowered.inputs[*input as usize].donated,
            None => written.contains_key(&base.base),
        };
        let read_beside = draft.args.iter().any(|a| a.base == base.base);
        // The copy right before the call is not needed; a base that is copied is read by its copy.
        removed[*step - 1] = whole && writable && !read_beside && uses.last(base.base) == *step;
        removed[*step - 1]
    });
    remove(lowered, &removed);
    lowered.bases.iter().map(|(step, base)| (*step, base.base)).collect()
}

/// Removes steps; those after them move up.
pub(crate) fn remove(lowered: &mut Lowered, removed: &[bool]) {
    let mut next = 0;
    let number = |gone: &bool| {
        next += usize::from(!gone);
        next - usize::from(!gone)
    };
    let to: Vec<usize> = removed.iter().map(number).collect();
    let mut gone = removed.iter();
    lowered.drafts.retain(|_| gone.next() == Some(&false));
    lowered.bases = lowered.bases.drain().map(|(step, base)| (to[step], base)).collect();
    for split in &mut lowered.splits {
        (split.producer, split.consumer) = (to[split.producer], to[split.consumer]);
    }
}

/// Opens the buffers that `step` writes first, sharing that of an operand where it can be updated in place.
fn open_buffers(
    lowered: &Lowered,
    uses: &Uses,
    in_place: &FxHashMap<usize, NodeId>,
    step: usize,
    buffers: &mut Buffers,
    taken: &mut [bool],
    target: &Target,
) {
    let draft = &lowered.drafts[step];
    for (i, out) in draft.outs.iter().enumerate() {
        if buffers.of.contains_key(&out.base) {
            continue;
        }
        let last = uses.last(out.base);
        let len_bytes = lowered.types[out.base.index()].size_bytes();
        let shared = match in_place.get(&step) {
            Some(base) if i == 0 => Some(base_buffer(lowered, *base, step, buffers, taken)),
            _ if len_bytes <= target.apart_bytes => None,
            _ => dying_operand(lowered, draft, i, step, last, buffers),
        };
        let at = shared.unwrap_or_else(|| {
            buffers.list.push(Buffer { home: Home::Arena, len_bytes, first: step, last });
            buffers.list.len() - 1
        });
        let buffer = &mut buffers.list[at];
        buffer.last = buffer.last.max(last);
        buffers.of.insert(out.base, at);
    }
}

/// The buffer of the value that an in-place call starts from.
fn base_buffer(
    lowered: &Lowered,
    base: NodeId,
    step: usize,
    buffers: &mut Buffers,
    taken: &mut [bool],
) -> usize {
    if let Some(at) = buffers.of.get(&base) {
        return *at;
    }
    let input = lowered.input_of[&base];
    taken[input as usize] = true;
    let len_bytes = lowered.types[base.index()].size_bytes();
    buffers.list.push(Buffer { home: Home::Input(input), len_bytes, first: step, last: step });
    buffers.list.len() - 1
}

/// The buffer of an operand that nobody reads after `step` and that output `out` can replace element by element.
fn dying_operand(
    lowered: &Lowered,
    draft: &Draft,
    out: usize,
    step: usize,
    last: usize,
    buffers: &Buffers,
) -> Option<usize> {
    // A result gets a buffer of its own, which the caller keeps.
    if last == usize::MAX {
        return None;
    }
    let ty = lowered.types[draft.outs[out].base.index()];
    draft.args.iter().enumerate().find_map(|(arg, operand)| {
        let at = *buffers.of.get(&operand.base)?;
        let buffer = &buffers.list[at];
        let dies = buffer.last == step && buffer.home == Home::Arena;
        let from = lowered.types[operand.base.index()];
        let fits = from.size_bytes() == ty.size_bytes() && from.dtype == ty.dtype;
        // Another output of this step may have moved in already.
        let free = draft.outs.iter().all(|o| buffers.of.get(&o.base) != Some(&at));
        (dies && fits && free && replaces(draft, arg, out)).then_some(at)
    })
}

/// Whether the kernel reads `arg` only at the place where it writes `out`.
pub(crate) fn replaces(draft: &Draft, arg: usize, out: usize) -> bool {
    let Work::Kernel(kernel) = &draft.work else { return false };
    let mut stores = kernel.stores.iter().filter(|s| s.to.arg as usize == out);
    let (Some(store), None) = (stores.next(), stores.next()) else { return false };
    let same = |at: &Affine| *at == store.to.at;
    kernel.tape.iter().all(|inst| match &inst.op {
        KernelOp::Load(access) if access.arg as usize == arg => same(&access.at),
        _ => true,
    })
}

/// Decides where each result lives.
fn place_outputs(
    lowered: &Lowered,
    uses: &Uses,
    buffers: &mut Buffers,
    taken: &mut [bool],
) -> Vec<PlanOutput> {
    let mut placed: Vec<PlanOutput> = Vec::new();
    for (i, output) in lowered.outputs.iter().enumerate() {
        let source = match *output {
            Output::Input(index) => OutputSource::Input(index),
            Output::Node(id) | Output::Copied(id) => {
                let at = buffers.of[&id];
                match buffers.list[at].home {
                    Home::Output(first) => OutputSource::SameAs(first),
                    Home::Input(input) => donated_once(&placed, input),
                    Home::Arena => {
                        let input = donation(lowered, uses, id, &buffers.list[at], taken);
                        buffers.list[at].home = input.map_or(Home::Output(i as u32), Home::Input);
                        input.map_or(OutputSource::Written, OutputSource::Donated)
                    }
                }
            }
        };
        placed.push(PlanOutput { ty: lowered.output_types[i], source });
    }
    placed
}

/// A donated buffer becomes one result; a second one that equals it shares that.
fn donated_once(placed: &[PlanOutput], input: u32) -> OutputSource {
    let first = placed.iter().position(|o| o.source == OutputSource::Donated(input));
    first.map_or(OutputSource::Donated(input), |i| OutputSource::SameAs(i as u32))
}

/// A donated input in whose memory the result `id` can be written.
fn donation(
    lowered: &Lowered,
    uses: &Uses,
    id: NodeId,
    buffer: &Buffer,
    taken: &mut [bool],
) -> Option<u32> {
    let ty = lowered.types[id.index()];
    let draft = &lowered.drafts[buffer.first];
    let candidate = |input: NodeId, index: u32| {
        let donated = &lowered.inputs[index as usize];
        donated.donated
            && !taken[index as usize]
            && donated.ty.dtype == ty.dtype
            && donated.ty.shape.len() == ty.shape.len()
            && uses.last(input) <= buffer.first
    };
    // First an operand that this very step replaces element by element ...
    let out = draft.outs.iter().position(|o| o.base == id);
    let replaced = draft.args.iter().enumerate().filter_map(|(arg, operand)| {
        let index = *lowered.input_of.get(&operand.base)?;
        let ok = candidate(operand.base, index) && out.is_some_and(|o| replaces(draft, arg, o));
        ok.then_some(index)
    });
    // ... else one that is no longer read at all.
    let unread = || {
        let inputs = lowered.input_of.iter().map(|(input, index)| (*input, *index));
        let unread = |input: NodeId| {
            let read_here = draft.args.iter().any(|a| a.base == input);
            uses.last.contains_key(&input) && (uses.last(input) < buffer.first || !read_here)
        };
        inputs
            .filter(|(input, index)| candidate(*input, *index) && unread(*input))
            .map(|i| i.1)
            .min()
    };
    // The lowest index: results in the order of the inputs keep their places.
    let found = replaced.min().or_else(unread)?;
    taken[found as usize] = true;
    Some(found)
}

struct Arena {
    offsets: Vec<usize>,
    bytes: usize,
}

/// Steps before and after its life for which nobody has the memory of a buffer that is to be [apart](Target::apart_bytes).
const APART: usize = 24;

/// The steps in which a buffer's memory is its own.
fn life(buffer: &Buffer, target: &Target) -> [usize; 2] {
    let apart = if buffer.len_bytes <= target.apart_bytes { APART } else { 0 };
    [buffer.first.saturating_sub(apart), buffer.last.saturating_add(apart)]
}

/// Greedy by size: the largest buffer first, each at the lowest offset that is free for its whole life.
fn place_arena(buffers: &Buffers, target: &Target) -> Result<Arena> {
    let list = &buffers.list;
    let mut order: Vec<usize> = (0..list.len()).filter(|i| list[*i].home == Home::Arena).collect();
    order.sort_by_key(|i| (Reverse(list[*i].len_bytes), list[*i].first));
    let total: u128 = order.iter().map(|i| list[*i].len_bytes as u128).sum();
    if total > isize::MAX as u128 {
        return Err(Error::Arena { bytes: total });
    }
    let mut offsets = vec![0; list.len()];
    // Placed buffers by offset, so that one walk finds the lowest gap.
    let mut placed: Vec<(usize, usize, usize)> = Vec::new();
    let mut bytes = 0;
    for i in order {
        let b = &list[i];
        let len = b.len_bytes.next_multiple_of(target.align_bytes);
        let (mut offset, [first, last]) = (0, life(b, target));
        for (start, end, other) in &placed {
            if offset + len <= *start {
                break;
            }
            if list[*other].first <= last && first <= list[*other].last {
                offset = offset.max(*end);
            }
        }
        offsets[i] = offset;
        bytes = bytes.max(offset + len);
        let at = placed.partition_point(|p| p.0 <= offset);
        placed.insert(at, (offset, offset + len, i));
    }
    Ok(Arena { offsets, bytes })
}
