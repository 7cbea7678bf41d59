//! What the ranks of a training share: the rows of a batch, and sums.

use crate::error::ErrorKind;
use crate::fnv::Fnv;
use crate::io::data::Batch;
use crate::{Compiled, LazyTensor, Result, World, compile};
use std::sync::Arc;

/// This rank among those that train one adapter.
pub(super) struct Ranks {
    world: Arc<World>,
    sum: Compiled,
}

impl Ranks {
    pub(super) fn new(world: Arc<World>) -> Ranks {
        let sum = compile(|args: &[LazyTensor]| Ok(vec![args[0].all_reduce()?]));
        let sum = sum.within(Arc::clone(&world));
        Ranks { world, sum }
    }

    pub(super) fn world(&self) -> &Arc<World> {
        &self.world
    }

    /// This rank's rows of a batch.
    ///
    /// # Errors
    /// Where the rows cannot be dealt evenly.
    pub(super) fn deal(&self, batch: &Batch) -> Result<Batch> {
        let (rows, ranks) = (batch.batch, self.world.size());
        if !rows.is_multiple_of(ranks) {
            return Err(ErrorKind::UnevenRows { rows, ranks }.into());
        }
        Ok(batch.every(ranks, self.world.rank()))
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// Where a rank is lost.
    pub(super) fn any(&self, says_so: bool) -> Result<bool> {
        Ok(self.sum(&[f32::from(u8::from(says_so))])?[0] > 0.0)
    }

    /// Sees that all ranks got the same text.
    ///
    /// # Errors
    /// Where this one differs from the others.
    pub(super) fn check_same(&self, text: &str) -> Result<()> {
        let mut hash = Fnv::default();
        text.bytes().for_each(|byte| hash.add(byte.into()));
        // Of 16 bits each: sums of as many as there are ranks are exact in f32.
        let parts: Vec<f32> =
            (0..4).map(|i| f32::from((hash.finish() >> (16 * i)) as u16)).collect();
        let mean = |sum: f32| f64::from(sum) / self.world.size() as f64;
        let same = self.sum(&parts)?.iter().zip(&parts).all(|(s, x)| mean(*s) == f64::from(*x));
        match same {
            true => Ok(()),
            false => Err(ErrorKind::RanksDiffer { rank: self.world.rank() }.into()),
        }
    }

    fn sum(&self, values: &[f32]) -> Result<Vec<f32>> {
        let values = LazyTensor::from_slice(values, &[values.len()], self.world.device())?;
        self.sum.call(vec![values])?[0].to_vec1()
    }
}

/// The sums of all these over the ranks, in one exchange.
pub(super) fn sums(parts: &[LazyTensor]) -> Result<Vec<LazyTensor>> {
    let flat = parts.iter().map(|part| part.reshape(&[part.elem_count()]));
    let flat = LazyTensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?.all_reduce()?;
    let mut start = 0;
    let cut = |part: &LazyTensor| {
        let len = part.elem_count();
        let sum = flat.narrow(0, start, len)?.reshape(part.dims())?;
        start += len;
        Ok(sum)
    };
    parts.iter().map(cut).collect()
}
