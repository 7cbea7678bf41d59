//! Ways to break a file.

use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

/// One change to a file's bytes. Places are mostly near the beginning, where headers are.
#[derive(Clone, Debug)]
pub(crate) enum Damage {
    Cut(Index),
    Byte(Place, u8),
    /// Eight bytes: a length, an offset, a count.
    Word(Place, u64),
    Insert(Place, Vec<u8>),
    Delete(Place, usize),
    Repeat(Place, usize),
    /// Another number in place of one in a text.
    Number(Index, &'static str),
    /// So many brackets.
    Nest(Place, usize),
}

#[derive(Clone, Debug)]
pub(crate) struct Place {
    at: Index,
    near: bool,
}

const HEADER_BYTES: usize = 4096;
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "0.5",
    "1e999",
    "null",
    "4294967296",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "99999999999999999999999",
    "\"7\"",
];

fn place() -> impl Strategy<Value = Place> {
    (any::<Index>(), prop::bool::weighted(0.8)).prop_map(|(at, near)| Place { at, near })
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        select(vec![0, 1, 1 << 20, 1 << 31, 1 << 32, 1 << 62, 1 << 63, u64::MAX - 7, u64::MAX]),
        any::<u64>(),
    ]
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        1 => any::<Index>().prop_map(Damage::Cut),
        3 => (place(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        3 => (place(), word()).prop_map(|(at, word)| Damage::Word(at, word)),
        2 => (place(), prop::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        2 => (place(), 1usize..40).prop_map(|(at, len)| Damage::Delete(at, len)),
        2 => (place(), 1usize..200).prop_map(|(at, len)| Damage::Repeat(at, len)),
        4 => (any::<Index>(), select(NUMBERS.to_vec()))
            .prop_map(|(at, number)| Damage::Number(at, number)),
        1 => (place(), 1usize..100_000).prop_map(|(at, depth)| Damage::Nest(at, depth)),
    ]
}

impl Place {
    fn of(&self, bytes: &[u8]) -> usize {
        let near = if self.near { HEADER_BYTES } else { usize::MAX };
        self.at.index(bytes.len().min(near).max(1)).min(bytes.len())
    }
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        let end = |at: usize, len: usize, bytes: &[u8]| (at + len).min(bytes.len());
        match self {
            Damage::Cut(at) => bytes.truncate(at.index(bytes.len() + 1)),
            Damage::Byte(at, byte) => {
                let at = at.of(bytes);
                bytes.splice(at..end(at, 1, bytes), [*byte]);
            }
            Damage::Word(at, word) => {
                let at = at.of(bytes);
                bytes.splice(at..end(at, 8, bytes), word.to_le_bytes());
            }
            Damage::Insert(at, more) => {
                let at = at.of(bytes);
                bytes.splice(at..at, more.iter().copied());
            }
            Damage::Delete(at, len) => {
                let at = at.of(bytes);
                bytes.drain(at..end(at, *len, bytes));
            }
            Damage::Repeat(at, len) => {
                let at = at.of(bytes);
                let part = bytes[at..end(at, *len, bytes)].to_vec();
                bytes.splice(at..at, part);
            }
            Damage::Number(at, number) => {
                let head = &bytes[..bytes.len().min(HEADER_BYTES)];
                let starts = |i: &usize| {
                    head[*i].is_ascii_digit() && (*i == 0 || !head[*i - 1].is_ascii_digit())
                };
                let starts: Vec<usize> = (0..head.len()).filter(starts).collect();
                if !starts.is_empty() {
                    let at = *at.get(&starts);
                    let len = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                    bytes.splice(at..at + len, number.bytes());
                }
            }
            Damage::Nest(at, depth) => {
                let at = at.of(bytes);
                bytes.splice(at..at, std::iter::repeat_n(b'[', *depth));
            }
        }
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().expect(name))
}

/// Calls `check` with broken variants of `whole`, always the same ones.
pub(crate) fn each(whole: &[u8], cases: u32, check: impl Fn(&[u8])) {
    let cases = setting("METAL_CANDLE_FUZZ_CASES", cases.into());
    let config = Config {
        cases: u32::try_from(cases).unwrap(),
        failure_persistence: None,
        ..Config::default()
    };
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&setting("METAL_CANDLE_FUZZ_SEED", 0).to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let some = prop::collection::vec(damage(), 1..4);
    let outcome = runner.run(&some, |damage| {
        let mut bytes = whole.to_vec();
        damage.iter().for_each(|damage| damage.apply(&mut bytes));
        check(&bytes);
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}
