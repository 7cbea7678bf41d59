//! Messages to text, by the Jinja template that the model brings.
//!
//! The environment is the one that Hugging Face renders templates in: `trim_blocks`,
//! `lstrip_blocks`, loop controls, Python's methods of strings and dicts, `raise_exception`,
//! `strftime_now`, lists printed as Python prints them, and a `tojson` that writes what Python's
//! `json.dumps` writes.

mod python;

use std::error::Error as _;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::Result;

/// Instructions that a template may execute. A long chat takes some thousands; nested loops of a
/// hostile template would take for ever.
const FUEL: u64 = 50_000_000;
const NAME: &str = "chat";

/// What can be wrong with a chat template, or with what it is given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum Problem {
    #[error("{cause}")]
    Syntax { cause: minijinja::Error },
    #[error("the template refuses these messages: {message}")]
    Raised { message: String },
    #[error("{cause}")]
    Render { cause: minijinja::Error },
}

/// One message of a chat: a JSON object with a `role`, usually a `content`, and whatever else the
/// template reads (`tool_calls`, `name`, `reasoning_content`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, serde_json::Value>")]
pub struct Message(Map<String, serde_json::Value>);

/// A message that has no role.
#[derive(Debug, thiserror::Error)]
#[error("a message needs a string \"role\"; it has the keys {keys:?}")]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub struct NoRole {
    keys: Vec<String>,
}

impl Message {
    /// A plain message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut message = Map::new();
        message.insert("role".to_owned(), role.into().into());
        message.insert("content".to_owned(), content.into().into());
        Self(message)
    }

    /// `system`, `user`, `assistant`, `tool`, ...
    pub fn role(&self) -> &str {
        self.0["role"].as_str().expect("metal-candle bug: a message was built without a role")
    }

    /// The content where it is text, not a list of parts.
    pub fn content(&self) -> Option<&str> {
        self.0.get("content")?.as_str()
    }

    /// All of it.
    pub fn as_map(&self) -> &Map<String, serde_json::Value> {
        &self.0
    }
}

impl TryFrom<Map<String, serde_json::Value>> for Message {
    type Error = NoRole;

    fn try_from(message: Map<String, serde_json::Value>) -> std::result::Result<Self, NoRole> {
        match message.get("role") {
            Some(serde_json::Value::String(_)) => Ok(Self(message)),
            _ => Err(NoRole { keys: message.keys().cloned().collect() }),
        }
    }
}

/// A compiled chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// Compiles `source`. `tokens` are variables that it may print: `bos_token`, `eos_token`, ...
    ///
    /// # Errors
    /// [`Problem::Syntax`].
    pub fn new(
        source: impl Into<String>,
        tokens: impl IntoIterator<Item = (&'static str, String)>,
    ) -> std::result::Result<Self, Problem> {
        let source = source.into();
        let mut environment = environment();
        for (name, token) in tokens {
            environment.add_global(name, token);
        }
        environment
            .add_template_owned(NAME, without_generation_tags(&source))
            .map_err(|cause| Problem::Syntax { cause })?;
        Ok(Self { environment, source })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Fixes what `strftime_now` takes for now, in seconds since 1970, UTC. Without it a template
    /// that prints the date makes another text tomorrow.
    #[must_use]
    pub fn at_time(mut self, unix_seconds: i64) -> Self {
        self.environment
            .add_function("strftime_now", move |format: &str| strftime(format, unix_seconds));
        self
    }

    /// The chat as text, special tokens spelled out; with `add_generation_prompt` it ends where
    /// the assistant begins to speak.
    ///
    /// # Errors
    /// [`Problem::Raised`] where the template itself refuses, [`Problem::Render`] otherwise.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&[serde_json::Value]>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let none = Value::from(());
        let input = context! {
            messages => messages,
            tools => tools.map_or(none.clone(), Value::from_serialize),
            documents => none,
            add_generation_prompt,
        };
        let rendered = self.environment.get_template(NAME).and_then(|t| t.render(input));
        Ok(rendered.map_err(rendering_problem)?)
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("source", &self.source).finish_non_exhaustive()
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_formatter(|out, state, value| match value.kind() {
        ValueKind::Seq | ValueKind::Map => Ok(out.write_str(&python::repr(value))?),
        _ => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: String| -> JinjaResult {
        let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
        Err(error.with_source(Raised(message)))
    });
    environment.add_function("strftime_now", |format: &str| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        strftime(format, now.as_secs().cast_signed())
    });
    environment
}

type JinjaResult = std::result::Result<Value, minijinja::Error>;

/// Marks an error as the template's own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn rendering_problem(cause: minijinja::Error) -> Problem {
    let mut source = cause.source();
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Problem::Raised { message: message.clone() };
        }
        source = error.source();
    }
    Problem::Render { cause }
}

fn strftime(format: &str, unix_seconds: i64) -> JinjaResult {
    python::strftime(format, unix_seconds).map(Value::from).map_err(|directive| {
        let detail = format!("strftime_now: %{directive} is not supported");
        minijinja::Error::new(ErrorKind::InvalidOperation, detail)
    })
}

/// `value|tojson(indent=.., ensure_ascii=.., separators=.., sort_keys=..)`, with the defaults of
/// Hugging Face's filter: Python's separators, and text as it is.
fn to_json(value: &Value, options: Kwargs) -> JinjaResult {
    let separators: Option<Vec<String>> = options.get("separators")?;
    let json = python::Json {
        indent: options.get("indent")?,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: match separators.as_deref() {
            Some([item, key]) => Some((item.clone(), key.clone())),
            _ => None,
        },
    };
    options.assert_all_used()?;
    json.dumps(value).map(Value::from).map_err(|cause| {
        minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(cause)
    })
}

/// Hugging Face's own tags `{% generation %}` .. `{% endgeneration %}` mark the assistant's text
/// and print nothing; as `{% if true %}` .. `{% endif %}` they go on printing nothing.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        let Some(end) = tag.find("%}") else { break };
        let body = &tag[2..end];
        out.push_str(before);
        match body.trim_matches(['-', '+', ' ', '\t', '\n', '\r']) {
            word @ ("generation" | "endgeneration") => {
                let plain = if word == "generation" { "if true" } else { "endif" };
                out.push_str("{%");
                out.push_str(&body.replace(word, plain));
                out.push_str("%}");
            }
            _ => out.push_str(&tag[..end + 2]),
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}
