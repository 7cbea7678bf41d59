//! `metal-candle train`

mod adapter;
mod chart;
mod events;
mod observer;
mod page;
mod ranks;

use crate::columns::DataArgs;
use crate::model::ModelArgs;
use crate::ui::{is_quiet, note, progress};
use crate::units::Bytes;
use adapter::AdapterArgs;
use anyhow::{Result, bail};
use indicatif::ProgressBar;
use metal_candle::io::GgufFile;
use metal_candle::io::data::{
    Batcher, Dataset, Example, Examples, Rows, TokenizeOptions, tokenize,
};
use metal_candle::io::tokenizer::Tokenizer;
use metal_candle::models::Decoder;
use metal_candle::nn::LoRAAdapter;
use metal_candle::train::{AdamWConfig, LRScheduler, Report, Trainer, TrainingConfig};
use metal_candle::{Device, Plan, Workspace};
use observer::Observer;
use ranks::Ranks;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    data: DataArgs,
    /// Train on so many GPUs of this machine, one process each; --batch-size is of each. Launchers
    /// that start the processes by themselves (torchrun) set RANK, WORLD_SIZE and LOCAL_RANK
    /// instead, also with --device cpu
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    gpus: Option<u16>,
    /// Updates
    #[arg(long, default_value_t = 1000)]
    iters: usize,
    /// Rows of a batch
    #[arg(long, default_value_t = 4)]
    batch_size: usize,
    /// Batches of an update
    #[arg(long, default_value_t = 1)]
    grad_accumulation_steps: usize,
    /// Tokens of a row; longer ones are cut and counted
    #[arg(long, default_value_t = 2048)]
    max_seq_length: usize,
    /// Put several rows into one of --max-seq-length, kept apart in attention: less padding
    #[arg(long, overrides_with = "no_packing")]
    packing: bool,
    /// Give every row a row of its own (the default)
    #[arg(long)]
    no_packing: bool,
    /// On the CPU, lay out the frozen matrices once instead of at every step: a little faster, for up
    /// to twice their memory on top; `plan` says how much. Not for weights in blocks (GGUF)
    #[arg(long)]
    prepack_weights: bool,
    /// The highest learning rate
    #[arg(long, default_value_t = 1e-5)]
    learning_rate: f64,
    /// How the learning rate moves
    #[arg(long, value_enum, default_value = "constant")]
    lr_schedule: Schedule,
    /// Updates until the learning rate is reached
    #[arg(long, default_value_t = 0)]
    warmup: usize,
    /// Updates after which the learning rate is at its end [default: --iters]
    #[arg(long, value_name = "N")]
    lr_decay_iters: Option<usize>,
    /// Where the cosine ends
    #[arg(long, default_value_t = 0.0)]
    min_learning_rate: f64,
    /// Where the adapter goes (PEFT's format)
    #[arg(long, default_value = "adapters")]
    adapter_path: PathBuf,
    #[command(flatten)]
    adapter: AdapterArgs,
    /// Train the completions only, not the prompts
    #[arg(long)]
    mask_prompt: bool,
    /// Gradients of a larger norm are scaled down to this one
    #[arg(long, default_value_t = 1.0)]
    max_grad_norm: f64,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.01)]
    weight_decay: f64,
    /// Of the initial adapter and the order of the rows
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Updates between two reports
    #[arg(long, default_value_t = 10)]
    steps_per_report: usize,
    /// Updates between two validations
    #[arg(long, default_value_t = 200)]
    steps_per_eval: usize,
    /// Batches of one validation; 0 is all
    #[arg(long, default_value_t = 25)]
    val_batches: usize,
    /// Validations without a lower loss after which training ends; 0 is never
    #[arg(long, default_value_t = 0)]
    patience: usize,
    /// Updates between two checkpoints; 0 is only at the end
    #[arg(long, default_value_t = 100)]
    save_every: usize,
    /// Go on where the run in --adapter-path stopped
    #[arg(long)]
    resume: bool,
    /// Write what happens to this file, one JSON object a line; --resume appends
    #[arg(long, value_name = "FILE.jsonl")]
    log: Option<PathBuf>,
    /// Draw loss, speed and memory into this file: one HTML page that needs nothing else
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Print the plan of one step and its exact memory before training
    #[arg(long)]
    show_plan: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Schedule {
    Constant,
    Linear,
    Cosine,
}

impl Args {
    pub(crate) fn model(&self) -> &ModelArgs {
        &self.model
    }

    /// The adapter that training begins with.
    ///
    /// # Errors
    /// Where it does not fit the base.
    pub(crate) fn adapter(&self, base: &Decoder) -> Result<LoRAAdapter> {
        self.adapter.of(base, self.model.name(), self.seed)
    }

