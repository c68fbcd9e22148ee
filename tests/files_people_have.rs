//! Inputs as people have them, on a tiny model: right numbers, or exit 2 and one line that says what to do. No download.

mod common;

use common::{kvfuse, refuse, succeed, text, tiny};
use kvfuse::lock::FolderLock;
use kvfuse::model::Model;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder with the tiny model in `model/`.
fn place() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    tiny(&model, 257, 256);
    (dir, model)
}

/// Changes a JSON file of a folder.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Rewrites the numbers of one tensor of a safetensors file of f32.
fn edit_tensor(path: &Path, name: &str, change: impl Fn(&mut [f32])) {
    let bytes = fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(n, view)| {
            let mut data = view.data().to_vec();
            if n == name {
                let mut numbers: Vec<f32> =
                    data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                change(&mut numbers);
                data = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
            }
            (n.to_owned(), view.dtype(), view.shape().to_vec(), data)
        })
        .collect();
    let metadata = SafeTensors::read_metadata(&bytes).unwrap().1.metadata().clone();
    let views = all.iter().map(|(n, d, s, b)| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    let changed = safetensors::serialize(views, metadata).unwrap();
    fs::write(path, changed).unwrap();
}

/// The shard of the tiny model that holds a tensor.
fn shard(model: &Path, name: &str) -> PathBuf {
    let index: Value =
        serde_json::from_slice(&fs::read(model.join("model.safetensors.index.json")).unwrap()).unwrap();
    model.join(index["weight_map"][name].as_str().unwrap())
}

fn prompts(dir: &Path, lines: &[Value]) -> String {
    let path = dir.join("prompts.jsonl");
    fs::write(&path, lines.iter().map(|l| format!("{l}\n")).collect::<String>()).unwrap();
    format!("prompts:{}", text(&path))
}

/// Dumps two prompts; returns the dump's folder.
fn dumped(dir: &Path, model: &Path, name: &str) -> PathBuf {
    let lines = ["Who keeps the lamp in Port Vale?", "Who keeps the boat in Port Vale?"];
    let data = prompts(dir, &lines.map(|p| json!({"prompt": p, "answers": ["Mara Quill"]})));
    let out = dir.join(name);
    succeed(&["dump", "--model", text(model), "--data", &data, "--requests", "2", "-q", "-o", text(&out)]);
    out
}

