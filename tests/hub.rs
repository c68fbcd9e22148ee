//! `hf:ORG/NAME` against a model hub that is served here.

mod common;

use common::{kvfuse, tiny};
use kvfuse::files;
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::thread;

const CONTEXT: u64 = 64;

/// What a request looked like: path and Authorization header.
type Log = Arc<Mutex<Vec<(String, Option<String>)>>>;

/// Serves the files of `org/tiny` at revision `v1` as the hub does, until the test ends.
fn serve(folder: &Path) -> (String, Log) {
    let files: BTreeMap<String, Vec<u8>> = fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap())
        .map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap()))
        .collect();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let log: Log = Arc::default();
    let ours = Arc::clone(&log);
    thread::spawn(move || {
        for stream in listener.incoming() {
            answer(stream.unwrap(), &files, &ours);
        }
    });
    (address, log)
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, log: &Log) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let (mut range, mut token) = (None, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).unwrap();
        let Some((name, value)) = header.trim().split_once(": ") else { break };
        match &name.to_lowercase()[..] {
            "range" => range = value.strip_prefix("bytes=").map(str::to_owned),
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    log.lock().unwrap().push((path.clone(), token));
    let name = path.strip_prefix("/org/tiny/resolve/v1/").unwrap_or_default();
    let (status, headers, body) = if path == "/api/models/org/tiny/revision/v1" {
        let siblings: Vec<_> = files.keys().map(|f| json!({"rfilename": f})).collect();
        let info = json!({"siblings": siblings, "sha": "c0ffee"}).to_string();
        ("200 OK", "Content-Type: application/json\r\n".to_owned(), info.into_bytes())
    } else if let Some(file) = files.get(name) {
        let (from, to) = range.as_deref().and_then(|r| r.split_once('-')).unwrap_or(("0", ""));
        let from: usize = from.parse().unwrap();
        let to = to.parse().unwrap_or(file.len() - 1).min(file.len() - 1);
        let headers = format!(
            "Content-Range: bytes {from}-{to}/{}\r\nETag: \"{}\"\r\nx-repo-commit: c0ffee\r\n",
            file.len(),
            files::sha256_bytes(file)
        );
        ("206 Partial Content", headers, file[from..=to].to_vec())
    } else {
        ("404 Not Found", String::new(), Vec::new())
    };
    let head =
        format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    // The client may hang up once it has what it wants.
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn try_model(endpoint: &str, home: &Path, model: &str) -> Output {
    let mut command = kvfuse();
    command.env("HF_ENDPOINT", endpoint).env("HF_HOME", home).env("HF_TOKEN", "secret");
    command.args(["model", "try", model, "hi", "--tokens", "2", "--json"]).output().unwrap()
}

#[test]
fn a_repository_is_fetched_once_and_then_read_from_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, home) = (dir.path().join("tiny"), dir.path().join("home"));
    fs::create_dir(&folder).unwrap();
    tiny(&folder, 257, CONTEXT);
    let (endpoint, log) = serve(&folder);
    let first = try_model(&endpoint, &home, "hf:org/tiny@v1");
    let said = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{said}");
    let asked = log.lock().unwrap().clone();
    assert!(asked.iter().all(|(_, token)| token.as_deref() == Some("Bearer secret")), "{asked:?}");
    assert!(!asked.iter().any(|(path, _)| path.contains("README")));
    let probe: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    let ids: Vec<u64> = probe["ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap()).collect();
    assert_eq!((ids.len(), ids[0]), (3, 0), "a BOS, as the tokenizer's post-processor has it, and two bytes");

    // Nobody listens there: all is in HF_HOME. The folder itself gives the same.
    let again = try_model("http://127.0.0.1:9", &home, "hf:org/tiny@v1");
    assert_eq!(again.stdout, first.stdout);
    assert_eq!(log.lock().unwrap().len(), asked.len());
    let local = try_model("http://127.0.0.1:9", &home, folder.to_str().unwrap());
    assert_eq!(local.stdout, first.stdout);

    // A context beyond reason allocates nothing by itself.
    tiny(&folder, 257, 1_000_000_000_000_000);
    let wide = try_model("http://127.0.0.1:9", &home, folder.to_str().unwrap());
    assert_eq!(wide.stdout, first.stdout, "{}", String::from_utf8_lossy(&wide.stderr));
}

/// Of a short prompt with a long answer and a long prompt with a short one, each fits the context.
#[test]
fn room_for_an_answer_is_the_requests_own() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tiny");
    fs::create_dir(&folder).unwrap();
    tiny(&folder, 257, 1000);
    let line = |task: &str, context: &str| {
        json!({"dataset": task, "context": context, "input": "Why?", "answers": ["So."]}).to_string() + "\n"
    };
    let file = dir.path().join("two.jsonl");
    fs::write(&file, line("gov_report", "Few words.") + &line("hotpotqa", &"word ".repeat(100))).unwrap();
    let run = |arguments: &[&str]| {
        let output = kvfuse().current_dir(dir.path()).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    run(&["dump", "--model", "tiny", "--data", "longbench:two.jsonl", "--limit", "2", "-o", "dump"]);
    run(&["sweep", "dump", "--method", "none", "--resamples", "9", "-o", "out"]);
}

#[test]
fn a_tokenizer_of_a_larger_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // "h" is the 72nd byte that can be printed.
    tiny(dir.path(), 50, CONTEXT);
    let output = try_model("http://127.0.0.1:9", dir.path(), dir.path().to_str().unwrap());
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("tokenizer.json: token") && said.contains("tokenizer that belongs"), "{said}");
}

#[test]
fn a_repository_that_is_not_there_is_one_line() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    let (endpoint, _) = serve(dir.path());
    let refused = |endpoint: &str, model: &str, words: &str| {
        let output = try_model(endpoint, &dir.path().join("home"), model);
        let said = String::from_utf8_lossy(&output.stderr);
        let errors: Vec<&str> = said.lines().filter(|l| l.starts_with("error: ")).collect();
        assert_eq!((output.status.code(), errors.len()), (Some(2), 1), "{said}");
        assert!(errors[0].contains(model) && errors[0].contains(words), "{said}");
    };
    refused(&endpoint, "hf:org/other", "HF_TOKEN");
    refused(&endpoint, "hf:org/tiny@v1", "tokenizer.json");
    refused("http://127.0.0.1:9", "hf:org/tiny@v1", "HF_ENDPOINT");
    refused(&endpoint, "hf:tiny", "hf:ORG/NAME");
}
