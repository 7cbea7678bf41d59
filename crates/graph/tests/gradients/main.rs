//! The laws of differentiation, checked on the f64 oracle.

mod check;
mod composites;
mod laws;
mod primitives;
