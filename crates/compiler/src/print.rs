//! A plan, to be read.

use crate::kernel::{Kernel, Lanes};
use crate::plan::{OutputSource, Step};
use crate::{LibraryCall, Operand, Plan, Slot, Work};
use std::fmt;

pub(crate) fn plan(plan: &Plan, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(
        f,
        "plan for {}: {} steps, {} inputs, {} outputs",
        plan.target,
        plan.steps.len(),
        plan.inputs.len(),
        plan.outputs.len()
    )?;
    writeln!(
        f,
        "memory: peak {} = inputs and results {} + arena {} ({} if nothing were shared)",
        Bytes(plan.peak_bytes() as u64),
        Bytes((plan.peak_bytes() - plan.arena_bytes) as u64),
        Bytes(plan.arena_bytes as u64),
        Bytes(plan.unshared_bytes as u64),
    )?;
    writeln!(f, "work: {} flops, {} moved", Si(plan.flops()), Bytes(plan.bytes()))?;
    for (i, s) in plan.steps.iter().enumerate() {
        step(i, s, f)?;
        for split in plan.splits.iter().filter(|split| split.consumer == i) {
            writeln!(f, "        not fused with {:03}: {}", split.producer, split.reason)?;
        }
    }
    for (i, output) in plan.outputs.iter().enumerate() {
        match output.source {
            OutputSource::Written => {}
            OutputSource::Donated(input) => writeln!(f, "out{i} is in{input}, updated in place")?,
            OutputSource::Input(input) => writeln!(f, "out{i} is in{input}")?,
            OutputSource::SameAs(other) => writeln!(f, "out{i} is out{other}")?,
        }
    }
    Ok(())
}

fn step(i: usize, step: &Step, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let list = |operands: &[Operand]| {
        operands.iter().map(|o| format!("{}", Shown(o))).collect::<Vec<_>>().join(", ")
    };
    write!(f, "{i:03}  {} = {}({})", list(&step.outs), step.label, list(&step.args))?;
    match &step.work {
        Work::Kernel(kernel) => write!(f, "  {}", Space(kernel))?,
        Work::Call(LibraryCall::Gemm { alpha, accumulate }) => {
            if *alpha != 1.0 {
                write!(f, "  alpha={alpha}")?;
            }
            if *accumulate {
                write!(f, "  in place")?;
            }
        }
        Work::Call(LibraryCall::GemmSum { alphas, accumulate }) => {
            if alphas.iter().any(|alpha| *alpha != 1.0) {
                let alphas: Vec<String> = alphas.iter().map(f64::to_string).collect();
                write!(f, "  alpha={}", alphas.join(", "))?;
            }
            if *accumulate {
                write!(f, "  in place")?;
            }
        }
        Work::Call(LibraryCall::LowRank { low_scale, scale }) => {
            write!(f, "  alpha={low_scale}, {scale}  in place")?;
        }
        Work::Call(_) => {}
    }
    writeln!(f, "  {} flops, {}", Si(step.flops), Bytes(step.bytes))
}

/// `arena[1024..2048]:f32[4, 64]`
struct Shown<'a>(&'a Operand);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Operand { slot, dtype, layout } = self.0;
        match slot {
            Slot::Input(i) => write!(f, "in{i}")?,
            Slot::Output(i) => write!(f, "out{i}")?,
            Slot::Arena { offset_bytes, len_bytes } => {
                write!(f, "arena[{offset_bytes}..{}]", offset_bytes + len_bytes)?;
            }
        }
        write!(f, ":{dtype}{}", layout.shape)?;
        if !layout.is_contiguous() {
            write!(f, "@{}+{:?}", layout.offset, layout.strides())?;
        }
        Ok(())
    }
}

/// `rows 1024 x cols 512, 2 passes, 9 insts`
struct Space<'a>(&'a Kernel);

impl fmt::Display for Space<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kernel = self.0;
        let (rows, cols) = kernel.space.split_at(kernel.row_axes);
        write!(f, "{rows:?}x{cols:?}, {} insts", kernel.tape.len())?;
        if kernel.stages() > 1 {
            write!(f, ", {} passes", kernel.stages())?;
        }
        if kernel.lanes == Lanes::Rows {
            write!(f, ", rows in lanes")?;
        }
        Ok(())
    }
}

/// A size in the largest unit of 1024s that is not above it.
#[derive(Clone, Copy, Debug)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64 / 1024.0;
        if value < 1.0 {
            return f.pad(&format!("{} B", self.0));
        }
        let mut unit = 0;
        while value >= 1024.0 && unit < UNITS.len() - 1 {
            value /= 1024.0;
            unit += 1;
        }
        f.pad(&format!("{value:.1} {}", UNITS[unit]))
    }
}

struct Si(u64);

impl fmt::Display for Si {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
        let (mut value, mut unit) = (self.0 as f64, 0);
        while value >= 1000.0 && unit < UNITS.len() - 1 {
            value /= 1000.0;
            unit += 1;
        }
        if unit == 0 { write!(f, "{}", self.0) } else { write!(f, "{value:.1}{}", UNITS[unit]) }
    }
}
