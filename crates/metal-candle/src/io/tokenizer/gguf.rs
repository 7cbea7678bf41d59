//! A tokenizer from the metadata of a GGUF file.
//!
//! A GGUF names its pre-tokenizer instead of carrying it. The regexes below are those of the
//! models' own `tokenizer.json` (llama.cpp rewrites some for its own engine; transformers 5 falls
//! back to GPT-2's for names it does not know, `smollm` among them, and then encodes digits after
//! two or more spaces unlike the model was trained).

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer};

use super::{Problem, SpecialIds, check};
use crate::io::gguf::GgufFile;
use crate::io::{Error, Result};

const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// How a text is cut into words before BPE.
#[derive(Clone, Copy)]
enum Words {
    /// GPT-2's regex.
    Gpt2,
    /// Every digit alone, then GPT-2's regex.
    DigitsThenGpt2,
    /// One regex.
    Regex(&'static str),
}

/// One row per value of `tokenizer.ggml.pre`.
struct Family {
    name: &'static str,
    words: Words,
    /// Unicode NFC before anything else.
    nfc: bool,
    /// A word that is a token is taken whole, whatever the merges say.
    whole_words: bool,
}

const FAMILIES: [Family; 8] = [
    Family::new("default", Words::Gpt2),
    Family::new("gpt-2", Words::Gpt2),
    Family::new("smollm", Words::DigitsThenGpt2),
    Family::new("starcoder", Words::DigitsThenGpt2),
    Family { whole_words: true, ..Family::new("llama-bpe", Words::Regex(LLAMA3)) },
    Family { whole_words: true, ..Family::new("llama3", Words::Regex(LLAMA3)) },
    Family { nfc: true, ..Family::new("qwen2", Words::Regex(QWEN2)) },
    Family { nfc: true, ..Family::new("deepseek-r1-qwen", Words::Regex(QWEN2)) },
];

impl Family {
    const fn new(name: &'static str, words: Words) -> Self {
        Self { name, words, nfc: false, whole_words: false }
    }

    fn of(gguf: &GgufFile) -> Result<&'static Self> {
        // Files older than the key hold GPT-2's tokenizer or one like it.
        let got = gguf.str_opt("tokenizer.ggml.pre")?.unwrap_or("default");
        FAMILIES.iter().find(|family| family.name == got).ok_or_else(|| {
            let known = FAMILIES.iter().map(|family| family.name).collect();
            error(gguf, Problem::PreTokenizer { got: got.to_owned(), known })
        })
    }

    fn pre_tokenizer(&self) -> tokenizers::Result<Sequence> {
        let bytes = |use_regex| PreTokenizerWrapper::from(ByteLevel::new(false, true, use_regex));
        Ok(Sequence::new(match self.words {
            Words::Gpt2 => vec![bytes(true)],
            Words::DigitsThenGpt2 => vec![Digits::new(true).into(), bytes(true)],
            Words::Regex(regex) => {
                let pattern = SplitPattern::Regex(regex.to_owned());
                let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
                vec![split.into(), bytes(false)]
            }
        }))
    }
}

