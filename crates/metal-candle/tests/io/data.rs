use std::path::{Path, PathBuf};

use metal_candle::io::data::{
    BatchOptions, Batcher, Content, Cursor, Dataset, Example, Order, Problem, RowProblem, Rows,
    TokenizeOptions, tokenize,
};
use metal_candle::io::{Error, GgufFile, Tokenizer};
use proptest::prelude::*;

use super::support::{GgufBuilder, Meta, vectors};

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
                      '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}\
                      {{ '<|im_start|>assistant\n' }}{% endif %}";
/// As Qwen3's: the last turn opens with a block that earlier turns do not have.
const THINKING: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
                        {% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}\
                        {% endif %}{{ m.content.strip() + '<|im_end|>\n' }}{% endfor %}\
                        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
/// Writes earlier assistant turns in another way altogether.
const REWRITING: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}\
                         {{ m.content if loop.last or m.role == 'user' else '(cut)' }}\
                         {{ '<|im_end|>\n' }}{% endfor %}\
                         {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// A byte-level tokenizer with a template, and EOS `<|im_end|>`.
fn tokenizer(template: Option<&str>) -> Tokenizer {
    #[derive(serde::Deserialize)]
    struct Tiny {
        pre: String,
        tokens: Vec<String>,
        types: Vec<i32>,
        merges: Vec<String>,
    }
    let all: Vec<Tiny> = vectors("tiny_tokenizers.json");
    let tiny = all.into_iter().find(|tiny| tiny.pre == "smollm").unwrap();
    let eos = tiny.tokens.iter().position(|token| token == "<|im_end|>").unwrap() as u32;
    let mut builder = GgufBuilder::default()
        .meta("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .meta("tokenizer.ggml.pre", Meta::Str(tiny.pre))
        .meta("tokenizer.ggml.tokens", Meta::Strs(tiny.tokens))
        .meta("tokenizer.ggml.token_type", Meta::I32s(tiny.types))
        .meta("tokenizer.ggml.merges", Meta::Strs(tiny.merges))
        .meta("tokenizer.ggml.eos_token_id", Meta::U32(eos));
    if let Some(template) = template {
        builder = builder.meta("tokenizer.chat_template", Meta::Str(template.into()));
    }
    let folder = tempfile::tempdir().unwrap();
    Tokenizer::from_gguf(&GgufFile::open(builder.write(folder.path())).unwrap()).unwrap()
}

fn write(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, text).unwrap();
    path
}

fn rows(text: impl AsRef<[u8]>) -> metal_candle::io::Result<Rows> {
    let folder = tempfile::tempdir().unwrap();
    Rows::read(write(folder.path(), "rows.jsonl", text))
}

/// The only example of a one-line file, its trained tokens decoded, and all of them.
fn trained(template: &str, row: &str, mask_prompt: bool) -> (String, String) {
    let tokenizer = tokenizer(Some(template));
    let options = TokenizeOptions { max_seq_length: 999, mask_prompt };
    let examples = tokenize(&rows(row).unwrap(), &tokenizer, options).unwrap();
    let Example { ids, trained } = &examples.examples[0];
    let kept: Vec<u32> =
        ids.iter().zip(trained).filter(|(_, trained)| **trained).map(|(&id, _)| id).collect();
    (tokenizer.decode(&kept, false).unwrap(), tokenizer.decode(ids, false).unwrap())
}

#[test]
fn each_row_is_recognised_by_itself() {
    let text = "\u{feff}{\"text\": \"a\", \"other\": [1]}\r\n\n  \n\
                {\"prompt\": \"p\", \"completion\": \"c\"}\n\
                {\"messages\": [{\"role\": \"user\", \"content\": \"u\"}], \"text\": null}\n\
                {\"messages\": [{\"role\": \"user\", \"content\": \"u\"}], \"tools\": [{}]}";
    let rows = rows(text).unwrap().rows;
    let lines: Vec<usize> = rows.iter().map(|row| row.line).collect();
    assert_eq!(lines, [1, 4, 5, 6]);
    assert_eq!(rows[0].content, Content::Text("a".into()));
    let completion = Content::Completion { prompt: "p".into(), completion: "c".into() };
    assert_eq!(rows[1].content, completion);
    assert!(
        matches!(&rows[2].content, Content::Chat { messages, tools: None } if messages.len() == 1)
    );
    assert!(
        matches!(&rows[3].content, Content::Chat { tools: Some(tools), .. } if tools.len() == 1)
    );
}

#[test]
fn a_bad_line_is_an_error_with_line_and_column() {
    let good = "{\"text\": \"a\"}\n";
    let cases: [(&[u8], usize, &str); 12] = [
        (b"{\"text\": }", 10, "expected value"),
        (b"{\"text\": \"a\"", 12, "EOF"),
        (b"{\"text\": \"a\"} x", 15, "trailing"),
        (b"{\"text\": 5}", 10, "expected a string"),
        (b"[null, null, null, null, \"a\"]", 1, "expected an object"),
        (b"\"text\"", 1, "expected an object"),
        (b"{\"text\": \"\xff\"}", 11, "UTF-8"),
        (b"{\"question\": 1, \"answer\": 2}", 1, "[\"question\", \"answer\"]"),
        (b"{\"prompt\": \"p\"}", 1, "[\"prompt\"]"),
        (b"{\"messages\": []}", 1, "empty"),
        (b"{\"messages\": [{\"content\": \"x\"}]}", 31, "\"role\""),
        (b"{\"text\": \"a\", \"text\": \"b\"}", 20, "duplicate"),
    ];
    for (line, column, expected) in cases {
        let error = rows([good.as_bytes(), line].concat()).unwrap_err();
        let Error::Row { line: 2, column: got, problem, .. } = &error else {
            panic!("{error}");
        };
        assert!(problem.to_string().contains(expected), "{error}");
        assert_eq!(*got, column, "{error}");
        assert!(error.to_string().contains(&format!("rows.jsonl:2:{column}: ")), "{error}");
    }
}

#[test]
fn a_folder_has_its_splits_and_a_file_is_for_training() {
    let folder = tempfile::tempdir().unwrap();
    let error = Dataset::open(folder.path()).unwrap_err();
    let Error::Data { problem: Problem::NoFile { split: "train" }, .. } = &error else {
        panic!("{error}");
    };
    let train = write(folder.path(), "train.jsonl", "{\"text\": \"train\"}");
    write(folder.path(), "test.jsonl", "{\"text\": \"test\"}");
    let data = Dataset::open(folder.path()).unwrap();
    assert_eq!(data.train.rows[0].content, Content::Text("train".into()));
    assert_eq!(data.test.unwrap().rows[0].content, Content::Text("test".into()));
    assert!(data.valid.is_none());
    let data = Dataset::open(&train).unwrap();
    assert!(data.train.rows.len() == 1 && data.valid.is_none() && data.test.is_none());
    write(folder.path(), "valid.jsonl", " \n\n");
    let error = Dataset::open(folder.path()).unwrap_err();
    assert!(matches!(error, Error::Data { problem: Problem::Empty, .. }), "{error}");
    assert!(error.to_string().contains("valid.jsonl"), "{error}");
    let error = Dataset::open("/no/such/data").unwrap_err();
    assert!(matches!(error, Error::Data { problem: Problem::Missing, .. }), "{error}");
}

#[test]
fn text_is_trained_whole_and_ends_with_eos_once() {
    for mask_prompt in [false, true] {
        for text in ["Hi there", "Hi there<|im_end|>"] {
            let row = format!("{{\"text\": \"{text}\"}}");
            let (kept, all) = trained(CHATML, &row, mask_prompt);
            assert_eq!((kept.as_str(), all.as_str()), ("Hi there<|im_end|>", "Hi there<|im_end|>"));
        }
    }
}

#[test]
fn a_completion_is_a_turn_of_a_user_and_one_of_the_assistant() {
    let row = r#"{"prompt": "What?", "completion": " That."}"#;
    let all = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n That.<|im_end|>\n";
    assert_eq!(trained(CHATML, row, false), (all.to_owned(), all.to_owned()));
    assert_eq!(trained(CHATML, row, true), (" That.<|im_end|>\n".to_owned(), all.to_owned()));
}

const TURNS: &str = r#"{"messages": [{"role": "system", "content": "S"},
    {"role": "user", "content": "one"}, {"role": "assistant", "content": "eins"},
    {"role": "user", "content": "eins?"}, {"role": "assistant", "content": "zwei"}]}"#;

