//! Dims counted from the front or from the back.

use crate::error::AtCaller;
use crate::{LazyTensor, Result};
use metal_candle_graph::Error;

/// A dim of a tensor: from 0 at the front, or negative from the back, -1 being the last.
///
/// Every integer and Candle's `D` convert to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dim(i64);

impl From<i32> for Dim {
    fn from(dim: i32) -> Dim {
        Dim(i64::from(dim))
    }
}

impl From<i64> for Dim {
    fn from(dim: i64) -> Dim {
        Dim(dim)
    }
}

impl From<usize> for Dim {
    fn from(dim: usize) -> Dim {
        // No tensor has that many dims: it is refused with the others that are out of range.
        Dim(i64::try_from(dim).unwrap_or(i64::MAX))
    }
}

impl From<candle_core::D> for Dim {
    fn from(dim: candle_core::D) -> Dim {
        match dim {
            candle_core::D::Minus1 => Dim(-1),
            candle_core::D::Minus2 => Dim(-2),
            candle_core::D::Minus(n) => Dim(i64::try_from(n).map_or(i64::MIN, |n| -n)),
        }
    }
}

impl Dim {
    /// The position among `rank` dims.
    fn within(self, op: &'static str, rank: usize) -> metal_candle_graph::Result<usize> {
        let Dim(dim) = self;
        let at = if dim < 0 { dim.saturating_add(rank as i64) } else { dim };
        let at = usize::try_from(at).ok().filter(|at| *at < rank);
        at.ok_or(Error::Dim { op, dim, rank })
    }
}

impl LazyTensor {
    /// The position of `dim`.
    #[track_caller]
    pub(super) fn dim_of(&self, op: &'static str, dim: impl Into<Dim>) -> Result<usize> {
        dim.into().within(op, self.rank()).at_caller()
    }

    /// The position of a dim that is to be inserted: one more than there are.
    #[track_caller]
    pub(super) fn new_dim_of(&self, op: &'static str, dim: impl Into<Dim>) -> Result<usize> {
        dim.into().within(op, self.rank() + 1).at_caller()
    }

    /// The positions of `dims`, each at most once.
    #[track_caller]
    pub(super) fn dims_of(
        &self,
        op: &'static str,
        dims: impl IntoIterator<Item = impl Into<Dim>>,
    ) -> Result<Vec<usize>> {
        let rank = self.rank();
        let mut found = Vec::new();
        let mut twice = false;
        for dim in dims {
            let dim = self.dim_of(op, dim)?;
            twice |= found.contains(&dim);
            found.push(dim);
        }
        if twice {
            return Err(Error::Dims { op, dims: found, rank }).at_caller();
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::Dim;
    use metal_candle_graph::Error;

    #[test]
    fn dims_count_from_both_ends_and_no_further() {
        let within = |dim: Dim| dim.within("test", 3).ok();
        assert_eq!([0, 1, 2, 3].map(|d: i32| within(d.into())), [Some(0), Some(1), Some(2), None]);
        assert_eq!([-1, -3, -4].map(|d: i32| within(d.into())), [Some(2), Some(0), None]);
        assert_eq!(within(candle_core::D::Minus2.into()), Some(1));
        assert_eq!([within(usize::MAX.into()), within(i64::MIN.into())], [None, None]);
        let error = Dim::from(-4).within("test", 3).unwrap_err();
        assert_eq!(error, Error::Dim { op: "test", dim: -4, rank: 3 });
    }
}
