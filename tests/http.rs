//! `kvfuse serve` over HTTP, as a client meets it: answers, streams, refusals, clients that hang up, Ctrl-C.

mod common;

use common::{small_model, text};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvfuse"))
            .args(["serve", "--model", text(small_model()), "--port", "0"])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().rsplit("http://").next().unwrap().to_owned();
        Server { child, address }
    }

    fn send(&self, method: &str, path: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: kvfuse\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        stream
    }

    /// Status and body.
    fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = self.send(method, path, body);
        let mut all = String::new();
        stream.read_to_string(&mut all).unwrap();
        let status = all.split(' ').nth(1).unwrap().parse().unwrap();
        (status, all.split_once("\r\n\r\n").unwrap().1.to_owned())
    }

    fn complete(&self, body: Value) -> (u16, Value) {
        let (status, body) = self.ask("POST", "/v1/completions", &body.to_string());
        (status, serde_json::from_str(&body).unwrap())
    }

    fn metric(&self, name: &str) -> f64 {
        let (_, body) = self.ask("GET", "/metrics", "");
        let line = body.lines().find(|l| l.starts_with(name) && !l.starts_with('#')).unwrap().to_owned();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn until(&self, what: &str, is: impl Fn() -> bool) {
        let started = Instant::now();
        while !is() {
            assert!(started.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ctrl-C; the exit status.
    fn stop(mut self) -> i32 {
        Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap();
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap();
            }
            assert!(started.elapsed() < Duration::from_secs(30), "the server goes on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn answers_come_whole_and_in_pieces_and_are_the_same() {
    let server = Server::start(&[]);
    let ask = json!({"prompt": "one two three", "max_tokens": 12, "ignore_eos": true});
    let (status, whole) = server.complete(ask.clone());
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let mut streamed = ask;
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let (status, body) = server.ask("POST", "/v1/completions", &streamed.to_string());
    assert_eq!(status, 200);
    let data: Vec<&str> = body.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"));
    let pieces: Vec<Value> =
        data[..data.len() - 1].iter().map(|d| serde_json::from_str(d).unwrap()).collect();
    let joined: String = pieces.iter().filter_map(|p| p["choices"][0]["text"].as_str()).collect();
    assert_eq!(whole["choices"][0]["text"], joined);
    assert_eq!(pieces.last().unwrap()["usage"]["completion_tokens"], 12);
    assert_eq!(server.ask("GET", "/health", "").0, 200);
    assert!(server.ask("GET", "/v1/models", "").1.contains("max_model_len"));
    assert_eq!(server.metric("vllm:generation_tokens_total"), 24.0);
    assert_eq!(server.stop(), 0);
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let server = Server::start(&["--kv-cache-memory-bytes", "200kB"]);
    for (body, status, words) in [
        (json!({"max_tokens": 3}), 400, "prompt is missing"),
        (json!({"prompt": "a", "temperature": 0.7}), 400, "temperature 0"),
        (json!({"prompt": "a", "model": "gpt-9"}), 404, "gpt-9"),
        (json!({"prompt": ["a", "b"]}), 400, "one prompt"),
        (json!({"prompt": "a", "n": 2}), 400, "one answer"),
        (json!({"prompt": "a", "max_tokens": 0}), 400, "at least 1"),
        (json!({"prompt": "a", "max_tokens": 9000}), 400, "context"),
        (json!({"prompt": "a", "max_tokens": 3000}), 400, "bytes of KV cache"),
        (json!({"prompt": [99999]}), 400, "token"),
    ] {
        let (got, answer) = server.complete(body.clone());
        assert_eq!(got, status, "{body}: {answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(words), "{body}: {message}");
    }
    assert_eq!(server.ask("POST", "/v1/completions", "{").0, 400);
    assert_eq!(server.ask("GET", "/nothing", "").0, 404);
    assert_eq!(server.complete(json!({"prompt": "still there", "max_tokens": 2})).0, 200);
}

#[test]
fn a_client_that_hangs_up_frees_its_pages_and_ctrl_c_ends_what_runs() {
    let server = Server::start(&["--method", "none"]);
    let long =
        json!({"prompt": "on and on", "max_tokens": 8000, "ignore_eos": true, "stream": true}).to_string();
    let mut stream = server.send("POST", "/v1/completions", &long);
    let mut some = [0; 64];
    stream.read_exact(&mut some).unwrap();
    server.until("it runs", || server.metric("vllm:num_requests_running") == 1.0);
    drop(stream);
    server.until("its pages are back", || server.metric("vllm:kv_cache_usage_perc") == 0.0);
    let mut again = server.send("POST", "/v1/completions", &long);
    again.read_exact(&mut some).unwrap();
    assert_eq!(server.stop(), 0);
}