#[test]
fn every_assistant_turn_is_trained_not_only_the_last() {
    let row = TURNS.replace('\n', " ");
    let (kept, _) = trained(CHATML, &row, true);
    assert_eq!(kept, "eins<|im_end|>\nzwei<|im_end|>\n");
    let (kept, all) = trained(CHATML, &row, false);
    assert_eq!(kept, all);
}

#[test]
fn turns_are_found_where_the_template_writes_the_last_one_differently() {
    let (kept, all) = trained(THINKING, &TURNS.replace('\n', " "), true);
    assert_eq!(kept, "eins<|im_end|>\n<think>\n\n</think>\n\nzwei<|im_end|>\n");
    assert!(all.contains("assistant\neins"));
}

fn refused(template: Option<&str>, row: &str) -> RowProblem {
    let options = TokenizeOptions { max_seq_length: 99, mask_prompt: true };
    match tokenize(&rows(row).unwrap(), &tokenizer(template), options) {
        Err(Error::Row { line: 1, problem, .. }) => problem,
        other => panic!("expected a problem with the row, got {other:?}"),
    }
}

#[test]
fn rows_that_the_template_refuses_are_errors_at_their_line() {
    let turns = TURNS.replace('\n', " ");
    assert!(matches!(refused(Some(REWRITING), &turns), RowProblem::Turn { turn: 2 }));
    assert!(matches!(refused(None, &turns), RowProblem::NoTemplate));
    let raising = "{{ raise_exception('no ' + messages[0].role) }}";
    let problem = refused(Some(raising), &turns).to_string();
    assert!(problem.contains("no system"), "{problem}");
}

