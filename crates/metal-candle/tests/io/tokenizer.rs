use std::path::Path;

use metal_candle::io::tokenizer::Problem;
use metal_candle::io::{Error, GgufFile, Tokenizer};
use serde::Deserialize;

use super::support::{GgufBuilder, Meta, smollm2, vectors};

#[derive(Deserialize)]
struct Tiny {
    pre: String,
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<String>,
    cases: Vec<(String, Vec<u32>)>,
}

/// Text, ids, and what the ids decode to where that is not the text.
#[derive(Deserialize)]
struct Smollm2 {
    cases: Vec<(String, Vec<u32>, Option<String>)>,
}

fn gguf_of(tiny: &Tiny) -> GgufBuilder {
    GgufBuilder::default()
        .meta("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .meta("tokenizer.ggml.pre", Meta::Str(tiny.pre.clone()))
        .meta("tokenizer.ggml.tokens", Meta::Strs(tiny.tokens.clone()))
        .meta("tokenizer.ggml.token_type", Meta::I32s(tiny.types.clone()))
        .meta("tokenizer.ggml.merges", Meta::Strs(tiny.merges.clone()))
}

fn build(builder: &GgufBuilder) -> metal_candle::io::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::from_gguf(&GgufFile::open(builder.write(folder.path())).unwrap())
}

fn tiny(pre: &str) -> Tiny {
    vectors::<Vec<Tiny>>("tiny_tokenizers.json").into_iter().find(|t| t.pre == pre).unwrap()
}

#[test]
fn every_pre_tokenizer_gives_the_ids_of_the_tokenizers_library() {
    for tiny in vectors::<Vec<Tiny>>("tiny_tokenizers.json") {
        let tokenizer = build(&gguf_of(&tiny)).unwrap();
        assert_eq!(tokenizer.vocab_size(), tiny.tokens.len());
        assert!(tiny.cases.len() > 50);
        for (text, ids) in &tiny.cases {
            assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{}: {text:?}", tiny.pre);
        }
    }
}

#[test]
fn smollm2_gives_the_ids_of_transformers() {
    let Some(path) = smollm2("smollm2_gives_the_ids_of_transformers") else { return };
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap();
    let cases = vectors::<Smollm2>("smollm2_tokens.json").cases;
    assert!(cases.len() > 350);
    for (text, ids, decoded) in &cases {
        assert_eq!(tokenizer.encode(text, true).unwrap(), *ids, "{text:?}");
        let expected = decoded.as_ref().unwrap_or(text);
        assert_eq!(tokenizer.decode(ids, true).unwrap(), *expected);
    }
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!(tokenizer.special().bos, Some(1));
    assert!(tokenizer.is_end(2) && !tokenizer.is_end(1));
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(2));
}

#[test]
fn a_stream_gives_the_text_of_decode_in_whole_characters() {
    for tiny in vectors::<Vec<Tiny>>("tiny_tokenizers.json") {
        let tokenizer = build(&gguf_of(&tiny)).unwrap();
        for (text, ids) in &tiny.cases {
            let mut stream = tokenizer.stream();
            let mut streamed = String::new();
            for &id in ids {
                let piece = stream.push(id).unwrap();
                // A piece ends in the middle of a character only if the text says so itself.
                assert!(!piece.ends_with('\u{fffd}'), "{text:?}: {piece:?}");
                streamed += &piece;
            }
            streamed += &stream.finish().unwrap();
            assert_eq!(streamed, tokenizer.decode(ids, true).unwrap(), "{text:?}");
        }
    }
}

#[test]
fn a_stream_holds_a_character_back_until_its_last_byte() {
    let tiny = tiny("gpt-2");
    let tokenizer = build(&gguf_of(&tiny)).unwrap();
    let ids = tokenizer.encode("a\u{1f680}b", false).unwrap();
    assert_eq!(ids.len(), 6, "one token a byte");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "", "", "\u{1f680}", "b"]);
    let mut cut = tokenizer.stream();
    ids[..3].iter().for_each(|&id| drop(cut.push(id).unwrap()));
    assert_eq!(cut.finish().unwrap(), "\u{fffd}");
}

#[test]
fn spans_cover_the_bytes_of_the_text() {
    for tiny in vectors::<Vec<Tiny>>("tiny_tokenizers.json") {
        // NFC changes the text, and with it what a span can cover.
        if tiny.pre == "qwen2" {
            continue;
        }
        let tokenizer = build(&gguf_of(&tiny)).unwrap();
        for (text, ids) in &tiny.cases {
            let encoding = tokenizer.encode_spans(text, false).unwrap();
            assert_eq!(encoding.ids, *ids);
            let mut end = 0;
            for span in &encoding.spans {
                // The tokens of one character all have its bytes as their span.
                assert!(span.start <= end && end <= span.end, "{text:?}: {:?}", encoding.spans);
                end = span.end;
            }
            assert_eq!(end, text.len(), "{text:?}");
        }
    }
}

#[test]
fn bos_and_eos_are_added_where_the_file_asks_for_them() {
    let tiny = tiny("smollm");
    let bos = tiny.tokens.iter().position(|t| t == "<|im_start|>").unwrap() as u32;
    let eos = tiny.tokens.iter().position(|t| t == "<|im_end|>").unwrap() as u32;
    let builder = gguf_of(&tiny)
        .meta("tokenizer.ggml.bos_token_id", Meta::U32(bos))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(eos));
    let ask = |key: &str, add| (format!("tokenizer.ggml.add_{key}_token"), Meta::Bool(add));
    for (add_bos, add_eos) in [(false, false), (true, false), (false, true), (true, true)] {
        let [(bos_key, bos_ask), (eos_key, eos_ask)] = [ask("bos", add_bos), ask("eos", add_eos)];
        let tokenizer =
            build(&builder.clone().meta(&bos_key, bos_ask).meta(&eos_key, eos_ask)).unwrap();
        let plain = tokenizer.encode("Hi 42", false).unwrap();
        let mut expected = plain.clone();
        if add_bos {
            expected.insert(0, bos);
        }
        if add_eos {
            expected.push(eos);
        }
        assert_eq!(tokenizer.encode("Hi 42", true).unwrap(), expected);
        assert_eq!(tokenizer.decode(&expected, true).unwrap(), "Hi 42");
    }
}

