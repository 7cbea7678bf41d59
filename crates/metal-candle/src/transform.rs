//! Functions of functions: gradients and compilation.

mod compile;
mod grad;
mod recording;

pub(crate) use compile::Underway;
pub use compile::{Compiled, InputSource, Outline, compile};
pub use grad::{grad, value_and_grad};
pub use recording::Recording;