#[test]
fn long_rows_are_cut_and_counted_and_rows_with_nothing_to_train_are_left_out() {
    let text = "{\"text\": \"aaa bbb ccc ddd eee fff ggg\"}\n\
                {\"prompt\": \"a long prompt that fills the whole row\", \"completion\": \"x\"}\n\
                {\"messages\": [{\"role\": \"user\", \"content\": \"u\"}]}\n{\"text\": \"z\"}";
    let tokenizer = tokenizer(Some(CHATML));
    let options = TokenizeOptions { max_seq_length: 8, mask_prompt: true };
    let examples = tokenize(&rows(text).unwrap(), &tokenizer, options).unwrap();
    assert_eq!((examples.truncated, examples.untrained), (2 + 1, 2));
    let lengths: Vec<usize> = examples.examples.iter().map(|e| e.ids.len()).collect();
    assert_eq!(lengths, [8, 2]);
    assert_eq!((examples.tokens, examples.trained_tokens), (10, 7 + 1));
    let only = r#"{"messages": [{"role": "user", "content": "u"}]}"#;
    let error = tokenize(&rows(only).unwrap(), &tokenizer, options).unwrap_err();
    assert!(matches!(error, Error::Data { problem: Problem::NothingTrained { rows: 1 }, .. }));
}

/// Examples that can be told apart: ids are 1000·index + position, even positions are trained.
fn examples(lengths: &[usize]) -> Vec<Example> {
    let example = |(i, &len): (usize, &usize)| Example {
        ids: (0..len).map(|at| (1000 * (i + 1) + at) as u32).collect(),
        trained: (0..len).map(|at| at % 2 == 0).collect(),
    };
    lengths.iter().enumerate().map(example).collect()
}

fn batcher(lengths: &[usize], batch_size: usize, max_seq_length: usize, order: Order) -> Batcher {
    Batcher::new(examples(lengths), BatchOptions { batch_size, max_seq_length, order }).unwrap()
}

#[test]
fn labels_are_the_next_ids_where_they_are_trained() {
    let mut batcher = batcher(&[4, 5], 2, 64, Order::File);
    let batch = batcher.next_batch();
    assert_eq!((batch.batch, batch.seq, batch.trained), (2, 32, 1 + 2));
    assert_eq!(batch.ids[..6], [1000, 1001, 1002, 1003, 0, 0]);
    assert_eq!(batch.labels[..6], [-100, 1002, -100, -100, -100, -100]);
    assert_eq!(batch.ids[32..38], [2000, 2001, 2002, 2003, 2004, 0]);
    assert_eq!(batch.labels[32..38], [-100, 2002, -100, 2004, -100, -100]);
    assert_eq!(batch.ids.len(), 64);
    assert!(batch.labels[38..].iter().all(|&label| label == -100));
}

