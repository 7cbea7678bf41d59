//! Processes that run the same plans in step, each on a part of the data, and add up what they found.
//!
//! ```text
//! Rendezvous ── who this process is, and where rank 0 is to be found
//!   meet ────── each of the others connects to rank 0, over TCP
//! World ─────── the ranks that have met, and how they sum
//!   tcp ─────── on the CPU: rank 0 adds
//!   cuda::nccl  on NVIDIA GPUs: NCCL does, on the device's stream
//! ```

mod error;
mod meet;
mod tcp;

#[cfg(feature = "cuda")]
use crate::cuda::Nccl;
use crate::{Device, Result};
pub use error::WorldError;
use metal_candle_graph::DType;
use std::fmt;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;
use tcp::Star;
#[cfg(feature = "cuda")]
pub(crate) use tcp::tell;

/// Who this process is among several, and where they meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendezvous {
    /// Which one this is, from 0.
    pub rank: usize,
    /// How many there are.
    pub size: usize,
    /// Which one of those on its machine: the number of its GPU.
    pub local_rank: usize,
    /// Rank 0's machine.
    pub address: String,
    /// The port on which rank 0 listens.
    pub port: u16,
    /// How long to wait for the others at first.
    pub patience: Duration,
}

/// How long ranks wait for each other at first, unless told otherwise.
const PATIENCE: Duration = Duration::from_secs(60);
/// As PyTorch's launchers have it.
const PORT: u16 = 29500;

impl Rendezvous {
    /// Rank 0 of `size` on this machine, which listens on `port`.
    pub fn local(size: usize, port: u16) -> Rendezvous {
        let (rank, local_rank, address) = (0, 0, "127.0.0.1".to_owned());
        Rendezvous { rank, size, local_rank, address, port, patience: PATIENCE }
    }

    /// What a launcher (torchrun, mpirun by a script) has put into `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and
    /// `MASTER_PORT`; `None` if this process is the only one.
    ///
    /// # Errors
    /// [`WorldError::HalfSet`], [`WorldError::Variable`].
    pub fn from_env() -> Result<Option<Rendezvous>> {
        Ok(Rendezvous::from_variables(&|name| std::env::var(name).ok())?)
    }

    fn from_variables(
        get: &dyn Fn(&'static str) -> Option<String>,
    ) -> std::result::Result<Option<Rendezvous>, WorldError> {
        let (rank, size) = match (get("RANK"), get("WORLD_SIZE")) {
            (None, None) => return Ok(None),
            (Some(rank), Some(size)) => (rank, size),
            (Some(value), None) => {
                return Err(WorldError::HalfSet { set: "RANK", value, missing: "WORLD_SIZE" });
            }
            // Some schedulers always set it.
            (None, Some(size)) if size == "1" => return Ok(None),
            (None, Some(value)) => {
                return Err(WorldError::HalfSet { set: "WORLD_SIZE", value, missing: "RANK" });
            }
        };
        let number = |name, got: String, below: usize, expected: String| {
            let parsed = got.parse::<usize>().ok().filter(|n| *n < below);
            parsed.ok_or(WorldError::Variable { name, got, expected })
        };
        let size = number("WORLD_SIZE", size, 1 << 16, "the number of ranks".into())?;
        let below = format!("a number below WORLD_SIZE, which is {size}");
        let rank = number("RANK", rank, size, below.clone())?;
        let local_rank = match get("LOCAL_RANK") {
            Some(local) => number("LOCAL_RANK", local, size, below)?,
            None => rank,
        };
        let port = match get("MASTER_PORT") {
            Some(port) => number("MASTER_PORT", port, 1 << 16, "a port".into())? as u16,
            None => PORT,
        };
        // The launcher itself listens on that port then.
        let is_taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        let port = if is_taken { port.wrapping_add(1) } else { port };
        let address = get("MASTER_ADDR").unwrap_or_else(|| "127.0.0.1".into());
        let rendezvous = Rendezvous { rank, size, local_rank, address, port, patience: PATIENCE };
        Ok((size > 1).then_some(rendezvous))
    }
}

impl fmt::Display for Rendezvous {
    /// Where rank 0 is.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.address, self.port)
    }
}