#[test]
fn a_tokenizer_that_does_not_fit_is_refused() {
    let good = || gguf_of(&tiny("gpt-2"));
    let strings = |values: &[&str]| Meta::Strs(values.iter().map(|&v| v.to_owned()).collect());
    let tokens = |values: &[&str]| {
        let types = Meta::I32s(vec![1; values.len()]);
        good()
            .meta("tokenizer.ggml.tokens", strings(values))
            .meta("tokenizer.ggml.token_type", types)
    };
    let merges = |values: &[&str]| good().meta("tokenizer.ggml.merges", strings(values));
    let cases = [
        (good().meta("tokenizer.ggml.model", Meta::Str("llama".into())), "\"llama\""),
        (good().meta("tokenizer.ggml.pre", Meta::Str("tekken".into())), "\"tekken\""),
        (tokens(&["a", "b", "a"]).meta("tokenizer.ggml.merges", strings(&[])), "two ids, 0 and 2"),
        (good().meta("tokenizer.ggml.token_type", Meta::I32s(vec![1])), "1 token types"),
        (good().meta("tokenizer.ggml.token_type", Meta::I32s(vec![-1])), "array of integers"),
        (merges(&["ab"]), "merge 0"),
        (merges(&["a b c"]), "merge 0"),
        (merges(&["a ", "x"]), "merge 0"),
        (merges(&["a nope"]), "lacks"),
        // Both sides exist, what they make does not: this is what makes the library panic.
        (merges(&["<|im_start|> <|im_start|>"]), "lacks"),
        (good().meta("tokenizer.ggml.eos_token_id", Meta::U32(1 << 20)), "eos_token_id"),
    ];
    for (builder, expected) in cases {
        let error = build(&builder).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let mut missing = good();
    missing.metadata.retain(|(key, _)| key != "tokenizer.ggml.merges");
    assert!(matches!(build(&missing), Err(Error::Gguf { .. })));
}

/// A `tokenizer.json` of a tiny vocabulary, in either spelling of merges.
fn json(merges: &str) -> String {
    format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"normalizer":null,
        "added_tokens":[{{"id":3,"content":"<eos>","single_word":false,"lstrip":false,
        "rstrip":false,"normalized":false,"special":true}}],
        "pre_tokenizer":{{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,
        "use_regex":true}},"post_processor":null,"decoder":{{"type":"ByteLevel",
        "add_prefix_space":true,"trim_offsets":true,"use_regex":true}},
        "model":{{"type":"BPE","dropout":null,"unk_token":null,"fuse_unk":false,
        "vocab":{{"a":0,"b":1,"ab":2,"<eos>":3}},"merges":[{merges}]}}}}"#
    )
}

fn write(folder: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn a_tokenizer_json_brings_its_config_and_template() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"eos_token":{"content":"<eos>"},"bos_token":null,"pad_token":"<eos>",
        "chat_template":[{"name":"other","template":"x"},
        {"name":"default","template":"{{ messages[0].content }}{{ eos_token }}"}]}"#;
    write(folder.path(), "tokenizer_config.json", config);
    for merges in [r#"["a","b"]"#, r#""a b""#, r##""#version: 0.2","a b""##] {
        let path = write(folder.path(), "tokenizer.json", &json(merges));
        let tokenizer = Tokenizer::from_file(&path).unwrap();
        assert_eq!(tokenizer.encode("ab<eos>ba", false).unwrap(), [2, 3, 1, 0]);
        assert_eq!((tokenizer.special().eos, tokenizer.special().bos), (Some(3), None));
        let chat = [metal_candle::io::Message::new("user", "hi")];
        let template = tokenizer.chat_template().unwrap();
        assert_eq!(template.render(&chat, None, false).unwrap(), "hi<eos>");
    }
    write(folder.path(), "chat_template.jinja", "from the file");
    let tokenizer = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer.chat_template().unwrap().source(), "from the file");
    write(folder.path(), "tokenizer_config.json", r#"{"eos_token":"<nope>"}"#);
    let error = Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap_err();
    assert!(matches!(
        error,
        Error::Tokenizer { problem: Problem::SpecialToken { key: "eos_token", .. }, .. }
    ));
}

#[test]
fn a_broken_tokenizer_json_is_refused_at_every_cut() {
    let folder = tempfile::tempdir().unwrap();
    let whole = json(r#"["a","b"]"#);
    for len in 0..whole.len() {
        let path = write(folder.path(), "tokenizer.json", &whole[..len]);
        assert!(Tokenizer::from_file(&path).is_err(), "cut at {len}");
    }
    // Merges that the library would copy into a buffer that is too short for them.
    for merges in [r#"["<eos>","<eos>"]"#, r#""<eos> ab""#, r#""ab""#, r#"["a","zz"]"#] {
        let path = write(folder.path(), "tokenizer.json", &json(merges));
        let error = Tokenizer::from_file(&path).unwrap_err();
        assert!(matches!(error, Error::Tokenizer { .. }), "{merges}: {error}");
    }
}
