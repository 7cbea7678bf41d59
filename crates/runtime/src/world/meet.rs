//! How the ranks meet: each of the others connects to rank 0, which lets them go on once all are there.
//!
//! ```text
//! rank r > 0                                  rank 0
//!   MAGIC, r: u32, size: u32          ──────▶
//!                                     ◀──────   MAGIC, 0: u32            once all have come
//!                                     ◀──────   MAGIC, n: u32, n bytes   of why not
//! ```
//!
//! Numbers are little-endian. Whoever says something else, a port scanner say, is not listened to.

use super::{Rendezvous, WorldError};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Names the program and the version of what is said.
const MAGIC: [u8; 8] = *b"mcranks1";
/// What a rank has to say comes at once.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(20);
/// Longer than any reason.
const REASON_BYTES: usize = 4096;

/// Rank 0's links to the others, rank 1's first. Gives up when `goes_on` is false.
///
/// # Errors
/// [`WorldError::Missing`], [`WorldError::GivenUp`], [`WorldError::Size`], [`WorldError::Twice`]; the other ranks are
/// told.
pub(super) fn gather(
    listener: &TcpListener,
    size: usize,
    patience: Duration,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<Vec<TcpStream>, WorldError> {
    let mut links: Vec<Option<TcpStream>> = (1..size).map(|_| None).collect();
    let outcome = collect(listener, &mut links, patience, goes_on);
    let said = outcome.as_ref().map_or_else(ToString::to_string, |()| String::new());
    for link in links.iter_mut().flatten() {
        // Who has left meanwhile is missed at the first sum.
        let _ = answer(link, &said);
    }
    outcome?;
    Ok(links.into_iter().flatten().collect())
}

fn collect(
    listener: &TcpListener,
    links: &mut [Option<TcpStream>],
    patience: Duration,
    goes_on: &mut dyn FnMut() -> bool,
) -> Result<(), WorldError> {
    let address = || listener.local_addr().map_or_else(|_| "?".into(), |a| a.to_string());
    let failed = |source| WorldError::Listen { address: address(), source };
    listener.set_nonblocking(true).map_err(failed)?;
    let (start, size) = (Instant::now(), links.len() + 1);
    while links.iter().any(Option::is_none) {
        let mut link = match listener.accept() {
            Ok((link, _)) => link,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if !goes_on() {
                    return Err(WorldError::GivenUp);
                }
                if start.elapsed() > patience {
                    let missing = (1..size).filter(|rank| links[rank - 1].is_none()).collect();
                    return Err(WorldError::Missing { missing, seconds: patience.as_secs() });
                }
                sleep(PAUSE);
                continue;
            }
            Err(source) => return Err(failed(source)),
        };
        let Ok([rank, told]) = hear(&mut link) else { continue };
        let fault = match (1..size).contains(&rank) {
            _ if told != size => Some(WorldError::Size { rank, expected: size, got: told }),
            true if links[rank - 1].is_none() => None,
            _ => Some(WorldError::Twice { rank, size }),
        };
        if let Some(fault) = fault {
            let _ = answer(&mut link, &fault.to_string());
            return Err(fault);
        }
        links[rank - 1] = Some(link);
    }
    Ok(())
}

/// The rank and the size that a newcomer was told.
fn hear(link: &mut TcpStream) -> io::Result<[usize; 2]> {
    link.set_nonblocking(false)?;
    link.set_read_timeout(Some(HELLO_PATIENCE))?;
    let mut magic = [0; MAGIC.len()];
    link.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(ErrorKind::InvalidData.into());
    }
    let numbers = [number(link)?, number(link)?];
    ready(link)?;
    Ok(numbers)
}

/// Waits for as long as it takes from now on, and sends small things at once.
fn ready(link: &TcpStream) -> io::Result<()> {
    link.set_read_timeout(None)?;
    link.set_nodelay(true)
}

fn number(link: &mut TcpStream) -> io::Result<usize> {
    let mut bytes = [0; 4];
    link.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes) as usize)
}

fn answer(link: &mut TcpStream, reason: &str) -> io::Result<()> {
    let len = (reason.len() as u32).to_le_bytes();
    link.write_all(&[&MAGIC[..], &len, reason.as_bytes()].concat())
}

/// This rank's link to rank 0.
///
/// # Errors
/// [`WorldError::Unreachable`], [`WorldError::Stranger`], [`WorldError::Refused`].
pub(super) fn reach(rendezvous: &Rendezvous) -> Result<TcpStream, WorldError> {
    let address = rendezvous.to_string();
    let patience = rendezvous.patience;
    let start = Instant::now();
    let mut link = loop {
        match connect(rendezvous) {
            Ok(link) => break link,
            Err(source) if start.elapsed() > patience => {
                return Err(WorldError::Unreachable {
                    address,
                    seconds: patience.as_secs(),
                    source,
                });
            }
            Err(_) => sleep(5 * PAUSE),
        }
    };
    // Rank 0 waits for the others, too.
    let left = patience.saturating_sub(start.elapsed()) + patience + HELLO_PATIENCE;
    let reason = introduce(&mut link, rendezvous, left).map_err(|e| match e.kind() {
        ErrorKind::InvalidData => WorldError::Stranger { address: address.clone() },
        _ => {
            let (address, seconds) = (address.clone(), patience.as_secs());
            WorldError::Unreachable { address, seconds, source: e }
        }
    })?;
    match reason {
        reason if reason.is_empty() => Ok(link),
        reason => Err(WorldError::Refused { address, reason }),
    }
}

fn connect(rendezvous: &Rendezvous) -> io::Result<TcpStream> {
    let all = (rendezvous.address.as_str(), rendezvous.port).to_socket_addrs()?;
    let mut last = io::Error::from(ErrorKind::AddrNotAvailable);
    for address in all {
        match attempt(&address) {
            Ok(link) => return Ok(link),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn attempt(address: &SocketAddr) -> io::Result<TcpStream> {
    let link = TcpStream::connect_timeout(address, HELLO_PATIENCE)?;
    // A port from which connections go out, too, may by chance meet itself.
    match link.local_addr()? == link.peer_addr()? {
        true => Err(ErrorKind::ConnectionRefused.into()),
        false => Ok(link),
    }
}

/// Says who this is, and waits for the others. Returns rank 0's reason against it, or nothing.
fn introduce(
    link: &mut TcpStream,
    rendezvous: &Rendezvous,
    patience: Duration,
) -> io::Result<String> {
    let [rank, size] = [rendezvous.rank, rendezvous.size].map(|n| (n as u32).to_le_bytes());
    link.write_all(&[&MAGIC[..], &rank, &size].concat())?;
    link.set_read_timeout(Some(patience))?;
    let mut magic = [0; MAGIC.len()];
    link.read_exact(&mut magic)?;
    let len = number(link)?;
    if magic != MAGIC || len > REASON_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut reason = vec![0; len];
    link.read_exact(&mut reason)?;
    ready(link)?;
    Ok(String::from_utf8_lossy(&reason).into_owned())
}
