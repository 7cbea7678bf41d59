//! Text to token ids and back, as the model's own tokenizer does it.
//!
//! Three sources: a `tokenizer.json`; a Hugging Face folder with one; the metadata of a GGUF file
//! (byte-level BPE). The work is done by the `tokenizers` crate; what is ours is building it from a
//! GGUF, the check of a hostile merge table, and text that streams without half a character.

mod check;
mod cut;
mod gguf;
mod stream;

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use self::stream::TextStream;
use super::gguf::GgufFile;
use super::{ChatTemplate, Error, Result, file};

/// What can be wrong with a tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("model {got:?}: expected \"gpt2\" (byte-level BPE); put a tokenizer.json beside it")]
    Model { got: String },
    #[error("pre-tokenizer {got:?}: expected one of {known:?}; put a tokenizer.json beside it")]
    PreTokenizer { got: String, known: Vec<&'static str> },
    #[error("token {token:?} has two ids, {first} and {second}")]
    DuplicateToken { token: String, first: usize, second: usize },
    #[error("{tokens} tokens but {types} token types")]
    TokenTypes { tokens: usize, types: usize },
    #[error("merge {index} is {merge:?}: expected two tokens and a space between them")]
    Merge { index: usize, merge: String },
    #[error("merge {index} needs token {token:?}, which the vocabulary lacks")]
    MergeToken { index: usize, token: String },
    #[error("{key} is {id}, but the vocabulary has {tokens} tokens")]
    SpecialId { key: &'static str, id: u32, tokens: usize },
    #[error(
        "token {token:?} has id {id}, but the model has {rows} tokens: is it another model's tokenizer?"
    )]
    Vocabulary { token: String, id: u32, rows: usize },
    #[error("{key} is {token:?}, which the vocabulary lacks")]
    SpecialToken { key: &'static str, token: String },
    #[error("chat template: {cause}")]
    Template { cause: super::chat::Problem },
    #[error("texts of {limit} tokens at most leave no room for the {added} that are added to each")]
    Truncation { limit: usize, added: usize },
    #[error("{cause}")]
    Library { cause: tokenizers::Error },
}

/// The ids that mean something beside text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begins a text, where the model wants one.
    pub bos: Option<u32>,
    /// Ends a text, and in most chat models a turn.
    pub eos: Option<u32>,
    /// Ends a turn, where that is another token.
    pub eot: Option<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
    /// Stands for what cannot be encoded.
    pub unk: Option<u32>,
}

/// A text's ids, and which bytes of it each one covers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// As many byte ranges of the text; empty for a token that the tokenizer added.
    pub spans: Vec<Range<usize>>,
}

/// Text to ids and back.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    special: SpecialIds,
    chat_template: Option<ChatTemplate>,
}

