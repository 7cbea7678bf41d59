//! Maps that read the same values as one kernel, though neither needs the other's results: so the gradients of SwiGLU's gate
//! and up, which both read gate and the cotangent.
//!
//! The later map moves up to the earlier one; nothing else moves. It may if all that it reads is written by then, and if its
//! results take the places of values that are read for the last time there: then no step has more in memory than before.

use crate::emit::Draft;
use crate::kernel::{Access, Inst, Kernel, KernelOp, Reg, Store};
use crate::lower::{Lowered, Output};
use crate::memory::{remove, replaces};
use crate::{Target, Work};
use metal_candle_graph::{BinaryOp, NodeId, UnaryOp};
use rustc_hash::{FxHashMap, FxHashSet};
use smallvec::SmallVec;

/// Joins every map that may move up to an earlier one with it.
pub(crate) fn join(lowered: &mut Lowered, target: &Target) {
    let mut accesses = Accesses::of(lowered);
    let mut runs_in: Vec<usize> = (0..lowered.drafts.len()).collect();
    for (later, to) in runs_in.iter_mut().enumerate() {
        let Some((earlier, joined)) = find(lowered, &accesses, later, target) else { continue };
        accesses.join(&lowered.drafts[later], later, earlier);
        lowered.drafts[earlier] = joined;
        *to = earlier;
    }
    for split in &mut lowered.splits {
        (split.producer, split.consumer) = (runs_in[split.producer], runs_in[split.consumer]);
    }
    lowered.splits.retain(|split| split.producer != split.consumer);
    let moved: Vec<bool> = runs_in.iter().enumerate().map(|(step, to)| step != *to).collect();
    remove(lowered, &moved);
}

/// Which steps read and write each value, in order.
struct Accesses {
    readers: FxHashMap<NodeId, Vec<usize>>,
    writers: FxHashMap<NodeId, SmallVec<[usize; 1]>>,
    /// Values that outlive the steps: the caller's, and results.
    kept: FxHashSet<NodeId>,
}

impl Accesses {
    fn of(lowered: &Lowered) -> Accesses {
        let results = lowered.outputs.iter().filter_map(|output| match output {
            Output::Node(id) | Output::Copied(id) => Some(*id),
            Output::Input(_) => None,
        });
        let kept = lowered.input_of.keys().copied().chain(results).collect();
        let (readers, writers) = (FxHashMap::default(), FxHashMap::default());
        let mut accesses = Accesses { readers, writers, kept };
        for (step, draft) in lowered.drafts.iter().enumerate() {
            for read in draft.args.iter().chain(lowered.bases.get(&step)) {
                accesses.readers.entry(read.base).or_default().push(step);
            }
            for out in &draft.outs {
                accesses.writers.entry(out.base).or_default().push(step);
            }
        }
        accesses
    }

    /// Whether no other step has a part in what this one writes.
    fn writes_alone(&self, draft: &Draft) -> bool {
        draft.outs.iter().all(|out| self.writers[&out.base].len() == 1)
    }

    fn is_written_before(&self, id: NodeId, step: usize) -> bool {
        self.writers.get(&id).is_none_or(|writers| writers.iter().all(|writer| *writer < step))
    }

    /// Whether nobody needs `id` after `step`, which reads it.
    fn dies_at(&self, id: NodeId, step: usize) -> bool {
        !self.kept.contains(&id) && self.readers[&id].last() == Some(&step)
    }

    /// The last step before `step` that reads `id`.
    fn reader_before(&self, id: NodeId, step: usize) -> Option<usize> {
        self.readers[&id].iter().rev().copied().find(|reader| *reader < step)
    }

    /// The draft of `later` becomes part of `earlier`.
    fn join(&mut self, draft: &Draft, later: usize, earlier: usize) {
        for arg in &draft.args {
            let readers = self.readers.entry(arg.base).or_default();
            readers.retain(|reader| *reader != later);
            readers.insert(readers.partition_point(|reader| *reader <= earlier), earlier);
        }
        for out in &draft.outs {
            self.writers.insert(out.base, SmallVec::from_elem(earlier, 1));
        }
    }
}

/// The step that the map of `later` may join, and the kernel of both.
fn find(
    lowered: &Lowered,
    accesses: &Accesses,
    later: usize,
    target: &Target,
) -> Option<(usize, Draft)> {
    let draft = &lowered.drafts[later];
    let lasts = draft.outs.iter().any(|out| accesses.kept.contains(&out.base));
    if lasts || !is_map(draft) || !accesses.writes_alone(draft) {
        return None;
    }
    // Operands that are done with, and the step that read one of them last: from there on, none is needed.
    let dying: Vec<NodeId> =
        draft.args.iter().map(|arg| arg.base).filter(|id| accesses.dies_at(*id, later)).collect();
    let earlier = dying.iter().filter_map(|id| accesses.reader_before(*id, later)).max()?;
    let first = &lowered.drafts[earlier];
    let is_ready = draft.args.iter().all(|arg| accesses.is_written_before(arg.base, earlier));
    if !is_ready || !is_map(first) || !accesses.writes_alone(first) {
        return None;
    }
    let joined = both(first, draft, target)?;
    all_take_places(lowered, &joined, first.outs.len(), dying, target).then_some((earlier, joined))
}

