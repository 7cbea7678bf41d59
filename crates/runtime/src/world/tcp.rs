//! Sums in the host's memory, by way of rank 0.
//!
//! ```text
//! rank r > 0                                  rank 0
//!   len: u64, its numbers             ──────▶   adds them to its own, rank by rank
//!                                     ◀──────   OK: u32, the sums        or the number of a rank that is gone: u32
//! ```
//!
//! The order of the ranks is that of the additions, so a run's bits depend on nothing else. What is
//! added is in the machine's order: the ranks' machines are alike.

use super::{Links, WorldError};
use metal_candle_graph::DType;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// All went well; no rank has this number.
pub(super) const OK: u32 = u32::MAX;

/// The sums of one rank.
pub(super) struct Star {
    rank: usize,
    /// One sum at a time; `Err` is the rank that was lost.
    links: Mutex<Result<Links, usize>>,
}

impl Star {
    pub(super) fn new(rank: usize, links: Links) -> Star {
        Star { rank, links: Mutex::new(Ok(links)) }
    }

    /// Replaces the numbers in `bytes` by their sums over all ranks.
    ///
    /// # Errors
    /// [`WorldError::Lost`], now and from then on; [`WorldError::Differ`].
    pub(super) fn sum(&self, bytes: &mut [u8], dtype: DType) -> Result<(), WorldError> {
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let streams = match &mut *links {
            Ok(links) => &mut links.0,
            Err(rank) => return Err(WorldError::Lost { rank: *rank }),
        };
        let outcome = match self.rank {
            0 => lead(streams, bytes, dtype),
            _ => follow(&mut streams[0], bytes),
        };
        let Err(error) = &outcome else { return Ok(()) };
        let lost = if let WorldError::Lost { rank } = error { *rank } else { self.rank };
        if self.rank == 0 {
            tell(streams, lost);
        }
        // Closes them: nobody waits for a rank that has given up.
        *links = Err(lost);
        outcome
    }
}

/// How long a rank may take to hear that another one is gone.
const HEARING: Duration = Duration::from_secs(2);

/// Tells the other ranks which one is gone, and hears out those that are still speaking: a link that is closed on them would
/// take the word back.
pub(crate) fn tell(streams: &mut [TcpStream], lost: usize) {
    let mut others: Vec<&mut TcpStream> =
        (1..).zip(streams).filter(|(rank, _)| *rank != lost).map(|(_, stream)| stream).collect();
    // Who does not hear it sees the link closed.
    for stream in &mut others {
        let _ = stream.write_all(&(lost as u32).to_le_bytes());
        let _ = stream.shutdown(Shutdown::Write);
    }
    for stream in others {
        let _ = stream.set_read_timeout(Some(HEARING));
        let _ = io::copy(stream, &mut io::sink());
    }
}

fn lead(streams: &mut [TcpStream], bytes: &mut [u8], dtype: DType) -> Result<(), WorldError> {
    let mut part = vec![0; bytes.len()];
    for (rank, stream) in (1..).zip(&mut *streams) {
        let lost = |_: io::Error| WorldError::Lost { rank };
        let mut len = [0; 8];
        stream.read_exact(&mut len).map_err(lost)?;
        let (expected, got) = (bytes.len(), u64::from_le_bytes(len) as usize);
        if expected != got {
            return Err(WorldError::Differ { rank, expected, got });
        }
        stream.read_exact(&mut part).map_err(lost)?;
        add(bytes, &part, dtype);
    }
    for (rank, stream) in (1..).zip(streams) {
        let sent = stream.write_all(&OK.to_le_bytes()).and_then(|()| stream.write_all(bytes));
        sent.map_err(|_| WorldError::Lost { rank })?;
    }
    Ok(())
}

fn follow(stream: &mut TcpStream, bytes: &mut [u8]) -> Result<(), WorldError> {
    let mut exchange = || {
        let len = (bytes.len() as u64).to_le_bytes();
        // Where nobody reads on, what was said before tells why.
        let _ = stream.write_all(&len).and_then(|()| stream.write_all(bytes));
        let mut said = [0; 4];
        stream.read_exact(&mut said)?;
        match u32::from_le_bytes(said) {
            OK => stream.read_exact(bytes).map(|()| None),
            lost => Ok(Some(lost as usize)),
        }
    };
    match exchange() {
        Ok(None) => Ok(()),
        Ok(Some(rank)) => Err(WorldError::Lost { rank }),
        Err::<_, io::Error>(_) => Err(WorldError::Lost { rank: 0 }),
    }
}

fn add(sums: &mut [u8], part: &[u8], dtype: DType) {
    match dtype {
        DType::F32 => {
            for (sum, x) in sums.as_chunks_mut().0.iter_mut().zip(part.as_chunks().0) {
                *sum = (f32::from_ne_bytes(*sum) + f32::from_ne_bytes(*x)).to_ne_bytes();
            }
        }
        DType::F64 => {
            for (sum, x) in sums.as_chunks_mut().0.iter_mut().zip(part.as_chunks().0) {
                *sum = (f64::from_ne_bytes(*sum) + f64::from_ne_bytes(*x)).to_ne_bytes();
            }
        }
        other => panic!("metal-candle bug: a sum of {other} over ranks"),
    }
}
