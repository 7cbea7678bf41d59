use super::{Rendezvous, World, WorldError};
use crate::{Device, Error, Result};
use metal_candle_graph::DType;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

fn at(port: u16, rank: usize, size: usize) -> Rendezvous {
    let local = Rendezvous::local(size, port);
    Rendezvous { rank, local_rank: rank, patience: Duration::from_secs(20), ..local }
}

/// Every rank in a thread of its own.
fn ranks<T: Send>(size: usize, f: impl Fn(Result<Arc<World>>) -> T + Sync) -> Vec<T> {
    told(&vec![size; size], f)
}

/// As many ranks as `sizes`, each told of so many.
fn told<T: Send>(sizes: &[usize], f: impl Fn(Result<Arc<World>>) -> T + Sync) -> Vec<T> {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::scope(|scope| {
        let (f, listener) = (&f, &listener);
        let start = |(rank, size): (usize, &usize)| {
            let meeting = at(port, rank, *size);
            scope.spawn(move || match rank {
                0 => f(World::host(listener, &meeting, &Device::Cpu, &mut || true)),
                _ => f(World::join(&meeting, &Device::Cpu)),
            })
        };
        let all: Vec<_> = sizes.iter().enumerate().map(start).collect();
        all.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b)).collect()
}

#[test]
fn a_sum_is_that_of_all_ranks_in_their_order_on_each() {
    let part = |rank: usize| [1e8, -1e8, 0.25, f32::NAN].map(|x| x * (rank as f32 - 1.0) + 0.1);
    let sums = ranks(3, |world| {
        let world = world.unwrap();
        let mut bytes: Vec<u8> = part(world.rank()).iter().flat_map(|x| x.to_ne_bytes()).collect();
        world.sum(&mut bytes, DType::F32).unwrap();
        let mut doubles: Vec<u8> = 0.5f64.to_ne_bytes().to_vec();
        world.sum(&mut doubles, DType::F64).unwrap();
        assert_eq!(doubles, 1.5f64.to_ne_bytes());
        floats(&bytes)
    });
    let want: Vec<f32> = (0..3).map(|i| part(0)[i] + part(1)[i] + part(2)[i]).collect();
    for sum in sums {
        assert_eq!(sum[..3], want);
        assert!(sum[3].is_nan());
    }
}

#[test]
fn a_rank_that_leaves_ends_the_others_with_its_number() {
    let start = Instant::now();
    let said = ranks(4, |world| {
        let world = world.unwrap();
        let mut bytes = vec![0; 4 << 20];
        world.sum(&mut bytes, DType::F32).unwrap();
        if world.rank() == 2 {
            return String::new();
        }
        let error = world.sum(&mut bytes, DType::F32).unwrap_err().to_string();
        assert_eq!(world.sum(&mut bytes, DType::F32).unwrap_err().to_string(), error);
        error
    });
    for rank in [0, 1, 3] {
        assert!(said[rank].starts_with("rank 2 has ended"), "{rank}: {}", said[rank]);
    }
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn ranks_that_add_different_things_are_told_apart() {
    let said = ranks(2, |world| {
        let world = world.unwrap();
        let mut bytes = vec![0; 8 * (1 + world.rank())];
        world.sum(&mut bytes, DType::F32).unwrap_err().to_string()
    });
    assert!(said[0].starts_with("rank 1 adds 16 bytes where rank 0 adds 8"), "{said:?}");
    assert!(said[1].starts_with("rank 0 has ended"), "{said:?}");
}

#[test]
fn ranks_that_were_told_of_different_worlds_do_not_meet() {
    let said = told(&[2, 3], |world| world.unwrap_err().to_string());
    assert!(said[0].contains("rank 1 was told of 3 ranks, rank 0 of 2"), "{said:?}");
    assert!(said[1].contains("refused") && said[1].contains("WORLD_SIZE"), "{said:?}");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let meeting = Rendezvous { patience: Duration::ZERO, ..at(0, 0, 3) };
    let error = World::host(&listener, &meeting, &Device::Cpu, &mut || true).unwrap_err();
    assert!(error.to_string().starts_with("ranks 1, 2 did not come"), "{error}");
    let error = World::host(&listener, &at(0, 0, 3), &Device::Cpu, &mut || false).unwrap_err();
    assert!(matches!(error, Error::World(WorldError::GivenUp)), "{error}");
}

#[test]
fn a_port_in_use_and_a_rank_0_that_is_not_there_are_errors_that_say_what_to_do() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let error = World::join(&at(port, 0, 2), &Device::Cpu).unwrap_err().to_string();
    assert!(error.contains(&port.to_string()) && error.contains("MASTER_PORT"), "{error}");
    drop(listener);
    let meeting = Rendezvous { patience: Duration::ZERO, ..at(port, 1, 2) };
    let error = World::join(&meeting, &Device::Cpu).unwrap_err().to_string();
    assert!(error.starts_with(&format!("no rank 0 at 127.0.0.1:{port}")), "{error}");
}

