//! Whether a plan stays within its memory. A [`Plan`] is plain data that anyone can make; what runs it trusts it only
//! after this.

use crate::error::{Error, PlanFault, Result};
use metal_candle_compiler::kernel::{Access, Affine, Kernel, KernelOp, Level};
use metal_candle_compiler::{Layout, LibraryCall, Operand, OutputSource, Plan, Slot, Step, Work};
use metal_candle_graph::{DType, TensorType};

/// Checks every step and every result of a plan.
///
/// # Errors
/// [`Error::Plan`], with the first step that reaches beyond its memory, writes what is not its own, or writes where
/// it also reads in another order.
pub(crate) fn verify(plan: &Plan) -> Result<()> {
    for (index, step) in plan.steps.iter().enumerate() {
        let fault = |fault| Error::Plan { step: index, label: step.label.clone(), fault };
        check_operands(plan, step).map_err(fault)?;
        match &step.work {
            Work::Kernel(kernel) => check_kernel(plan, kernel, step),
            Work::Call(LibraryCall::AllReduce) => check_all_reduce(step),
            Work::Call(_) => check_call(step),
        }
        .map_err(fault)?;
    }
    let sound = (0..plan.outputs.len()).all(|i| output_is_sound(plan, i));
    let fault =
        Error::Plan { step: plan.steps.len(), label: "results".into(), fault: PlanFault::Output };
    if sound { Ok(()) } else { Err(fault) }
}

/// Whether the steps write every element of output `index` before they read any, through pointers, so that its
/// memory need not be initialised.
pub(crate) fn is_written_whole(plan: &Plan, index: usize) -> bool {
    let slot = Slot::Output(index as u32);
    let touches = |operands: &[Operand]| operands.iter().any(|o| o.slot == slot);
    let first = plan.steps.iter().find(|s| touches(&s.args) || touches(&s.outs));
    let Some(step) = first.filter(|step| !touches(&step.args)) else {
        return false;
    };
    let len = plan.outputs[index].ty.shape.len();
    let mut outs = step.outs.iter().enumerate().filter(|(_, out)| out.slot == slot);
    let (Some((at, out)), None) = (outs.next(), outs.next()) else { return false };
    match &step.work {
        Work::Kernel(kernel) => writes_all(kernel, at, len),
        Work::Call(
            LibraryCall::Gemm { accumulate: false, .. }
            | LibraryCall::GemmSum { accumulate: false, .. },
        ) => matches!(out.dtype, DType::F32 | DType::F64) && out.layout.shape.len() == len,
        Work::Call(_) => false,
    }
}

/// Whether the kernel of a verified plan writes each of the `len` elements that its output of number `out` has room for, and
/// not a part of them, as one that puts something into a larger value.
pub(crate) fn writes_all(kernel: &Kernel, out: usize, len: usize) -> bool {
    let mut stores = kernel.stores.iter().filter(|s| s.to.arg as usize == out);
    let (Some(store), None) = (stores.next(), stores.next()) else { return false };
    // In bounds, all distinct, and as many as there are: all of them.
    written_points(kernel, store.reg.index()).iter().product::<usize>() == len
}

fn output_is_sound(plan: &Plan, index: usize) -> bool {
    let output = &plan.outputs[index];
    let alike =
        |ty: &TensorType| ty.dtype == output.ty.dtype && ty.shape.len() == output.ty.shape.len();
    match output.source {
        OutputSource::Written => true,
        OutputSource::Input(i) => plan.inputs.get(i as usize).is_some_and(|input| alike(&input.ty)),
        OutputSource::Donated(i) => {
            let donated = plan.inputs.get(i as usize).filter(|input| input.donated);
            let once = plan.outputs[..index].iter().all(|o| o.source != output.source);
            once && donated.is_some_and(|input| alike(&input.ty))
        }
        OutputSource::SameAs(i) => (i as usize) < index && alike(&plan.outputs[i as usize].ty),
    }
}

/// The size of a slot, if the plan has it.
fn slot_bytes(plan: &Plan, slot: Slot) -> Option<usize> {
    match slot {
        Slot::Input(i) => Some(plan.inputs.get(i as usize)?.ty.size_bytes()),
        Slot::Output(i) => {
            let output = plan.outputs.get(i as usize)?;
            (output.source == OutputSource::Written).then(|| output.ty.size_bytes())
        }
        Slot::Arena { offset_bytes, len_bytes } => {
            let end = offset_bytes.checked_add(len_bytes)?;
            (end <= plan.arena_bytes).then_some(len_bytes)
        }
    }
}

