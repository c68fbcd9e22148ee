//! The real model from dump to figure, through the binary.

mod common;

use common::{SMALL, assert_same_dump, kvfuse, model_file, small_dump, succeed, text};
use kvfuse::model::{Gguf, Model, Tokenizer, to_f32};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn sweep_arguments<'a>(dump: &'a str, out: &'a str) -> Vec<&'a str> {
    vec![
        "sweep",
        dump,
        "--method",
        "bff:tau=0.9|0.75",
        "--max-new-tokens",
        "8",
        "--resamples",
        "200",
        "-o",
        out,
    ]
}

#[test]
fn from_dump_to_figures_the_same_bytes_on_one_thread_and_two() {
    let dir = tempfile::tempdir().unwrap();
    let dump = text(small_dump());
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let inspected = succeed(&["inspect", dump]);
    assert!(inspected.contains("requests  5") && inspected.contains("finite throughout"), "{inspected}");

    for (out, threads) in [(&one, "1"), (&two, "2")] {
        let mut arguments = sweep_arguments(dump, text(out));
        arguments.extend(["--threads", threads]);
        let table = succeed(&arguments);
        assert!(table.contains("prefix") && table.contains("sweep.csv"), "{table}");
    }
    let csv = fs::read_to_string(one.join("sweep.csv")).unwrap();
    assert_eq!(csv, fs::read_to_string(two.join("sweep.csv")).unwrap());
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 5, "header, none, prefix, two thresholds");
    let header: Vec<&str> = lines[0].split(',').collect();
    let cell = |line: usize, name: &str| -> f64 {
        let column = header.iter().position(|h| *h == name).unwrap();
        lines[line].split(',').nth(column).unwrap().parse().unwrap()
    };
    // The controls: no fusion is itself, and prefix sharing costs nothing.
    assert_eq!((cell(1, "kl"), cell(1, "top1"), cell(1, "f1_diff")), (0.0, 1.0, 0.0));
    assert!((0.99..=1.0).contains(&cell(1, "cr_audited")));
    assert!(cell(2, "kl") < 1e-6 && cell(2, "cr_audited") > 1.1);
    // The stricter threshold saves less and harms less; the paper's ratio flatters.
    assert!(cell(3, "cr_audited") < cell(4, "cr_audited"));
    assert!(cell(3, "kl") < cell(4, "kl") && cell(3, "key_error") < cell(4, "key_error"));
    for line in 1..5 {
        assert!(cell(line, "cr_audited") <= cell(line, "cr_paper"));
        assert!((cell(line, "cr_prefix") - cell(2, "cr_audited")).abs() < 1e-9);
    }
    assert!(fs::read_to_string(one.join("manifest.json")).unwrap().contains("\"command\""));

    succeed(&["plot", text(&one)]);
    for figure in ["quality_vs_cr", "cr_vs_tau", "layer_cr"] {
        let png = fs::read(one.join(format!("{figure}.png"))).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 5000, "{figure}");
        let svg = fs::read_to_string(one.join(format!("{figure}.svg"))).unwrap();
        assert!(svg.contains("smollm2-135m, builtin:qa, 5 requests"), "{figure}");
    }
}

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
    succeed(&["dump", "--data", &data, "--requests", "2", "-o", text(&dump)]);
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
    succeed(&["dump", "--data", &data, "--requests", "1", "-o", text(&dump)]);
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
    arguments.extend(["-o", text(&out)]);
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

