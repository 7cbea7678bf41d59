//! The logits of a model, with or without an adapter, for comparing with other programs.
//!
//! ```text
//! cargo run -p metal-candle --example logits -- MODEL ADAPTER IDS OUT
//! ```
//!
//! MODEL is a GGUF file or a Hugging Face folder; its weights are taken as f32. ADAPTER is a folder
//! of PEFT's or mlx-lm's or a GGUF file, or `-` for none. IDS are token ids with commas between them.
//! OUT gets one f32 after the other, little-endian: `[tokens, vocabulary]`.

use std::error::Error;

use metal_candle::models::{BaseWeights, load_decoder};
use metal_candle::nn::LoRAAdapter;
use metal_candle::{Device, LazyTensor};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [model, adapter, ids, out] = &args[..] else {
        return Err(format!("expected MODEL ADAPTER IDS OUT, got {} arguments", args.len()).into());
    };
    let ids = ids.split(',').map(|id| id.trim().parse::<u32>()).collect::<Result<Vec<_>, _>>()?;
    let decoder = load_decoder(model.as_ref(), BaseWeights::F32, &Device::Cpu)?;
    let adapter = match adapter.as_str() {
        "-" => None,
        path => Some(LoRAAdapter::load(path, &decoder.config, &Device::Cpu)?),
    };
    let ids = LazyTensor::from_slice(&ids, &[1, ids.len()], &Device::Cpu)?;
    let logits = decoder.logits(&decoder.hidden(&ids, adapter.as_ref())?)?;
    let bytes: Vec<u8> = logits.to_vec::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect();
    Ok(std::fs::write(out, bytes)?)
}
