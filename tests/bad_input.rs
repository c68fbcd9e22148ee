//! Bad input gets one clear line on stderr and exit status 2.

mod common;

use common::{copy_folder, refuse, scratch, small_dump, small_model, text, write};
use std::fs;
use std::io::Write;

#[test]
fn a_text_file_named_gguf() {
    let dir = scratch();
    let file = write(&dir.path().join("notes.gguf"), b"dear diary");
    refuse(&["model", "info", text(&file)], &["notes.gguf", "not a GGUF file"]);
}

/// candle divides by a file's alignment.
#[test]
fn a_gguf_aligned_to_nothing() {
    let dir = scratch();
    let key = b"general.alignment";
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.extend(1u64.to_le_bytes());
    bytes.extend((key.len() as u64).to_le_bytes());
    bytes.extend(key);
    bytes.extend(4u32.to_le_bytes());
    let whole = [&bytes[..], &0u32.to_le_bytes()].concat();
    let file = write(&dir.path().join("flat.gguf"), &whole);
    refuse(&["model", "info", text(&file)], &["flat.gguf", "alignment", "fetch"]);
    let whole = [&bytes[..], &32u32.to_le_bytes()].concat();
    let file = write(&dir.path().join("empty.gguf"), &whole);
    refuse(&["model", "info", text(&file)], &["empty.gguf", "architecture ''"]);
}

#[test]
fn an_unknown_architecture() {
    let dir = scratch();
    write(&dir.path().join("config.json"), br#"{"model_type": "rwkv"}"#);
    refuse(&["model", "info", text(dir.path())], &["config.json", "architecture 'rwkv'"]);
}

#[test]
fn a_damaged_hf_folder() {
    let dir = scratch();
    refuse(&["model", "info", text(dir.path())], &["config.json"]);
    let config = r#"{"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2,
                     "intermediate_size": 8, "vocab_size": 8}"#;
    write(&dir.path().join("config.json"), config.as_bytes());
    refuse(&["model", "info", text(dir.path())], &["neither model.safetensors"]);
    write(&dir.path().join("model.safetensors"), b"\x10\x00\x00\x00\x00\x00\x00\x00{}");
    refuse(&["model", "info", text(dir.path())], &["model.safetensors", "truncated"]);
}

