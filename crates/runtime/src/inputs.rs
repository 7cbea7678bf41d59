//! The inputs of a plan: some are held for all runs, the others given to each.
//!
//! A model's weights are hundreds of buffers, the same in every run: they are checked and held once, so that a run looks at
//! what changes alone. What is held keeps a handle to its memory, which is therefore never donated nor written meanwhile.

use crate::buffer::Buffer;
use crate::{Device, Error, Result};
use metal_candle_compiler::{OutputSource, Plan, PlanInput, Slot};
use metal_candle_graph::DType;

/// What is known of a plan's inputs before a run.
pub(crate) struct Inputs {
    /// By input: its buffer, if it is held.
    held: Vec<Option<Buffer>>,
    /// The others, in the plan's order, as each run is given them.
    given: Vec<Given>,
    /// By input: its position among those, if it is not held.
    positions: Vec<Option<u32>>,
    device: Device,
}

/// An input that is not held. What runs look at lies together: between two of them everything has left the caches.
pub(crate) struct Given {
    pub(crate) input: u32,
    pub(crate) donated: bool,
    /// Whether a step or a result refers to it.
    used: bool,
    dtype: DType,
    len: usize,
}

impl Inputs {
    /// `held` is by input; if it is empty, nothing is held.
    ///
    /// # Errors
    /// [`Error::InputCount`], [`Error::InputType`], [`Error::InputDevice`]; [`Error::DonatedShared`] for one that is held
    /// and is to be donated.
    pub(crate) fn new(
        plan: &Plan,
        device: &Device,
        mut held: Vec<Option<Buffer>>,
    ) -> Result<Inputs> {
        let (expected, got) = (plan.inputs.len(), held.len());
        if got != expected && got != 0 {
            return Err(Error::InputCount { expected, got });
        }
        held.resize(expected, None);
        let used = used_inputs(plan);
        for (index, buffer) in held.iter().enumerate() {
            let Some(buffer) = buffer else { continue };
            if plan.inputs[index].donated {
                return Err(Error::DonatedShared { input: index });
            }
            if used[index] {
                check(index, buffer, &plan.inputs[index], device)?;
            }
        }
        let (mut given, mut positions) = (Vec::new(), vec![None; expected]);
        for (input, used) in used.into_iter().enumerate().filter(|(i, _)| held[*i].is_none()) {
            positions[input] = Some(given.len() as u32);
            let PlanInput { ty, donated } = plan.inputs[input];
            let (dtype, len) = (ty.dtype, ty.shape.len());
            given.push(Given { input: input as u32, donated, used, dtype, len });
        }
        Ok(Inputs { held, given, positions, device: *device })
    }

    /// # Errors
    /// [`Error::InputCount`], [`Error::InputType`], [`Error::InputDevice`] and [`Error::DonatedShared`].
    pub(crate) fn check(&self, plan: &Plan, given: &mut [Buffer]) -> Result<()> {
        let (expected, got) = (self.given.len(), given.len());
        if expected != got {
            return Err(Error::InputCount { expected, got });
        }
        for (buffer, of) in given.iter().zip(&self.given).filter(|(_, of)| of.used) {
            if of.dtype != buffer.dtype()
                || of.len != buffer.len()
                || buffer.device() != self.device
            {
                let index = of.input as usize;
                check(index, buffer, &plan.inputs[index], &self.device)?;
            }
        }
        for (buffer, of) in given.iter_mut().zip(&self.given) {
            if of.used && of.donated && !buffer.is_unique_now() {
                return Err(Error::DonatedShared { input: of.input as usize });
            }
        }
        Ok(())
    }

    /// The held buffers, each with its input.
    pub(crate) fn held(&self) -> impl Iterator<Item = (usize, &Buffer)> {
        self.held.iter().enumerate().filter_map(|(i, buffer)| Some((i, buffer.as_ref()?)))
    }

    /// The inputs that a run is given, in its order.
    pub(crate) fn given(&self) -> &[Given] {
        &self.given
    }

    /// The position of an input among those that a run is given, if it is not held.
    pub(crate) fn position(&self, input: u32) -> Option<u32> {
        self.positions[input as usize]
    }

    /// The buffer of an input.
    pub(crate) fn get<'a>(&'a self, input: usize, given: &'a [Buffer]) -> &'a Buffer {
        match (self.positions[input], &self.held[input]) {
            (Some(at), _) => &given[at as usize],
            (None, Some(buffer)) => buffer,
            (None, None) => panic!("metal-candle bug: an input that is neither held nor given"),
        }
    }

    /// All of them, in the plan's order.
    pub(crate) fn all(&self, given: Vec<Buffer>) -> Vec<Buffer> {
        if self.given.len() == self.held.len() {
            return given;
        }
        let mut given = given.into_iter();
        let mut next = || given.next().expect("metal-candle bug: an input was not given");
        self.held.iter().map(|held| held.clone().unwrap_or_else(&mut next)).collect()
    }
}

fn check(index: usize, buffer: &Buffer, input: &PlanInput, device: &Device) -> Result<()> {
    let (expected, got, len) = (input.ty, buffer.dtype(), buffer.len());
    if expected.dtype != got || expected.shape.len() != len {
        return Err(Error::InputType { index, expected, got, len });
    }
    let (expected, got) = (*device, buffer.device());
    if expected != got {
        return Err(Error::InputDevice { index, expected, got });
    }
    Ok(())
}

fn used_inputs(plan: &Plan) -> Vec<bool> {
    let mut used = vec![false; plan.inputs.len()];
    for operand in plan.steps.iter().flat_map(|s| s.args.iter().chain(&s.outs)) {
        if let Slot::Input(i) = operand.slot {
            used[i as usize] = true;
        }
    }
    for output in &plan.outputs {
        if let OutputSource::Input(i) | OutputSource::Donated(i) = output.source {
            used[i as usize] = true;
        }
    }
    used
}