fn check_operands(plan: &Plan, step: &Step) -> std::result::Result<(), PlanFault> {
    for operand in step.args.iter().chain(&step.outs) {
        let (slot, dtype) = (operand.slot, operand.dtype);
        let len_bytes = slot_bytes(plan, slot).ok_or(PlanFault::NoSuchSlot { slot })?;
        let slot_dtype = match slot {
            Slot::Input(i) => plan.inputs[i as usize].ty.dtype,
            Slot::Output(i) => plan.outputs[i as usize].ty.dtype,
            Slot::Arena { .. } => dtype,
        };
        if dtype != slot_dtype {
            return Err(PlanFault::AccessDType { expected: slot_dtype, got: dtype });
        }
        if let Slot::Arena { offset_bytes, .. } = slot
            && !offset_bytes.is_multiple_of(dtype.size_bytes())
        {
            return Err(PlanFault::Misaligned { slot, dtype });
        }
        let Layout { shape, offset, .. } = operand.layout;
        if let Some(reach) = Reach::new(offset, shape.dims(), operand.layout.strides()) {
            reach.check(slot, dtype, len_bytes)?;
        }
    }
    for out in &step.outs {
        if let Slot::Input(input) = out.slot
            && !plan.inputs[input as usize].donated
        {
            return Err(PlanFault::WritesInput { input });
        }
    }
    Ok(())
}

/// Whoever adds takes the output as so many numbers in a row.
fn check_all_reduce(step: &Step) -> std::result::Result<(), PlanFault> {
    let sums =
        |out: &Operand| matches!(out.dtype, DType::F32 | DType::F64) && out.layout.is_contiguous();
    match (&step.args[..], &step.outs[..]) {
        ([], [out]) if sums(out) => Ok(()),
        _ => Err(PlanFault::AllReduce),
    }
}

/// A call reads and writes in an order of its own: its outputs share memory with nothing.
fn check_call(step: &Step) -> std::result::Result<(), PlanFault> {
    let span = |operand: &Operand| {
        let Layout { shape, offset, .. } = operand.layout;
        let reach = Reach::new(offset, shape.dims(), operand.layout.strides())?;
        Some(Span::new(operand.slot, operand.dtype, &reach))
    };
    for (i, out) in step.outs.iter().enumerate() {
        let others = step.args.iter().chain(&step.outs[..i]);
        let overlaps = others.filter_map(span).any(|o| span(out).is_some_and(|s| s.overlaps(&o)));
        if overlaps || !are_distinct(out.layout.shape.dims(), out.layout.strides()) {
            return Err(PlanFault::Overlap);
        }
    }
    Ok(())
}

fn check_kernel(plan: &Plan, kernel: &Kernel, step: &Step) -> std::result::Result<(), PlanFault> {
    let mut loads: Vec<(&Affine, Span)> = Vec::new();
    for inst in &kernel.tape {
        if let KernelOp::Load(access) = &inst.op {
            let points = points(kernel, inst.level);
            if let Some(span) = check_access(plan, kernel, access, &points, &step.args)? {
                loads.push((&access.at, span));
            }
        }
    }
    let mut stored: Vec<Span> = Vec::new();
    for store in &kernel.stores {
        let points = written_points(kernel, store.reg.index());
        let to = &store.to;
        let Some(span) = check_access(plan, kernel, to, &points, &step.outs)? else { continue };
        let distinct = are_distinct(&points, &to.at.strides);
        let beside = stored.iter().all(|other| !span.overlaps(other));
        // What is read where it is written must be read at the very same point.
        let in_place = loads
            .iter()
            .all(|(at, load)| !span.overlaps(load) || (**at == to.at && load.start == span.start));
        if !(distinct && beside && in_place) {
            return Err(PlanFault::Overlap);
        }
        stored.push(span);
    }
    Ok(())
}

/// The extents over which values of `level` are there; an extent of 1 stands for an axis that is not walked.
fn points(kernel: &Kernel, level: Level) -> Vec<usize> {
    let mut points = kernel.space.to_vec();
    if level == Level::Row {
        points[kernel.row_axes..].fill(1);
    }
    points
}

