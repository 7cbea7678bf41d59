//! Rows to token sequences, and which of their tokens are trained.

use std::ops::Range;

use serde_json::Value;

use super::{Content, Problem, Row, RowProblem, Rows};
use crate::io::{ChatTemplate, Error, Message, Result, Tokenizer};

/// How rows become sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenizeOptions {
    /// Longer rows are cut to so many tokens.
    pub max_seq_length: usize,
    /// Train on what the assistant says only: the completion, and every assistant turn of a chat.
    /// A `text` row is trained whole either way.
    pub mask_prompt: bool,
}

/// A token sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// For each id, whether predicting it is trained. The first is never predicted.
    pub trained: Vec<bool>,
}

/// The sequences of a file, and what was cut.
#[derive(Clone, Debug, PartialEq)]
pub struct Examples {
    /// One for each row that has something to train on, in order.
    pub examples: Vec<Example>,
    /// Rows that were longer than `max_seq_length`.
    pub truncated: usize,
    /// Rows left out because no token of theirs is trained.
    pub untrained: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Tokens that are trained.
    pub trained_tokens: usize,
}

impl Example {
    /// Positions whose next token is trained.
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().skip(1).filter(|&&trained| trained).count()
    }
}

/// Tokenises every row.
///
/// * `text`: encoded as it is, EOS appended unless it ends with it.
/// * `prompt`, `completion`: a user's turn and the assistant's, by the chat template.
/// * `messages`: by the chat template.
///
/// # Errors
/// [`Error::Row`] for a row that the template or the tokenizer refuses;
/// [`Problem::NothingTrained`] where no row has a token to train on.
pub fn tokenize(rows: &Rows, tokenizer: &Tokenizer, options: TokenizeOptions) -> Result<Examples> {
    let mut all =
        Examples { examples: Vec::new(), truncated: 0, untrained: 0, tokens: 0, trained_tokens: 0 };
    for row in &rows.rows {
        let mut example = tokenize_row(row, tokenizer, options.mask_prompt).map_err(|problem| {
            Error::Row { path: rows.path.clone(), line: row.line, column: 1, problem }
        })?;
        if example.ids.len() > options.max_seq_length {
            example.ids.truncate(options.max_seq_length);
            example.trained.truncate(options.max_seq_length);
            all.truncated += 1;
        }
        match example.trained_tokens() {
            0 => all.untrained += 1,
            trained => {
                all.tokens += example.ids.len();
                all.trained_tokens += trained;
                all.examples.push(example);
            }
        }
    }
    if all.examples.is_empty() {
        let problem = Problem::NothingTrained { rows: rows.rows.len() };
        return Err(Error::Data { path: rows.path.clone(), problem });
    }
    Ok(all)
}

type RowResult<T> = std::result::Result<T, RowProblem>;

fn tokenize_row(row: &Row, tokenizer: &Tokenizer, mask_prompt: bool) -> RowResult<Example> {
    match &row.content {
        Content::Text(text) => {
            let mut ids = tokenizer.encode(text, true).map_err(tokenizer_problem)?;
            if let Some(eos) = tokenizer.special().eos
                && ids.last() != Some(&eos)
            {
                ids.push(eos);
            }
            Ok(Example { trained: vec![true; ids.len()], ids })
        }
        Content::Completion { prompt, completion } => {
            let messages = [Message::new("user", prompt), Message::new("assistant", completion)];
            tokenize_chat(&messages, None, tokenizer, mask_prompt)
        }
        Content::Chat { messages, tools } => {
            tokenize_chat(messages, tools.as_deref(), tokenizer, mask_prompt)
        }
    }
}

fn tokenize_chat(
    messages: &[Message],
    tools: Option<&[Value]>,
    tokenizer: &Tokenizer,
    mask_prompt: bool,
) -> RowResult<Example> {
    let template = tokenizer.chat_template().ok_or(RowProblem::NoTemplate)?;
    let chat = Chat { template, messages, tools };
    let text = chat.render(messages.len(), false)?;
    // The template has spelled out BOS where the model wants it.
    let encoding = tokenizer.encode_spans(&text, false).map_err(tokenizer_problem)?;
    if !mask_prompt {
        let trained = vec![true; encoding.ids.len()];
        return Ok(Example { ids: encoding.ids, trained });
    }
    let turns = chat.assistant_spans(&text)?;
    // A token across the edge of a turn was seen in part by who wrote the prompt: not trained.
    let within = |span: &Range<usize>| {
        turns.iter().any(|turn| turn.start <= span.start && span.end <= turn.end)
    };
    let trained = encoding.spans.iter().map(within).collect();
    Ok(Example { ids: encoding.ids, trained })
}

struct Chat<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    tools: Option<&'a [Value]>,
}

impl Chat<'_> {
    /// The first `count` messages.
    fn render(&self, count: usize, add_generation_prompt: bool) -> RowResult<String> {
        self.template
            .render(&self.messages[..count], self.tools, add_generation_prompt)
            .map_err(|cause| RowProblem::Template { cause: cause.to_string() })
    }

    /// The bytes of `text`, the rendering of all messages, that an assistant says: from where its
    /// prompt ends to where the rendering up to its turn ends.
    fn assistant_spans(&self, text: &str) -> RowResult<Vec<Range<usize>>> {
        let mut spans = Vec::new();
        for (i, message) in self.messages.iter().enumerate() {
            if message.role() != "assistant" {
                continue;
            }
            let prompt = self.render(i, true)?;
            let upto = self.render(i + 1, false)?;
            let turn = upto
                .strip_prefix(&prompt)
                .filter(|_| text.starts_with(&prompt))
                .and_then(|said| find_turn(&text[prompt.len()..], said, message.content()));
            let len = turn.ok_or(RowProblem::Turn { turn: i })?;
            spans.push(prompt.len()..prompt.len() + len);
        }
        Ok(spans)
    }
}

/// How many bytes of `rest` the turn takes that was rendered as `said` when it came last.
///
/// Some templates write the last turn differently (Qwen3 opens it with an empty `<think>` block).
/// Then the turn is its content and what follows the content in `said`, such as `<|im_end|>`.
fn find_turn(rest: &str, said: &str, content: Option<&str>) -> Option<usize> {
    if rest.starts_with(said) {
        return Some(said.len());
    }
    let content = content?.trim();
    let after = &said[said.rfind(content)? + content.len()..];
    let end = rest.find(content)? + content.len();
    rest[end..].starts_with(after).then_some(end + after.len())
}

fn tokenizer_problem(cause: Error) -> RowProblem {
    RowProblem::Tokenizer { cause: cause.to_string() }
}
