//! `+ - * /` on tensors and numbers. They panic with the error that the method would return.

use crate::{LazyTensor, Result};
use metal_candle_graph::BinaryOp;
use std::ops;

#[track_caller]
fn must(result: Result<LazyTensor>) -> LazyTensor {
    match result {
        Ok(x) => x,
        Err(e) => panic!("{e}"),
    }
}

impl LazyTensor {
    #[track_caller]
    fn with_number(&self, op: BinaryOp, rhs: f64) -> Result<LazyTensor> {
        let rhs = self.scalar(op.as_str(), rhs)?;
        self.binary(op, &LazyTensor::constant(rhs, self.device()))
    }

    #[track_caller]
    fn after_number(&self, op: BinaryOp, lhs: f64) -> Result<LazyTensor> {
        let lhs = self.scalar(op.as_str(), lhs)?;
        LazyTensor::constant(lhs, self.device()).binary(op, self)
    }
}

/// `impl Trait<Rhs> for Lhs`, the result by `|lhs, rhs| body`.
macro_rules! operator {
    ($trait:ident, $method:ident, $lhs:ty, $rhs:ty, |$a:ident, $b:ident| $body:expr) => {
        impl ops::$trait<$rhs> for $lhs {
            type Output = LazyTensor;
            #[track_caller]
            fn $method(self, rhs: $rhs) -> LazyTensor {
                let ($a, $b) = (self, rhs);
                must($body)
            }
        }
    };
}

macro_rules! operators {
    ($($trait:ident, $method:ident;)*) => {$(
        operator!($trait, $method, &LazyTensor, &LazyTensor, |a, b| a.binary(BinaryOp::$trait, b));
        operator!($trait, $method, &LazyTensor, LazyTensor, |a, b| a.binary(BinaryOp::$trait, &b));
        operator!($trait, $method, LazyTensor, &LazyTensor, |a, b| a.binary(BinaryOp::$trait, b));
        operator!($trait, $method, LazyTensor, LazyTensor, |a, b| a.binary(BinaryOp::$trait, &b));
        operator!($trait, $method, &LazyTensor, f64, |a, b| a.with_number(BinaryOp::$trait, b));
        operator!($trait, $method, LazyTensor, f64, |a, b| a.with_number(BinaryOp::$trait, b));
        operator!($trait, $method, f64, &LazyTensor, |a, b| b.after_number(BinaryOp::$trait, a));
        operator!($trait, $method, f64, LazyTensor, |a, b| b.after_number(BinaryOp::$trait, a));
    )*};
}

operators! {
    Add, add;
    Sub, sub;
    Mul, mul;
    Div, div;
}

impl ops::Neg for &LazyTensor {
    type Output = LazyTensor;
    #[track_caller]
    fn neg(self) -> LazyTensor {
        must(LazyTensor::neg(self))
    }
}

impl ops::Neg for LazyTensor {
    type Output = LazyTensor;
    #[track_caller]
    fn neg(self) -> LazyTensor {
        must(LazyTensor::neg(&self))
    }
}

#[cfg(test)]
mod tests {
    use crate::{Device, LazyTensor};

    fn tensor(values: &[f32]) -> LazyTensor {
        LazyTensor::from_slice(values, &[values.len()], &Device::Cpu).unwrap()
    }

    #[test]
    fn operators_take_handles_references_and_numbers_on_both_sides() {
        let (a, b) = (tensor(&[1.0, 2.0]), tensor(&[4.0, 8.0]));
        let by_reference = &a + &b - &a * &b / &a;
        let by_value = a.clone() + b.clone() - a.clone() * b.clone() / a.clone();
        let mixed = &a + b.clone() - (a.clone() * &b) / &a;
        for x in [by_reference, by_value, mixed] {
            assert_eq!(x.to_vec1::<f32>().unwrap(), [1.0, 2.0]);
        }
        let numbers = 1.0 - (2.0 * &a + 1.0) / 2.0 - 8.0 / b;
        assert_eq!((-&numbers).to_vec1::<f32>().unwrap(), [2.5, 2.5]);
        assert_eq!((-(-numbers)).to_vec1::<f32>().unwrap(), [-2.5, -2.5]);
    }

    #[test]
    #[should_panic(expected = "add: shapes [2] and [3] do not broadcast together (at crates")]
    fn an_operator_panics_with_the_error_and_its_line() {
        let _ = tensor(&[1.0, 2.0]) + tensor(&[1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_number_that_the_dtype_has_not_is_refused() {
        let x = LazyTensor::from_slice(&[1u8, 2], &[2], &Device::Cpu).unwrap();
        for (mul, add) in [(0.5, 0.0), (1.0, -1.0), (256.0, 0.0), (f64::NAN, 0.0)] {
            assert!(x.affine(mul, add).is_err(), "{mul} {add}");
        }
        assert_eq!((&x * 255.0 - 1.0).to_vec1::<u8>().unwrap(), [254, 253]);
    }
}