    /// One of the same shapes, to plan with.
    ///
    /// # Errors
    /// As [`Self::adapter`].
    pub(crate) fn adapter_outline(&self, base: &Decoder) -> Result<LoRAAdapter> {
        self.adapter.outline(base, self.model.name(), self.seed)
    }

    pub(crate) fn config(&self) -> TrainingConfig {
        config(self)
    }

    /// # Errors
    /// Where a flag means nothing on this device.
    pub(crate) fn check(&self, device: &Device) -> Result<()> {
        if self.prepack_weights && *device != Device::Cpu {
            bail!(
                "--prepack-weights: expected the device cpu, got {device}, which reads weights as they lie"
            );
        }
        Ok(())
    }

    /// Whether the memory of weights that are laid out once is to be planned.
    pub(crate) fn prepacks(&self) -> bool {
        self.prepack_weights
    }

    /// What would be trained on, if the flags say it; of the model only its tokenizer is read.
    pub(crate) fn examples_for_plan(&self) -> Result<Option<Vec<Example>>> {
        let Some(data) = &self.data.data else { return Ok(None) };
        let data = Dataset::open_with(data, &self.data.columns())?;
        let path = self.model.source().path()?;
        let tokenizer = match path.is_dir() {
            true => Tokenizer::from_file(path.join("tokenizer.json"))?,
            false => Tokenizer::from_gguf(&GgufFile::open(path)?)?,
        };
        Ok(Some(examples("training", &data.train, &tokenizer, self)?.examples))
    }
}

/// How a training that did not fail ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Done,
    /// Stopped by Ctrl-C, and saved.
    Interrupted,
}

pub(crate) fn run(args: &Args) -> Result<End> {
    let ranks = Ranks::meet(args)?;
    let outcome = train(args, &ranks);
    ranks.blame(outcome)
}

fn train(args: &Args, ranks: &Ranks) -> Result<End> {
    args.check(&ranks.device)?;
    // What cannot be written is said before anything is loaded.
    let mut observer = Observer::open(args, ranks.is_first())?;
    let loaded = args.model.load_on(&ranks.device)?;
    let data = Dataset::open_with(args.data.path()?, &args.data.columns())?;
    let train = examples("training", &data.train, &loaded.tokenizer, args)?;
    let valid = match &data.valid {
        Some(rows) => Some(examples("validation", rows, &loaded.tokenizer, args)?),
        None => None,
    };
    let decoder = Arc::new(loaded.decoder);
    let adapter = args.adapter(&decoder)?;
    let config = adapter.config.clone();
    let trainable = adapter.num_trainable_parameters();
    note!("adapter: {} layers, {trainable} trainable parameters", adapter.layers().len());
    let stop = on_interrupt()?;
    let mut trainer = Trainer::new(decoder, adapter, args.config())?;
    if let Some(world) = &ranks.world {
        trainer = trainer.within(Arc::clone(world))?;
    }
    let mut trainer = trainer.stop_when(Arc::clone(&stop));
    let batches = trainer.batches(&train.examples)?;
    note!("{}", described(&batches));
    if ranks.is_first() {
        let (plan, workspaces) = trainer.plan_with_workspaces(&train.examples)?;
        note!("{}", memory(&plan, &workspaces, &ranks.device));
        if args.show_plan {
            println!("{plan}");
        }
        let examples = [Some(&train), valid.as_ref()];
        let planned = (&plan, &workspaces[..]);
        let adapter = (&config, trainable);
        observer.describe(observer::summary(args, planned, examples, &batches, adapter)?);
    }
    let bar = progress(args.iters as u64, "{bar:30} {pos}/{len} {msg} eta {eta}");
    let valid = valid.map_or_else(Vec::new, |valid| valid.examples);
    let mut end = End::Done;
    let trained = trainer.train(&train.examples, &valid, |report| {
        if matches!(report, Report::Stopped { .. }) {
            end = End::Interrupted;
        }
        observer.see(&report, &stop);
        show(&bar, args, report);
    });
    bar.finish_and_clear();
    trained?;
    observer.finish()?;
    Ok(end)
}

/// The batches of an epoch in a line.
fn described(batches: &Batcher) -> String {
    let widths: Vec<String> =
        batches.shapes().iter().rev().map(|(_, width)| width.to_string()).collect();
    format!(
        "batches: {} an epoch, of {} x {} tokens; {:.1} % padding",
        batches.batches_per_epoch(),
        batches.shapes()[0].0,
        widths.join(", "),
        100.0 * batches.occupancy().padding()
    )
}

/// What a step takes of the device, in a line.
fn memory(plan: &Plan, workspaces: &[Workspace], device: &Device) -> String {
    let bytes = |bytes: usize| Bytes(bytes as u64);
    let beside = listed(workspaces).map_or_else(String::new, |all| format!(", beside it {all}"));
    let free = device.memory().map_or_else(String::new, |memory| {
        format!("; {} free on {device}", bytes(memory.free_bytes))
    });
    format!("memory: {} by the plan of a step{beside}{free}", bytes(plan.peak_bytes()))
}

