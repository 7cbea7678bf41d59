//! mlx-lm's files: its nested keys as our flags, and its settings that say what is so anyway.

use super::Setting;
use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

/// mlx-lm's rank where a file names none.
const DEFAULT_RANK: f64 = 8.0;

/// The settings of a file; empty ones are left out. What is done otherwise than asked is noted.
pub(super) fn flags(file: Map<String, Value>, notes: &mut Vec<String>) -> Result<Vec<Setting>> {
    let mut out = Vec::new();
    for (key, value) in file {
        match (key.as_str(), value) {
            (_, Value::Null) => {}
            ("lora_parameters", Value::Object(lora)) => out.extend(lora_parameters(lora)?),
            ("lr_schedule", Value::Object(schedule)) => out.extend(lr_schedule(&schedule, notes)?),
            // Adam is AdamW that does not decay.
            ("optimizer", Value::String(name)) if name == "adam" => {
                out.push(setting(&key, "weight-decay", json!(0)));
            }
            (_, value) => {
                let flag = key.replace('_', "-");
                out.push(Setting { key, flag, value });
            }
        }
    }
    // A schedule brings its own learning rate.
    let nested: Vec<String> =
        out.iter().filter(|s| s.key.contains('.')).map(|s| s.flag.clone()).collect();
    out.retain(|s| s.key.contains('.') || !nested.contains(&s.flag));
    Ok(out)
}

fn setting(key: &str, flag: &str, value: Value) -> Setting {
    Setting { key: key.to_owned(), flag: flag.to_owned(), value }
}

/// `scale` multiplies the branch as it is; ours is alpha / rank.
fn lora_parameters(lora: Map<String, Value>) -> Result<Vec<Setting>> {
    let rank = match lora.get("rank") {
        Some(rank) => rank.as_f64().context("lora_parameters: rank: expected a number")?,
        None => DEFAULT_RANK,
    };
    let mut out = Vec::new();
    for (name, value) in lora {
        let key = format!("lora_parameters.{name}");
        match name.as_str() {
            "rank" => out.push(setting(&key, "lora-rank", value)),
            "scale" => {
                let scale = value.as_f64().with_context(|| format!("{key}: expected a number"))?;
                out.push(setting(&key, "lora-alpha", json!(scale * rank)));
            }
            "dropout" => out.push(setting(&key, "lora-dropout", value)),
            "keys" => out.push(setting(&key, "target-modules", value)),
            _ => bail!("unknown key {key:?}: expected rank, scale, dropout or keys"),
        }
    }
    Ok(out)
}

/// `{name, warmup, warmup_init, arguments}`; the decay of mlx-lm begins after the warm-up.
fn lr_schedule(schedule: &Map<String, Value>, notes: &mut Vec<String>) -> Result<Vec<Setting>> {
    let number = |value: &Value| value.as_f64().or_else(|| value.as_str()?.parse().ok());
    let arguments: Vec<f64> = match schedule.get("arguments") {
        Some(Value::Array(list)) => list.iter().map(number).collect::<Option<_>>(),
        _ => None,
    }
    .context("lr_schedule: arguments: expected a list of numbers")?;
    let unknown =
        |key: &&String| !["name", "warmup", "warmup_init", "arguments"].contains(&key.as_str());
    if let Some(key) = schedule.keys().find(unknown) {
        bail!("unknown key \"lr_schedule.{key}\": expected name, warmup, warmup_init or arguments");
    }
    let warmup = schedule.get("warmup").and_then(number).unwrap_or(0.0);
    if schedule.get("warmup_init").and_then(number).is_some_and(|init| init != 0.0) {
        notes.push("lr_schedule.warmup_init: the warm-up begins at 0 here".to_owned());
    }
    let name = schedule.get("name").and_then(Value::as_str).unwrap_or_default();
    let (kind, [rate, steps, end]) = match (name, &arguments[..]) {
        ("cosine_decay", [rate, steps]) => ("cosine", [*rate, *steps, 0.0]),
        ("cosine_decay", [rate, steps, end]) => ("cosine", [*rate, *steps, *end]),
        ("linear_schedule", [rate, 0.0, steps]) => ("linear", [*rate, *steps, 0.0]),
        ("linear_schedule", [_, end, _]) => {
            bail!("lr_schedule: a linear_schedule that ends at {end} is not supported: only at 0")
        }
        _ => bail!(
            "lr_schedule: {name:?} with {} arguments is not supported: expected cosine_decay with \
             [rate, steps] or [rate, steps, end], or linear_schedule with [rate, 0, steps]",
            arguments.len()
        ),
    };
    let of =
        |name: &str, flag: &str, value: Value| setting(&format!("lr_schedule.{name}"), flag, value);
    let mut out = vec![
        of("name", "lr-schedule", json!(kind)),
        of("arguments", "learning-rate", json!(rate)),
        of("arguments", "lr-decay-iters", json!((steps + warmup) as u64)),
        of("warmup", "warmup", json!(warmup as u64)),
    ];
    if end > 0.0 {
        out.push(of("arguments", "min-learning-rate", json!(end)));
    }
    Ok(out)
}