#[test]
fn strangers_neither_join_nor_stop_the_others() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::scope(|scope| {
        // Who knocks first is no rank.
        let mut stranger = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stranger.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let rank0 = scope.spawn(|| {
            World::host(&listener, &at(port, 0, 2), &Device::Cpu, &mut || true).map(drop)
        });
        World::join(&at(port, 1, 2), &Device::Cpu).unwrap();
        rank0.join().unwrap().unwrap();
    });
    // What answers may be no rank 0.
    thread::scope(|scope| {
        let server = scope.spawn(|| {
            let (mut link, _) = listener.accept().unwrap();
            link.set_nonblocking(false).unwrap();
            link.read_exact(&mut [0; 16]).unwrap();
            link.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
        });
        listener.set_nonblocking(false).unwrap();
        let error = World::join(&at(port, 1, 2), &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("is no rank 0"), "{error}");
        server.join().unwrap();
    });
}

#[test]
fn the_environment_of_a_launcher_is_read_and_half_of_one_refused() {
    let read = |set: &[(&str, &str)]| {
        let set: Vec<(String, String)> =
            set.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        let get = |name: &'static str| set.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone());
        Rendezvous::from_variables(&get)
    };
    assert_eq!(read(&[]).unwrap(), None);
    assert_eq!(read(&[("WORLD_SIZE", "1")]).unwrap(), None);
    assert_eq!(read(&[("WORLD_SIZE", "1"), ("RANK", "0")]).unwrap(), None);
    let two = [("RANK", "3"), ("WORLD_SIZE", "4")];
    let plain = read(&two).unwrap().unwrap();
    assert_eq!((plain.rank, plain.size, plain.local_rank), (3, 4, 3));
    assert_eq!(plain.to_string(), "127.0.0.1:29500");
    let rest = [("LOCAL_RANK", "1"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "4000")];
    let whole = read(&[&two[..], &rest].concat()).unwrap().unwrap();
    assert_eq!((whole.local_rank, whole.to_string().as_str()), (1, "node0:4000"));
    // torchrun's own store has that port.
    let agent = [("TORCHELASTIC_USE_AGENT_STORE", "True")];
    let agent = read(&[&two[..], &rest, &agent].concat()).unwrap().unwrap();
    assert_eq!(agent.port, 4001);
    for (set, part) in [
        (&[("RANK", "0")][..], "no WORLD_SIZE"),
        (&[("WORLD_SIZE", "2")], "no RANK"),
        (&[("WORLD_SIZE", "2"), ("RANK", "2")], "RANK=2"),
        (&[("WORLD_SIZE", "x"), ("RANK", "0")], "WORLD_SIZE=x"),
        (&[("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_PORT", "70000")], "MASTER_PORT=70000"),
    ] {
        let error = read(set).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