fn written_points(kernel: &Kernel, reg: usize) -> Vec<usize> {
    points(kernel, kernel.tape.get(reg).map_or(Level::Col, |inst| inst.level))
}

/// Where an access of the kernel reaches; `None` if it is never made.
fn check_access(
    plan: &Plan,
    kernel: &Kernel,
    access: &Access,
    points: &[usize],
    operands: &[Operand],
) -> std::result::Result<Option<Span>, PlanFault> {
    let no_such = PlanFault::NoSuchOperand { arg: access.arg, count: operands.len() };
    let operand = operands.get(access.arg as usize).ok_or(no_such)?;
    if access.dtype != operand.dtype {
        return Err(PlanFault::AccessDType { expected: operand.dtype, got: access.dtype });
    }
    let (expected, got) = (kernel.space.len(), access.at.strides.len());
    if expected != got {
        return Err(PlanFault::Rank { expected, got });
    }
    let Some(reach) = Reach::new(access.at.offset, points, &access.at.strides) else {
        return Ok(None);
    };
    let slot = operand.slot;
    let len_bytes = slot_bytes(plan, slot).ok_or(PlanFault::NoSuchSlot { slot })?;
    reach.check(slot, access.dtype, len_bytes)?;
    Ok(Some(Span::new(slot, access.dtype, &reach)))
}

/// The first and the last element that a layout or an access touches.
struct Reach {
    first: i128,
    last: i128,
}

impl Reach {
    /// `None` if there are no elements.
    fn new(offset: isize, extents: &[usize], strides: &[isize]) -> Option<Reach> {
        let mut reach = Reach { first: offset as i128, last: offset as i128 };
        for (extent, stride) in extents.iter().zip(strides) {
            let span = (extent.checked_sub(1)? as i128).saturating_mul(*stride as i128);
            let end = if span < 0 { &mut reach.first } else { &mut reach.last };
            *end = end.saturating_add(span);
        }
        Some(reach)
    }

    fn check(
        &self,
        slot: Slot,
        dtype: DType,
        len_bytes: usize,
    ) -> std::result::Result<(), PlanFault> {
        let bytes = |elements: i128| elements.saturating_mul(dtype.size_bytes() as i128);
        let (from, to) = (bytes(self.first), bytes(self.last.saturating_add(1)));
        if from >= 0 && to <= len_bytes as i128 {
            return Ok(());
        }
        let clamp = |x: i128| x.clamp(isize::MIN as i128, isize::MAX as i128) as isize;
        Err(PlanFault::OutOfBounds { slot, from: clamp(from), to: clamp(to), len_bytes })
    }
}

/// Bytes of one allocation.
struct Span {
    /// Which: the arena, an input or an output.
    memory: (u8, u32),
    /// Where the slot starts in it.
    start: usize,
    from: usize,
    to: usize,
}

impl Span {
    /// Of a reach that has been checked.
    fn new(slot: Slot, dtype: DType, reach: &Reach) -> Span {
        let (memory, start) = match slot {
            Slot::Arena { offset_bytes, .. } => ((0, 0), offset_bytes),
            Slot::Input(i) => ((1, i), 0),
            Slot::Output(i) => ((2, i), 0),
        };
        let byte = |element: i128| start + element as usize * dtype.size_bytes();
        Span { memory, start, from: byte(reach.first), to: byte(reach.last + 1) }
    }

    fn overlaps(&self, other: &Span) -> bool {
        self.memory == other.memory && self.from < other.to && other.from < self.to
    }
}

/// Whether no two points have one place: every stride reaches beyond what the smaller ones span.
fn are_distinct(extents: &[usize], strides: &[isize]) -> bool {
    if extents.contains(&0) {
        return true;
    }
    let axes = extents.iter().zip(strides).filter(|(extent, _)| **extent > 1);
    let mut axes: Vec<(usize, usize)> = axes.map(|(e, s)| (s.unsigned_abs(), e - 1)).collect();
    axes.sort_unstable();
    let mut spanned = 0usize;
    axes.iter().all(|(stride, steps)| {
        let beyond = *stride > spanned;
        spanned = spanned.saturating_add(stride.saturating_mul(*steps));
        beyond
    })
}