#[test]
fn batches_are_padded_to_a_multiple_of_32_and_never_beyond_the_limit() {
    // The last token is only a label, so 33 tokens are 32 columns.
    for (len, max, seq) in
        [(2, 99, 32), (33, 99, 32), (34, 99, 64), (200, 99, 99), (99, 99, 99), (5, 4, 4)]
    {
        let batch = batcher(&[len], 1, max, Order::File).next_batch();
        assert_eq!(batch.seq, seq, "{len} tokens of at most {max}");
        let expected = (1..=seq).filter(|&at| at < len && at % 2 == 0).count();
        assert_eq!(batch.trained, expected, "{len} tokens of at most {max}");
    }
}

#[test]
fn a_short_last_batch_is_filled_with_rows_that_train_nothing() {
    let mut batcher = batcher(&[4, 4, 4], 2, 32, Order::File);
    assert_eq!(batcher.batches_per_epoch(), 2);
    batcher.next_batch();
    let last = batcher.next_batch();
    assert_eq!((last.batch, last.ids.len(), last.trained), (2, 64, 1));
    assert!(last.ids[32..].iter().all(|&id| id == 0));
    assert_eq!(batcher.cursor(), Cursor { epoch: 1, batch: 0 });
    assert_eq!(batcher.next_batch().ids[0], 1000);
}

#[test]
fn bad_options_are_refused() {
    let options = BatchOptions { batch_size: 1, max_seq_length: 8, order: Order::File };
    let new = |examples, options| Batcher::new(examples, options).unwrap_err();
    assert!(matches!(new(Vec::new(), options), Problem::Empty));
    let no_rows = BatchOptions { batch_size: 0, ..options };
    assert!(matches!(new(examples(&[4]), no_rows), Problem::Zero { what: "batch_size" }));
    let no_columns = BatchOptions { max_seq_length: 0, ..options };
    assert!(matches!(new(examples(&[4]), no_columns), Problem::Zero { what: "max_seq_length" }));
    let mut uneven = examples(&[4]);
    uneven[0].trained.pop();
    assert!(matches!(new(uneven, options), Problem::Mask { ids: 4, trained: 3 }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..Default::default() })]

    /// Every epoch has every example once, in an order that only seed and epoch decide; going on
    /// from any cursor gives the same batches; rows of a batch differ little in length.
    #[test]
    fn an_epoch_is_a_permutation_that_can_be_taken_up_anywhere(
        lengths in prop::collection::vec(1usize..140, 1..40),
        batch_size in 1usize..6,
        seed in any::<u64>(),
        stop in 0usize..60,
        packed in any::<bool>(),
    ) {
        let options =
            BatchOptions { batch_size, max_seq_length: 128, order: Order::Shuffled { seed } };
        let new = if packed { Batcher::packed } else { Batcher::new };
        let mut batcher = new(examples(&lengths), options).unwrap();
        let mut resumed = batcher.clone();
        let per_epoch = batcher.batches_per_epoch();
        let mut epochs = Vec::new();
        let mut after_stop = Vec::new();
        let mut cursor = Cursor::default();
        for i in 0..3 * per_epoch {
            if i == stop {
                cursor = batcher.cursor();
            }
            let shapes = batcher.shapes();
            let batch = batcher.next_batch();
            prop_assert!(shapes.contains(&(batch.batch, batch.seq)));
            epochs.extend(batch.ids.iter().filter(|&&id| id != 0 && id % 1000 == 0));
            if i >= stop {
                after_stop.push(batch);
            }
        }
        for epoch in epochs.chunks(lengths.len()) {
            let mut seen: Vec<u32> = epoch.to_vec();
            seen.sort_unstable();
            let all: Vec<u32> = (1..=lengths.len() as u32).map(|i| 1000 * i).collect();
            prop_assert_eq!(seen, all);
        }
        resumed.seek(cursor);
        for batch in after_stop {
            prop_assert_eq!(resumed.next_batch(), batch);
        }
    }
}

