//! A run is saved so that it can go on, and goes on if it is the same one.

use super::Trainer;
use crate::Result;
use crate::fnv::Fnv;
use crate::io::data::{Batcher, Example};
use crate::train::checkpoint::{self, Progress};
use crate::train::report::Report;
use serde_json::{Map, Value, json};
use std::path::Path;

/// What is needed to go on, in the adapter's folder.
const STATE: &str = "training_state.safetensors";

impl Trainer {
    /// Where to begin: at the beginning, or where the checkpoint says.
    pub(super) fn start(
        &mut self,
        batches: &mut Batcher,
        settings: &Map<String, Value>,
        report: &mut impl FnMut(Report),
    ) -> Result<Progress> {
        let path = self.config.adapter_path.as_deref().map(|folder| folder.join(STATE));
        let Some(path) = path.filter(|path| self.config.resume && path.exists()) else {
            return Ok(Progress::default());
        };
        let names: Vec<String> = self.step.state().map(|(name, _)| name).collect();
        let device = self.decoder.device();
        let (tensors, progress) = checkpoint::load(&path, names.into_iter(), settings, device)?;
        self.step.restore(tensors, progress.count)?;
        batches.seek(progress.cursor);
        report(Report::Resumed { step: progress.iteration });
        Ok(progress)
    }

    pub(super) fn save(
        &self,
        progress: &Progress,
        settings: &Map<String, Value>,
        report: &mut impl FnMut(Report),
    ) -> Result<()> {
        if let Some(path) = self.config.adapter_path.as_ref().filter(|_| self.is_first()) {
            self.step.adapter()?.save(path)?;
            self.save_state(path, progress, settings)?;
            report(Report::Saved { step: progress.iteration });
        }
        Ok(())
    }

    fn save_state(
        &self,
        folder: &Path,
        progress: &Progress,
        settings: &Map<String, Value>,
    ) -> Result<()> {
        checkpoint::save(&folder.join(STATE), self.step.state(), progress, settings)
    }

    /// What a run that goes on must have in common with the one that stopped.
    pub(super) fn settings(&self, train: &[Example]) -> Result<Map<String, Value>> {
        let c = &self.config;
        let settings = json!({
            "iters": c.iters,
            // Of all ranks: as many rows on one go on with the run of several.
            "batch_size": c.batch_size * self.ranks(),
            "grad_accumulation_steps": c.grad_accumulation_steps,
            "max_seq_length": c.max_seq_length,
            "packing": c.packing,
            "learning rate": format!("{:?}", c.schedule),
            "optimizer": format!("{:?}", c.optimizer),
            "max_gradient_norm": c.max_gradient_norm,
            "seed": c.seed,
            "training data": fingerprint(train),
            "base model": self.decoder.fingerprint()?,
        });
        let Value::Object(mut settings) = settings else {
            panic!("metal-candle bug: settings are {settings}");
        };
        // What the base is called is no part of what it is.
        let adapter = self.step.adapter_config().to_json().into_iter();
        let adapter = adapter.filter(|(option, _)| option != "base_model_name_or_path");
        settings.extend(adapter.map(|(option, value)| (format!("adapter {option}"), value)));
        Ok(settings)
    }
}

/// What tells data sets apart: their size, and a hash of all ids and masks.
fn fingerprint(examples: &[Example]) -> String {
    let mut hash = Fnv::default();
    for example in examples {
        hash.add(example.ids.len() as u64);
        for (id, trained) in example.ids.iter().zip(&example.trained) {
            hash.add(u64::from(*id) << 1 | u64::from(*trained));
        }
    }
    format!("{} rows, {hash:016x}", examples.len())
}
