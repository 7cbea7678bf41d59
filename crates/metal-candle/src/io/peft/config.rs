//! `adapter_config.json`.

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Problem;

/// Which modules get an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "OneOrMany<String>", into = "OneOrMany<String>")]
pub enum TargetModules {
    /// A module of one of these full names, or whose name ends with `.` and one of these.
    Names(Vec<String>),
    /// A module whose full name matches this regular expression as a whole.
    Regex(String),
    /// Every linear module but the output projection: `"all-linear"`.
    AllLinear,
}

/// Which biases are trained. Only [`Bias::None`] is supported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None of them.
    #[default]
    None,
    /// All of the model's.
    All,
    /// Those of the modules that have an adapter.
    LoraOnly,
}

/// How a fresh adapter begins.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitLoraWeights {
    /// `true`: A Kaiming-uniform with a = √5, B zero. `false`: both random.
    Default(bool),
    /// A scheme by name, such as `gaussian`.
    Named(String),
}

/// A value where PEFT takes one or a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list.
    Many(Vec<T>),
}

/// PEFT's `LoraConfig`, field for field where it is supported.
///
/// [`Self::from_json`] reads a file of PEFT's and refuses what is not supported; `Deserialize`
/// alone fills in defaults and overlooks other options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// What the base is called: a hub id or a path. Not compared with anything.
    pub base_model_name_or_path: Option<String>,
    /// `CAUSAL_LM`.
    pub task_type: Option<String>,
    /// Rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`, or by `lora_alpha / √r` with rsLoRA.
    #[serde(serialize_with = "integer_if_whole")]
    pub lora_alpha: f64,
    /// Probability of dropping an input of A while training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / √r`.
    pub use_rslora: bool,
    /// Which modules get an adapter.
    pub target_modules: TargetModules,
    /// Modules that get none even where `target_modules` match: names or a regular expression.
    pub exclude_modules: Option<OneOrMany<String>>,
    /// Only these layers, where `target_modules` are suffixes.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// What the list of layers is called, where it is not the part before the first number.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Other ranks, by a regular expression of the module's name or its end; the first that
    /// matches counts.
    pub rank_pattern: IndexMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: IndexMap<String, f64>,
    /// Which biases are trained.
    pub bias: Bias,
    /// How a fresh adapter begins.
    pub init_lora_weights: InitLoraWeights,
}

impl Default for LoraConfig {
    /// PEFT's defaults, on every linear module.
    fn default() -> Self {
        Self {
            base_model_name_or_path: None,
            task_type: Some("CAUSAL_LM".to_owned()),
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: IndexMap::new(),
            alpha_pattern: IndexMap::new(),
            bias: Bias::None,
            init_lora_weights: InitLoraWeights::Default(true),
        }
    }
}

/// Options that may be set to anything without changing what the adapter computes.
const INERT: [&str; 10] = [
    "peft_type",
    "peft_version",
    "auto_mapping",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "eva_config",
    "runtime_config",
    "parent_library",
];

/// Options that change it, and how. Refused where they are set to anything.
const UNSUPPORTED: [(&str, &str); 19] = [
    ("use_dora", "DoRA rescales the weight by a learned magnitude"),
    ("use_qalora", "QA-LoRA pools the inputs of A"),
    ("fan_in_fan_out", "the base would store its weights transposed"),
    ("lora_bias", "lora_B would have a bias"),
    ("modules_to_save", "whole modules would be trained and stored beside the adapter"),
    ("trainable_token_indices", "single embeddings would be trained"),
    ("target_parameters", "parameters that are no modules would get adapters"),
    ("layer_replication", "the base's layers would be stacked anew"),
    ("alora_invocation_tokens", "activated LoRA starts only after its invocation tokens"),
    ("arrow_config", "Arrow routes between adapters"),
    ("use_bdlora", "BD-LoRA makes A and B block-diagonal"),
    ("velora_config", "VeLoRA compresses activations"),
    ("monteclora_config", "MonteCLoRA samples its weights"),
    ("kasa_config", "KaSA changes the base's weights"),
    ("megatron_config", "Megatron splits its layers"),
    ("ensure_weight_tying", "the adapters of tied weights would be tied"),
    ("loftq_config", "LoftQ changes the base's weights"),
    ("corda_config", "CorDA changes the base's weights"),
    ("lora_ga_config", "LoRA-GA changes the base's weights"),
];

/// Initialisations that leave the base as it is, so that A and B alone are the adapter.
const INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