/// Whether a key without a flag here changes nothing that is computed.
///
/// # Errors
/// Where it is mlx-lm's, and asks for what is not done here.
pub(super) fn is_moot(setting: &Setting) -> Result<bool> {
    let same = match setting.key.as_str() {
        "train" => json!(true),
        "test" | "grad_checkpoint" => json!(false),
        "fine_tune_type" => json!("lora"),
        "optimizer" => json!("adamw"),
        "test_batches" | "clear_cache_threshold" | "project_name" | "trust_remote_code" => {
            return Ok(true);
        }
        _ => return Ok(false),
    };
    match setting.value == same {
        true => Ok(true),
        false => bail!("{} is {}: only {same} is supported", setting.key, setting.value),
    }
}

#[cfg(test)]
mod tests {
    use super::flags;
    use serde_json::{Map, Value, json};

    fn of(file: Value) -> Result<Vec<String>, String> {
        let Value::Object(file) = file else { panic!("{file}") };
        let file: Map<String, Value> = file;
        let settings = flags(file, &mut Vec::new()).map_err(|e| e.to_string())?;
        Ok(settings.into_iter().map(|s| format!("{}={}", s.flag, s.value)).collect())
    }

    #[test]
    fn a_scale_is_alpha_over_rank() {
        let lora = json!({ "lora_parameters": { "scale": 20.0, "rank": 4, "keys": ["q_proj"] } });
        let want = ["lora-alpha=80.0", "lora-rank=4", "target-modules=[\"q_proj\"]"];
        assert_eq!(of(lora).unwrap(), want);
        let default = json!({ "lora_parameters": { "scale": 2.0 } });
        assert_eq!(of(default).unwrap(), ["lora-alpha=16.0"]);
    }

    #[test]
    fn a_schedule_decays_after_its_warm_up_and_brings_its_rate() {
        let schedule = |name: &str, arguments: Value| {
            json!({ "learning_rate": 7.0, "lr_schedule":
                { "name": name, "warmup": 100, "arguments": arguments } })
        };
        let cosine = of(schedule("cosine_decay", json!([1e-5, 1000, 1e-7]))).unwrap();
        let want = ["lr-schedule=\"cosine\"", "learning-rate=0.00001", "lr-decay-iters=1100"];
        assert_eq!(cosine[..3], want);
        assert_eq!(cosine[3..], ["warmup=100", "min-learning-rate=1e-7"]);
        let linear = of(schedule("linear_schedule", json!([1e-4, 0.0, 50]))).unwrap();
        assert_eq!(linear[0], "lr-schedule=\"linear\"");
        assert!(linear.contains(&"lr-decay-iters=150".to_owned()) && linear.len() == 4);
        for (name, arguments) in [
            ("linear_schedule", json!([1e-4, 1e-5, 50])),
            ("step_decay", json!([1e-1, 0.9, 10])),
            ("cosine_decay", json!([1e-5])),
        ] {
            let error = of(schedule(name, arguments)).unwrap_err();
            assert!(error.contains("not supported"), "{error}");
        }
    }
}
