//! `metal-candle plan`

use crate::model::CacheArgs;
use crate::train;
use crate::ui::note;
use crate::units::{Bytes, Count};
use anyhow::{Result, bail};
use metal_candle::generate::{DecodeShape, Generator};
use metal_candle::graph::TensorType;
use metal_candle::models::{Decoder, load_outline};
use metal_candle::train::Trainer;
use metal_candle::{Device, InputSource, Outline, Workspace};
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::Arc;

/// The flags are those of `train`: put `plan` in its place.
// Its group would have the name of the flattened one.
#[derive(clap::Args)]
#[group(skip)]
pub(crate) struct Args {
    #[command(flatten)]
    train: train::Args,
    /// Plan a step of generation instead: --batch-size texts with a cache of --max-seq-length
    /// tokens each
    #[arg(long)]
    decode: bool,
    /// With --decode: tokens that the step takes in; 1 writes a text, more read a prompt
    #[arg(long, default_value_t = 1, requires = "decode", value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..))]
    new_tokens: u32,
    #[command(flatten)]
    cache: CacheArgs,
    /// Print every step
    #[arg(long)]
    full: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let model = args.train.model();
    let path = model.source().path()?;
    // A plan is data: it can be made for a device that is not here.
    let device = model.device().named();
    args.train.check(&device)?;
    let decoder = load_outline(&path, model.base(), &device)?;
    let decoder = args.cache.of(decoder.with_activations(model.activations(&device)));
    let decoder = Arc::new(decoder);
    let (what, outline, parts) = match args.decode {
        true => decode(args, decoder)?,
        false => training(args, decoder)?,
    };
    let page = match args.full {
        true => outline.plan.to_string(),
        false => {
            let mut workspaces = workspaces(&device, &outline)?;
            if let Some(workspaces) = workspaces.as_mut().filter(|_| args.train.prepacks()) {
                workspaces.push(outline.prepacked(&device));
            }
            Summary { what, outline: &outline, parts: &parts, device, workspaces }.to_string()
        }
    };
    note!("planned for {device}");
    std::io::stdout().write_all(page.as_bytes())?;
    Ok(())
}

/// What runs would hold beside the plan, where the device is here to say so.
fn workspaces(device: &Device, outline: &Outline) -> Result<Option<Vec<Workspace>>> {
    Ok(match device.check() {
        Ok(()) => Some(device.workspaces(&outline.plan)?),
        Err(_) => None,
    })
}

/// What the arguments of a plan are: names, and how many of each.
type Parts = Vec<(&'static str, usize)>;

fn training(args: &Args, decoder: Arc<Decoder>) -> Result<(String, Outline, Parts)> {
    let config = args.train.config();
    let adapter = args.train.adapter_outline(&decoder)?;
    let examples = args.train.examples_for_plan()?;
    let seq = config.max_seq_length.min(decoder.config.max_position_embeddings);
    let outline = Trainer::outline(decoder, &adapter, &config, examples.as_deref())?;
    let parameters = adapter.parameters().len();
    let what = format!(
        "one update: {} x {} rows of {}; an adapter of {} parameters on {} layers",
        config.grad_accumulation_steps.max(1),
        config.batch_size,
        match examples {
            Some(_) => "the longest batch of the data".to_owned(),
            None => format!("{seq} tokens"),
        },
        Count(adapter.num_trainable_parameters() as u64),
        adapter.layers().len(),
    );
    let parts =
        vec![("adapter", parameters), ("optimizer state", 2 * parameters), ("batch", usize::MAX)];
    Ok((what, outline, parts))
}

fn decode(args: &Args, decoder: Arc<Decoder>) -> Result<(String, Outline, Parts)> {
    let config = args.train.config();
    let (batch, tokens) = (config.batch_size, args.new_tokens as usize);
    let context = decoder.config.max_position_embeddings;
    let capacity = config.max_seq_length.min(context);
    if tokens > capacity {
        bail!("--new-tokens: expected at most the cache's {capacity} tokens, got {tokens}");
    }
    let outline = Generator::outline(decoder, DecodeShape { batch, tokens, capacity })?;
    let what = format!(
        "one step of generation: {batch} x {tokens} new tokens, {batch} x {capacity} in the cache"
    );
    let small = if batch == 1 { 3 } else { 5 };
    Ok((what, outline, vec![("batch", small), ("cache", usize::MAX)]))
}

/// A plan on one page.
struct Summary<'a> {
    what: String,
    outline: &'a Outline,
    parts: &'a [(&'static str, usize)],
    device: Device,
    workspaces: Option<Vec<Workspace>>,
}

/// Rows of the table of the largest tensors.
const LARGEST: usize = 8;

