//! Two processes train as one with the rows of both, on the CPU or on two GPUs; of GPUs, it prints how fast.

#[path = "support/random_model.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod random_model;
#[path = "support/testbed.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod testbed;

use candle_core::DType as CandleDType;
use metal_candle::io::LoraConfig;
use metal_candle::io::data::Batch;
use metal_candle::io::peft::TargetModules;
use metal_candle::models::{BaseWeights, load_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, TrainStep};
use metal_candle::{DType, Device, Rendezvous, World};
use random_model::Sizes;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::Instant;

/// The folder of the models, for the second process.
const FOLDER: &str = "METAL_CANDLE_TEST_FOLDER";

const TINY: Sizes = Sizes {
    hidden: 64,
    inner: 160,
    vocabulary: 512,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    context: 64,
};
/// SmolLM2-135M's.
const SMOLLM: Sizes = Sizes {
    hidden: 576,
    inner: 1536,
    vocabulary: 49152,
    layers: 30,
    heads: 9,
    kv_heads: 3,
    context: 2048,
};

/// What is trained, on how much.
struct Job {
    model: &'static str,
    base: BaseWeights,
    activations: DType,
    /// Rows of each rank, and their tokens.
    rows: usize,
    seq: usize,
    vocabulary: usize,
    steps: usize,
}

const SMALL: Job = Job {
    model: "tiny",
    base: BaseWeights::F32,
    activations: DType::F32,
    rows: 2,
    seq: 32,
    vocabulary: 512,
    steps: 20,
};
const LARGE: Job = Job {
    model: "smollm",
    base: BaseWeights::BF16,
    activations: DType::BF16,
    rows: 8,
    seq: 512,
    vocabulary: 49152,
    steps: 40,
};

/// The GPU after the first, or the CPU again.
fn device_of(rank: usize) -> Device {
    match *testbed::device() {
        Device::Cuda(first) => Device::Cuda(first + rank as u32),
        device => device,
    }
}

fn batch(job: &Job, ranks: usize) -> Batch {
    let (batch, seq) = (job.rows * ranks, job.seq);
    let id = |i: usize| ((i / seq * 31 + i % seq * 7) % (job.vocabulary / 2)) as u32;
    let ids: Vec<u32> = (0..batch * seq).map(id).collect();
    let mut labels: Vec<i64> = ids.iter().map(|id| i64::from(*id) + 1).collect();
    // Ranks count differently: a mean of their means would be another number.
    labels[..seq / 2].fill(-100);
    let trained = batch * seq - seq / 2;
    Batch { ids, labels, batch, seq, trained, documents: None }
}

/// The losses of the steps on batches of so many ranks' rows, and the tokens of a second, all ranks together.
fn train(job: &Job, folder: &Path, ranks: usize, world: Option<&Arc<World>>) -> (Vec<f32>, f64) {
    let device = device_of(world.map_or(0, |world| world.rank()));
    let decoder = load_decoder(&folder.join(job.model), job.base, &device).unwrap();
    let decoder = Arc::new(decoder.with_activations(job.activations));
    let config = LoraConfig {
        r: 8,
        lora_alpha: 16.0,
        target_modules: TargetModules::AllLinear,
        ..LoraConfig::default()
    };
    let adapter = LoRAAdapter::new(config, decoder.modules(), 1, &device).unwrap();
    let mut step = TrainStep::new(decoder, adapter, AdamWConfig::default(), 1.0, 0).unwrap();
    if let Some(world) = world {
        step = step.within(Arc::clone(world)).unwrap();
    }
    let batch = batch(job, ranks);
    let mut run = || step.run(&batch, 1e-3).unwrap().loss;
    // The first steps compile and record.
    let mut losses: Vec<f32> = (0..job.steps / 4).map(|_| run()).collect();
    let (start, left) = (Instant::now(), job.steps - losses.len());
    losses.extend((0..left).map(|_| run()));
    (losses, (left * batch.ids.len()) as f64 / start.elapsed().as_secs_f64())
}

/// This test again, as the second rank.
fn second(port: u16, folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["two_processes_train_as_one_with_the_rows_of_both", "--exact", "--nocapture"]);
    command.env("RANK", "1").env("WORLD_SIZE", "2").env("LOCAL_RANK", "1").env(FOLDER, folder);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
    command.spawn().unwrap()
}

fn jobs() -> Vec<&'static Job> {
    let is_gpu = *testbed::device() != Device::Cpu;
    [&SMALL].into_iter().chain(is_gpu.then_some(&LARGE)).collect()
}

#[test]
fn two_processes_train_as_one_with_the_rows_of_both() {
    if let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) {
        let meeting = Rendezvous::from_env().unwrap().unwrap();
        let world = World::join(&meeting, &device_of(1)).unwrap();
        for job in jobs() {
            train(job, &folder, 2, Some(&world));
        }
        return;
    }
    if !matches!(testbed::device(), Device::Cpu | Device::Cuda(_)) || device_of(1).check().is_err()
    {
        eprintln!("SKIPPED on {}: there is no second GPU", testbed::device());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (name, sizes) in [("tiny", TINY), ("smollm", SMOLLM)].into_iter().take(jobs().len()) {
        let path = folder.path().join(name);
        std::fs::create_dir(&path).unwrap();
        random_model::write(&path, sizes, CandleDType::BF16, CandleDType::BF16);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut other = second(port, folder.path());
    let meeting = Rendezvous::local(2, port);
    let mut goes_on = || matches!(other.try_wait(), Ok(None));
    let world = World::host(&listener, &meeting, &device_of(0), &mut goes_on).unwrap();
    let two: Vec<_> =
        jobs().into_iter().map(|job| train(job, folder.path(), 2, Some(&world))).collect();
    drop(world);
    assert!(other.wait().unwrap().success());
    for (job, (losses, speed)) in jobs().into_iter().zip(two) {
        compare(job, folder.path(), &losses, speed);
    }
}

/// Against one process with the rows of both.
fn compare(job: &Job, folder: &Path, losses: &[f32], speed: f64) {
    let (want, _) = train(job, folder, 2, None);
    // Of the first loss: what is nearly learnt by heart has no loss left to be a part of.
    let off = losses.iter().zip(&want).map(|(a, b)| ((a - b) / want[0]).abs()).fold(0.0, f32::max);
    let alone = train(job, folder, 1, None).1;
    eprintln!(
        "{} on {}: {alone:.0} tokens/s alone, {speed:.0} of two ({:.2} times); losses off by {off:.1e} at most: {:?}",
        job.model,
        testbed::device(),
        speed / alone,
        losses.iter().step_by(5).collect::<Vec<_>>(),
    );
    assert!(want.last() < want.first(), "{want:?}");
    // What lies between products in bf16 is rounded differently in batches of other sizes, by the tiles of a product.
    let (is_gpu, is_wide) = (*testbed::device() != Device::Cpu, job.activations == DType::F32);
    let bound = match (is_gpu, is_wide) {
        (false, _) => 1e-6,
        (true, true) => 1e-4,
        (true, false) => 2e-3,
    };
    assert!(off <= bound, "{off}: {losses:?} is not {want:?}");
}
