//! What the columns of the rows are called: keys of JSON objects, or the header of a CSV file.

use super::{Content, RowProblem};
use crate::io::Message;
use serde_json::Value;
use std::fmt::Write;

/// What the columns are called. By default a row is recognised by the names that it has:
/// `messages` (and `tools`), `prompt` with `completion`, or `text`. Once a column is named here,
/// rows are what the named columns make, whatever else they have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Columns {
    /// Holds a chat; instead of `messages`.
    pub chat: Option<String>,
    /// Holds the question; instead of `prompt`.
    pub prompt: Option<String>,
    /// Holds the answer; instead of `completion`.
    pub completion: Option<String>,
    /// Hold the text, joined by line breaks where they are several; instead of `text`.
    pub text: Vec<String>,
}

/// The columns that are looked for.
pub(super) struct Wanted<'a> {
    pub(super) chat: Option<&'a str>,
    pub(super) completion: Option<[&'a str; 2]>,
    pub(super) text: Vec<&'a str>,
}

/// What a row has in the wanted columns.
#[derive(Default)]
pub(super) struct Fields<'a> {
    pub(super) messages: Option<Vec<Message>>,
    pub(super) tools: Option<Vec<Value>>,
    pub(super) strings: Vec<(&'a str, String)>,
}

impl Columns {
    pub(super) fn wanted(&self) -> Wanted<'_> {
        let Columns { chat, prompt, completion, text } = self;
        let completions = prompt.is_some() || completion.is_some();
        let any = chat.is_none() && !completions && text.is_empty();
        Wanted {
            chat: chat.as_deref().or(any.then_some("messages")),
            completion: (any || completions).then(|| {
                [
                    prompt.as_deref().unwrap_or("prompt"),
                    completion.as_deref().unwrap_or("completion"),
                ]
            }),
            text: if any { vec!["text"] } else { text.iter().map(String::as_str).collect() },
        }
    }
}

impl<'a> Wanted<'a> {
    /// The wanted columns that hold a string.
    pub(super) fn strings(&self) -> impl Iterator<Item = &'a str> {
        self.completion.into_iter().flatten().chain(self.text.iter().copied())
    }

    /// The wanted column of this name that holds a string.
    pub(super) fn string(&self, name: &str) -> Option<&'a str> {
        self.strings().find(|wanted| *wanted == name)
    }

    /// What the row says, or what it has where it says nothing that is wanted.
    pub(super) fn content(
        &self,
        fields: Fields<'_>,
        keys: impl FnOnce() -> Vec<String>,
    ) -> Result<Content, RowProblem> {
        let Fields { messages, tools, strings } = fields;
        if let Some(messages) = messages {
            return match messages.is_empty() {
                true => Err(RowProblem::NoMessages),
                false => Ok(Content::Chat { messages, tools }),
            };
        }
        let get = |name: &str| {
            strings.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone())
        };
        if let Some([prompt, completion]) = self.completion
            && let (Some(prompt), Some(completion)) = (get(prompt), get(completion))
        {
            return Ok(Content::Completion { prompt, completion });
        }
        let text: Option<Vec<String>> = self.text.iter().map(|name| get(name)).collect();
        match text {
            Some(text) if !text.is_empty() => Ok(Content::Text(text.join("\n"))),
            _ => Err(RowProblem::Format { keys: keys(), expected: self.to_string() }),
        }
    }
}

impl std::fmt::Display for Wanted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut kinds: Vec<String> = self.chat.iter().map(|name| format!("{name:?}")).collect();
        kinds.extend(
            self.completion.map(|[prompt, completion]| format!("{prompt:?} with {completion:?}")),
        );
        if let Some((first, rest)) = self.text.split_first() {
            let mut all = format!("{first:?}");
            for name in rest {
                write!(all, " with {name:?}")?;
            }
            kinds.push(all);
        }
        match kinds.split_last() {
            Some((last, rest)) if !rest.is_empty() => write!(f, "{}, or {last}", rest.join(", ")),
            Some((only, _)) => f.write_str(only),
            None => f.write_str("a .jsonl file, where a column can hold a chat"),
        }
    }
}
