//! Dumps and sweeps through the binary: any prompts, killed and resumed. On a made-up model, no download.

mod common;

use common::{SMALL, assert_same_dump, kvfuse, small_dump, small_model, succeed, sweep_arguments, text};
use kvfuse::model::{Model, to_f32};
use safetensors::SafeTensors;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

#[test]
fn a_block_size_list_and_a_spared_first_token() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    let mut arguments = sweep_arguments(text(small_dump()), out);
    arguments.extend(["--block-size", "8,32", "--first-token", "prefill", "--batch", "3"]);
    succeed(&arguments);
    let csv = fs::read_to_string(dir.path().join("sweep.csv")).unwrap();
    assert_eq!(csv.lines().count(), 9);
    let column = |name: &str| csv.lines().next().unwrap().split(',').position(|c| c == name).unwrap();
    for (name, value) in [("first_token", "prefill"), ("batch", "3")] {
        assert!(csv.lines().skip(1).all(|l| l.split(',').nth(column(name)) == Some(value)), "{name}: {csv}");
    }
}

#[test]
fn prompts_without_answers_are_compared_on_their_own_continuation() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    let line = |s: &str| format!("{{\"prompt\": \"{s}\"}}\n");
    fs::write(&file, line("The tallest tree in the park is") + &line("The tallest tree in the park was"))
        .unwrap();
    let data = format!("prompts:{}", text(&file));
    let dump = dir.path().join("dump");
    succeed(&["dump", "--model", text(small_model()), "--data", &data, "--requests", "2", "-o", text(&dump)]);
    let out = dir.path().join("out");
    succeed(&[
        "sweep",
        text(&dump),
        "--method",
        "bff:tau=0.9",
        "--block-size",
        "2",
        "--max-new-tokens",
        "4",
        "-o",
        text(&out),
    ]);
    let run = fs::read_dir(out.join("runs")).unwrap().next().unwrap().unwrap().path();
    let record = fs::read_to_string(run).unwrap();
    assert!(record.contains("\"f1\": null"), "{record}");
    succeed(&["plot", text(&out)]);
}

/// With one token there is nothing to fuse before the answer: ratios are 1, errors 0, and the sweep can be resumed.
#[test]
fn prompts_of_one_token() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("prompts.jsonl");
    fs::write(&file, "{\"prompt\": \"The\", \"answers\": [\"end\"]}\n").unwrap();
    let data = format!("prompts:{}", text(&file));
    let (dump, out) = (dir.path().join("dump"), dir.path().join("out"));
    succeed(&["dump", "--model", text(small_model()), "--data", &data, "--requests", "1", "-o", text(&dump)]);
    let arguments =
        ["sweep", text(&dump), "--method", "bff:tau=0.9", "--max-new-tokens", "2", "-o", text(&out)];
    succeed(&arguments);
    let csv = fs::read_to_string(out.join("sweep.csv")).unwrap();
    let fused = csv.lines().last().unwrap();
    assert!(!fused.contains(",,,"), "{fused}");
    let run = fs::read_dir(out.join("runs")).unwrap().next().unwrap().unwrap().path();
    let before = fs::metadata(&run).unwrap().modified().unwrap();
    succeed(&arguments);
    assert_eq!(before, fs::metadata(&run).unwrap().modified().unwrap(), "measured once");
}

/// Starts the binary, waits until `ready`, kills it with SIGKILL.
fn kill_when(arguments: &[&str], ready: impl Fn() -> bool) {
    let binary = assert_cmd::cargo::cargo_bin("kvfuse");
    let mut child =
        Command::new(binary).args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let started = Instant::now();
    while !ready() && child.try_wait().unwrap().is_none() {
        assert!(started.elapsed() < Duration::from_secs(300), "it never got so far");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_killed_dump_goes_on_to_the_same_dump() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("dump");
    let mut arguments = SMALL.to_vec();
    arguments.extend(["--model", text(small_model()), "-o", text(&out)]);
    kill_when(&arguments, || out.join("request-00001.safetensors").exists());
    assert!(!out.join("request-00004.safetensors").exists(), "killed too late to test anything");
    let before = fs::metadata(out.join("request-00000.safetensors")).unwrap().modified().unwrap();
    succeed(&arguments);
    let after = fs::metadata(out.join("request-00000.safetensors")).unwrap().modified().unwrap();
    assert_eq!(before, after, "what was finished is kept");
    assert_same_dump(&out, small_dump());
}

#[test]
fn a_killed_sweep_goes_on_to_the_same_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (killed, whole) = (dir.path().join("killed"), dir.path().join("whole"));
    let dump = text(small_dump());
    let runs = || {
        fs::read_dir(killed.join("runs")).map_or(0, |d| {
            d.filter(|e| e.as_ref().is_ok_and(|e| e.path().extension().is_some_and(|x| x == "json"))).count()
        })
    };
    kill_when(&sweep_arguments(dump, text(&killed)), || runs() >= 2);
    assert!(runs() < 4, "killed too late to test anything");
    succeed(&sweep_arguments(dump, text(&killed)));
    succeed(&sweep_arguments(dump, text(&whole)));
    let read = |out: &Path| fs::read(out.join("sweep.csv")).unwrap();
    assert_eq!(read(&killed), read(&whole));

    // And once more: nothing is left to do, no model is needed.
    let home = dir.path().join("no-models-here");
    let output =
        kvfuse().args(sweep_arguments(dump, text(&killed))).env("KVFUSE_HOME", &home).output().unwrap();
    assert!(output.status.success());
    assert!(!home.exists());
    assert_eq!(read(&killed), read(&whole));
}

/// The dump holds what one straight prefill of the prompt gives, shared prefix or not.
#[test]
fn the_shared_prefix_changes_nothing() {
    let shard = fs::read(small_dump().join("request-00001.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&shard).unwrap();
    let manifest = kvfuse::dump::Manifest::read(small_dump()).unwrap();
    assert!(manifest.shared_prefix_tokens > 30);
    let model = Model::load(text(small_model())).unwrap();
    let probe = kvfuse::model::probe(&model, &manifest.requests[1].request.prompt, 1).unwrap();
    assert_eq!(probe.ids.len(), manifest.requests[1].tokens);
    for layer in [0, 14, 29] {
        let stored = tensors.tensor(&format!("layer.{layer}.key")).unwrap();
        let stored = to_f32(stored.dtype(), stored.data()).unwrap();
        let entries = probe.cache.layers[layer].entries.iter();
        let straight: Vec<f32> = entries.flat_map(|e| probe.pool.keys(e.block).to_vec()).collect();
        assert_eq!(stored.len(), straight.len());
        for (a, b) in stored.iter().zip(&straight) {
            // The dump is in f16.
            assert!((a - b).abs() < 2e-3 + b.abs() / 1000.0, "layer {layer}: {a} {b}");
        }
    }
}