impl LoraConfig {
    /// From the object of an `adapter_config.json`.
    ///
    /// # Errors
    /// [`Problem::PeftType`]; [`Problem::Unsupported`] for an option that would make the adapter
    /// compute something else; [`Problem::Option`] for a value out of range or of another type.
    pub fn from_json(json: &Map<String, Value>) -> Result<Self, Problem> {
        match json.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            got => {
                let got = got.and_then(Value::as_str).unwrap_or("absent").to_owned();
                return Err(Problem::PeftType { got });
            }
        }
        refuse_unsupported(json)?;
        let options = known_options(json);
        // PEFT would guess from the base's model type, which an adapter does not carry.
        if !options.contains_key("target_modules") {
            let (option, got) = ("target_modules".to_owned(), "absent".to_owned());
            let expected = "a list of names, a regular expression or \"all-linear\"";
            return Err(Problem::Option { option, got, expected });
        }
        let config: Self =
            serde_json::from_value(options.into()).map_err(|cause| Problem::Json { cause })?;
        config.check()?;
        Ok(config)
    }

    /// The object of an `adapter_config.json` that PEFT loads.
    pub fn to_json(&self) -> Map<String, Value> {
        let mut json = Map::new();
        json.insert("peft_type".to_owned(), "LORA".into());
        json.insert("inference_mode".to_owned(), true.into());
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => json.extend(fields),
            other => unreachable!("metal-candle bug: a LoRA config is written as {other:?}"),
        }
        json
    }

    /// Whether every value is in its range and the options fit together.
    ///
    /// # Errors
    /// [`Problem::Option`], [`Problem::Unsupported`].
    pub fn check(&self) -> Result<(), Problem> {
        let option = |option: &str, got: String, expected| {
            Err(Problem::Option { option: option.to_owned(), got, expected })
        };
        let ranks = self.rank_pattern.iter().map(|(pattern, &r)| (pattern.as_str(), r));
        if let Some((name, _)) = ranks.chain([("r", self.r)]).find(|(_, r)| *r == 0) {
            return option(name, "0".to_owned(), "a rank of at least 1");
        }
        let alphas = self.alpha_pattern.iter().map(|(pattern, &alpha)| (pattern.as_str(), alpha));
        let mut alphas = alphas.chain([("lora_alpha", self.lora_alpha)]);
        if let Some((name, alpha)) = alphas.find(|(_, alpha)| !alpha.is_finite()) {
            return option(name, alpha.to_string(), "a finite number");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            return option("lora_dropout", self.lora_dropout.to_string(), "a number in [0, 1)");
        }
        let suffixes = matches!(self.target_modules, TargetModules::Names(_));
        if self.layers_to_transform.is_some() && !suffixes {
            let expected = "absent, or target_modules a list";
            return option("layers_to_transform", "set".to_owned(), expected);
        }
        self.refuse_variants()
    }

    /// Values of the fields themselves that are not supported.
    fn refuse_variants(&self) -> Result<(), Problem> {
        let unsupported = |option: &str, value: String, reason| {
            Err(Problem::Unsupported { option: option.to_owned(), value, reason })
        };
        if self.bias != Bias::None {
            let value = format!("{:?}", self.bias);
            return unsupported("bias", value, "biases would be trained and stored");
        }
        match &self.init_lora_weights {
            InitLoraWeights::Named(name) if !INITS.contains(&&*name.to_lowercase()) => {
                let reason = "it changes the base's weights, or is not known; \
                              convert the adapter to plain LoRA with PEFT first";
                unsupported("init_lora_weights", format!("{name:?}"), reason)
            }
            _ => Ok(()),
        }
    }
}

/// Refuses every option that is set, is not a field, and is not known to be inert.
fn refuse_unsupported(json: &Map<String, Value>) -> Result<(), Problem> {
    let Value::Object(fields) = serde_json::to_value(LoraConfig::default()).unwrap_or_default()
    else {
        return Ok(());
    };
    for (option, value) in json {
        if is_unset(value) || fields.contains_key(option) || INERT.contains(&option.as_str()) {
            continue;
        }
        let known = UNSUPPORTED.iter().find(|(name, _)| name == option);
        return Err(Problem::Unsupported {
            option: option.clone(),
            value: value.to_string(),
            reason: known.map_or("no option of the PEFT that this crate knows", |row| row.1),
        });
    }
    Ok(())
}

/// What is left of the object once everything is taken out that says nothing.
fn known_options(json: &Map<String, Value>) -> Map<String, Value> {
    json.iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(option, value)| (option.clone(), value.clone()))
        .collect()
}

/// PEFT's ways of saying that an option is not used.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(set) => !set,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) => false,
    }
}

impl From<OneOrMany<String>> for TargetModules {
    fn from(value: OneOrMany<String>) -> Self {
        match value {
            OneOrMany::One(word) if word.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            OneOrMany::One(regex) => Self::Regex(regex),
            OneOrMany::Many(names) => Self::Names(names),
        }
    }
}

impl From<TargetModules> for OneOrMany<String> {
    fn from(value: TargetModules) -> Self {
        match value {
            TargetModules::AllLinear => Self::One("all-linear".to_owned()),
            TargetModules::Regex(regex) => Self::One(regex),
            TargetModules::Names(names) => Self::Many(names),
        }
    }
}

/// PEFT's own files hold an integer, and other readers expect one.
fn integer_if_whole<S: serde::Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        to.serialize_i64(*value as i64)
    } else {
        to.serialize_f64(*value)
    }
}
