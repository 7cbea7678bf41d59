//! What can go wrong between ranks.

use crate::Device;
use std::io;

/// What can go wrong between the ranks of a [`World`](crate::World).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorldError {
    #[error("the environment has {set}={value}, but no {missing}: a launcher sets both")]
    HalfSet { set: &'static str, value: String, missing: &'static str },
    #[error("the environment has {name}={got}: expected {expected}")]
    Variable { name: &'static str, got: String, expected: String },
    #[error(
        "rank 0 cannot listen on {address}: {source}; give all ranks another MASTER_PORT, and the address of this \
         machine as MASTER_ADDR"
    )]
    Listen { address: String, source: io::Error },
    #[error(
        "no rank 0 at {address} within {seconds} s ({source}): is it running, with the same MASTER_ADDR and MASTER_PORT?"
    )]
    Unreachable { address: String, seconds: u64, source: io::Error },
    #[error("{} did not come to rank 0 within {seconds} s: were they started, and what did they say?", ranks(.missing))]
    Missing { missing: Vec<usize>, seconds: u64 },
    #[error("another rank ended before all had met: see what it said")]
    GivenUp,
    #[error(
        "what answers at {address} is no rank 0 of this version: give all ranks another MASTER_PORT"
    )]
    Stranger { address: String },
    #[error(
        "rank {rank} was told of {got} ranks, rank 0 of {expected}: WORLD_SIZE must be the same"
    )]
    Size { rank: usize, expected: usize, got: usize },
    #[error("two processes say that they are rank {rank}: each needs a RANK of its own, from 0 to {}", size - 1)]
    Twice { rank: usize, size: usize },
    #[error("rank 0 at {address} refused: {reason}")]
    Refused { address: String, reason: String },
    #[error("rank {rank} has ended, and the others cannot go on without it: see what it said")]
    Lost { rank: usize },
    #[error(
        "rank {rank} adds {got} bytes where rank 0 adds {expected}: the ranks run different plans"
    )]
    Differ { rank: usize, expected: usize, got: usize },
    #[error("there are no sums over ranks on {device}: use cpu or cuda")]
    Device { device: Device },
    #[error("the plan is for {plan}, the ranks sum on {world}")]
    OtherDevice { plan: Device, world: Device },
    #[error(
        "several GPUs need NCCL, which could not be loaded: {cause}; install it (libnccl2 from NVIDIA's package \
         repository, or `pip install nvidia-nccl-cu12`), and have its folder in LD_LIBRARY_PATH or its path in \
         METAL_CANDLE_NCCL"
    )]
    Library { cause: String },
    /// What NCCL said.
    #[error("NCCL, {doing}: {message}")]
    Nccl { doing: &'static str, message: String },
}

fn ranks(missing: &[usize]) -> String {
    let numbers: Vec<String> = missing.iter().map(usize::to_string).collect();
    format!("rank{} {}", if missing.len() == 1 { "" } else { "s" }, numbers.join(", "))
}
