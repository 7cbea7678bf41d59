//! `metal-candle info`

use crate::model::locate;
use crate::units::{Bytes, Count};
use anyhow::{Context, Result, bail};
use metal_candle::io::gguf::{Encoding, GgufFile, lora};
use metal_candle::io::peft::TargetModules;
use metal_candle::io::{AdapterFormat, DecoderConfig, Tokenizer, adapter};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A GGUF file, a Hugging Face folder, an adapter of PEFT, mlx-lm or llama.cpp, or a model's
    /// name on the hub
    path: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let path = &locate(&args.path, None, "main")?;
    let meta = fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    let page = match meta.is_dir() {
        false => file(path, meta.len())?,
        true if path.join("adapter_config.json").exists() => adapter(path)?,
        true if path.join("config.json").exists() => folder(path)?,
        true => bail!(
            "{}: expected adapter_config.json (an adapter) or config.json (a model) in it",
            path.display()
        ),
    };
    std::io::stdout().write_all(page.0.as_bytes())?;
    Ok(())
}

/// Lines of a name and what is to be said of it.
struct Page(String);

impl Page {
    fn new(path: &Path, what: &str) -> Page {
        Page(format!("{}: {what}\n", path.display()))
    }

    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        self.0 += &format!("{name:<16}{value}\n");
    }
}

/// A GGUF file is a model or an adapter.
fn file(path: &Path, len: u64) -> Result<Page> {
    let file = GgufFile::open(path)?;
    if let Ok(Some("adapter")) = file.str_opt("general.type") {
        return adapter(path);
    }
    let mut page = Page::new(path, &format!("a GGUF model of {}", Bytes(len)));
    if let Ok(Some(name)) = file.str_opt("general.name") {
        page.line("name", name);
    }
    match file.decoder_config() {
        Ok(config) => decoder(&mut page, &config),
        Err(error) => {
            page.line("architecture", file.str("general.architecture").unwrap_or("unknown"));
            page.line("not runnable", error);
        }
    }
    let stored = file.tensors().iter().map(|tensor| Stored {
        encoding: match tensor.encoding {
            Encoding::Dense(dtype) => format!("{dtype:?}"),
            Encoding::Blocks(format) => format!("{format:?}"),
        },
        elements: product(tensor.shape.iter().map(|dim| *dim as u64)),
        bytes: tensor.len_bytes as u64,
    });
    weights(&mut page, stored);
    tokenizer(&mut page, Tokenizer::from_gguf(&file));
    Ok(page)
}

fn decoder(page: &mut Page, c: &DecoderConfig) {
    page.line("architecture", &c.architecture);
    page.line(
        "layers",
        format!("{}, hidden {}, inner {}", c.num_layers, c.hidden_size, c.intermediate_size),
    );
    page.line(
        "attention",
        format!("{} heads of {}, {} of keys and values", c.num_heads, c.head_dim, c.num_kv_heads),
    );
    page.line("context", format!("{} tokens", c.max_position_embeddings));
    let tied = if c.tie_word_embeddings { "the output is the embedding" } else { "not tied" };
    page.line("vocabulary", format!("{} tokens, {tied}", c.vocab_size));
}

/// One tensor of a file.
struct Stored {
    encoding: String,
    elements: u64,
    bytes: u64,
}

/// Parameters in all, and the tensors by how they are stored, the largest part first.
fn weights(page: &mut Page, tensors: impl Iterator<Item = Stored>) {
    let mut by_encoding: BTreeMap<String, (u64, u64, u64)> = BTreeMap::new();
    for Stored { encoding, elements, bytes } in tensors {
        let entry = by_encoding.entry(encoding).or_default();
        entry.0 += 1;
        entry.1 = entry.1.saturating_add(elements);
        entry.2 = entry.2.saturating_add(bytes);
    }
    let total = |part: fn(&(u64, u64, u64)) -> u64| by_encoding.values().map(part).sum::<u64>();
    let (count, elements, bytes) = (total(|e| e.0), total(|e| e.1), total(|e| e.2));
    let what = format!("{} in {count} tensors, {}", Count(elements), Bytes(bytes));
    page.line("parameters", what);
    let mut parts: Vec<_> = by_encoding.into_iter().collect();
    parts.sort_by_key(|(_, (.., bytes))| std::cmp::Reverse(*bytes));
    for (i, (encoding, (count, elements, bytes))) in parts.into_iter().enumerate() {
        let (elements, bytes) = (Count(elements), Bytes(bytes));
        let line = format!("{encoding:<6}{count:>5} tensors {elements:>9} {bytes:>11}");
        page.line(if i == 0 { "stored as" } else { "" }, line);
    }
}

fn tokenizer(page: &mut Page, tokenizer: metal_candle::io::Result<Tokenizer>) {
    let tokenizer = match tokenizer {
        Ok(tokenizer) => tokenizer,
        Err(error) => return page.line("tokenizer", format!("not usable: {error}")),
    };
    let special = tokenizer.special();
    let named = [("bos", special.bos), ("eos", special.eos), ("eot", special.eot)];
    let spell = |(name, id): (&str, Option<u32>)| {
        let id = id?;
        Some(format!(", {name} {id} {:?}", tokenizer.decode(&[id], false).ok()?))
    };
    let special: String = named.into_iter().filter_map(spell).collect();
    page.line("tokenizer", format!("{} tokens{special}", tokenizer.vocab_size()));
    page.line("chat template", if tokenizer.chat_template().is_some() { "yes" } else { "no" });
}

