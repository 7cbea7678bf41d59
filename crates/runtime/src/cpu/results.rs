//! The results of a run: where each of them is, and the memory of those that the steps write.

use crate::buffer::Buffer;
use crate::element::Data;
use crate::inputs::Inputs;
use crate::pages::{LARGE_BYTES, prefer_huge};
use crate::spares::Spares;
use crate::{Error, Result, verify};
use metal_candle_compiler::{OutputSource, Plan, PlanOutput};
use std::sync::Arc;

/// What is known of a plan's results before a run.
pub(super) struct Results {
    sources: Vec<Source>,
    /// If runs are to use the memory of earlier results.
    spares: Option<Arc<Spares>>,
}

/// Where a result is, once every step has run.
#[derive(Clone, Copy)]
enum Source {
    /// In memory that the steps write. Fresh memory must be zeroed before if that is said: it may not all be written.
    Written {
        zeroed: bool,
    },
    /// At this position among what the run is given: handed on if it was given away, and this is its only result.
    Given {
        at: u32,
        handed_on: bool,
    },
    /// An input that is held.
    Held(u32),
    SameAs(u32),
}

impl Source {
    fn new(plan: &Plan, inputs: &Inputs, index: usize) -> Source {
        let source = plan.outputs[index].source;
        match source {
            OutputSource::Written => {
                Source::Written { zeroed: !verify::is_written_whole(plan, index) }
            }
            OutputSource::SameAs(i) => Source::SameAs(i),
            OutputSource::Donated(i) | OutputSource::Input(i) => match inputs.position(i) {
                Some(at) => {
                    let given = plan.outputs.iter().all(|o| o.source != OutputSource::Input(i));
                    Source::Given { at, handed_on: given }
                }
                None => Source::Held(i),
            },
        }
    }
}

impl Results {
    pub(super) fn new(plan: &Plan, inputs: &Inputs) -> Results {
        let sources = (0..plan.outputs.len()).map(|i| Source::new(plan, inputs, i)).collect();
        Results { sources, spares: None }
    }

    pub(super) fn keep_spares(&mut self) {
        self.spares = Some(Arc::new(Spares::new(self.sources.len())));
    }

    pub(super) fn spare_bytes(&self) -> usize {
        self.spares.as_ref().map_or(0, |spares| spares.bytes())
    }

    /// Memory for the results that the steps write, by number.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]
    pub(super) fn allocate(&self, plan: &Plan, to: &mut Vec<(u32, Data)>) -> Result<()> {
        to.clear();
        for (i, source) in self.sources.iter().enumerate() {
            let Source::Written { zeroed } = *source else { continue };
            let data = match self.spares.as_ref().and_then(|spares| spares.take(i)) {
                // An earlier result: as in the arena, steps find what a run before this one has left.
                Some(spare) => spare,
                None => fresh(&plan.outputs[i], zeroed)?,
            };
            to.push((i as u32, data));
        }
        Ok(())
    }

    /// The results, once every step has run with what was [allocated](Results::allocate).
    pub(super) fn collect(
        &self,
        plan: &Plan,
        inputs: &Inputs,
        written: &mut Vec<(u32, Data)>,
        given: Vec<Buffer>,
    ) -> Vec<Buffer> {
        let mut given: Vec<Option<Buffer>> = given.into_iter().map(Some).collect();
        let mut written = written.drain(..);
        let mut results: Vec<Buffer> = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            let result = match *source {
                Source::Written { .. } => written.next().map(|(output, mut data)| {
                    // SAFETY: `allocate` made room for these, and the steps have written every one, or it has, or a run
                    // before this one, whose result they were.
                    unsafe { data.set_len(plan.outputs[output as usize].ty.shape.len()) };
                    self.buffer(data, output as usize)
                }),
                Source::Given { at, handed_on: true } => given[at as usize].take(),
                Source::Given { at, handed_on: false } => given[at as usize].clone(),
                Source::Held(i) => Some(inputs.get(i as usize, &[]).clone()),
                Source::SameAs(i) => Some(results[i as usize].clone()),
            };
            results.push(result.expect("metal-candle bug: a result without memory"));
        }
        results
    }

    fn buffer(&self, data: Data, output: usize) -> Buffer {
        match &self.spares {
            Some(spares) if data.size_bytes() >= LARGE_BYTES => Buffer::lent(data, spares, output),
            _ => Buffer::from_data(data),
        }
    }
}

/// Memory from the system for a result.
fn fresh(output: &PlanOutput, zeroed: bool) -> Result<Data> {
    let (dtype, len) = (output.ty.dtype, output.ty.shape.len());
    let data = if zeroed { Data::zeroed(dtype, len) } else { Data::with_capacity(dtype, len) };
    let out_of_memory = || Error::OutOfMemory {
        what: format!("a result {}", output.ty),
        bytes: output.ty.size_bytes(),
    };
    let mut data = data.ok_or_else(out_of_memory)?;
    prefer_huge(data.as_mut_ptr(), output.ty.size_bytes());
    Ok(data)
}
