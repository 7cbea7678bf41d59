//! What can go wrong between a graph and a plan.

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error(transparent)]
    Graph(#[from] metal_candle_graph::Error),
    #[error("plan: the graph needs {bytes} bytes of scratch, more than can be addressed")]
    Arena { bytes: u128 },
}

pub type Result<T> = std::result::Result<T, Error>;
