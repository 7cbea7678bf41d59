//! Several processes that train one adapter: `--gpus` starts them; or a launcher has, and says so by `RANK` and
//! `WORLD_SIZE`.

use super::Args;
use crate::ui::{note, silence};
use anyhow::{Context, Result, bail};
use metal_candle::{Device, Rendezvous, World};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Who takes part, and where this process computes.
pub(super) struct Ranks {
    pub(super) device: Device,
    pub(super) world: Option<Arc<World>>,
    /// The other ranks, where this process has started them.
    children: Vec<Child>,
}

/// How long ranks that were started here may take to end after this one.
const PATIENCE: Duration = Duration::from_secs(10);

impl Ranks {
    /// Meets the others, if there are any.
    ///
    /// # Errors
    /// Where `--gpus`, `--device`, the environment and the machine do not go together, or the ranks cannot meet.
    pub(super) fn meet(args: &Args) -> Result<Ranks> {
        let named = args.model.device().named();
        match (Rendezvous::from_env()?, args.gpus.map(usize::from)) {
            (Some(meeting), gpus) => {
                if let Some(gpus) = gpus.filter(|gpus| *gpus != meeting.size) {
                    bail!(
                        "--gpus {gpus} starts processes of its own, but this one was started as one of {} \
                         (WORLD_SIZE): leave --gpus out",
                        meeting.size
                    );
                }
                let device = match named {
                    Device::Cuda(0) => Device::Cuda(meeting.local_rank as u32),
                    other => other,
                };
                Ranks::join(&meeting, device)
            }
            (None, None | Some(1)) => {
                let device = args.model.device().present()?;
                Ok(Ranks { device, world: None, children: Vec::new() })
            }
            (None, Some(gpus)) => {
                if args.model.device().is_chosen() && named != Device::Cuda(0) {
                    bail!("--gpus {gpus}: expected --device auto or cuda, got {named}");
                }
                Device::Cuda(gpus as u32 - 1).check()?;
                Ranks::start(gpus)
            }
        }
    }

    fn join(meeting: &Rendezvous, device: Device) -> Result<Ranks> {
        let rank = meeting.rank;
        if rank > 0 {
            silence();
        }
        let world = device.check().and_then(|()| World::join(meeting, &device));
        let world = world.with_context(|| format!("rank {rank}"))?;
        Ok(Ranks { device, world: Some(world), children: Vec::new() })
    }

    /// Starts the other ranks: this command again, told which one it is.
    fn start(size: usize) -> Result<Ranks> {
        let listener = TcpListener::bind("127.0.0.1:0").context("no port to meet on")?;
        let meeting = Rendezvous::local(size, listener.local_addr()?.port());
        let program = std::env::current_exe().context("this program, to be started again")?;
        let device = Device::Cuda(0);
        let mut ranks = Ranks { device, world: None, children: Vec::new() };
        for rank in 1..size {
            let mut command = Command::new(&program);
            command.args(std::env::args_os().skip(1)).stdin(Stdio::null()).stdout(Stdio::null());
            command.env("RANK", rank.to_string()).env("LOCAL_RANK", rank.to_string());
            command.env("WORLD_SIZE", size.to_string()).env("MASTER_ADDR", &meeting.address);
            command.env("MASTER_PORT", meeting.port.to_string());
            command.env_remove("TORCHELASTIC_USE_AGENT_STORE");
            ranks.children.push(command.spawn().with_context(|| format!("starting rank {rank}"))?);
        }
        let children = &mut ranks.children;
        let mut goes_on = || children.iter_mut().all(|child| matches!(child.try_wait(), Ok(None)));
        ranks.world = Some(World::host(&listener, &meeting, &device, &mut goes_on)?);
        note!("ranks: {size}, one on each of cuda:0 to cuda:{}", size - 1);
        Ok(ranks)
    }

    /// Whether it is for this process to say and to write something.
    pub(super) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    fn rank(&self) -> usize {
        self.world.as_ref().map_or(0, |world| world.rank())
    }

    /// What went wrong, with the rank that says so unless it is the first.
    pub(super) fn blame<T>(&self, outcome: Result<T>) -> Result<T> {
        match self.rank() {
            0 => outcome,
            rank => outcome.with_context(|| format!("rank {rank}")),
        }
    }
}

impl Drop for Ranks {
    /// Waits for those that were started here: a rank ends when the others have.
    fn drop(&mut self) {
        self.world = None;
        let start = Instant::now();
        for child in &mut self.children {
            while matches!(child.try_wait(), Ok(None)) && start.elapsed() < PATIENCE {
                sleep(Duration::from_millis(10));
            }
            // One that has ended is no error.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