#[test]
fn a_tokenizers_truncation_and_padding_are_not_the_models() {
    let (dir, model) = place();
    let before = Model::load(text(&model)).unwrap().tokenizer.encode_prompt("Who keeps the lamp?").unwrap();
    edit(&model.join("tokenizer.json"), |t| {
        t["truncation"] =
            json!({"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0});
        t["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"});
    });
    let model_ids =
        Model::load(text(&model)).unwrap().tokenizer.encode_prompt("Who keeps the lamp?").unwrap();
    assert_eq!(model_ids, before);
    assert_eq!(before.len(), 20, "a BOS and a byte each");
    drop(dir);
}

/// Found by fuzzing: the tokenizers crate panics at both.
#[test]
fn a_tokenizer_that_is_no_json_or_contradicts_itself_is_refused() {
    let (_dir, model) = place();
    let file = model.join("tokenizer.json");
    let sound = fs::read_to_string(&file).unwrap();
    edit(&file, |t| {
        t["post_processor"] = json!({"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<S>": {"id": "<S>", "ids": [1], "tokens": ["<S>"]}}});
    });
    refuse(&["model", "info", text(&model)], &["tokenizer.json", "post_processor", "<s>"]);
    let (head, tail) = sound.split_once(r#""decoder":"#).unwrap();
    fs::write(&file, format!(r#"{head}"decoder":{{"type":-{tail}"#)).unwrap();
    refuse(&["model", "info", text(&model)], &["tokenizer.json", "not a usable"]);
}

#[test]
fn ends_are_those_that_the_files_name() {
    let (_dir, model) = place();
    let ends = |id: u32| Model::load(text(&model)).unwrap().tokenizer.is_end(id);
    assert!(!ends(65));
    edit(&model.join("config.json"), |c| c["eos_token_id"] = json!([65, 66]));
    assert!(ends(65) && ends(66) && !ends(67));
    fs::write(model.join("generation_config.json"), r#"{"eos_token_id": 67}"#).unwrap();
    assert!(ends(67) && !ends(65), "generation_config.json goes before config.json");
    fs::write(model.join("tokenizer_config.json"), r#"{"eos_token": {"content": "A"}}"#).unwrap();
    let a = Model::load(text(&model)).unwrap().tokenizer.encode("A").unwrap()[0];
    assert!(ends(a) && ends(67));
}

#[test]
fn what_is_missing_or_not_read_is_named() {
    let (_dir, model) = place();
    edit(&model.join("config.json"), |c| c["tie_word_embeddings"] = json!(false));
    refuse(&["model", "info", text(&model)], &["lm_head.weight", "missing"]);
    edit(&model.join("config.json"), |c| c["tie_word_embeddings"] = json!(true));
    // Weights that no index lists are not the model's.
    fs::copy(shard(&model, "model.norm.weight"), model.join("stray.safetensors")).unwrap();
    edit_tensor(&model.join("stray.safetensors"), "model.norm.weight", |x| x.fill(9.0));
    let norm = shard(&model, "model.norm.weight");
    succeed(&["model", "info", text(&model)]);
    // A bias that this architecture has no place for.
    let bytes = fs::read(&norm).unwrap();
    let bias = 1f32.to_le_bytes().repeat(16);
    {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let own = tensors.iter().map(|(n, v)| (n.to_owned(), v));
        let view = TensorView::new(Dtype::F32, vec![16], &bias).unwrap();
        let all = own.chain([("model.layers.0.self_attn.q_proj.bias".to_owned(), view)]);
        fs::write(&norm, safetensors::serialize(all, None).unwrap()).unwrap();
    }
    edit(&model.join("model.safetensors.index.json"), |i| {
        i["weight_map"]["model.layers.0.self_attn.q_proj.bias"] =
            json!(norm.file_name().unwrap().to_str().unwrap());
    });
    refuse(&["model", "info", text(&model)], &["q_proj.bias", "does not use"]);
    fs::remove_file(&norm).unwrap();
    refuse(&["model", "info", text(&model)], &[norm.file_name().unwrap().to_str().unwrap(), "missing"]);
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    let (_dir, model) = place();
    let name = "model.layers.0.mlp.up_proj.weight";
    edit_tensor(&shard(&model, name), name, |x| x[7] = f32::NAN);
    refuse(&["model", "info", text(&model)], &[name, "NaN", "element 7"]);
}

/// Keys beyond f16 fit into a dump of f32, not into the cache that a sweep measures, nor into a dump of f16.
#[test]
fn a_number_beyond_f16_is_named_with_layer_and_request() {
    let (dir, model) = place();
    let name = "model.layers.0.self_attn.k_proj.weight";
    edit_tensor(&shard(&model, name), name, |x| x.iter_mut().for_each(|x| *x *= 1e5));
    let dump = dumped(dir.path(), &model, "dump");
    refuse(
        &["sweep", text(&dump), "--method", "bff:tau=0.9", "--block-size", "4"],
        &["line-1", "layer 0", "f16", "65504"],
    );
    let data = format!("prompts:{}", text(&dir.path().join("prompts.jsonl")));
    let out = dir.path().join("half");
    let mut arguments = vec!["dump", "--model", text(&model), "--data", &data, "--requests", "2"];
    arguments.extend(["--dtype", "f16", "-o", text(&out)]);
    refuse(&arguments, &["layer 0", "key", "--dtype bf16 or f32"]);
}

#[test]
fn an_edited_shard_and_one_of_another_model_are_found() {
    let (dir, model) = place();
    let dump = dumped(dir.path(), &model, "dump");
    let sweep = |words: &[&str]| {
        refuse(&["sweep", text(&dump), "--method", "bff:tau=0.9,spare-layers=0", "--block-size", "4"], words);
    };
    let path = dump.join("request-00001.safetensors");
    let good = fs::read(&path).unwrap();
    let change = |number: f32| {
        fs::write(&path, &good).unwrap();
        edit_tensor(&path, "layer.0.value", |x| x[3] = number);
    };
    change(0.25);
    sweep(&["request-00001.safetensors", "checksum differs"]);
    change(70_000.0);
    sweep(&["request-00001.safetensors", "checksum differs"]);
    change(f32::NAN);
    sweep(&["request-00001.safetensors", "NaN"]);
    // The same prompts of another model.
    let changed = dir.path().join("changed");
    fs::create_dir(&changed).unwrap();
    tiny(&changed, 257, 256);
    let name = "model.layers.0.self_attn.v_proj.weight";
    edit_tensor(&shard(&changed, name), name, |x| x.iter_mut().for_each(|x| *x += 0.5));
    let other = dumped(dir.path(), &changed, "other");
    fs::copy(other.join("request-00001.safetensors"), &path).unwrap();
    sweep(&["request-00001.safetensors", "another dump"]);
}

/// Shards of another model that lie where a dump is made are not taken for its own.
#[test]
fn stale_shards_are_made_anew() {
    let (dir, model) = place();
    let dump = dumped(dir.path(), &model, "dump");
    fs::remove_file(dump.join("manifest.json")).unwrap();
    let name = "model.layers.0.self_attn.v_proj.weight";
    edit_tensor(&shard(&model, name), name, |x| x.iter_mut().for_each(|x| *x += 0.5));
    let again = dumped(dir.path(), &model, "dump");
    let right = dumped(dir.path(), &model, "right");
    let read = |dump: &Path| fs::read(dump.join("request-00000.safetensors")).unwrap();
    assert!(read(&again) == read(&right));
}

#[test]
fn a_folder_has_one_writer() {
    let (dir, model) = place();
    let dump = dumped(dir.path(), &model, "dump");
    let out = dir.path().join("out");
    let held = FolderLock::take(&out).unwrap();
    let words = ["out", "is being written by", &format!("process {}", std::process::id())];
    refuse(&["sweep", text(&dump), "--method", "bff:tau=0.9", "--block-size", "4", "-o", text(&out)], &words);
    drop(held);
    succeed(&[
        "sweep",
        text(&dump),
        "--method",
        "bff:tau=0.9,spare-layers=0",
        "--block-size",
        "4",
        "-o",
        text(&out),
    ]);
    let hidden = fs::read_dir(&out).unwrap().filter(|e| {
        let name = e.as_ref().unwrap().file_name();
        name.to_string_lossy().contains("lock") || name.to_string_lossy().contains("partial")
    });
    assert_eq!(hidden.count(), 0);
}

#[test]
fn errors_of_stdout_are_errors() {
    let (_dir, model) = place();
    for arguments in [&["completions", "bash"][..], &["model", "info", text(&model)], &["--help"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(kvfuse().get_program());
        let status =
            command.args(arguments).stdout(full).stderr(std::process::Stdio::null()).status().unwrap();
        assert_eq!(status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn memory_that_is_not_to_be_had_is_one_line() {
    let program = kvfuse();
    let script =
        format!("ulimit -v 300000; {} model info smollm2-135m", program.get_program().to_string_lossy());
    let output = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.lines().last().unwrap().starts_with("error: "), "{said}");
}

#[test]
fn default_names_tell_dumps_apart() {
    let (dir, model) = place();
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    tiny(&other, 257, 200);
    let data = prompts(dir.path(), &[json!({"prompt": "Who?", "answers": ["a"]})]);
    for (model, dtype) in [(&model, "f32"), (&model, "bf16"), (&other, "f32")] {
        let spec = format!("{}/", text(model));
        let output = kvfuse()
            .current_dir(dir.path())
            .args(["dump", "--model", &spec, "--data", &data, "--requests", "1", "--dtype", dtype])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let names = fs::read_dir(dir.path().join("dumps")).unwrap();
    let mut names: Vec<String> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names.len(), 3, "{names:?}");
    assert!(names[0].starts_with("model-prompts-n1-k3-s0-bf16-"), "{names:?}");
}

/// KL of the first token and of the others, its tail, and a stop token among the targets.
#[test]
fn kl_has_a_tail() {
    let (dir, model) = place();
    let dump = dumped(dir.path(), &model, "dump");
    const METHODS: &str = "bff:tau=0.5,spare-layers=0,prefix+bff:tau=0.5,spare-layers=0";
    let arguments = ["sweep", text(&dump), "--block-size", "4", "--json"];
    let rows: Vec<Value> =
        succeed(&[&arguments[..], &["--first-token", "prefill,fused", "--method", METHODS]].concat())
            .lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect();
    assert_eq!(rows.len(), 8, "two protocols of two controls and two methods");
    for row in &rows {
        let n = |name: &str| row[name].as_f64().unwrap();
        assert!(n("kl_p95") <= n("kl_p99") && n("kl_p99") <= n("kl_max") && n("kl") <= n("kl_max"), "{row}");
        if row["first_token"] == "prefill" {
            assert_eq!(n("kl_first"), 0.0, "the first token comes from the unfused cache");
        }
    }
    let of = |method: &str, first: &str| {
        rows.iter()
            .find(|r| r["method"].as_str().unwrap().starts_with(method) && r["first_token"] == first)
            .unwrap()
    };
    let cr = |method: &str| of(method, "fused")["cr_audited"].as_f64().unwrap();
    assert!(cr("prefix+bff") >= cr("prefix"), "fusion comes on top of prefix sharing");
    let runs = fs::read_dir(dump.join("sweep/runs")).unwrap();
    let record: Value =
        serde_json::from_slice(&fs::read(runs.into_iter().next().unwrap().unwrap().path()).unwrap()).unwrap();
    assert_eq!(record["requests"][0]["token_kl"].as_array().unwrap().len(), " Mara Quill".len());
}

/// gz and BOM are read; what is not UTF-8 text is named.
#[test]
fn texts_may_be_packed_or_marked() {
    let (dir, model) = place();
    let line = "{\"prompt\": \"Who keeps the l\u{e2}mp?\", \"answers\": [\"Mara\"]}\n";
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut packed, line.as_bytes()).unwrap();
    let utf16: Vec<u8> = [0xfeff].into_iter().chain(line.encode_utf16()).flat_map(u16::to_le_bytes).collect();
    let files = [
        ("plain.jsonl", line.as_bytes().to_vec()),
        ("marked.jsonl", format!("\u{feff}{line}").into_bytes()),
        ("packed.jsonl.gz", packed.finish().unwrap()),
        ("wide.jsonl", utf16),
        (
            "latin.jsonl",
            line.replace('\u{e2}', "?")
                .into_bytes()
                .iter()
                .map(|b| if *b == b'?' { 0xe2 } else { *b })
                .collect(),
        ),
    ];
    let dump = |name: &str| {
        let data = format!("prompts:{}", text(&dir.path().join(name)));
        let out = dir.path().join(format!("{name}-dump"));
        vec!["dump", "--model", text(&model), "--requests", "1", "--data"]
            .into_iter()
            .map(str::to_owned)
            .chain([data, "-o".to_owned(), text(&out).to_owned()])
            .collect::<Vec<String>>()
    };
    for (name, bytes) in &files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    let tokens = |name: &str| {
        let arguments = dump(name);
        succeed(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        let manifest = dir.path().join(format!("{name}-dump/manifest.json"));
        let manifest: Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        manifest["requests"][0]["prompt"].clone()
    };
    let plain = tokens("plain.jsonl");
    assert_eq!(tokens("marked.jsonl"), plain);
    assert_eq!(tokens("packed.jsonl.gz"), plain);
    for (name, words) in [("wide.jsonl", ["wide.jsonl", "UTF-16"]), ("latin.jsonl", ["latin.jsonl", "UTF-8"])]
    {
        let arguments = dump(name);
        refuse(&arguments.iter().map(String::as_str).collect::<Vec<_>>(), &words);
    }
}

/// Questions that share an id and nothing else are others; those that share a passage are not.
#[test]
fn calibration_and_sweep_share_no_passage_whatever_the_ids() {
    let (dir, model) = place();
    let paragraph = |i: usize| {
        let question =
            |q: &str| json!({"id": "same", "question": q, "answers": [{"text": "lamp", "answer_start": 0}]});
        json!({"context": format!("The lamp {i} of Port Vale."), "qas": [question("What is it?"), question("Which?")]})
    };
    let data = json!({"data": [{"title": "t", "paragraphs": (0..6).map(paragraph).collect::<Vec<_>>()}]});
    let path = dir.path().join("squad.json");
    fs::write(&path, data.to_string()).unwrap();
    let (dump, thresholds, out) =
        (dir.path().join("dump"), dir.path().join("t.toml"), dir.path().join("out"));
    let spec = format!("squad:{}", text(&path));
    let dumping =
        ["dump", "--model", text(&model), "--data", &spec, "--requests", "12", "--shots", "0", "-q"];
    succeed(&[&dumping[..], &["-o", text(&dump)]].concat());
    let sizes = ["--block-size", "4"];
    let calibrating = ["calibrate", text(&dump), "--target-kl", "0.5", "-o", text(&thresholds)];
    succeed(&[&calibrating[..], &sizes].concat());
    succeed(&[
        "sweep",
        text(&dump),
        "--method",
        &format!("bff:thresholds={}", text(&thresholds)),
        "-o",
        text(&out),
        "--block-size",
        "4",
    ]);
    let read = |path: &Path| -> Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let swept = read(&out.join("manifest.json"))["contexts"].as_array().unwrap().clone();
    let table: toml::Value = toml::from_str(&fs::read_to_string(&thresholds).unwrap()).unwrap();
    let seen: Vec<String> =
        table["contexts"].as_array().unwrap().iter().map(|c| c.as_str().unwrap().to_owned()).collect();
    assert_eq!((seen.len(), swept.len()), (3, 3), "half of the passages each");
    assert!(swept.iter().all(|c| !seen.iter().any(|s| c == s)));
    const METHOD: &str = "bff:tau=0.9,spare-layers=0";
    let halves = ["first", "second"].map(|half| {
        let out = dir.path().join(half);
        let arguments = ["sweep", text(&dump), "--half", half, "--method", METHOD, "-o", text(&out)];
        succeed(&[&arguments[..], &sizes].concat());
        read(&out.join("manifest.json"))["contexts"].as_array().unwrap().clone()
    });
    assert_eq!(halves[0].len() + halves[1].len(), 6);
    assert!(halves[0].iter().all(|c| !halves[1].contains(c)));
}
