//! Which texts are nearest to a question, by the angle between their vectors.
//!
//! ```text
//! cargo run -p metal-candle --example nearest -- FOLDER QUESTION TEXT..
//! ```
//!
//! FOLDER is one of sentence-transformers, as that of all-MiniLM-L6-v2.

use std::error::Error;

use metal_candle::Device;
use metal_candle::embed::EmbeddingModel;
use metal_candle::models::BaseWeights;

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, texts @ ..] = &args[..] else {
        return Err("expected FOLDER QUESTION TEXT..".into());
    };
    let model = EmbeddingModel::load(folder.as_ref(), BaseWeights::F32, &Device::Cpu)?;
    let vectors = model.encode(texts)?;
    let mut rows = texts.iter().zip(vectors.rows());
    let (_, question) = rows.next().ok_or("expected a QUESTION")?;
    // Folders that do not normalise give vectors of any length.
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let cosine =
        |row: &[f32]| dot(question, row) / (dot(question, question) * dot(row, row)).sqrt();
    let mut found: Vec<(f32, &String)> = rows.map(|(text, row)| (cosine(row), text)).collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (cosine, text) in found {
        println!("{cosine:.3}  {text}");
    }
    Ok(())
}
