use std::collections::HashMap;

use metal_candle::io::{ChatTemplate, Error, GgufFile, Message, Tokenizer, chat};
use serde::Deserialize;
use serde_json::Value;

use super::support::{smollm2, vectors};

#[derive(Deserialize)]
struct Vectors {
    now: i64,
    chats: HashMap<String, Vec<Message>>,
    tools: Vec<Value>,
    model: Vec<ModelCase>,
    templates: Vec<Template>,
}

/// The real model's template and tokenizer together.
#[derive(Deserialize)]
struct ModelCase {
    chat: String,
    generate: bool,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Template {
    source: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    chat: String,
    tools: bool,
    generate: bool,
    text: Option<String>,
    error: Option<String>,
}

fn template(source: &str) -> ChatTemplate {
    let tokens = [("bos_token", "<s>".to_owned()), ("eos_token", "</s>".to_owned())];
    ChatTemplate::new(source, tokens).unwrap()
}

#[test]
fn templates_render_what_transformers_renders() {
    let vectors = vectors::<Vectors>("chat.json");
    let mut refused = 0;
    for Template { source, cases } in &vectors.templates {
        let template = template(source).at_time(vectors.now);
        for case in cases {
            let tools = case.tools.then_some(vectors.tools.as_slice());
            let rendered = template.render(&vectors.chats[&case.chat], tools, case.generate);
            match (&case.text, &case.error) {
                (Some(text), None) => assert_eq!(rendered.unwrap(), *text, "{}", case.chat),
                (None, Some(message)) => {
                    let error = rendered.unwrap_err();
                    assert!(
                        matches!(&error, Error::Chat(chat::Problem::Raised { message: m }) if m == message),
                        "{error}"
                    );
                    refused += 1;
                }
                _ => panic!("a case is a text or an error"),
            }
        }
    }
    assert!(refused > 0);
}

#[test]
fn smollm2_chats_have_the_ids_of_transformers() {
    let Some(path) = smollm2("smollm2_chats_have_the_ids_of_transformers") else { return };
    let vectors = vectors::<Vectors>("chat.json");
    let tokenizer = Tokenizer::from_gguf(&GgufFile::open(path).unwrap()).unwrap();
    let template = tokenizer.chat_template().unwrap();
    assert_eq!(template.source(), vectors.templates[0].source);
    for case in &vectors.model {
        let text = template.render(&vectors.chats[&case.chat], None, case.generate).unwrap();
        assert_eq!(tokenizer.encode(&text, false).unwrap(), case.ids, "{}", case.chat);
    }
}

#[test]
fn a_template_that_does_not_parse_is_refused_with_its_line() {
    for source in
        ["line one\n{% for %}", "{{ unclosed", "{% if x %}", "{% generation %}", "{{ a.b. }}"]
    {
        let error = ChatTemplate::new(source, []).unwrap_err();
        assert!(matches!(error, chat::Problem::Syntax { .. }), "{source}: {error}");
    }
    let error = ChatTemplate::new("one\n{% for %}", []).unwrap_err().to_string();
    assert!(error.contains(":2"), "{error}");
}

#[test]
fn a_template_that_fails_says_why() {
    let chat = [Message::new("user", "hi")];
    for (source, expected) in [
        ("{{ nope() }}", "nope"),
        ("{{ messages[0].x.y }}", "undefined"),
        ("{{ strftime_now('%Q') }}", "%Q"),
        ("{{ messages | tojson(wrong=1) }}", "wrong"),
    ] {
        let error = template(source).render(&chat, None, false).unwrap_err().to_string();
        assert!(error.contains(expected), "{source}: {error}");
    }
}

#[test]
fn a_template_without_end_is_stopped() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let error = template(loops).render(&[Message::new("user", "hi")], None, false).unwrap_err();
    assert!(error.to_string().contains("fuel"), "{error}");
    let recursion = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(template(recursion).render(&[Message::new("user", "hi")], None, false).is_err());
}

#[test]
fn a_message_needs_a_role() {
    for json in [r#"{}"#, r#"{"content":"x"}"#, r#"{"role":1}"#, r#"[]"#, r#""x""#] {
        assert!(serde_json::from_str::<Message>(json).is_err(), "{json}");
    }
    let message: Message =
        serde_json::from_str(r#"{"role":"user","content":["p"],"z":1}"#).unwrap();
    assert_eq!((message.role(), message.content()), ("user", None));
    assert_eq!(
        serde_json::to_string(&message).unwrap(),
        r#"{"role":"user","content":["p"],"z":1}"#
    );
}
