//! Small values on their way between host and device.

use super::memory::STAGED_BYTES;
use metal_candle_compiler::render::Status;
use metal_candle_compiler::{OutputSource, Plan, PlanOutput};
use std::ops::Range;

/// Results of up to so many bytes come back to the host with the run.
const RETURNED_BYTES: usize = 1 << 20;
/// What every part of a workspace starts at a multiple of.
const ALIGN_BYTES: usize = 256;

/// Memory that the host and the device exchange: `[small inputs | status | small results]`. What the host holds of the
/// first goes there, the rest comes back in one copy.
pub(super) struct Staging {
    /// By input: where it lies if the host holds it.
    pub(super) inputs: Vec<Option<usize>>,
    /// By output: where it lies if it is small.
    pub(super) outputs: Vec<Option<usize>>,
    pub(super) status: usize,
    pub(super) len_bytes: usize,
}

impl Staging {
    pub(super) fn new(plan: &Plan) -> Staging {
        let mut len_bytes = 0;
        let mut place = |bytes: usize, limit: usize| {
            (bytes <= limit).then(|| {
                let at = len_bytes;
                len_bytes += bytes.next_multiple_of(ALIGN_BYTES);
                at
            })
        };
        let inputs =
            plan.inputs.iter().map(|input| place(input.ty.size_bytes(), STAGED_BYTES)).collect();
        let status = place(size_of::<Status>(), usize::MAX).expect("metal-candle bug: no status");
        let output = |o: &PlanOutput| match o.source {
            OutputSource::Written => place(o.ty.size_bytes(), RETURNED_BYTES),
            OutputSource::Donated(_) | OutputSource::Input(_) | OutputSource::SameAs(_) => None,
        };
        let outputs = plan.outputs.iter().map(output).collect();
        Staging { inputs, outputs, status, len_bytes }
    }
}

/// Adds a range behind the others; one that follows closely makes the last longer, as a copy costs more than its bytes.
pub(super) fn join(ranges: &mut Vec<Range<usize>>, next: Range<usize>) {
    const CLOSE_BYTES: usize = 16 << 10;
    match ranges.last_mut() {
        Some(last) if next.start - last.end <= CLOSE_BYTES => last.end = next.end,
        _ => ranges.push(next),
    }
}
