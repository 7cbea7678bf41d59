//! Rewrites of a whole graph. Each is a function from a graph to a graph, made of
//! [`ComputationGraph::rebuild`](crate::ComputationGraph::rebuild).

mod expand;
mod simplify;
mod split_reduce;

pub use expand::expand;
pub use simplify::simplify;
pub use split_reduce::split_reductions;
