//! The adapter that a training begins with: a fresh one, or one that was trained before.

use crate::ui::note;
use anyhow::{Context, Result};
use metal_candle::io::peft::{OneOrMany, TargetModules};
use metal_candle::io::{LoraConfig, adapter};
use metal_candle::models::Decoder;
use metal_candle::nn::LoRAAdapter;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct AdapterArgs {
    /// Rank of the adapter
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// The branch is scaled by alpha / rank
    #[arg(long, default_value_t = 16.0)]
    lora_alpha: f64,
    /// Probability of dropping an input of the branch
    #[arg(long, default_value_t = 0.0)]
    lora_dropout: f64,
    /// The layers to adapt: names as PEFT matches them, or all-linear
    #[arg(long, value_delimiter = ',', default_value = "q_proj,v_proj")]
    target_modules: Vec<String>,
    /// Adapt only the last N layers of the model: faster and smaller, as no gradient goes back
    /// through those before; -1 is all
    #[arg(long, default_value = "-1", value_name = "N", value_parser = layers,
          allow_negative_numbers = true)]
    num_layers: Layers,
    /// Train this adapter further, on other data for example, instead of a fresh one: a folder of
    /// PEFT's or mlx-lm's, or a GGUF file. Rank, alpha, dropout and layers are its own
    #[arg(long, value_name = "PATH")]
    resume_adapter_file: Option<PathBuf>,
}

/// Which layers get an adapter.
#[derive(Clone, Copy, Debug)]
enum Layers {
    All,
    Last(usize),
}

fn layers(text: &str) -> Result<Layers, String> {
    match (text, text.parse()) {
        ("-1", _) => Ok(Layers::All),
        (_, Ok(count @ 1..)) => Ok(Layers::Last(count)),
        _ => Err("expected a number of layers, or -1 for all".to_owned()),
    }
}

impl AdapterArgs {
    /// The adapter for this base, which is called `name`.
    ///
    /// # Errors
    /// Where it does not fit the base.
    pub(crate) fn of(&self, base: &Decoder, name: String, seed: u64) -> Result<LoRAAdapter> {
        match &self.resume_adapter_file {
            Some(path) => {
                let adapter = LoRAAdapter::load(path, &base.config, base.device());
                let adapter = adapter.with_context(at(path))?;
                let LoraConfig { r, lora_alpha, lora_dropout, .. } = adapter.config;
                note!(
                    "adapter: that of {}, with its rank {r}, alpha {lora_alpha}, dropout {lora_dropout}; {}",
                    path.display(),
                    targets(&adapter.config)
                );
                Ok(adapter)
            }
            None => self.fresh(base, name, seed),
        }
    }

    /// One of the same shapes, for a base and a device of which no memory is to be touched.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub(crate) fn outline(&self, base: &Decoder, name: String, seed: u64) -> Result<LoRAAdapter> {
        let Some(path) = &self.resume_adapter_file else { return self.fresh(base, name, seed) };
        let config = adapter::load(path, Some(&base.config)).with_context(at(path))?.config;
        Ok(LoRAAdapter::new(config, base.modules(), seed, base.device())?)
    }

    fn fresh(&self, base: &Decoder, name: String, seed: u64) -> Result<LoRAAdapter> {
        let config = LoraConfig {
            base_model_name_or_path: Some(name),
            r: self.lora_rank,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules: match &self.target_modules[..] {
                [all] if all == "all-linear" => TargetModules::AllLinear,
                names => TargetModules::Names(names.to_vec()),
            },
            ..LoraConfig::default()
        };
        let config = match self.num_layers {
            Layers::All => config,
            Layers::Last(count) => {
                let linear = base.modules().map(|(name, _)| name);
                config.for_last_layers(count, linear).context("--num-layers")?
            }
        };
        Ok(LoRAAdapter::new(config, base.modules(), seed, base.device())?)
    }
}

fn at(path: &Path) -> impl Fn() -> String {
    move || format!("cannot load the adapter {}", path.display())
}

/// What an adapter is for, in a few words: `q_proj, v_proj; layers 14 to 29`.
pub(super) fn targets(config: &LoraConfig) -> String {
    let modules = match &config.target_modules {
        TargetModules::Names(names) => names.join(", "),
        TargetModules::Regex(regex) => format!("what matches {regex}"),
        TargetModules::AllLinear => "all-linear".to_owned(),
    };
    let layers = match &config.layers_to_transform {
        None => return modules,
        Some(OneOrMany::One(layer)) => std::slice::from_ref(layer),
        Some(OneOrMany::Many(layers)) => layers,
    };
    match layers {
        [] => modules,
        [one] => format!("{modules}; layer {one}"),
        [first, .., last] if layers.iter().copied().eq(*first..=*last) => {
            format!("{modules}; layers {first} to {last}")
        }
        layers => {
            let layers: Vec<String> = layers.iter().map(usize::to_string).collect();
            format!("{modules}; layers {}", layers.join(", "))
        }
    }
}
