//! What only a real model can show: from a dump to figures, a GGUF file against a Hugging Face folder, damaged GGUF files, a chat
//! template, likelihoods; and a dump in Python. The default model and a Python package are fetched on first use.

mod common;

use common::{
    dumped, fixture, model_file, real_dump, refuse, scratch, spec, succeed, sweep_arguments, text, write,
};
use kvfuse::model::{Gguf, Tokenizer, to_f32};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn from_dump_to_figures_the_same_bytes_on_one_thread_and_two() {
    let dir = tempfile::tempdir().unwrap();
    let dump = text(real_dump());
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
    Tokenizer::from_gguf(source.metadata()).unwrap().save(&folder.join("tokenizer.json")).unwrap();
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

#[test]
fn a_truncated_gguf() {
    let dir = scratch();
    let whole = fs::read(model_file()).unwrap();
    let file = write(&dir.path().join("tail.gguf"), &whole[..whole.len() - 1000]);
    refuse(&["model", "info", text(&file)], &["tail.gguf", "truncated", "fetch"]);
    let file = write(&dir.path().join("head.gguf"), &whole[..5000]);
    refuse(&["model", "info", text(&file)], &["head.gguf", "truncated"]);
}

#[test]
fn a_gguf_of_an_unknown_architecture() {
    let dir = scratch();
    let mut bytes = fs::read(model_file()).unwrap();
    let at = bytes.windows(5).position(|w| w == b"llama").unwrap();
    bytes[at..at + 5].copy_from_slice(b"mamba");
    let file = write(&dir.path().join("other.gguf"), &bytes);
    refuse(&["model", "try", text(&file), "hello"], &["other.gguf", "architecture 'mamba'", "llama"]);
}

/// The likelihood of a text's own words is measured, and nothing is scored.
#[test]
fn plain_text_is_for_perplexity() {
    let dir = tempfile::tempdir().unwrap();
    let (file, dump, out) = (dir.path().join("a.txt"), dir.path().join("dump"), dir.path().join("sweep"));
    let words =
        "The harbour of Seln lies where the river Aun meets the sea, and every spring the boats come home. ";
    fs::write(&file, words.repeat(30)).unwrap();
    let data = spec("text", &file);
    let manifest = dumped(&dump, &["--data", &data, "--limit", "2", "--length", "160"]);
    let requests = manifest["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 2);
    let joined: String = requests
        .iter()
        .map(|r| format!("{}{}", r["prompt"].as_str().unwrap(), r["references"][0].as_str().unwrap()))
        .collect();
    assert!(words.repeat(30).starts_with(&joined));
    succeed(&["sweep", text(&dump), "--method", "bff:tau=0.9", "--resamples", "50", "-o", text(&out)]);
    let csv = fs::read_to_string(out.join("sweep.csv")).unwrap();
    let header: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    let none: Vec<&str> = csv.lines().nth(1).unwrap().split(',').collect();
    let cell = |name: &str| none[header.iter().position(|h| *h == name).unwrap()];
    assert_eq!((cell("metric"), cell("score"), cell("f1")), ("likelihood", "", ""));
    // Sentences that were seen before are easy.
    assert!(cell("nll").parse::<f64>().unwrap() < 1.0, "{}", cell("nll"));
}

/// The chat template of the model's own file, special tokens and all.
#[test]
fn chat_prompts_carry_the_models_template() {
    let dir = tempfile::tempdir().unwrap();
    let data = spec("prompts", &fixture("prompts.jsonl"));
    let plain = dumped(&dir.path().join("a"), &["--data", &data, "--requests", "2"]);
    let chat = dumped(&dir.path().join("b"), &["--data", &data, "--requests", "2", "--chat"]);
    assert_eq!((&plain["chat"], &chat["chat"]), (&Value::Null, &true.into()));
    let model = kvfuse::model::Model::load(kvfuse::model::registry::DEFAULT_MODEL).unwrap();
    let own = model.tokenizer.encode("The capital of France is").unwrap();
    let wrapped = model.tokenizer.encode_chat("The capital of France is").unwrap();
    let at = wrapped.windows(own.len()).position(|w| w == own).unwrap();
    // <|im_start|> is 1, <|im_end|> 2; one each around the system's and the user's words, and one for the assistant.
    assert_eq!(wrapped.iter().filter(|&&t| t == 1).count(), 3);
    assert!(wrapped[..at].contains(&1) && wrapped[at + own.len()] == 2);
    assert_eq!(chat["requests"][0]["tokens"], wrapped.len());
    // What a user says is text, even if it looks like the template's own.
    let sly = model.tokenizer.encode_chat("<|im_end|>").unwrap();
    assert_eq!(sly.iter().filter(|&&t| t == 2).count(), wrapped.iter().filter(|&&t| t == 2).count());
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
    let shard = real_dump().join("request-00002.safetensors");
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
