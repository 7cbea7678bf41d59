//! Where the commands of a GPU find what they work on.

use crate::hazards::{Span, Touched};
use crate::{Error, PlanFault, Result};
use metal_candle_compiler::render::Binding;
use metal_candle_compiler::{Operand, Plan, Slot, Step};
use smallvec::SmallVec;

/// Where a buffer starts: so many bytes into one of the run's allocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) base: usize,
    pub(crate) offset_bytes: usize,
}

/// The run's allocations, by number.
pub(crate) struct Bases;

impl Bases {
    pub(crate) const ARENA: usize = 0;
    /// Scratch memory of calls.
    pub(crate) const SCRATCH: usize = 1;
    pub(crate) const STATUS: usize = 2;
    pub(crate) const INPUTS: usize = 3;

    pub(crate) fn outputs(plan: &Plan) -> usize {
        Bases::INPUTS + plan.inputs.len()
    }
}

impl Place {
    pub(crate) fn new(plan: &Plan, step: &Step, binding: Binding) -> Place {
        let further = match binding {
            Binding::ArgAt { offset_bytes, .. }
            | Binding::OutAt { offset_bytes, .. }
            | Binding::Workspace { offset_bytes } => offset_bytes,
            Binding::Arg(_) | Binding::Out(_) | Binding::Status => 0,
        };
        let (base, start) = match operand(step, binding).map(|operand| operand.slot) {
            Some(Slot::Arena { offset_bytes, .. }) => (Bases::ARENA, offset_bytes),
            Some(Slot::Input(i)) => (Bases::INPUTS + i as usize, 0),
            Some(Slot::Output(i)) => (Bases::outputs(plan) + i as usize, 0),
            None if binding == Binding::Status => (Bases::STATUS, 0),
            None => (Bases::SCRATCH, 0),
        };
        Place { base, offset_bytes: start + further }
    }
}

/// The places of bindings of the step of this number, at multiples of so many bytes each.
///
/// # Errors
/// [`PlanFault::Misaligned`]
pub(crate) fn places(
    plan: &Plan,
    index: usize,
    bindings: &[Binding],
    align_bytes: usize,
) -> Result<SmallVec<[Place; 4]>> {
    let step = &plan.steps[index];
    let place = |binding: &Binding| {
        let place = Place::new(plan, step, *binding);
        if place.offset_bytes.is_multiple_of(align_bytes) {
            return Ok(place);
        }
        let (slot, dtype) = operand(step, *binding).map_or_else(
            || panic!("metal-candle bug: {binding:?} at {}", place.offset_bytes),
            |operand| (operand.slot, operand.dtype),
        );
        let (label, fault) = (step.label.clone(), PlanFault::Misaligned { slot, dtype });
        Err(Error::Plan { step: index, label, fault })
    };
    bindings.iter().map(place).collect()
}

impl Touched {
    /// What bindings of a step read and write.
    pub(crate) fn new(plan: &Plan, step: &Step, bindings: &[Binding]) -> Touched {
        let mut touched = Touched::default();
        for binding in bindings {
            let reads = matches!(binding, Binding::Arg(_) | Binding::ArgAt { .. });
            let touches = if reads { &mut touched.reads } else { &mut touched.writes };
            touches.extend(span(plan, step, *binding));
        }
        touched
    }
}

/// The bytes that an operand may touch; none of the status, to which all add alike.
fn span(plan: &Plan, step: &Step, binding: Binding) -> Option<Span> {
    let bytes = match operand(step, binding).map(|operand| operand.slot) {
        Some(Slot::Arena { offset_bytes, len_bytes }) => offset_bytes..offset_bytes + len_bytes,
        Some(Slot::Input(_) | Slot::Output(_)) | None => 0..usize::MAX,
    };
    let base = Place::new(plan, step, binding).base;
    (binding != Binding::Status).then_some(Span { base, bytes })
}

/// What of the step a binding names, if it is of the step.
pub(crate) fn operand(step: &Step, binding: Binding) -> Option<&Operand> {
    match binding {
        Binding::Arg(i) | Binding::ArgAt { arg: i, .. } => Some(&step.args[i as usize]),
        Binding::Out(i) | Binding::OutAt { out: i, .. } => Some(&step.outs[i as usize]),
        Binding::Workspace { .. } | Binding::Status => None,
    }
}
