//! `metal-candle eval`

use crate::columns::DataArgs;
use crate::model::ModelArgs;
use crate::ui::progress;
use anyhow::{Context, Result, bail};
use metal_candle::generate::{Generator, GeneratorConfig};
use metal_candle::io::Tokenizer;
use metal_candle::io::chat::Message;
use metal_candle::io::data::{Content, Row, Rows};
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;

/// Names follow mlx-lm where it has them.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// A trained adapter: a folder of PEFT's or mlx-lm's, or a GGUF file
    #[arg(long)]
    adapter_path: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    /// Tokens of an answer at most
    #[arg(short, long, default_value_t = 64)]
    max_tokens: usize,
    /// Show so many of the rows
    #[arg(long, default_value_t = 0)]
    samples: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One row of the data: what is asked, in full and as the user said it, and the answer.
struct Question {
    prompt: String,
    said: String,
    expected: String,
}

/// What the model made of a question.
struct Sample<'a> {
    question: &'a Question,
    got: String,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let loaded = args.model.load_with(args.adapter_path.as_deref())?;
    let questions = questions(&args.data, &loaded.tokenizer)?;
    let tokenizer = Arc::new(loaded.tokenizer);
    let generator = Generator::new(Arc::new(loaded.decoder), Arc::clone(&tokenizer));

    let bar = progress(questions.len() as u64, "{bar:30} {pos}/{len} eta {eta}");
    let mut matches = 0;
    let mut samples = Vec::new();
    for (i, question) in questions.iter().enumerate() {
        let mut max_tokens = args.max_tokens;
        if i >= args.samples {
            // An answer that goes on for longer than the expected one does not match.
            max_tokens = max_tokens.min(tokenizer.encode(&question.expected, false)?.len() + SLACK);
        }
        let config = GeneratorConfig { max_tokens, ..GeneratorConfig::default() };
        let got = generator.generate(&question.prompt, &config, |_| {})?.text;
        matches += usize::from(got.trim() == question.expected.trim());
        if i < args.samples {
            samples.push(Sample { question, got });
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    print(args, matches, questions.len(), &samples);
    Ok(())
}

/// Another split of the same text into tokens may take a few more.
const SLACK: usize = 4;

/// The questions of a file, each with its answer.
fn questions(data: &DataArgs, tokenizer: &Tokenizer) -> Result<Vec<Question>> {
    let rows = Rows::read_split(data.path()?, "test", &data.columns())?;
    let question = |row: &Row| {
        question(&row.content, tokenizer)
            .with_context(|| format!("{}:{}", rows.path.display(), row.line))
    };
    rows.rows.iter().map(question).collect()
}

/// The answer is the completion, or the last thing that the assistant says.
fn question(content: &Content, tokenizer: &Tokenizer) -> Result<Question> {
    let (messages, tools, expected) = match content {
        Content::Text(_) => {
            bail!(
                "a row of \"text\" has no answer: expected \"messages\", or \"prompt\" and \
                 \"completion\""
            )
        }
        Content::Completion { prompt, completion } => {
            (vec![Message::new("user", prompt)], None, completion.as_str())
        }
        Content::Chat { messages, tools } => {
            let answer = messages.iter().rposition(|m| m.role() == "assistant");
            let answer = answer.context("no message is the assistant's")?;
            let expected = messages[answer].content().context("the answer is no text")?;
            (messages[..answer].to_vec(), tools.as_deref(), expected)
        }
    };
    let said = messages.iter().rev().find(|m| m.role() == "user").and_then(Message::content);
    let said = said.unwrap_or_default().to_owned();
    let template = tokenizer.chat_template().context("the model has no chat template")?;
    let prompt = template.render(&messages, tools, true)?;
    Ok(Question { prompt, said, expected: expected.to_owned() })
}

fn print(args: &Args, matches: usize, rows: usize, samples: &[Sample]) {
    if args.json {
        let sample = |s: &Sample| {
            let Question { said, expected, .. } = s.question;
            json!({ "prompt": said, "expected": expected, "got": s.got })
        };
        let samples: Vec<_> = samples.iter().map(sample).collect();
        println!("{}", json!({ "matches": matches, "rows": rows, "samples": samples }));
        return;
    }
    for sample in samples {
        println!("prompt:   {}", sample.question.said);
        println!("expected: {}", sample.question.expected);
        println!("got:      {}\n", sample.got.trim());
    }
    let percent = 100.0 * matches as f64 / rows as f64;
    println!("exact match {matches}/{rows} ({percent:.1} %)");
}