impl Summary<'_> {
    /// What an input belongs to.
    fn part(&self, source: &InputSource) -> &'static str {
        match source {
            InputSource::Captured(Some(name)) if name.starts_with("rope.") => "rotary tables",
            InputSource::Captured(_) => "weights",
            InputSource::Argument(at) => {
                let mut end = 0usize;
                let holds = |(_, len): &&(&str, usize)| {
                    end = end.saturating_add(*len);
                    *at < end
                };
                self.parts.iter().find(holds).map_or("", |(name, _)| name)
            }
        }
    }

    fn memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = &self.outline.plan;
        let inputs = || self.outline.inputs.iter().zip(&plan.inputs);
        let captured = ["weights", "rotary tables"].into_iter();
        let mut inputs_bytes = 0;
        for part in captured.chain(self.parts.iter().map(|(name, _)| *name)) {
            let of_part = inputs().filter(|(source, _)| self.part(source) == part);
            let sizes: Vec<usize> = of_part.map(|(_, input)| input.ty.size_bytes()).collect();
            let bytes: usize = sizes.iter().sum();
            inputs_bytes += bytes;
            row(f, part, bytes, &format!("{} tensors", sizes.len()))?;
        }
        row(f, "results", plan.peak_bytes() - inputs_bytes - plan.arena_bytes, "")?;
        let unshared = format!("{} if nothing were shared", Bytes(plan.unshared_bytes as u64));
        row(f, "arena", plan.arena_bytes, &unshared)?;
        row(f, "peak", plan.peak_bytes(), &format!("{} bytes exactly", plan.peak_bytes()))?;
        self.beside(f)
    }

    fn beside(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = self.device;
        let Some(workspaces) = &self.workspaces else {
            return writeln!(f, "\nworkspaces: not known here, where there is no {device}");
        };
        let mut held = workspaces.iter().filter(|workspace| workspace.bytes > 0).peekable();
        if held.peek().is_some() {
            writeln!(f, "\nworkspaces beside it, on {device}")?;
        }
        held.try_for_each(|workspace| {
            let shared = if workspace.shared { "one for all plans" } else { "" };
            row(f, workspace.name, workspace.bytes, shared)
        })
    }

    /// The largest inputs and the largest values that the steps make.
    fn largest(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = &self.outline.plan;
        let mut rows: Vec<(usize, String)> = Vec::new();
        for (source, input) in self.outline.inputs.iter().zip(&plan.inputs) {
            let name = match source {
                InputSource::Captured(Some(name)) => name.as_str(),
                source => self.part(source),
            };
            rows.push((input.ty.size_bytes(), shown(name, &input.ty)));
        }
        for (i, step) in plan.steps.iter().enumerate() {
            for out in &step.outs {
                let ty = TensorType::new(out.dtype, out.layout.shape);
                let fresh = !step.args.iter().any(|arg| arg.slot == out.slot);
                if fresh && matches!(out.slot, metal_candle::plan::Slot::Arena { .. }) {
                    rows.push((ty.size_bytes(), shown(&format!("step {i}: {}", step.label), &ty)));
                }
            }
        }
        rows.sort_by_key(|(bytes, _)| std::cmp::Reverse(*bytes));
        let mut at = 0;
        for _ in 0..LARGEST {
            let Some((bytes, name)) = rows.get(at) else { break };
            let same = rows[at..].iter().take_while(|(other, _)| other == bytes).count();
            let more =
                if same > 1 { format!(", and {} as large", same - 1) } else { String::new() };
            writeln!(f, "  {:>10}  {name}{more}", Bytes(*bytes as u64).to_string())?;
            at += same;
        }
        Ok(())
    }
}

fn shown(name: &str, ty: &TensorType) -> String {
    let mut text = name.to_owned();
    let _ = write!(text, " {ty}");
    text
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, bytes: usize, note: &str) -> fmt::Result {
    // The names of workspaces are longer than those of parts.
    let width = if name.len() < 16 { 16 } else { 26 };
    let line = format!("  {name:<width$}{:>10}  {note}", Bytes(bytes as u64).to_string());
    writeln!(f, "{}", line.trim_end())
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = &self.outline.plan;
        writeln!(f, "{}", self.what)?;
        writeln!(f, "\nmemory")?;
        self.memory(f)?;
        writeln!(f, "\nwork")?;
        let (flops, steps) = (plan.flops(), plan.steps.len());
        writeln!(f, "  {:<16}{:>10}  in {steps} steps", "operations", Count(flops).to_string())?;
        writeln!(f, "  {:<16}{:>10}", "bytes moved", Bytes(plan.bytes()).to_string())?;
        writeln!(f, "\nlargest tensors")?;
        self.largest(f)
    }
}
