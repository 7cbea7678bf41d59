//! Functions of functions: gradients and compilation.

mod compile;
mod grad;

pub use compile::{Compiled, InputSource, Outline, compile};
pub use grad::{grad, value_and_grad};