impl Tokenizer {
    /// From a `tokenizer.json`; special ids and the chat template from the `tokenizer_config.json`
    /// and `chat_template.jinja` beside it, where they exist. Padding and truncation, with which some are saved, are left
    /// out, as transformers does.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Json`], [`Error::Tokenizer`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = file::read(path)?;
        let failed = |problem| Error::Tokenizer { path: path.to_owned(), problem };
        check::json(path, &bytes)?;
        let library = |cause| failed(Problem::Library { cause });
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(library)?;
        inner.with_padding(None).with_truncation(None).map_err(library)?;
        let mut tokenizer = Self::new(path, inner);
        tokenizer.read_config(&path.with_file_name("tokenizer_config.json"))?;
        let template = path.with_file_name("chat_template.jinja");
        if template.exists() {
            let source = String::from_utf8_lossy(&file::read(&template)?).into_owned();
            tokenizer.chat_template = Some(tokenizer.template(&template, source)?);
        }
        Ok(tokenizer)
    }

    /// From the metadata of a GGUF file (`tokenizer.ggml.*`, `tokenizer.chat_template`).
    ///
    /// # Errors
    /// [`Error::Gguf`] for keys that are missing or of another type; [`Error::Tokenizer`].
    pub fn from_gguf(gguf: &GgufFile) -> Result<Self> {
        let (inner, special) = gguf::build(gguf)?;
        let mut tokenizer = Self { special, ..Self::new(gguf.path(), inner) };
        if let Some(source) = gguf.str_opt("tokenizer.chat_template")? {
            tokenizer.chat_template = Some(tokenizer.template(gguf.path(), source.to_owned())?);
        }
        Ok(tokenizer)
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into a folder, each in one step.
    ///
    /// # Errors
    /// [`Error::File`]; [`Problem::Library`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        let json = self.inner.to_string(true).map_err(self.library())?;
        file::write_atomic(&folder.join("tokenizer.json"), json.as_bytes())?;
        let mut config = serde_json::Map::new();
        config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
        let SpecialIds { bos, eos, pad, unk, .. } = self.special;
        for (key, id) in
            [("bos_token", bos), ("eos_token", eos), ("pad_token", pad), ("unk_token", unk)]
        {
            if let Some(token) = id.and_then(|id| self.inner.id_to_token(id)) {
                config.insert(key.to_owned(), token.into());
            }
        }
        if let Some(template) = &self.chat_template {
            config.insert("chat_template".to_owned(), template.source().into());
        }
        let config = serde_json::to_string_pretty(&config)
            .expect("metal-candle bug: a JSON object cannot be printed");
        file::write_atomic(&folder.join("tokenizer_config.json"), config.as_bytes())
    }

    /// The ids of `text`. Special tokens spelled out in it are recognised; with `add_special` the
    /// ones that the model wants around every text (such as BOS) are added.
    ///
    /// # Errors
    /// [`Problem::Library`].
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(self.library())?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`Self::encode`], with the bytes of `text` that each id covers.
    ///
    /// # Errors
    /// [`Problem::Library`].
    pub fn encode_spans(&self, text: &str, add_special: bool) -> Result<Encoding> {
        let encoding = self.inner.encode(text, add_special).map_err(self.library())?;
        let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok(Encoding { ids: encoding.get_ids().to_vec(), spans })
    }

    /// The text of `ids`; `skip_special` leaves out tokens such as EOS. Bytes that are no UTF-8
    /// become U+FFFD, ids outside the vocabulary nothing.
    ///
    /// # Errors
    /// [`Problem::Library`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(self.library())
    }

    /// Decodes ids one by one; see [`TextStream`].
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The ids that mean something beside text.
    pub fn special(&self) -> &SpecialIds {
        &self.special
    }

    /// Whether generation stops at `id`.
    pub fn is_end(&self, id: u32) -> bool {
        self.special.eos == Some(id) || self.special.eot == Some(id)
    }

    /// The id of one token, by its exact spelling in the vocabulary.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Tokens of the vocabulary, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Holds the vocabulary against a model's embedding of so many rows, of which it may leave some unused.
    ///
    /// # Errors
    /// [`Problem::Vocabulary`] for an id that is no row.
    pub fn check_vocabulary(&self, rows: usize) -> Result<()> {
        let vocabulary = self.inner.get_vocab(true);
        let largest = vocabulary.into_iter().max_by_key(|(_, id)| *id);
        match largest {
            Some((token, id)) if id as usize >= rows => Err(Error::Tokenizer {
                path: self.path.clone(),
                problem: Problem::Vocabulary { token, id, rows },
            }),
            _ => Ok(()),
        }
    }

    /// The model's chat template, where it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    fn new(path: &Path, inner: tokenizers::Tokenizer) -> Self {
        let special = SpecialIds::default();
        Self { path: path.to_owned(), inner, special, chat_template: None }
    }

    /// Special ids and chat template of a `tokenizer_config.json`, if there is one.
    fn read_config(&mut self, path: &Path) -> Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let config: Config = file::read_json(path)?;
        let id = |key, token: &Option<TokenName>| self.named_id(path, key, token.as_ref());
        self.special = SpecialIds {
            bos: id("bos_token", &config.bos_token)?,
            eos: id("eos_token", &config.eos_token)?,
            eot: None,
            pad: id("pad_token", &config.pad_token)?,
            unk: id("unk_token", &config.unk_token)?,
        };
        let template = match config.chat_template {
            None => None,
            Some(Templates::One(source)) => Some(source),
            Some(Templates::Named(all)) => {
                all.into_iter().find(|named| named.name == "default").map(|named| named.template)
            }
        };
        self.chat_template = template.map(|source| self.template(path, source)).transpose()?;
        Ok(())
    }

    fn named_id(
        &self,
        path: &Path,
        key: &'static str,
        token: Option<&TokenName>,
    ) -> Result<Option<u32>> {
        let Some(TokenName::Text(token) | TokenName::Added { content: token }) = token else {
            return Ok(None);
        };
        match self.token_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::Tokenizer {
                path: path.to_owned(),
                problem: Problem::SpecialToken { key, token: token.clone() },
            }),
        }
    }

    /// A template of this file that knows how this vocabulary spells its special tokens.
    fn template(&self, path: &Path, source: String) -> Result<ChatTemplate> {
        let spell = |id: Option<u32>| id.and_then(|id| self.inner.id_to_token(id));
        let SpecialIds { bos, eos, pad, unk, .. } = self.special;
        let tokens =
            [("bos_token", bos), ("eos_token", eos), ("pad_token", pad), ("unk_token", unk)];
        let tokens = tokens.into_iter().filter_map(|(name, id)| Some((name, spell(id)?)));
        ChatTemplate::new(source, tokens)
            .map_err(|cause| in_file(path)(Problem::Template { cause }))
    }

    fn library(&self) -> impl FnOnce(tokenizers::Error) -> Error + '_ {
        |cause| Error::Tokenizer { path: self.path.clone(), problem: Problem::Library { cause } }
    }
}

/// The keys of a `tokenizer_config.json` that concern us.
#[derive(Deserialize)]
struct Config {
    bos_token: Option<TokenName>,
    eos_token: Option<TokenName>,
    pad_token: Option<TokenName>,
    unk_token: Option<TokenName>,
    chat_template: Option<Templates>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenName {
    Text(String),
    Added { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

fn in_file(path: &Path) -> impl Fn(Problem) -> Error + '_ {
    |problem| Error::Tokenizer { path: path.to_owned(), problem }
}
