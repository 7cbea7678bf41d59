//! Columns of other names, and CSV.

use metal_candle::io::data::{Columns, Content, Dataset, Problem, RowProblem, Rows};
use metal_candle::io::{Error, Result};
use proptest::prelude::*;

fn read(name: &str, text: &str, columns: &Columns) -> Result<Vec<(usize, Content)>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    let rows = Rows::read_with(path, columns)?;
    Ok(rows.rows.into_iter().map(|row| (row.line, row.content)).collect())
}

fn text(text: &str) -> Content {
    Content::Text(text.to_owned())
}

fn completion(prompt: &str, completion: &str) -> Content {
    Content::Completion { prompt: prompt.to_owned(), completion: completion.to_owned() }
}

fn named(names: &[&str]) -> Columns {
    let text = names.iter().map(|name| (*name).to_owned()).collect();
    Columns { text, ..Columns::default() }
}

#[test]
fn what_is_named_counts_whatever_else_a_row_has() {
    let row = r#"{"question": "Q", "answer": "A", "text": "T", "prompt": "P", "completion": "C",
        "talk": [{"role": "user", "content": "U"}]}"#;
    let row = row.replace('\n', " ");
    let one = |columns| read("rows.jsonl", &row, &columns).unwrap().remove(0).1;
    assert_eq!(one(Columns::default()), completion("P", "C"));
    assert_eq!(one(named(&["question", "answer"])), text("Q\nA"));
    assert_eq!(one(named(&["text"])), text("T"));
    let prompt = Some("question".to_owned());
    assert_eq!(one(Columns { prompt, ..Columns::default() }), completion("Q", "C"));
    let (prompt, answer) = (Some("question".to_owned()), Some("answer".to_owned()));
    assert_eq!(
        one(Columns { prompt, completion: answer, ..Columns::default() }),
        completion("Q", "A")
    );
    let chat = Columns { chat: Some("talk".to_owned()), ..Columns::default() };
    assert!(matches!(one(chat), Content::Chat { messages, .. } if messages.len() == 1));

    let error = read("rows.jsonl", &row, &named(&["question", "reply"])).unwrap_err().to_string();
    assert!(error.ends_with(r#"expected "question" with "reply""#), "{error}");
    let error = read("rows.jsonl", r#"{"question": 5}"#, &named(&["question"])).unwrap_err();
    assert!(error.to_string().contains("rows.jsonl:1:14: "), "{error}");
}

#[test]
fn csv_rows_are_what_their_header_calls_them() {
    let file = "\u{feff}id,prompt,completion\r\n1,\"a, \"\"b\"\"\",x\r\n\r\n2,\"two\nlines\",\r\n3,\u{e9},5\" z";
    let rows = read("rows.csv", file, &Columns::default()).unwrap();
    let want = [
        (2, completion("a, \"b\"", "x")),
        (4, completion("two\nlines", "")),
        (6, completion("\u{e9}", "5\" z")),
    ];
    assert_eq!(rows, want);
    assert_eq!(
        read("rows.CSV", file, &named(&["id", "prompt"])).unwrap()[0].1,
        text("1\na, \"b\"")
    );
}

#[test]
fn a_bad_csv_row_is_an_error_with_line_and_column() {
    type Is = fn(&RowProblem) -> bool;
    let cases: [(&str, usize, usize, Is); 8] = [
        ("text\na\n\"b\nc", 3, 1, |p| matches!(p, RowProblem::CsvQuote)),
        ("id,text\n1,\"a\"b\n", 2, 6, |p| matches!(p, RowProblem::CsvAfterQuote)),
        ("id,text\n1,a\n2,b,c\n", 3, 5, |p| {
            matches!(p, RowProblem::CsvColumns { expected: 2, got: 3 })
        }),
        ("id,text\n1,a\n2\n", 3, 1, |p| {
            matches!(p, RowProblem::CsvColumns { expected: 2, got: 1 })
        }),
        ("id,text\n\"1\n2\",a,b\n", 3, 6, |p| matches!(p, RowProblem::CsvColumns { .. })),
        (
            "text,id,text\n",
            1,
            9,
            |p| matches!(p, RowProblem::CsvDuplicate { name } if name == "text"),
        ),
        (
            "id,words\n1,a\n",
            2,
            1,
            |p| matches!(p, RowProblem::Format { keys, .. } if keys == &["id", "words"]),
        ),
        (
            "messages\n[]\n",
            2,
            1,
            |p| matches!(p, RowProblem::Format { expected, .. } if !expected.contains("messages")),
        ),
    ];
    for (file, line, column, is) in cases {
        match read("rows.csv", file, &Columns::default()).unwrap_err() {
            Error::Row { line: l, column: c, problem, .. } => {
                assert_eq!((l, c), (line, column), "{file:?}: {problem}");
                assert!(is(&problem), "{file:?}: {problem}");
            }
            other => panic!("{file:?}: {other}"),
        }
    }
    for file in ["", "text\n", "text\n\n \n"] {
        let error = read("rows.csv", file, &Columns::default()).unwrap_err();
        assert!(matches!(error, Error::Data { problem: Problem::Empty, .. }), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.csv");
    std::fs::write(&path, b"id,text\n1,\xff\n").unwrap();
    let error = Rows::read(&path).unwrap_err().to_string();
    assert!(error.contains("rows.csv:2:3: not UTF-8"), "{error}");
}

#[test]
fn a_folder_may_hold_csv_but_not_one_split_twice() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("train.csv", "text\na\n");
    write("test.jsonl", r#"{"text": "b"}"#);
    let data = Dataset::open(folder.path()).unwrap();
    assert_eq!(data.train.rows[0].content, text("a"));
    assert_eq!(data.test.unwrap().rows[0].content, text("b"));
    let columns = Columns::default();
    assert_eq!(Rows::read_split(folder.path(), "test", &columns).unwrap().rows.len(), 1);
    let error = Rows::read_split(folder.path(), "valid", &columns).unwrap_err().to_string();
    assert!(error.contains("no valid.jsonl or valid.csv"), "{error}");
    write("train.jsonl", r#"{"text": "a"}"#);
    let error = Dataset::open(folder.path()).unwrap_err();
    assert!(
        matches!(error, Error::Data { problem: Problem::TwoFiles { split: "train" }, .. }),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn whatever_is_quoted_comes_back(
        cells in prop::collection::vec((any::<String>(), "[\",\r\nx]{0,9}"), 1..6),
        end in "\r?\n",
    ) {
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let mut file = format!("completion,prompt{end}");
        for (a, b) in &cells {
            file += &format!("{},{}{end}", quoted(a), quoted(b));
        }
        let rows = read("rows.csv", &file, &Columns::default()).unwrap();
        let want: Vec<Content> = cells.iter().map(|(a, b)| completion(b, a)).collect();
        prop_assert_eq!(rows.into_iter().map(|(_, row)| row).collect::<Vec<_>>(), want);
    }

    #[test]
    fn no_bytes_make_the_reader_panic(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..60),
            "text[\",\r\n\u{e9}x]{0,40}".prop_map(String::into_bytes),
        ],
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        std::fs::write(&path, &bytes).unwrap();
        if let Err(Error::Row { line, column, .. }) = Rows::read(&path) {
            let lines = bytes.split(|b| *b == b'\n').collect::<Vec<_>>();
            // The mark that some editors begin a file with is not counted.
            prop_assert!(line <= lines.len() && column <= lines[line - 1].len() + 1);
        }
    }
}