/// `256.0 MiB scratch memory of calls, 32.0 MiB cuBLASLt`; nothing where none holds anything yet.
fn listed(workspaces: &[Workspace]) -> Option<String> {
    let held = workspaces.iter().filter(|workspace| workspace.bytes > 0);
    let held = held.map(|held| format!("{} {}", Bytes(held.bytes as u64), held.name));
    let all = held.collect::<Vec<_>>().join(", ");
    (!all.is_empty()).then_some(all)
}

/// Becomes true with the first Ctrl-C; the second one ends the program at once.
fn on_interrupt() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        note!("finishing the step and saving; press Ctrl-C again to end at once");
    })?;
    Ok(stop)
}

/// The token sequences of a file; says what was cut or left out.
fn examples(what: &str, rows: &Rows, tokenizer: &Tokenizer, args: &Args) -> Result<Examples> {
    let options =
        TokenizeOptions { max_seq_length: args.max_seq_length, mask_prompt: args.mask_prompt };
    let all = tokenize(rows, tokenizer, options)?;
    let (cut, limit) = (all.truncated, args.max_seq_length);
    note!(
        "{what}: {} rows, {} tokens, {} of them trained; {cut} rows cut to {limit} tokens",
        all.examples.len(),
        all.tokens,
        all.trained_tokens,
    );
    if all.untrained > 0 {
        note!("{what}: {} rows left out: none of their tokens is trained", all.untrained);
    }
    Ok(all)
}

fn config(args: &Args) -> TrainingConfig {
    let (rate, warmup, total) =
        (args.learning_rate, args.warmup, args.lr_decay_iters.unwrap_or(args.iters));
    let floor = args.min_learning_rate;
    let schedule = match args.lr_schedule {
        Schedule::Constant if warmup == 0 => LRScheduler::Constant { rate },
        Schedule::Constant => LRScheduler::Warmup { rate, warmup },
        Schedule::Linear => LRScheduler::WarmupLinear { rate, warmup, total },
        Schedule::Cosine => LRScheduler::WarmupCosine { rate, warmup, total, floor },
    };
    TrainingConfig {
        iters: args.iters,
        batch_size: args.batch_size,
        grad_accumulation_steps: args.grad_accumulation_steps,
        max_seq_length: args.max_seq_length,
        packing: args.packing,
        prepack_weights: args.prepack_weights,
        schedule,
        optimizer: AdamWConfig { weight_decay: args.weight_decay, ..AdamWConfig::default() },
        max_gradient_norm: args.max_grad_norm,
        seed: args.seed,
        steps_per_report: args.steps_per_report,
        steps_per_eval: args.steps_per_eval,
        val_batches: args.val_batches,
        patience: args.patience,
        save_every: args.save_every,
        adapter_path: Some(args.adapter_path.clone()),
        resume: args.resume,
    }
}

fn show(bar: &ProgressBar, args: &Args, report: Report) {
    let line = match report {
        Report::Train { step, loss, rate, gradient_norm, tokens_per_second, .. } => {
            bar.set_position(step as u64);
            let memory = Device::Cpu.memory().map_or_else(String::new, |memory| {
                format!(", {}", Bytes(memory.used_bytes as u64))
            });
            bar.set_message(format!(
                "loss {loss:.3}, {tokens_per_second:.0} tok/s, rate {rate:.1e}{memory},"
            ));
            format!(
                "step {step}: loss {loss:.4}, learning rate {rate:.2e}, gradient norm \
                 {gradient_norm:.3}, {tokens_per_second:.0} tok/s"
            )
        }
        Report::Validation { step, loss, is_best } => {
            format!(
                "step {step}: validation loss {loss:.4}{}",
                if is_best { ", the best" } else { "" }
            )
        }
        Report::Skipped { step, loss, gradient_norm, culprit } => format!(
            "step {step}: skipped, not finite: loss {loss}, gradient norm {gradient_norm}, first in {}; \
             a lower --learning-rate may help",
            culprit.as_deref().unwrap_or("the loss")
        ),
        Report::Resumed { step } => {
            bar.set_position(step as u64);
            format!("step {step}: going on from {}", args.adapter_path.display())
        }
        Report::Stopped { step } => format!("step {step}: stopped; --resume goes on from here"),
        Report::Stale { step } => {
            format!("step {step}: the validation loss no longer falls: done")
        }
        Report::Saved { step } => {
            format!("step {step}: saved to {}", args.adapter_path.display())
        }
    };
    if !is_quiet() {
        bar.suspend(|| println!("{line}"));
    }
}