/// The tokenizer and the special ids that the metadata describe.
pub(super) fn build(gguf: &GgufFile) -> Result<(Tokenizer, SpecialIds)> {
    let model = gguf.str("tokenizer.ggml.model")?;
    if model != "gpt2" {
        return Err(error(gguf, Problem::Model { got: model.to_owned() }));
    }
    let family = Family::of(gguf)?;
    let tokens = gguf.strings("tokenizer.ggml.tokens")?;
    let special = special_ids(gguf, tokens.len())?;
    let library = |cause| error(gguf, Problem::Library { cause });
    let mut tokenizer = Tokenizer::new(bpe(gguf, family, &tokens)?);
    if family.nfc {
        tokenizer.with_normalizer(Some(NFC)).map_err(library)?;
    }
    tokenizer.with_pre_tokenizer(Some(family.pre_tokenizer().map_err(library)?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    tokenizer.add_tokens(added_tokens(gguf, &tokens)?).map_err(library)?;
    add_around(gguf, &mut tokenizer, &tokens, &special)?;
    Ok((tokenizer, special))
}

fn bpe(gguf: &GgufFile, family: &Family, tokens: &[&str]) -> Result<BPE> {
    let mut ids: HashMap<&str, usize> = HashMap::with_capacity(tokens.len());
    for (second, token) in tokens.iter().enumerate() {
        if let Some(first) = ids.insert(token, second) {
            let token = (*token).to_owned();
            return Err(error(gguf, Problem::DuplicateToken { token, first, second }));
        }
    }
    let merges = gguf.strings("tokenizer.ggml.merges")?;
    let merges: Vec<(&str, &str)> = merges
        .iter()
        .enumerate()
        .map(|(index, merge)| check::split_merge(index, merge))
        .collect::<std::result::Result<_, _>>()
        .map_err(|problem| error(gguf, problem))?;
    check::merges(&ids, &merges, "").map_err(|problem| error(gguf, problem))?;
    let vocab: Vocab =
        tokens.iter().zip(0..).map(|(token, id)| ((*token).to_owned(), id)).collect();
    let merges = merges.into_iter().map(|(a, b)| (a.to_owned(), b.to_owned())).collect();
    BPE::builder()
        .vocab_and_merges(vocab, merges)
        .ignore_merges(family.whole_words)
        .build()
        .map_err(|cause| error(gguf, Problem::Library { cause }))
}

/// Tokens that are matched whole in a text: control tokens, which decoding can skip, and
/// user-defined ones.
fn added_tokens(gguf: &GgufFile, tokens: &[&str]) -> Result<Vec<AddedToken>> {
    const CONTROL: u32 = 3;
    const USER_DEFINED: u32 = 4;
    let types = match gguf.metadata().contains_key("tokenizer.ggml.token_type") {
        true => gguf.u32s("tokenizer.ggml.token_type")?,
        false => return Ok(Vec::new()),
    };
    if types.len() != tokens.len() {
        let problem = Problem::TokenTypes { tokens: tokens.len(), types: types.len() };
        return Err(error(gguf, problem));
    }
    let added = tokens.iter().zip(types).filter_map(|(token, kind)| match kind {
        CONTROL => Some(AddedToken::from(*token, true)),
        USER_DEFINED => Some(AddedToken::from(*token, false).normalized(false)),
        _ => None,
    });
    Ok(added.collect())
}

fn special_ids(gguf: &GgufFile, tokens: usize) -> Result<SpecialIds> {
    let id = |key: &'static str| match gguf.u32_opt(key)? {
        Some(id) if id as usize >= tokens => {
            Err(error(gguf, Problem::SpecialId { key, id, tokens }))
        }
        id => Ok(id),
    };
    Ok(SpecialIds {
        bos: id("tokenizer.ggml.bos_token_id")?,
        eos: id("tokenizer.ggml.eos_token_id")?,
        eot: id("tokenizer.ggml.eot_token_id")?,
        pad: id("tokenizer.ggml.padding_token_id")?,
        unk: id("tokenizer.ggml.unknown_token_id")?,
    })
}

/// BOS before and EOS after every text, where the file asks for them.
fn add_around(
    gguf: &GgufFile,
    tokenizer: &mut Tokenizer,
    tokens: &[&str],
    special: &SpecialIds,
) -> Result<()> {
    let library = |cause| error(gguf, Problem::Library { cause });
    let wanted = |key: &str, id: Option<u32>| -> Result<Option<u32>> {
        Ok(if gguf.bool_opt(key)? == Some(true) { id } else { None })
    };
    let bos = wanted("tokenizer.ggml.add_bos_token", special.bos)?;
    let eos = wanted("tokenizer.ggml.add_eos_token", special.eos)?;
    let (mut template, mut used) = (vec!["$A"], Vec::new());
    for (name, id) in [("bos", bos), ("eos", eos)] {
        let Some(id) = id else { continue };
        let place = if name == "bos" { 0 } else { template.len() };
        template.insert(place, name);
        let spelling = tokens[id as usize].to_owned();
        used.push(SpecialToken::new(name.to_owned(), vec![id], vec![spelling]).map_err(library)?);
    }
    if used.is_empty() {
        return Ok(());
    }
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(|cause| library(cause.into()))?
        .special_tokens(used)
        .build()
        .map_err(|cause| library(cause.into()))?;
    tokenizer.with_post_processor(Some(processor));
    Ok(())
}

fn error(gguf: &GgufFile, problem: Problem) -> Error {
    Error::Tokenizer { path: gguf.path().to_owned(), problem }
}
