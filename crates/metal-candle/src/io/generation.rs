//! `generation_config.json`: how a model's makers mean it to be run.

use super::{Result, file};
use serde::{Deserialize, Deserializer};
use std::path::Path;

/// What of the file is used here. Names and meanings are transformers': filters and temperature
/// count only where `do_sample` is true.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GenerationConfig {
    /// Tokens that end a text.
    #[serde(rename = "eos_token_id", deserialize_with = "one_or_many")]
    pub eos_token_ids: Vec<u32>,
    /// Whether tokens are drawn at random.
    #[serde(deserialize_with = "or_default")]
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// So many of the likeliest tokens.
    pub top_k: Option<usize>,
    /// The likeliest tokens of this probability in all.
    pub top_p: Option<f64>,
    /// Makes tokens that were seen less likely.
    pub repetition_penalty: Option<f64>,
}

impl GenerationConfig {
    /// Reads the file of a model folder; without one there is nothing that its makers say.
    ///
    /// # Errors
    /// [`Error::File`](super::Error::File); [`Error::Json`](super::Error::Json), too where a value is of the wrong type.
    pub fn read(folder: &Path) -> Result<GenerationConfig> {
        let path = folder.join("generation_config.json");
        match path.exists() {
            true => file::read_json(&path),
            false => Ok(GenerationConfig::default()),
        }
    }
}

/// `2`, `[2, 3]` or null.
fn one_or_many<'de, D: Deserializer<'de>>(input: D) -> std::result::Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Option::<Ids>::deserialize(input)? {
        None => Vec::new(),
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    })
}

/// Null is the default.
fn or_default<'de, D: Deserializer<'de>>(input: D) -> std::result::Result<bool, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::GenerationConfig;
    use crate::io::Error;

    fn read(text: &str) -> super::Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("generation_config.json"), text).unwrap();
        GenerationConfig::read(folder.path())
    }

    #[test]
    fn end_tokens_are_one_or_many_and_all_may_be_missing() {
        let llama = read(
            r#"{"bos_token_id": 1, "eos_token_id": [7, 9], "do_sample": true, "temperature": 0.6,
            "top_p": 0.9, "transformers_version": "4.40"}"#,
        );
        let want = GenerationConfig {
            eos_token_ids: vec![7, 9],
            do_sample: true,
            temperature: Some(0.6),
            top_p: Some(0.9),
            ..GenerationConfig::default()
        };
        assert_eq!(llama.unwrap(), want);
        assert_eq!(read(r#"{"eos_token_id": 2}"#).unwrap().eos_token_ids, [2]);
        let nulls = r#"{"eos_token_id": null, "do_sample": null, "top_k": null}"#;
        assert_eq!(read(nulls).unwrap(), GenerationConfig::default());
        let empty = tempfile::tempdir().unwrap();
        assert_eq!(GenerationConfig::read(empty.path()).unwrap(), GenerationConfig::default());
    }

    #[test]
    fn a_value_of_another_type_is_refused_with_the_file_s_name() {
        for text in ["[", r#"{"top_k": "many"}"#, r#"{"eos_token_id": -1}"#] {
            let error = read(text).unwrap_err();
            assert!(matches!(error, Error::Json { .. }), "{error}");
            assert!(error.to_string().contains("generation_config.json"), "{error}");
        }
    }
}