/// Rank 0's links to the others, rank 1's first; another rank's link to rank 0.
pub(crate) struct Links(pub(crate) Vec<TcpStream>);

/// The ranks that have met. A plan that runs in a world sums over all its ranks where the graph says
/// [`AllReduce`](metal_candle_graph::Operation::AllReduce); the ranks must run the same plans in the same order.
pub struct World {
    rank: usize,
    size: usize,
    device: Device,
    sums: Sums,
}

enum Sums {
    Host(Star),
    #[cfg(feature = "cuda")]
    Cuda(Nccl),
}

impl World {
    /// Meets the others. This rank computes on `device`.
    ///
    /// # Errors
    /// Where they cannot meet, by [`WorldError`]; [`Error::NotInBuild`](crate::Error::NotInBuild) and
    /// [`Error::NotInMachine`](crate::Error::NotInMachine) for the device.
    pub fn join(rendezvous: &Rendezvous, device: &Device) -> Result<Arc<World>> {
        World::prepare(device)?;
        if rendezvous.rank == 0 {
            let at = (rendezvous.address.as_str(), rendezvous.port);
            let listener = TcpListener::bind(at)
                .map_err(|source| WorldError::Listen { address: rendezvous.to_string(), source })?;
            return World::host(&listener, rendezvous, device, &mut || true);
        }
        let links = Links(vec![meet::reach(rendezvous)?]);
        World::of(rendezvous, device, links)
    }

    /// [`World::join`] of rank 0, where somebody has bound the port already: whoever starts the others, and can tell by
    /// `goes_on` whether they are still on their way.
    ///
    /// # Errors
    /// As [`World::join`]; [`WorldError::GivenUp`] when `goes_on` is false.
    pub fn host(
        listener: &TcpListener,
        rendezvous: &Rendezvous,
        device: &Device,
        goes_on: &mut dyn FnMut() -> bool,
    ) -> Result<Arc<World>> {
        World::prepare(device)?;
        let links = meet::gather(listener, rendezvous.size, rendezvous.patience, goes_on)?;
        World::of(rendezvous, device, Links(links))
    }

    /// What can fail without the others fails before they are met.
    fn prepare(device: &Device) -> Result<()> {
        match device {
            Device::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => Nccl::prepare(*number),
            device => {
                device.check()?;
                Err(WorldError::Device { device: *device }.into())
            }
        }
    }

    fn of(rendezvous: &Rendezvous, device: &Device, links: Links) -> Result<Arc<World>> {
        let Rendezvous { rank, size, .. } = *rendezvous;
        let sums = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(number) => Sums::Cuda(Nccl::new(*number, [rank, size], links)?),
            _ => Sums::Host(Star::new(rank, links)),
        };
        Ok(Arc::new(World { rank, size, device: *device, sums }))
    }

    /// Which rank this is, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub fn size(&self) -> usize {
        self.size
    }

    /// What this rank computes on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Replaces numbers in the host's memory by their sums.
    ///
    /// # Errors
    /// [`WorldError::Lost`], [`WorldError::Differ`].
    pub(crate) fn sum(&self, bytes: &mut [u8], dtype: DType) -> Result<()> {
        match &self.sums {
            Sums::Host(star) => Ok(star.sum(bytes, dtype)?),
            #[cfg(feature = "cuda")]
            Sums::Cuda(_) => panic!("metal-candle bug: a sum on the host among GPUs"),
        }
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn nccl(&self) -> &Nccl {
        match &self.sums {
            Sums::Cuda(nccl) => nccl,
            Sums::Host(_) => panic!("metal-candle bug: a sum on a GPU among hosts"),
        }
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World(rank {} of {}, {})", self.rank, self.size, self.device)
    }
}

#[cfg(test)]
mod tests;
