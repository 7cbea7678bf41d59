//! Models by their names on the hub, which is a server of the test's here.

use crate::{command, is_one_line, model, testbed, text, write};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// The files of `owner/name`, and what was asked for.
struct Hub {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// `token` is what it wants to see, if anything.
    fn serve(files: BTreeMap<&'static str, Vec<u8>>, token: Option<&'static str>) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // A client that hangs up is no reason to stop.
                let _ = answer(stream.unwrap(), &files, token, &log);
            }
        });
        Hub { endpoint, requests }
    }

    fn requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<&'static str, Vec<u8>>,
    token: Option<&str>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap()?;
    let path = first.split(' ').nth(1).unwrap().to_owned();
    let (mut range, mut given) = (None, None);
    for line in lines {
        let line = line?;
        let (name, value) = line.split_once(": ").unwrap_or((line.as_str(), ""));
        match name.to_lowercase().as_str() {
            "" => break,
            "range" => range = Some(value.trim_start_matches("bytes=").to_owned()),
            "authorization" => given = Some(value.trim_start_matches("Bearer ").to_owned()),
            _ => {}
        }
    }
    log.lock().unwrap().push(path.clone());
    let refused = token.is_some() && given.as_deref() != token;
    let status = |status: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    };
    if refused {
        return stream.write_all(status("401 Unauthorized").as_bytes());
    }
    if path == "/api/models/owner/name/revision/main" {
        let siblings: Vec<_> =
            files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        let body = serde_json::json!({ "siblings": siblings, "sha": SHA }).to_string();
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        return stream.write_all((head + &body).as_bytes());
    }
    let file = path.strip_prefix(&format!("/owner/name/resolve/{SHA}/"));
    let Some(content) = file.and_then(|name| files.get(name)) else {
        return stream.write_all(status("404 Not Found").as_bytes());
    };
    let range = range.unwrap_or_else(|| "0-".into());
    let (from, to) = range.split_once('-').unwrap();
    let from: usize = from.parse().unwrap();
    let end = to.parse::<usize>().map_or(content.len(), |to| to + 1).min(content.len());
    let body = &content[from.min(end)..end];
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {from}-{}/{}\r\n\
         ETag: \"{}\"\r\nX-Repo-Commit: {SHA}\r\nConnection: close\r\n\r\n",
        body.len(),
        end.saturating_sub(1),
        content.len(),
        file.unwrap_or_default(),
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body)
}

/// The command with a cache of its own, and this hub.
fn with(args: &[&str], home: &Path, endpoint: &str) -> Command {
    let mut command = command(args);
    command.env("HF_HOME", home).env("HF_ENDPOINT", endpoint);
    command
}

fn generate(model: &str) -> Vec<&str> {
    vec!["generate", "--model", model, "--prompt", "Hi", "--max-tokens", "4"]
}

#[track_caller]
fn succeeded(output: Output) -> (String, String) {
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{err}");
    (out, err)
}

/// Nobody listens there.
const NOWHERE: &str = "http://127.0.0.1:9";

#[test]
fn a_model_comes_from_the_hub_once_and_from_the_cache_then() {
    let folder = tempfile::tempdir().unwrap();
    let local = model(folder.path());
    let bytes = std::fs::read(&local).unwrap();
    let (want, _) = succeeded(command(&generate(&local)).output().unwrap());
    let hub = Hub::serve([("tiny.gguf", bytes), ("README.md", b"hello".to_vec())].into(), None);
    let home = folder.path().join("home");
    let run = |args: &[&str], endpoint: &str| with(args, &home, endpoint).output().unwrap();
    let args = generate("owner/name");
    assert_eq!(succeeded(run(&args, &hub.endpoint)).0, want);
    let first = hub.requests();
    assert_eq!(succeeded(run(&args, &hub.endpoint)).0, want);
    // The second time it only asked for the list of files.
    assert_eq!(hub.requests(), first + 1);
    // Where no hub is, there is the cache; the user is told.
    let (out, err) = succeeded(run(&args, NOWHERE));
    assert!(out == want && err.contains("cannot be reached"), "{err}");
    let mut offline = with(&args, &home, NOWHERE);
    let (out, err) = succeeded(offline.env("HF_HUB_OFFLINE", "1").output().unwrap());
    assert!(out == want && !err.contains("cannot be reached"), "{err}");
    let snapshot = home.join("hub/models--owner--name/snapshots").join(SHA).join("tiny.gguf");
    assert!(snapshot.exists(), "{}", snapshot.display());
}

#[test]
fn a_cache_that_another_tool_filled_is_used_offline() {
    let folder = tempfile::tempdir().unwrap();
    let local = model(folder.path());
    let cache = folder.path().join("cache/models--owner--name");
    let snapshot = cache.join("snapshots").join(SHA);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(cache.join("refs")).unwrap();
    write(&cache.join("refs"), "main", SHA.as_bytes());
    std::fs::copy(&local, snapshot.join("a.gguf")).unwrap();
    let run = |model: &str| {
        let mut command = command(&generate(model));
        command.env("HF_HUB_CACHE", folder.path().join("cache")).env("HF_HUB_OFFLINE", "1");
        command.output().unwrap()
    };
    let (want, _) = succeeded(command(&generate(&local)).output().unwrap());
    assert_eq!(succeeded(run("owner/name")).0, want);
    assert_eq!(succeeded(run("owner/name:a.gguf")).0, want);
    is_one_line(&run("owner/other"), 1, &["owner/other", "no such file", "HF_HUB_OFFLINE"]);
    is_one_line(&run("owner/name:b.gguf"), 1, &["no b.gguf", "a.gguf"]);
}

