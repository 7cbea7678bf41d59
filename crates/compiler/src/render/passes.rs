//! What is computed in which pass over the columns, and what a thread keeps from pass to pass.

use super::launch::{Launch, Team};
use super::{index, scalar};
use crate::kernel::{Affine, Inst, Kernel, KernelOp, Level, Reg};
use metal_candle_graph::UnaryOp;

/// Bytes of registers that a thread keeps between passes: a quarter of what a block of 1024, or half of what
/// one of 256 can have without the device running fewer of them.
const KEPT_BYTES: usize = 128;

/// A kernel, in the order in which a team computes it.
pub(super) struct Passes {
    /// One value for what a thread computes together, or one for each of them.
    pub(super) level: Vec<Level>,
    /// Column values that stay in registers until the last pass.
    pub(super) kept: Vec<bool>,
    pub(super) passes: Vec<Pass>,
    /// Row values that need the last reductions.
    pub(super) last: Vec<Reg>,
}

/// One walk over the columns.
#[derive(Default)]
pub(super) struct Pass {
    /// Row values that are needed in it.
    pub(super) before: Vec<Reg>,
    /// Column values, each after its operands.
    pub(super) body: Vec<Reg>,
    pub(super) reductions: Vec<Reg>,
}

impl Passes {
    /// `per_thread`: column values of one register that a thread holds.
    pub(super) fn new(kernel: &Kernel, launch: &Launch, per_thread: usize) -> Passes {
        let live = live(kernel);
        if launch.team == Team::Element {
            return Passes::of_elements(kernel, launch, &live);
        }
        let level: Vec<Level> = kernel.tape.iter().map(|inst| inst.level).collect();
        let stages = kernel.stages() as usize;
        let kept = keep(kernel, &live, stages, per_thread);
        let mut passes: Vec<Pass> = (0..stages).map(|_| Pass::default()).collect();
        let mut last = Vec::new();
        for (reg, inst) in regs(kernel).filter(|(reg, _)| live[reg.index()]) {
            let stage = inst.stage as usize;
            match (&inst.op, inst.level) {
                (KernelOp::Reduce(..), _) => passes[stage].reductions.push(reg),
                (_, Level::Row) if stage < stages => passes[stage].before.push(reg),
                (_, Level::Row) => last.push(reg),
                (_, Level::Col) => {}
            }
        }
        for (number, pass) in passes.iter_mut().enumerate() {
            pass.body = body(kernel, &live, &kept, &pass.reductions, [number, stages]);
        }
        Passes { level, kept, passes, last }
    }

    /// Everything at once: what is one for all neighbours, then what is not.
    fn of_elements(kernel: &Kernel, launch: &Launch, live: &[bool]) -> Passes {
        let axis = index::fast_axis(kernel, Team::Element);
        let walks = |at: &Affine| axis.is_some_and(|axis| at.strides[axis] != 0);
        let mut level: Vec<Level> = Vec::with_capacity(kernel.tape.len());
        for inst in &kernel.tape {
            let own = match &inst.op {
                KernelOp::Load(access) => walks(&access.at),
                KernelOp::Index(at) | KernelOp::Random { at, .. } => walks(at),
                _ => false,
            };
            let from = Kernel::operands(&inst.op);
            let varies = own || from.iter().any(|r| level[r.index()] == Level::Col);
            level.push(if varies && launch.vector > 1 { Level::Col } else { Level::Row });
        }
        let (before, body): (Vec<Reg>, Vec<Reg>) = regs(kernel)
            .map(|(reg, _)| reg)
            .filter(|reg| live[reg.index()])
            .partition(|reg| level[reg.index()] == Level::Row);
        let passes = vec![Pass { before, body, reductions: Vec::new() }];
        Passes { level, kept: vec![false; kernel.tape.len()], passes, last: Vec::new() }
    }

    pub(super) fn keeps_any(&self) -> bool {
        self.kept.contains(&true)
    }
}

fn regs(kernel: &Kernel) -> impl DoubleEndedIterator<Item = (Reg, &Inst)> {
    (0..kernel.tape.len()).map(|at| (Reg(at as u32), &kernel.tape[at]))
}

/// What a store needs.
fn live(kernel: &Kernel) -> Vec<bool> {
    let mut live = vec![false; kernel.tape.len()];
    kernel.stores.iter().for_each(|store| live[store.reg.index()] = true);
    for (reg, inst) in regs(kernel).rev() {
        if live[reg.index()] {
            Kernel::operands(&inst.op).iter().for_each(|r| live[r.index()] = true);
        }
    }
    live
}

