//! Writes what the fuzzer starts from (docs/reliability.md): `cargo test --release --test fuzz_seeds -- --ignored`.

mod common;
#[path = "common/reference.rs"]
mod reference;

use common::{Shape, fixture, succeed, text};
use reference::Fixture;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

fn fuzz(kind: &str, target: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(kind).join(target);
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).unwrap();
    folder
}

fn seed(target: &str, files: &[&Path]) {
    let folder = fuzz("seeds", target);
    for (i, file) in files.iter().enumerate() {
        fs::copy(file, folder.join(i.to_string())).unwrap();
    }
}

fn seed_texts(target: &str, texts: &[&str]) {
    let folder = fuzz("seeds", target);
    for (i, text) in texts.iter().enumerate() {
        fs::write(folder.join(i.to_string()), text).unwrap();
    }
}

/// Sound files that stand beside the one that is made up.
fn sound(target: &str, files: &[(&Path, &str)]) {
    let folder = fuzz("sound", target);
    for (file, name) in files {
        fs::copy(file, folder.join(name)).unwrap();
    }
}

#[test]
#[ignore = "writes into fuzz/"]
fn write_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = at("model");
    fs::create_dir(&model).unwrap();
    Shape { layers: 1, hidden: 4, heads: 2, kv_heads: 1, wide: 4, vocab: 257, context: 256 }.write(&model);
    // One file of weights: the fuzzer makes up one file at a time.
    let index = model.join("model.safetensors.index.json");
    fs::remove_file(&index).unwrap();
    let (first, second) =
        (model.join("model-00001-of-00002.safetensors"), model.join("model-00002-of-00002.safetensors"));
    let (a, b) = (fs::read(&first).unwrap(), fs::read(&second).unwrap());
    let (a, b) = (
        safetensors::SafeTensors::deserialize(&a).unwrap(),
        safetensors::SafeTensors::deserialize(&b).unwrap(),
    );
    let weights = model.join("model.safetensors");
    let all = a.tensors().into_iter().chain(b.tensors());
    safetensors::serialize_to_file(all, None, &weights).unwrap();
    [first, second].iter().for_each(|file| fs::remove_file(file).unwrap());
    let (config, tokenizer) = (model.join("config.json"), model.join("tokenizer.json"));
    seed("config", &[&config]);
    sound("config", &[(&weights, "model.safetensors"), (&tokenizer, "tokenizer.json")]);
    seed("safetensors", &[&weights]);
    sound("safetensors", &[(&config, "config.json"), (&tokenizer, "tokenizer.json")]);
    seed("tokenizer", &[&tokenizer]);
    sound("tokenizer", &[(&weights, "model.safetensors"), (&config, "config.json")]);

    let reference = Fixture::read();
    let gguf = at("model.gguf");
    reference.case("llama", "smollm").write_gguf(&reference.tokenizers["smollm"].metadata, &gguf);
    seed("gguf", &[&gguf]);

    let prompts = at("prompts.jsonl");
    let line = |prompt: &str| json!({"prompt": prompt, "answers": ["x"]}).to_string() + "\n";
    fs::write(&prompts, ["Who keeps the lamp?", "Who keeps the boat?"].map(line).concat()).unwrap();
    let (data, dump) = (format!("prompts:{}", text(&prompts)), at("dump"));
    let options = ["--data", &data, "--requests", "2", "-o", text(&dump)];
    succeed(&[&["dump", "--model", text(&model)][..], &options].concat());
    let (manifest, shard) = (dump.join("manifest.json"), dump.join("request-00000.safetensors"));
    seed("manifest", &[&manifest]);
    sound("manifest", &[(&shard, "request-00000.safetensors")]);
    seed("shard", &[&shard]);
    sound("shard", &[(&manifest, "manifest.json")]);

    let codec = at("joint.safetensors");
    succeed(&["train", text(&dump), "-o", text(&codec), "--rank", "2"]);
    seed("joint", &[&codec]);
    let joint = format!("joint:codec={}", text(&codec));
    let files: Vec<PathBuf> = [
        "none",
        "prefix+bff:tau=0.5,spare-layers=0,rope=strip",
        "kivi:residual=4",
        "h2o:keep=0.5+int8",
        &joint,
    ]
    .iter()
    .enumerate()
    .map(|(i, chain)| {
        let file = at(&format!("{i}.kv"));
        succeed(&["encode", text(&dump), "--method", chain, "--block-size", "4", "-o", text(&file)]);
        file
    })
    .collect();
    seed("encoded", &files.iter().map(PathBuf::as_path).collect::<Vec<_>>());
    sound("encoded", &[(&codec, "joint.safetensors")]);

    seed_texts(
        "spec",
        &[
            "prefix+bff:tau=0.95:0.60:0.05,pairing=best|lsh+kivi:bits=4|2",
            "none,prefix,int8,fp8,cff:tau=0.7,fuse=2",
            "snapkv:keep=0.5+rotated:bits=3",
        ],
    );
    let experiment = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments").join(name);
    seed("experiment", &[&experiment("chains.toml"), &experiment("poisson.toml")]);
    seed_texts(
        "table",
        &[
            "run,method,block_size,batch,first_token,bff.tau,cr_audited,kl\na,none,16,64,fused,,1.0,0.0\nb,bff:tau=0.9,16,64,fused,0.9,1.1,0.01\n",
            "block_size,layer,part,rope,class,statistic,at,value,low,high\n16,0,key,keep,all,exceedance,0.9,0.01,0.0,0.02\n",
        ],
    );
    seed("longbench", &[&fixture("longbench.jsonl")]);
    seed("ruler", &[&fixture("ruler.jsonl")]);
    seed("prompts", &[&fixture("prompts.jsonl")]);
    let passage = |question: &str| {
        json!({"context": "The ferry leaves at noon.", "qas": [{"id": question, "question": question,
        "answers": [{"text": "noon", "answer_start": 20}]}]})
    };
    let squad = json!({"data": [{"title": "t", "paragraphs": [passage("When?"), passage("At what time?")]}]});
    seed_texts("squad", &[&squad.to_string()]);
}
