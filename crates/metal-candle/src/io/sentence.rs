//! What sentence-transformers writes beside an encoder: `modules.json`, a pooling, and how long texts may be.

use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::hf::{Problem, encoder_config};
use super::{EncoderConfig, Error, Result, file};

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The first one, which stands for the text.
    Cls,
}

/// What is done before and after the encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct EmbeddingConfig {
    /// From tokens to a text.
    pub pooling: Pooling,
    /// Whether vectors have length 1.
    pub normalize: bool,
    /// Tokens of a text, with those that the tokenizer adds; what is longer is cut.
    pub max_seq_length: usize,
    /// Whether texts are taken in lower case, whatever the tokenizer does.
    pub lowercase: bool,
    /// What stands before every text.
    pub prompt: String,
}

/// A folder of sentence-transformers, or one of transformers with an encoder, whose vectors are then the mean of their
/// tokens', as sentence-transformers has it.
#[derive(Clone, Debug, PartialEq)]
pub struct SentenceFolder {
    /// Where the encoder and its tokenizer are: the folder itself, or one in it.
    pub transformer: PathBuf,
    /// The encoder's shape.
    pub encoder: EncoderConfig,
    /// What is done around it.
    pub embedding: EmbeddingConfig,
}

impl SentenceFolder {
    /// Reads and checks all but the weights and the tokenizer.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Json`]; [`Error::Model`] for an encoder, a module or a pooling that this crate does not
    /// compute.
    pub fn open(folder: &Path) -> Result<SentenceFolder> {
        let modules = Modules::read(folder)?;
        let encoder = encoder_config(&modules.transformer)?;
        let pooling = match &modules.pooling {
            Some(pooling) => read_pooling(&pooling.join("config.json"), encoder.hidden_size)?,
            None => PoolingChoice { pooling: Pooling::Mean, includes_prompt: true },
        };
        let sentence: SentenceJson =
            read_optional(&modules.transformer.join("sentence_bert_config.json"))?;
        let embedding = EmbeddingConfig {
            pooling: pooling.pooling,
            normalize: modules.normalize,
            max_seq_length: max_seq_length(&modules.transformer, &sentence, &encoder)?,
            lowercase: sentence.do_lower_case.unwrap_or(false),
            prompt: default_prompt(folder, pooling.includes_prompt)?,
        };
        Ok(SentenceFolder { transformer: modules.transformer, encoder, embedding })
    }
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct ModuleJson {
    path: String,
    #[serde(rename = "type")]
    class: String,
}

/// Where the modules are.
struct Modules {
    transformer: PathBuf,
    pooling: Option<PathBuf>,
    normalize: bool,
}

impl Modules {
    fn read(folder: &Path) -> Result<Modules> {
        let path = folder.join("modules.json");
        if !path.exists() {
            let transformer = folder.to_owned();
            return Ok(Modules { transformer, pooling: None, normalize: false });
        }
        let in_file = |problem| Error::Model { path: path.clone(), problem };
        let modules: Vec<ModuleJson> = file::read_json(&path)?;
        let expected = ["Transformer", "Pooling", "Normalize"];
        for (index, module) in modules.iter().enumerate() {
            // The package of the class changes from version to version.
            let class = module.class.rsplit('.').next().unwrap_or_default();
            if expected.get(index) != Some(&class) {
                return Err(in_file(Problem::Module { index, got: module.class.clone() }));
            }
        }
        let [transformer, pooling, ..] = &modules[..] else {
            return Err(in_file(Problem::Module { index: modules.len(), got: "missing".into() }));
        };
        let place = |index, module: &ModuleJson| {
            within(folder, &module.path)
                .ok_or_else(|| in_file(Problem::ModuleFolder { index, name: module.path.clone() }))
        };
        Ok(Modules {
            transformer: place(0, transformer)?,
            pooling: Some(place(1, pooling)?),
            normalize: modules.len() == expected.len(),
        })
    }
}

/// A folder in this one, or itself where the name is empty.
fn within(folder: &Path, name: &str) -> Option<PathBuf> {
    let is_plain = Path::new(name).components().all(|part| matches!(part, Component::Normal(_)));
    match name {
        "" => Some(folder.to_owned()),
        name if is_plain => Some(folder.join(name)),
        _ => None,
    }
}

/// `1_Pooling/config.json`, as it is and as it was before version 5.
#[derive(Deserialize)]
struct PoolingJson {
    #[serde(alias = "word_embedding_dimension")]
    embedding_dimension: usize,
    pooling_mode: Option<OneOrMany>,
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_mean_sqrt_len_tokens: bool,
    #[serde(default)]
    pooling_mode_weightedmean_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
    include_prompt: Option<bool>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl PoolingJson {
    fn modes(&self) -> Vec<&str> {
        match &self.pooling_mode {
            Some(OneOrMany::One(mode)) => return vec![mode],
            Some(OneOrMany::Many(modes)) => return modes.iter().map(String::as_str).collect(),
            None => {}
        }
        let flags = [
            (self.pooling_mode_cls_token, "cls"),
            (self.pooling_mode_mean_tokens, "mean"),
            (self.pooling_mode_max_tokens, "max"),
            (self.pooling_mode_mean_sqrt_len_tokens, "mean_sqrt_len_tokens"),
            (self.pooling_mode_weightedmean_tokens, "weightedmean"),
            (self.pooling_mode_lasttoken, "lasttoken"),
        ];
        flags.into_iter().filter_map(|(is_set, mode)| is_set.then_some(mode)).collect()
    }
}

struct PoolingChoice {
    pooling: Pooling,
    includes_prompt: bool,
}

fn read_pooling(path: &Path, hidden_size: usize) -> Result<PoolingChoice> {
    let json: PoolingJson = file::read_json(path)?;
    let fail = |problem| Err(Error::Model { path: path.to_owned(), problem });
    if json.embedding_dimension != hidden_size {
        let (key, got) = ("word_embedding_dimension", json.embedding_dimension.to_string());
        let expected = format!("the encoder's hidden_size, {hidden_size}");
        return fail(Problem::Inconsistent { key, got, expected });
    }
    let pooling = match json.modes()[..] {
        ["mean"] => Pooling::Mean,
        ["cls"] => Pooling::Cls,
        ref other => {
            let (key, value, expected) = ("pooling_mode", format!("{other:?}"), "mean or cls");
            return fail(Problem::Unsupported { key, value, expected });
        }
    };
    Ok(PoolingChoice { pooling, includes_prompt: json.include_prompt.unwrap_or(true) })
}

/// `sentence_bert_config.json`
#[derive(Default, Deserialize)]
struct SentenceJson {
    max_seq_length: Option<usize>,
    do_lower_case: Option<bool>,
}

/// Of `tokenizer_config.json`; transformers writes 10³⁰ for no limit.
#[derive(Default, Deserialize)]
struct TokenizerJson {
    model_max_length: Option<f64>,
}

fn max_seq_length(
    transformer: &Path,
    sentence: &SentenceJson,
    encoder: &EncoderConfig,
) -> Result<usize> {
    let path = transformer.join("tokenizer_config.json");
    let tokenizer: TokenizerJson = read_optional(&path)?;
    let of_tokenizer = tokenizer.model_max_length.map(|limit| limit as usize);
    let limit = sentence.max_seq_length.or(of_tokenizer);
    // More than there are positions for cannot be computed.
    match limit.unwrap_or(usize::MAX).min(encoder.max_tokens()) {
        0 => {
            let (key, got, expected) = ("max_seq_length", "0".into(), "1 or more".into());
            Err(Error::Model { path, problem: Problem::Inconsistent { key, got, expected } })
        }
        limit => Ok(limit),
    }
}

/// `config_sentence_transformers.json`
#[derive(Default, Deserialize)]
struct PromptsJson {
    #[serde(default)]
    prompts: std::collections::BTreeMap<String, String>,
    default_prompt_name: Option<String>,
}

fn default_prompt(folder: &Path, includes_prompt: bool) -> Result<String> {
    let path = folder.join("config_sentence_transformers.json");
    let PromptsJson { mut prompts, default_prompt_name } = read_optional(&path)?;
    let Some(name) = default_prompt_name else { return Ok(String::new()) };
    let fail = |problem| Err(Error::Model { path: path.clone(), problem });
    let Some(prompt) = prompts.remove(&name) else {
        let (key, expected) = ("default_prompt_name", "the name of one of the prompts".into());
        return fail(Problem::Inconsistent { key, got: format!("{name:?}"), expected });
    };
    if !includes_prompt && !prompt.is_empty() {
        let (key, value) = ("default_prompt_name", format!("{name:?} with include_prompt false"));
        let expected = "a pooling that includes the prompt";
        return fail(Problem::Unsupported { key, value, expected });
    }
    Ok(prompt)
}

/// What a file says, or the default where there is none.
fn read_optional<T: DeserializeOwned + Default>(path: &Path) -> Result<T> {
    match path.exists() {
        true => file::read_json(path),
        false => Ok(T::default()),
    }
}
