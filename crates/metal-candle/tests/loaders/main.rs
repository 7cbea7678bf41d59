//! Files that are broken on purpose: whatever is in them, they are read or refused in one line that names the
//! file, without a panic and in memory of a small multiple of their size. And files that are whole: their
//! weights stay where they are.
//!
//! `METAL_CANDLE_FUZZ_CASES` asks for another number of broken files per kind, `METAL_CANDLE_FUZZ_SEED` for
//! others than CI's.

#[path = "../../../runtime/tests/support/counting.rs"]
#[allow(unsafe_code, reason = "an allocator cannot do without; the file belongs to the runtime")]
#[allow(dead_code, reason = "shared with other tests")]
mod counting;
mod damage;
mod hostile;
mod kinds;
#[path = "../support/random_model.rs"]
mod random_model;
#[path = "../io/support.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod support;
#[path = "../support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;
#[path = "../regressions/tiny.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod tiny;

use candle_core::DType as CandleDType;
use counting::{Counting, watch};
use metal_candle::models::BaseWeights;
use random_model::{HIDDEN, INNER, model};
use std::fs;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use testbed::decoder;

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations of other threads would be counted too.
fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a loader may allocate beside a multiple of the file: tables of a tokenizer, regular expressions.
const CONSTANT_BYTES: usize = 4 << 20;
/// How many bytes one of the file may become: a byte of an array becomes a value of 32 bytes.
const MULTIPLE: usize = 64;

/// Loads a file that may be anything; returns the refusal.
#[track_caller]
fn load(path: &Path, loader: impl FnOnce() -> Result<(), String>) -> Option<String> {
    let len = fs::metadata(path).unwrap().len() as usize;
    let started = Instant::now();
    let (result, allocated) = watch(loader);
    let name = path.display().to_string();
    assert!(started.elapsed() < Duration::from_secs(30), "{name} took {:?}", started.elapsed());
    let most = CONSTANT_BYTES + MULTIPLE * len;
    assert!(allocated.peak_bytes <= most, "{allocated:?} for the {len} bytes of {name}");
    let message = result.err()?;
    assert!(message.contains(&name), "the message does not name {name}: {message}");
    assert!(!message.contains('\n'), "not one line: {message}");
    Some(message)
}

#[test]
fn weights_that_are_stored_as_asked_for_stay_in_the_file() {
    let _alone = alone();
    let cases = [
        (CandleDType::F32, BaseWeights::F32),
        (CandleDType::F32, BaseWeights::AsStored),
        (CandleDType::BF16, BaseWeights::BF16),
        (CandleDType::F16, BaseWeights::F16),
    ];
    for (stored, base) in cases {
        let folder = model(stored, stored);
        let file_bytes = fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
        let (_decoder, allocated) = watch(|| decoder(folder.path(), base));
        // The header, but no matrix.
        assert!(allocated.largest * 4 < HIDDEN * INNER * 4, "{stored:?}: {allocated:?}");
        assert!(allocated.peak_bytes as u64 * 4 < file_bytes, "{stored:?}: {allocated:?}");
    }
    // One that is stored otherwise is made anew.
    let folder = model(CandleDType::BF16, CandleDType::BF16);
    let (_decoder, allocated) = watch(|| decoder(folder.path(), BaseWeights::F32));
    assert!(allocated.largest >= HIDDEN * INNER * 4, "{allocated:?}");
}