#[test]
fn a_folder_comes_with_its_shards_and_of_several_gguf_files_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let data = testbed::file("data/models/llama");
    let read = |name: &str| std::fs::read(data.join(name)).unwrap();
    let weights = read("model.safetensors");
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&weights[8..8 + header]).unwrap();
    let names = header.as_object().unwrap().keys().filter(|name| *name != "__metadata__");
    let map: BTreeMap<&String, &str> = names.map(|name| (name, "part-1.safetensors")).collect();
    let index = serde_json::json!({ "weight_map": map }).to_string();
    let gguf = std::fs::read(model(folder.path())).unwrap();
    let files = [
        ("config.json", read("config.json")),
        ("model.safetensors.index.json", index.into_bytes()),
        ("part-1.safetensors", weights),
        ("consolidated.safetensors", b"not this one".to_vec()),
        ("a.gguf", gguf.clone()),
        ("b.gguf", gguf),
    ];
    let hub = Hub::serve(files.into(), None);
    let run = |args: &[&str]| with(args, folder.path(), &hub.endpoint).output().unwrap();
    let local = command(&["plan", "--full", "--model", data.to_str().unwrap()]).output().unwrap();
    assert_eq!(succeeded(run(&["plan", "--full", "--model", "owner/name"])), succeeded(local));
    assert!(!hub.requests.lock().unwrap().iter().any(|path| path.contains("consolidated")));
    let named = succeeded(run(&["plan", "--model", "owner/name:b.gguf"])).0;
    let flag = succeeded(run(&["plan", "--model", "owner/name", "--gguf-file", "a.gguf"])).0;
    assert_eq!(named, flag);
    is_one_line(
        &run(&["plan", "--model", "owner/name:c.gguf"]),
        1,
        &["no c.gguf", "a.gguf, b.gguf"],
    );
}

#[test]
fn whatever_takes_a_model_takes_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let shared = testbed::file("data/adapters");
    let (base, adapter) = (shared.join("base.gguf"), shared.join("peft"));
    let hub = Hub::serve([("base.gguf", std::fs::read(&base).unwrap())].into(), None);
    let home = folder.path().join("home");
    let (base, adapter) = (base.to_str().unwrap(), adapter.to_str().unwrap());
    let rows = write(folder.path(), "train.jsonl", b"{\"text\": \"12 34\"}\n");
    let convert = ["adapter", "convert", "--to", "gguf", "--adapter-path", adapter];
    let fuse = ["fuse", "--export-gguf", "--adapter-path", adapter];
    for (args, made) in [(&convert[..], ""), (&fuse, "ggml-model.gguf")] {
        let to = |name: &str| folder.path().join(format!("{}-{name}", args[0]));
        let make = |name: &str, model: &str| {
            let to = to(name);
            let more = ["--save-path", to.to_str().unwrap(), "--model", model];
            succeeded(with(&[args, &more].concat(), &home, &hub.endpoint).output().unwrap());
            std::fs::read(if made.is_empty() { to } else { to.join(made) }).unwrap()
        };
        assert_eq!(make("hub", "owner/name"), make("here", base), "{args:?}");
    }
    let inspect = |model: &str| {
        let args = ["data", "inspect", "--data", &rows, "--model", model];
        let output = with(&args, &home, &hub.endpoint).output().unwrap();
        (output.status.code(), text(&output.stdout))
    };
    assert_eq!(inspect("owner/name"), inspect(base));
    let mut info = with(&["info", "owner/name"], &home, &hub.endpoint);
    assert!(succeeded(info.output().unwrap()).0.contains("a GGUF model of"));
}

#[test]
fn what_is_neither_here_nor_there_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let hub = Hub::serve([("tiny.gguf", vec![1, 2, 3])].into(), Some("secret"));
    let run = |model: &str, token: &str| {
        let mut command = with(&["plan", "--model", model], folder.path(), &hub.endpoint);
        command.env("HF_TOKEN", token).output().unwrap()
    };
    is_one_line(&run("owner/name", "wrong"), 1, &["owner/name: no such file", "HF_TOKEN"]);
    is_one_line(&run("owner/gone", "secret"), 1, &["owner/gone: no such file", "on the hub (404)"]);
    // With the token it comes, and is no model.
    is_one_line(&run("owner/name", "secret"), 1, &["tiny.gguf"]);
    let nowhere =
        with(&["plan", "--model", "owner/gone"], folder.path(), NOWHERE).output().unwrap();
    is_one_line(&nowhere, 1, &["no such file", "cannot be reached"]);
    is_one_line(&run("not-there", "secret"), 1, &["not-there: no such file", "owner/name"]);
}