/// Whether each result from the `from`-th on can lie where one of the `dying` operands does.
fn all_take_places(
    lowered: &Lowered,
    draft: &Draft,
    from: usize,
    mut dying: Vec<NodeId>,
    target: &Target,
) -> bool {
    (from..draft.outs.len()).all(|out| {
        let takes = |id: &NodeId| {
            let arg = draft.args.iter().position(|arg| arg.base == *id);
            arg.is_some_and(|arg| takes_place(lowered, draft, arg, out, target))
        };
        dying.iter().position(takes).map(|at| dying.swap_remove(at)).is_some()
    })
}

fn is_map(draft: &Draft) -> bool {
    let is_reduce = |inst: &Inst| matches!(inst.op, KernelOp::Reduce(..));
    matches!(&draft.work, Work::Kernel(kernel) if !kernel.tape.iter().any(is_reduce))
}

/// Whether the result can lie where the operand does, as [`crate::memory`] would have it.
fn takes_place(lowered: &Lowered, draft: &Draft, arg: usize, out: usize, target: &Target) -> bool {
    let ty = |id: NodeId| lowered.types[id.index()];
    let (from, to) = (ty(draft.args[arg].base), ty(draft.outs[out].base));
    let fits = from.dtype == to.dtype && from.size_bytes() == to.size_bytes();
    fits && to.size_bytes() > target.apart_bytes && replaces(draft, arg, out)
}

/// The kernel that does what both do, if one of them loads all that either does.
fn both(first: &Draft, second: &Draft, target: &Target) -> Option<Draft> {
    let (Work::Kernel(a), Work::Kernel(b)) = (&first.work, &second.work) else { return None };
    if (&a.space, a.row_axes, a.lanes) != (&b.space, b.row_axes, b.lanes) {
        return None;
    }
    let mut args = first.args.clone();
    let number = |arg: &crate::analysis::Located| {
        let known = args.iter().position(|a| a.base == arg.base);
        known.unwrap_or_else(|| {
            args.push(*arg);
            args.len() - 1
        }) as u32
    };
    let arg_of: Vec<u32> = second.args.iter().map(number).collect();
    let outs = [&first.outs[..], &second.outs].concat();
    let kernel = joined(a, b, &arg_of, first.outs.len() as u32);
    let loads = |kernel: &Kernel| {
        kernel.tape.iter().filter(|inst| matches!(inst.op, KernelOp::Load(_))).count()
    };
    let shares_loads = loads(&kernel) == loads(a).max(loads(b));
    let fits = kernel.tape.len() <= target.max_tape;
    (shares_loads && fits && args.len() + outs.len() <= target.max_operands).then(|| Draft {
        work: Work::Kernel(kernel),
        args,
        outs,
        label: format!("{} & {}", first.label, second.label),
    })
}

/// The tape of `a`, then that of `b` with its operands renumbered; an instruction that is there already is not made twice.
fn joined(a: &Kernel, b: &Kernel, arg_of: &[u32], first_out: u32) -> Kernel {
    let mut kernel = a.clone();
    let mut reg_of: Vec<Reg> = Vec::with_capacity(b.tape.len());
    for inst in &b.tape {
        let mut op = inst.op.with_operands(|reg| reg_of[reg.index()]);
        if let KernelOp::Load(access) = &mut op {
            access.arg = arg_of[access.arg as usize];
        }
        reg_of.push(push(&mut kernel.tape, Inst { op, ..*inst }));
    }
    kernel.stores.extend(b.stores.iter().map(|store| Store {
        reg: reg_of[store.reg.index()],
        to: Access { arg: first_out + store.to.arg, ..store.to.clone() },
    }));
    share_sigmoids(kernel)
}

/// `silu(x)` as `x · sigmoid(x)`, where the kernel computes that sigmoid for another value: SwiGLU's gradients.
fn share_sigmoids(kernel: Kernel) -> Kernel {
    let sigmoid_of = |silu: &Inst| match silu.op {
        KernelOp::Unary(UnaryOp::Silu, x) => {
            let sigmoid = Inst { op: KernelOp::Unary(UnaryOp::Sigmoid, x), ..silu.clone() };
            kernel.tape.contains(&sigmoid).then_some((x, sigmoid))
        }
        _ => None,
    };
    if !kernel.tape.iter().any(|inst| sigmoid_of(inst).is_some()) {
        return kernel;
    }
    let mut tape: Vec<Inst> = Vec::with_capacity(kernel.tape.len() + 1);
    let mut reg_of: Vec<Reg> = Vec::with_capacity(kernel.tape.len());
    for inst in &kernel.tape {
        let moved = |inst: &Inst| {
            let op = inst.op.with_operands(|reg| reg_of[reg.index()]);
            Inst { op, ..inst.clone() }
        };
        let inst = match sigmoid_of(inst) {
            Some((x, sigmoid)) => {
                let sigmoid = push(&mut tape, moved(&sigmoid));
                let op = KernelOp::Binary(BinaryOp::Mul, reg_of[x.index()], sigmoid);
                Inst { op, ..inst.clone() }
            }
            None => moved(inst),
        };
        reg_of.push(push(&mut tape, inst));
    }
    let moved = |store: Store| Store { reg: reg_of[store.reg.index()], ..store };
    let stores = kernel.stores.iter().cloned().map(moved).collect();
    Kernel { tape, stores, ..kernel.clone() }
}

/// Appends the instruction, or finds it.
fn push(tape: &mut Vec<Inst>, inst: Inst) -> Reg {
    let known = tape.iter().position(|i| *i == inst);
    let at = known.unwrap_or_else(|| {
        tape.push(inst);
        tape.len() - 1
    });
    Reg(at as u32)
}