/// Writes the GGUF model as a Hugging Face folder in float32.
fn hf_folder(gguf: &Path, folder: &Path) {
    use kvfuse::model::TensorSource;
    let source = Gguf::open(gguf).unwrap();
    let c = source.config();
    let mut names = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
    for n in 0..c.layers {
        for part in [
            "input_layernorm",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.o_proj",
            "post_attention_layernorm",
            "mlp.gate_proj",
            "mlp.up_proj",
            "mlp.down_proj",
        ] {
            names.push(format!("model.layers.{n}.{part}.weight"));
        }
    }
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = names
        .into_iter()
        .map(|name| {
            let (shape, data) = source.tensor(&name).unwrap();
            (name, shape, data.into_f32().iter().flat_map(|x| x.to_le_bytes()).collect())
        })
        .collect();
    let views = tensors.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    fs::create_dir_all(folder).unwrap();
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": c.hidden,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.intermediate, "vocab_size": c.vocab, "max_position_embeddings": c.context,
        "rms_norm_eps": c.rms_epsilon, "rope_theta": c.rope.base, "tie_word_embeddings": true,
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    Tokenizer::from_gguf(&source, gguf).unwrap().save(&folder.join("tokenizer.json")).unwrap();
}

#[test]
fn a_gguf_and_a_hf_folder_give_the_same_dump() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("hf");
    hf_folder(&model_file(), &folder);
    let dumps: Vec<_> = [text(&model_file()), text(&folder)]
        .iter()
        .enumerate()
        .map(|(i, model)| {
            let out = dir.path().join(format!("dump{i}"));
            succeed(&["dump", "--model", model, "--requests", "2", "--shots", "1", "-o", text(&out)]);
            out
        })
        .collect();
    for shard in ["request-00000.safetensors", "request-00001.safetensors"] {
        let bytes: Vec<Vec<u8>> = dumps.iter().map(|d| fs::read(d.join(shard)).unwrap()).collect();
        let (a, b) =
            (SafeTensors::deserialize(&bytes[0]).unwrap(), SafeTensors::deserialize(&bytes[1]).unwrap());
        assert_eq!(a.names().len(), 61);
        for (name, x) in a.tensors() {
            let y = b.tensor(&name).unwrap();
            assert_eq!(x.shape(), y.shape());
            if name == "tokens" {
                assert_eq!(x.data(), y.data());
                continue;
            }
            let (x, y) = (to_f32(x.dtype(), x.data()).unwrap(), to_f32(y.dtype(), y.data()).unwrap());
            let worst = x.iter().zip(&y).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 1e-4, "{name}: {worst}");
        }
    }
}

/// The schema is for others: Python's safetensors reads a shard. Installs the package beside the build if need be.
#[test]
fn python_reads_a_shard() {
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    if !packages.join("safetensors").exists() {
        let status = Command::new("python3")
            .args(["-m", "pip", "install", "--quiet", "--target", text(&packages), "safetensors", "numpy"])
            .status()
            .unwrap();
        assert!(status.success(), "pip could not install safetensors and numpy");
    }
    let script = "import sys, json\n\
        from safetensors.numpy import load_file\n\
        t = load_file(sys.argv[1])\n\
        print(json.dumps([len(t), t['tokens'].tolist(), list(t['layer.29.value'].shape), str(t['layer.0.key'].dtype),\n\
        float(t['layer.7.key'][3, 1, 5])]))\n";
    let shard = small_dump().join("request-00002.safetensors");
    let output = Command::new("python3")
        .env("PYTHONPATH", &packages)
        .args(["-c", script, text(&shard)])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let got: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

    let bytes = fs::read(&shard).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = tensors.tensor("tokens").unwrap();
    let tokens: Vec<i64> = ids.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let key = tensors.tensor("layer.7.key").unwrap();
    let number = to_f32(key.dtype(), key.data()).unwrap()[3 * 192 + 64 + 5];
    let expected = serde_json::json!([61, tokens, [tokens.len(), 3, 64], "float16", f64::from(number)]);
    assert_eq!(got, expected);
}

/// The dump holds what one straight prefill of the prompt gives, shared prefix or not.
#[test]
fn the_shared_prefix_changes_nothing() {
    let shard = fs::read(small_dump().join("request-00001.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&shard).unwrap();
    let manifest = kvfuse::dump::Manifest::read(small_dump()).unwrap();
    assert!(manifest.shared_prefix_tokens > 30);
    let model = Model::load("smollm2-135m").unwrap();
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