/// The column values of pass `number` of `stages`: what its reductions take, what is kept from it, and, in the last one,
/// what is stored. All stores are in the last pass, for they may replace what an earlier one reads.
fn body(
    kernel: &Kernel,
    live: &[bool],
    kept: &[bool],
    reductions: &[Reg],
    [number, stages]: [usize; 2],
) -> Vec<Reg> {
    let mut needed = vec![false; kernel.tape.len()];
    for reduction in reductions {
        let operands = Kernel::operands(&kernel.tape[reduction.index()].op);
        operands.iter().for_each(|r| needed[r.index()] = true);
    }
    if number + 1 == stages {
        kernel.stores.iter().for_each(|store| needed[store.reg.index()] = true);
    }
    let mut body = Vec::new();
    for (reg, inst) in regs(kernel).rev().filter(|(_, inst)| inst.level == Level::Col) {
        let (at, stage) = (reg.index(), inst.stage as usize);
        let made_here = kept[at] && stage == number && live[at];
        let had_before = kept[at] && stage < number;
        if (needed[at] || made_here) && !had_before {
            Kernel::operands(&inst.op).iter().for_each(|r| needed[r.index()] = true);
            body.push(reg);
        }
    }
    body.reverse();
    body
}

/// Which values stay in registers: one after the other, that which saves the most work, as long as one fits; then what is read
/// for a later pass. The rest is read or computed again.
fn keep(kernel: &Kernel, live: &[bool], stages: usize, per_thread: usize) -> Vec<bool> {
    let mut kept = vec![false; kernel.tape.len()];
    let bytes = |reg: Reg| per_thread * scalar::register_bytes(kernel.tape[reg.index()].dtype);
    let mut candidates = taken_later(kernel, live, stages);
    candidates.retain(|reg| bytes(*reg) > 0);
    let (mut left, mut least) = (KEPT_BYTES, work(kernel, live, &kept, stages));
    loop {
        candidates.retain(|reg| bytes(*reg) <= left && !kept[reg.index()]);
        let with = |reg: &Reg| {
            let mut kept = kept.clone();
            kept[reg.index()] = true;
            (work(kernel, live, &kept, stages), *reg)
        };
        match candidates.iter().map(with).min() {
            Some((work, best)) if work < least => {
                kept[best.index()] = true;
                (left, least) = (left - bytes(best), work);
            }
            _ => break,
        }
    }
    // What a later pass reads is asked for in the first one, for what is left: no pass then waits for memory once more.
    candidates.retain(|reg| !kept[reg.index()] && is_read(kernel, *reg));
    for reg in candidates {
        if let Some(rest) = left.checked_sub(bytes(reg)) {
            kept[reg.index()] = true;
            left = rest;
        }
    }
    kept
}

/// Whether a value is one of memory, in whatever dtype.
fn is_read(kernel: &Kernel, reg: Reg) -> bool {
    match kernel.tape[reg.index()].op {
        KernelOp::Load(_) => true,
        KernelOp::Cast(x) => is_read(kernel, x),
        _ => false,
    }
}

/// Column values that are made in one pass and taken in a later one.
fn taken_later(kernel: &Kernel, live: &[bool], stages: usize) -> Vec<Reg> {
    let mut last_use: Vec<usize> = vec![0; kernel.tape.len()];
    for (_, inst) in regs(kernel).filter(|(reg, _)| live[reg.index()]) {
        for r in Kernel::operands(&inst.op) {
            last_use[r.index()] = last_use[r.index()].max(inst.stage as usize);
        }
    }
    for store in &kernel.stores {
        last_use[store.reg.index()] = stages.saturating_sub(1);
    }
    let later = |(reg, inst): &(Reg, &Inst)| {
        inst.level == Level::Col && last_use[reg.index()] > inst.stage as usize
    };
    regs(kernel).filter(later).map(|(reg, _)| reg).collect()
}

/// About how many instructions all passes take for an element, if these values are kept.
fn work(kernel: &Kernel, live: &[bool], kept: &[bool], stages: usize) -> u32 {
    let reductions = |number: usize| -> Vec<Reg> {
        let of = |(reg, inst): &(Reg, &Inst)| {
            let reduces = matches!(inst.op, KernelOp::Reduce(..));
            reduces && live[reg.index()] && inst.stage as usize == number
        };
        regs(kernel).filter(of).map(|(reg, _)| reg).collect()
    };
    let pass = |number| body(kernel, live, kept, &reductions(number), [number, stages]);
    (0..stages).flat_map(pass).map(|reg| cost(kernel, reg)).sum()
}

/// About how many instructions it takes to have a column value again.
fn cost(kernel: &Kernel, reg: Reg) -> u32 {
    match &kernel.tape[reg.index()].op {
        KernelOp::Const(_) | KernelOp::Reduce(..) => 0,
        // A row value that fills its columns.
        KernelOp::Cast(x) if kernel.tape[x.index()].level == Level::Row => 0,
        KernelOp::Unary(f, _) if !is_arithmetic(*f) => 8,
        KernelOp::Unary(..) | KernelOp::Binary(..) | KernelOp::Select(..) => 1,
        KernelOp::Index(_) | KernelOp::Cast(_) => 1,
        KernelOp::Load(_) => 8,
        KernelOp::Random { .. } => 40,
    }
}

fn is_arithmetic(f: UnaryOp) -> bool {
    use UnaryOp::*;
    matches!(f, Neg | Abs | Sign | Recip | Sqr | Sqrt | Rsqrt | Relu | Floor | Ceil | Round)
}