/// Sizes that would overflow or fill the memory before a weight is read, and settings the decoder does not know.
#[test]
fn a_hostile_config() {
    let dir = scratch();
    let config = |extra: serde_json::Value| {
        let mut config = serde_json::json!({"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8, "vocab_size": 8});
        let own = extra.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(own);
        write(&dir.path().join("config.json"), config.to_string().as_bytes());
    };
    config(serde_json::json!({}));
    refuse(&["model", "info", text(dir.path())], &["neither model.safetensors"]);
    let huge = 1_000_000_000_000_000_000_u64;
    for (extra, words) in [
        (serde_json::json!({"num_hidden_layers": huge, "sliding_window": 4}), ["layers", "beyond reason"]),
        (
            serde_json::json!({"model_type": "gemma3_text", "num_hidden_layers": huge, "sliding_window": 4}),
            ["layers", "beyond reason"],
        ),
        (serde_json::json!({"head_dim": 4 * huge}), ["head size", "beyond reason"]),
        (serde_json::json!({"vocab_size": 0}), ["vocabulary size", "zero"]),
        (serde_json::json!({"rms_norm_eps": -5.0}), ["RMS epsilon", "-5"]),
        (serde_json::json!({"rope_theta": -1.0}), ["RoPE", "sense"]),
        (serde_json::json!({"layer_types": ["full_attention"]}), ["layer_types", "num_hidden_layers"]),
        (serde_json::json!({"hidden_act": "gelu"}), ["gelu", "silu"]),
        (
            serde_json::json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            ["RoPE", "part of each head"],
        ),
        (serde_json::json!({"use_bidirectional_attention": true}), ["bidirectional", "generates"]),
    ] {
        config(extra);
        refuse(&["model", "info", text(dir.path())], &[&["config.json"][..], &words].concat());
    }
}

#[test]
fn things_that_are_not_there() {
    let dir = scratch();
    let missing = dir.path().join("nowhere");
    refuse(&["inspect", text(&missing)], &["nowhere", "no such dump folder"]);
    refuse(&["sweep", text(&missing)], &["nowhere", "no such dump folder"]);
    refuse(&["sweep", text(dir.path())], &["manifest.json", "no dump"]);
    refuse(&["plot", text(&missing)], &["sweep.csv"]);
    refuse(&["model", "info", text(&missing)], &["nowhere", "built-in", "smollm2-135m"]);
    refuse(&["model", "pull", "gpt-17"], &["gpt-17", "smollm2-135m"]);
    let data = format!("squad:{}", text(&missing));
    refuse(&["dump", "--model", text(small_model()), "--data", &data, "-o", text(dir.path())], &["nowhere"]);
}

#[test]
fn unusable_data() {
    let dir = scratch();
    let out = dir.path().join("out");
    let try_data = |kind: &str, name: &str, content: &str, words: &[&str]| {
        let file = write(&dir.path().join(name), content.as_bytes());
        let data = format!("{kind}:{}", text(&file));
        refuse(
            &["dump", "--model", text(small_model()), "--data", &data, "--requests", "1", "-o", text(&out)],
            words,
        );
    };
    try_data("squad", "empty.json", "", &["empty.json", "SQuAD"]);
    try_data("squad", "none.json", r#"{"data": []}"#, &["none.json", "no question"]);
    try_data("prompts", "empty.jsonl", "\n", &["empty.jsonl", "no prompt"]);
    try_data("prompts", "bad.jsonl", "{\"text\": 1}\n", &["bad.jsonl", "line 1"]);
    refuse(
        &["dump", "--model", text(small_model()), "--data", "wiki", "-o", text(&out)],
        &["--data wiki", "builtin:qa"],
    );
    assert!(!out.exists(), "nothing was begun");
}

#[test]
fn impossible_counts() {
    let dir = scratch();
    let out = text(dir.path());
    refuse(
        &["dump", "--model", text(small_model()), "--requests", "0", "-o", out],
        &["--requests must be at least 1"],
    );
    refuse(
        &["dump", "--model", text(small_model()), "--requests", "99999", "-o", out],
        &["--requests 99999", "questions"],
    );
    refuse(
        &["dump", "--model", text(small_model()), "--shots", "99", "-o", out],
        &["--shots 99", "worked examples"],
    );
}

#[test]
fn thresholds_out_of_range() {
    let dump = text(small_dump());
    refuse(&["sweep", dump, "--method", "bff:tau=1.5"], &["1.5", "(-1, 1]"]);
    refuse(&["sweep", dump, "--method", "bff:tau=-1"], &["-1", "(-1, 1]"]);
    refuse(&["sweep", dump, "--method", "bff:tau=0.60:0.95:0.05"], &["reversed", "0.95:0.60:0.05"]);
    refuse(&["sweep", dump, "--method", "bff:tau=0.9:0.6:0"], &["step"]);
    refuse(&["sweep", dump, "--method", "bff:tau=high"], &["high"]);
    refuse(&["sweep", dump, "--block-size", "0"], &["--block-size"]);
}

#[test]
fn a_bad_config_names_its_line() {
    let dir = scratch();
    let config = write(&dir.path().join("x.toml"), b"method = \"bff\"\n\ntresholds = 3\n");
    refuse(&["sweep", "--config", text(&config)], &["x.toml", "line 3", "tresholds"]);
}

#[test]
fn a_dump_of_another_model() {
    let dir = scratch();
    copy_folder(small_dump(), dir.path());
    let path = dir.path().join("manifest.json");
    let manifest = fs::read_to_string(&path).unwrap();
    let sha256 = kvfuse::dump::Manifest::read(dir.path()).unwrap().model.sha256;
    fs::write(&path, manifest.replace(&sha256, &"0".repeat(64))).unwrap();
    refuse(&["sweep", text(dir.path()), "--method", "bff:tau=0.9"], &["another model", "name the one"]);
}

#[test]
fn a_shard_cut_short_or_missing() {
    let dir = scratch();
    copy_folder(small_dump(), dir.path());
    let shard = dir.path().join("request-00003.safetensors");
    let bytes = fs::read(&shard).unwrap();
    fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    refuse(&["inspect", text(dir.path())], &["request-00003.safetensors", "cut short"]);
    refuse(
        &["sweep", text(dir.path()), "--method", "bff:tau=0.9"],
        &["request-00003.safetensors", "cut short"],
    );
    fs::remove_file(&shard).unwrap();
    refuse(
        &["sweep", text(dir.path()), "--method", "bff:tau=0.9"],
        &["request-00003.safetensors", "missing"],
    );
}

#[test]
fn a_shard_with_nan() {
    let dir = scratch();
    copy_folder(small_dump(), dir.path());
    let shard = dir.path().join("request-00001.safetensors");
    let mut file = fs::OpenOptions::new().write(true).open(&shard).unwrap();
    let length = file.metadata().unwrap().len();
    // An f16 NaN somewhere among the tensors; the end of the file holds the last of them.
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(length - 4096)).unwrap();
    file.write_all(&0x7e00u16.to_le_bytes()).unwrap();
    drop(file);
    refuse(&["inspect", text(dir.path())], &["request-00001.safetensors", "NaN"]);
    refuse(&["sweep", text(dir.path()), "--method", "bff:tau=0.9"], &["request-00001.safetensors", "NaN"]);
}

/// Found by fuzzing.
#[test]
fn a_manifest_whose_model_has_no_heads() {
    let dir = scratch();
    copy_folder(small_dump(), dir.path());
    let path = dir.path().join("manifest.json");
    let mut manifest: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    manifest["model"]["config"]["kv_heads"] = 0.into();
    write(&path, manifest.to_string().as_bytes());
    refuse(&["sweep", text(dir.path())], &["manifest.json", "key/value heads", "zero"]);
}

#[test]
fn a_folder_that_cannot_be_written() {
    let dir = scratch();
    let file = write(&dir.path().join("file"), b"");
    let below = file.join("out");
    refuse(&["dump", "--model", text(small_model()), "--requests", "1", "-o", text(&below)], &["out"]);
    refuse(&["sweep", text(small_dump()), "-o", text(&below)], &["out"]);
}

#[test]
fn a_folder_that_holds_something_else() {
    let dump = text(small_dump());
    refuse(
        &["dump", "--model", text(small_model()), "--requests", "2", "-o", dump],
        &["different dump", "-o"],
    );
}

#[test]
fn a_sweep_into_its_own_dump() {
    let dump = text(small_dump());
    refuse(&["sweep", dump, "-o", dump, "--method", "bff:tau=0.9"], &["not a sweep", "-o"]);
    common::succeed(&["inspect", dump]);
}

/// A sweep that cannot run leaves an older one's files alone.
#[test]
fn a_refused_sweep_changes_nothing() {
    let dir = scratch();
    let (dump, out) = (dir.path().join("dump"), dir.path().join("out"));
    copy_folder(small_dump(), &dump);
    fs::create_dir(&out).unwrap();
    write(&out.join("manifest.json"), br#"{"options": {}}"#);
    write(&out.join("sweep.csv"), b"old");
    fs::remove_file(dump.join("request-00002.safetensors")).unwrap();
    refuse(
        &["sweep", text(&dump), "-o", text(&out), "--method", "bff:tau=0.9"],
        &["request-00002.safetensors", "missing"],
    );
    assert_eq!(fs::read(out.join("manifest.json")).unwrap(), br#"{"options": {}}"#);
    assert_eq!(fs::read(out.join("sweep.csv")).unwrap(), b"old");
}

#[test]
fn numbers_beyond_reason() {
    let dump = text(small_dump());
    refuse(&["sweep", dump, "--block-size", "1152921504606846976"], &["--block-size"]);
    refuse(&["sweep", dump, "--block-size", "16,16"], &["--block-size", "twice"]);
    refuse(&["sweep", dump, "--resamples", "1000000000000000000"], &["--resamples"]);
    refuse(&["sweep", dump, "--max-new-tokens", "18446744073709551615"], &["--max-new-tokens"]);
    refuse(&["model", "try", text(small_model()), "a", "--tokens", "18446744073709551615"], &["context"]);
    refuse(&["sweep", dump, "--threads", "0"], &["--threads"]);
    refuse(&["sweep", dump, "--batch", "many"], &["--batch", "many"]);
}

#[test]
fn a_table_that_is_no_sweep() {
    let dir = scratch();
    write(&dir.path().join("sweep.csv"), b"a,b\n1,2\n");
    refuse(&["plot", text(dir.path())], &["sweep.csv", "no usable column"]);
    let csv = "method,model,data,tau,block_size,requests,cr_audited,cr_paper,f1,kl,layer_cr\n";
    write(&dir.path().join("sweep.csv"), csv.as_bytes());
    refuse(&["plot", text(dir.path())], &["sweep.csv", "no rows"]);
    let csv = "method,model,data,block_size,batch,first_token,requests,cr_audited,cr_paper,metric,score,score_low,score_high,kl,\
               kl_low,kl_high,layer_cr\nnone,m,d,16,64,fused,8,1,1,F1,1,1,1,0,0,0,1\nprefix,m,d,16,64,fused,8,2,2,F1,1,1,1,0,0,0,1\nbff:tau=0.9,m,d,16,64,fused,8,1e999,2,F1,1,1,1,0,0,0,1\n";
    write(&dir.path().join("sweep.csv"), csv.as_bytes());
    refuse(&["plot", text(dir.path())], &["sweep.csv", "infinite"]);
}

#[test]
fn a_prompt_longer_than_the_context() {
    let dir = scratch();
    let prompt = format!("{{\"prompt\": \"{}\"}}\n", "word ".repeat(9000));
    let file = write(&dir.path().join("long.jsonl"), prompt.as_bytes());
    let data = format!("prompts:{}", text(&file));
    let out = dir.path().join("out");
    refuse(
        &["dump", "--model", text(small_model()), "--data", &data, "--requests", "1", "-o", text(&out)],
        &["tokens", "line-1", "--max-tokens"],
    );
}
