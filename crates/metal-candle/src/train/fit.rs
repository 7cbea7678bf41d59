//! Whether a step's memory is there, and for which step it would be.

use super::StepShape;
use crate::error::ErrorKind;
use crate::{Device, Plan, Result, Workspace};

/// Rows shorter than this are not worth proposing.
const SHORTEST: usize = 32;

/// Sees that what a step of `shape` allocates, by itself and in workspaces, is free on the device; one that does not say is
/// believed to have it.
///
/// # Errors
/// [`ErrorKind::StepMemory`]; what planning a step says.
pub(super) fn check(
    device: &Device,
    shape: StepShape,
    plan: impl Fn(StepShape) -> Result<(Plan, Vec<Workspace>)>,
) -> Result<()> {
    let Some(memory) = device.memory() else { return Ok(()) };
    let wanted = |shape| {
        let (plan, workspaces) = plan(shape)?;
        // What all plans share is there already.
        let own = workspaces.into_iter().filter(|workspace| !workspace.shared);
        Ok(plan.allocated_bytes() + own.map(|workspace| workspace.bytes).sum::<usize>())
    };
    compare(*device, shape, memory.free_bytes, wanted)
}

fn compare(
    device: Device,
    shape: StepShape,
    free_bytes: usize,
    wanted: impl Fn(StepShape) -> Result<usize>,
) -> Result<()> {
    let wanted_bytes = wanted(shape)?;
    if wanted_bytes <= free_bytes {
        return Ok(());
    }
    let mut fits = None;
    let mut smaller = shape;
    while fits.is_none() {
        match smaller {
            StepShape { batch: 2.., .. } => smaller.batch /= 2,
            StepShape { seq, .. } if seq >= 2 * SHORTEST => smaller.seq /= 2,
            _ => break,
        }
        fits = (wanted(smaller)? <= free_bytes).then_some([smaller.batch, smaller.seq]);
    }
    let of = [shape.batch, shape.seq];
    Err(ErrorKind::StepMemory { device, of, wanted_bytes, free_bytes, fits }.into())
}

#[cfg(test)]
mod tests {
    use super::{StepShape, compare};
    use crate::{Device, ErrorKind};

    /// A step wants a KiB for each token, and one for itself.
    fn fitted(batch: usize, seq: usize, free_kib: usize) -> Result<(), Option<[usize; 2]>> {
        let shape = StepShape { batch, seq, accumulated: 1, packed: false };
        let wanted = |shape: StepShape| Ok((shape.batch * shape.seq + 1) << 10);
        compare(Device::Cpu, shape, free_kib << 10, wanted).map_err(|error| {
            let ErrorKind::StepMemory { fits, .. } = error.kind() else { panic!("{error}") };
            let message = error.to_string();
            assert!(message.contains("cpu"), "{message}");
            let proposed = fits.map(|[batch, seq]| format!("{batch} x {seq} would fit"));
            assert!(proposed.is_none_or(|text| message.contains(&text)), "{message}");
            *fits
        })
    }

    #[test]
    fn the_largest_half_that_fits_is_proposed() {
        assert_eq!(fitted(16, 1024, 20_000), Ok(()));
        assert_eq!(fitted(16, 1024, 16_384), Err(Some([8, 1024])));
        assert_eq!(fitted(16, 1024, 2_000), Err(Some([1, 1024])));
        assert_eq!(fitted(16, 1024, 600), Err(Some([1, 512])));
        assert_eq!(fitted(16, 1024, 20), Err(None));
    }
}