fn adapter(path: &Path) -> Result<Page> {
    let format = AdapterFormat::detect(path)?;
    let adapter = match format {
        // Its base may not be here.
        AdapterFormat::Gguf => lora::load_as_stored(path)?,
        AdapterFormat::Peft | AdapterFormat::Mlx => adapter::load(path, None)?,
    };
    let mut page = Page::new(path, &format!("a LoRA adapter in {format}'s format"));
    let config = &adapter.config;
    if let Some(base) = &config.base_model_name_or_path {
        page.line("base", base);
    }
    let scale = if config.use_rslora { "alpha / sqrt(rank)" } else { "alpha / rank" };
    page.line("rank", format!("{}, alpha {}, scaled by {scale}", config.r, config.lora_alpha));
    page.line("dropout", config.lora_dropout);
    page.line(
        "asked for",
        match &config.target_modules {
            TargetModules::Names(names) => names.join(", "),
            TargetModules::Regex(regex) => format!("modules that match {regex:?}"),
            TargetModules::AllLinear => "all-linear".to_owned(),
        },
    );
    let mut targets: BTreeMap<&str, usize> = BTreeMap::new();
    for module in adapter.modules.keys() {
        *targets.entry(module.rsplit('.').next().unwrap_or(module)).or_default() += 1;
    }
    let targets: Vec<_> = targets.iter().map(|(name, n)| format!("{name} x {n}")).collect();
    page.line("adapts", format!("{} layers: {}", adapter.modules.len(), targets.join(", ")));
    let parameters: usize = adapter.modules.values().map(|m| m.a.len() + m.b.len()).sum();
    let file = match format {
        AdapterFormat::Peft => path.join("adapter_model.safetensors"),
        AdapterFormat::Mlx => path.join("adapters.safetensors"),
        AdapterFormat::Gguf => path.to_owned(),
    };
    let bytes = fs::metadata(&file).with_context(|| format!("{}", file.display()))?.len();
    page.line("parameters", format!("{}, {}", Count(parameters as u64), Bytes(bytes)));
    Ok(page)
}

fn folder(path: &Path) -> Result<Page> {
    let mut page = Page::new(path, "a Hugging Face model folder");
    let file = path.join("config.json");
    let bytes = fs::read(&file).with_context(|| format!("{}", file.display()))?;
    let config: Map<String, Value> =
        serde_json::from_slice(&bytes).with_context(|| format!("{}", file.display()))?;
    const KEYS: [(&str, &str); 8] = [
        ("architecture", "model_type"),
        ("layers", "num_hidden_layers"),
        ("hidden", "hidden_size"),
        ("inner", "intermediate_size"),
        ("heads", "num_attention_heads"),
        ("key heads", "num_key_value_heads"),
        ("context", "max_position_embeddings"),
        ("vocabulary", "vocab_size"),
    ];
    for (name, key) in KEYS {
        match config.get(key) {
            Some(Value::String(text)) => page.line(name, text),
            Some(value) => page.line(name, value),
            None => {}
        }
    }
    let mut shards: Vec<PathBuf> =
        fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    shards.retain(|file| file.extension().is_some_and(|ext| ext == "safetensors"));
    shards.sort();
    page.line("shards", shards.len());
    let mut stored = Vec::new();
    for shard in &shards {
        stored.extend(safetensors(shard).with_context(|| format!("{}", shard.display()))?);
    }
    weights(&mut page, stored.into_iter());
    tokenizer(&mut page, Tokenizer::from_file(path.join("tokenizer.json")));
    Ok(page)
}

/// The tensors of a safetensors file, by its header alone: its length in 8 bytes, then JSON.
fn safetensors(path: &Path) -> Result<Vec<Stored>> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    let mut prefix = [0; 8];
    file.read_exact(&mut prefix).context("not a safetensors file: it ends before its header")?;
    let header = u64::from_le_bytes(prefix);
    if header > len.saturating_sub(8) {
        bail!("not a safetensors file: a header of {header} bytes in a file of {len}");
    }
    let mut json = Vec::new();
    file.take(header).read_to_end(&mut json)?;
    let entries: Map<String, Value> =
        serde_json::from_slice(&json).context("the header is not a JSON object")?;
    let tensors = entries.iter().filter(|(name, _)| *name != "__metadata__");
    tensors.map(|(name, entry)| stored(entry).with_context(|| name.clone())).collect()
}

fn stored(entry: &Value) -> Result<Stored> {
    let dtype = entry["dtype"].as_str().context("no dtype")?;
    let numbers = |key: &str| -> Option<Vec<u64>> {
        entry[key].as_array()?.iter().map(Value::as_u64).collect()
    };
    let shape = numbers("shape").context("no shape")?;
    let offsets = numbers("data_offsets").filter(|o| o.len() == 2 && o[0] <= o[1]);
    let offsets = offsets.context("no data_offsets")?;
    let elements = product(shape.into_iter());
    Ok(Stored { encoding: dtype.to_owned(), elements, bytes: offsets[1] - offsets[0] })
}

fn product(dims: impl Iterator<Item = u64>) -> u64 {
    dims.fold(1, u64::saturating_mul)
}
