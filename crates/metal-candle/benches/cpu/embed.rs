//! Vectors of texts, by what a user would call.

use super::Failure;
use super::model::{activations, base};
use super::serve::{Prepared, number, text};
use metal_candle::Device;
use metal_candle::embed::EmbeddingModel;
use serde_json::Value;

const WORDS: [&str; 8] = ["the", "house", "river", "light", "green", "stone", "music", "paper"];

/// Of `{"work": "embed", "model": FOLDER, "base": "f32", "activations": "f32", "texts": 32, "batch": 32, "shortest": 64,
/// "longest": 64}`: all of the texts, from strings to numbers.
pub(crate) fn embed(row: &Value) -> Result<Prepared, Failure> {
    let (model, texts) = model_and_texts(row)?;
    Ok(Prepared::new(move || {
        let rows = model.encode(&texts)?;
        let is_finite = rows.rows().all(|row| row.iter().all(|x| x.is_finite()));
        if is_finite && rows.cut() == 0 { Ok(()) } else { Err("cut or not finite".into()) }
    }))
}

/// The texts are those of `reference/bench.py`: their lengths spread evenly and in no order, a token to a word.
pub(crate) fn model_and_texts(row: &Value) -> Result<(EmbeddingModel, Vec<String>), Failure> {
    let model = EmbeddingModel::load(text(row, "model")?.as_ref(), base(row)?, &Device::Cpu)?;
    let model = model.with_activations(activations(row)?);
    let (count, shortest, longest) =
        (number(row, "texts")?, number(row, "shortest")?, number(row, "longest")?);
    if count < 2 || longest < shortest || shortest < 2 {
        return Err(format!("{count} texts of {shortest} to {longest} tokens").into());
    }
    let text = |i: usize| {
        let len = shortest + (longest - shortest) * (i * 37 % count) / (count - 1);
        let words = (0..len - 2).map(|j| WORDS[(i + j * j) % WORDS.len()]);
        words.collect::<Vec<_>>().join(" ")
    };
    let texts = (0..count).map(text).collect();
    Ok((model.with_batch_size(number(row, "batch")?), texts))
}
