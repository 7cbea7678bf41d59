//! Rewrites of a whole graph. Each is a function from a graph to a graph, made of
//! [`ComputationGraph::rebuild`](crate::ComputationGraph::rebuild).

mod expand;
mod join_sums;
mod share;
mod simplify;
mod split_reduce;

pub use expand::expand;
pub use join_sums::join_sums;
pub use share::share_factors;
pub use simplify::simplify;
pub use split_reduce::split_reductions;