#[test]
fn packed_documents_have_segments_and_positions_of_their_own_and_no_label_across_a_border() {
    let options = BatchOptions { batch_size: 2, max_seq_length: 8, order: Order::File };
    // Of inputs 3, 6, 4 and, cut, 8.
    let mut batcher = Batcher::packed(examples(&[4, 7, 5, 20]), options).unwrap();
    assert_eq!(batcher.batches_per_epoch(), 2);
    let batch = batcher.next_batch();
    assert_eq!((batch.batch, batch.seq), (2, 8));
    assert_eq!(batch.ids[..8], [4000, 4001, 4002, 4003, 4004, 4005, 4006, 4007]);
    assert_eq!(batch.labels[..8], [-100, 4002, -100, 4004, -100, 4006, -100, 4008]);
    assert_eq!(batch.ids[8..], [2000, 2001, 2002, 2003, 2004, 2005, 0, 0]);
    let documents = batch.documents.unwrap();
    assert_eq!(documents.segments, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0]);
    assert_eq!(documents.positions[8..], [0, 1, 2, 3, 4, 5, 0, 0]);
    let batch = batcher.next_batch();
    assert_eq!(batch.ids[..8], [3000, 3001, 3002, 3003, 1000, 1001, 1002, 0]);
    assert_eq!(batch.labels[..8], [-100, 3002, -100, 3004, -100, 1002, -100, -100]);
    let documents = batch.documents.unwrap();
    assert_eq!(documents.segments[..8], [1, 1, 1, 1, 2, 2, 2, 0]);
    assert_eq!(documents.positions[..8], [0, 1, 2, 3, 0, 1, 2, 0]);
    assert!(batch.trained == 3 && documents.segments[8..].iter().all(|&segment| segment == 0));
}

#[test]
fn packing_and_few_widths_are_seen_in_the_occupancy() {
    let lengths: Vec<usize> = (0..200).map(|i| 20 + i * 13 % 400).collect();
    let options = BatchOptions { batch_size: 4, max_seq_length: 1024, order: Order::File };
    let tokens: usize = lengths.iter().map(|len| len - 1).sum();
    let occupancy = |order, new: fn(_, _) -> Result<Batcher, Problem>| {
        let batcher = new(examples(&lengths), BatchOptions { order, ..options }).unwrap();
        assert!(batcher.shapes().len() <= 16, "{:?}", batcher.shapes());
        let occupancy = batcher.occupancy();
        assert_eq!(occupancy.tokens, tokens);
        occupancy.padding()
    };
    let file = occupancy(Order::File, Batcher::new);
    let sorted = occupancy(Order::Shuffled { seed: 3 }, Batcher::new);
    let packed = occupancy(Order::Shuffled { seed: 3 }, Batcher::packed);
    assert!(packed < 0.08 && sorted < 0.14 && file > 1.5 * sorted, "{packed} {sorted} {file}");
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own() {
    let lengths = [9; 40];
    let epoch = |seed: u64, epoch: u64| -> Vec<u32> {
        let mut batcher = batcher(&lengths, 4, 32, Order::Shuffled { seed });
        batcher.seek(Cursor { epoch, batch: 0 });
        (0..10)
            .flat_map(|_| batcher.next_batch().ids.chunks(32).map(|r| r[0]).collect::<Vec<_>>())
            .collect()
    };
    assert_eq!(epoch(1, 0), epoch(1, 0));
    assert_ne!(epoch(1, 0), epoch(1, 1));
    assert_ne!(epoch(1, 0), epoch(2, 0));
    assert_ne!(epoch(1, 0), (1..=40).map(|i| 1000 * i).collect::<Vec<u32>>());
}

#[test]
fn examples_of_like_length_share_a_batch() {
    let lengths: Vec<usize> = (0..64).map(|i| if i % 2 == 0 { 10 } else { 100 }).collect();
    let mut batcher = batcher(&lengths, 4, 128, Order::Shuffled { seed: 5 });
    let short = (0..16).filter(|_| batcher.next_batch().seq == 32).count();
    assert_eq!(short, 8);
}
