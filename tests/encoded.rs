//! Encoded files: as large as the ledger says, read back to the bit, damaged ones found. On a tiny model, no download.

mod common;

use common::{refuse, run, succeed, text, tiny};
use kvfuse::codec::evict::{Needs, observe};
use kvfuse::codec::registry::methods;
use kvfuse::codec::{Chain, Codec, Ledger, Memo};
use kvfuse::dump::{Manifest, open_model};
use kvfuse::encoded::{EncodeOptions, Encoded, encode, load_caches};
use kvfuse::model::Ropes;
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Prompts that share beginnings, end within blocks and belong to two tenants.
fn dump(dir: &Path) -> PathBuf {
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    tiny(&model, 257, 256);
    let prompts = [
        "Who keeps the lamp in Port Vale?",
        "Who keeps the boat in Port Vale?",
        "Who keeps the lamp in Port Vale at night?",
        "a",
    ];
    let line = |(i, p): (usize, &&str)| {
        json!({"prompt": p, "answers": ["x"], "tenant": format!("t{}", i % 2)}).to_string() + "\n"
    };
    let file = dir.join("prompts.jsonl");
    fs::write(&file, prompts.iter().enumerate().map(line).collect::<String>()).unwrap();
    let (data, out) = (format!("prompts:{}", text(&file)), dir.join("dump"));
    succeed(&["dump", "--model", text(&model), "--data", &data, "--requests", "4", "-o", text(&out)]);
    out
}

/// Every method that encodes finished caches, alone and after others.
fn chains(codec: &Path) -> Vec<Chain> {
    let mut all = Vec::new();
    for method in methods() {
        let dial = if method.dials.contains(&"tau") { ":tau=0.5,spare-layers=0" } else { "" };
        let residual = match method.name {
            "kivi" => ":residual=4",
            "kitty" => ":residual=4,sinks=4",
            _ => "",
        };
        let trained = match method.name {
            "joint" => format!(":codec={}", text(codec)),
            "kvtc" => {
                format!(":bits=2,residual=4,codec={}", text(&codec.with_file_name("joint-kvtc.safetensors")))
            }
            _ => String::new(),
        };
        let own = format!("{}{dial}{residual}{trained}", method.name);
        for before in [
            "",
            "prefix+",
            "bff:tau=0.5,spare-layers=0,rope=strip+",
            "prefix+bff:tau=0.5,spare-layers=0,scale=least-squares+",
            "prefix+streaming:keep=0.5+",
            "snapkv:keep=0.6+",
        ] {
            let parsed = Chain::parse(&format!("{before}{own}")).unwrap_or_default();
            all.extend(parsed.into_iter().filter(|c| c.chunks().is_none()));
        }
    }
    assert!(all.len() > 15);
    all
}

/// A joint codec trained on the dump by the binary, and a KVTC transform beside it.
fn trained(dir: &Path, dump: &Path) -> PathBuf {
    let codec = dir.join("joint.safetensors");
    succeed(&["train", text(dump), "-o", text(&codec), "--rank", "4", "--kvtc"]);
    codec
}

#[test]
fn a_file_is_as_large_as_the_ledger_and_gives_back_every_bit() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(dir.path());
    let manifest = Manifest::read(&dump).unwrap();
    let model = open_model(&dump, None, &manifest).unwrap();
    let ropes = Arc::new(Ropes::new(&manifest.model.config, 64));
    let (original, _) = load_caches(&dump, &manifest, &[0, 1, 2, 3], 4, ropes, 0).unwrap();
    for chain in chains(&trained(dir.path(), &dump)) {
        let name = chain.name();
        let out = dir.path().join("caches.kv");
        let options =
            EncodeOptions { dump: dump.clone(), chain: chain.clone(), block_size: 4, out: out.clone() };
        let size = encode(&options).unwrap();
        assert_eq!(size.file_bytes, fs::metadata(&out).unwrap().len());
        let body = 8 * (size.file_bytes - size.header_bytes - size.frame_bytes);
        assert_eq!(body, size.ledger_bits + size.padding_bits, "{name}");

        let mut batch = original.clone();
        let needs = chain.needs();
        if needs != Needs::default() {
            batch.observed = Some(Arc::new(observe(&model, &batch, needs).unwrap()));
        }
        chain.encode(&mut batch, &Memo::default()).unwrap();
        let layers = manifest.model.config.layers;
        assert_eq!(size.ledger_bits, Ledger::of(&batch, &chain.coverage(layers)).file_bits(), "{name}");
        let read = Encoded::read(&out, None).unwrap();
        assert_eq!(read.method, name);
        for (request, cache) in batch.caches.iter().enumerate() {
            for layer in 0..layers {
                assert_eq!(cache.layers[layer].kept, read.batch.caches[request].layers[layer].kept, "{name}");
                for block in 0..cache.layers[layer].entries.len() {
                    let (a, b) = (batch.read(request, layer, block), read.batch.read(request, layer, block));
                    assert_eq!(a, b, "{name}: request {request}, layer {layer}, block {block}");
                }
            }
        }
        assert_eq!(read.batch.pool.live_blocks(), batch.pool.live_blocks(), "{name}");
        // The same command writes the same bytes.
        let first = fs::read(&out).unwrap();
        encode(&options).unwrap();
        assert!(first == fs::read(&out).unwrap(), "{name}");
    }
}

#[test]
fn no_changed_byte_goes_unseen() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(dir.path());
    let joint = format!("prefix+joint:codec={}", text(&trained(dir.path(), &dump)));
    for chain in ["prefix+bff:tau=0.5,spare-layers=0+kivi:residual=4", "prefix+h2o:keep=0.7+int8", &joint] {
        let chain = Chain::parse(chain).unwrap().swap_remove(0);
        no_change_goes_unseen(dir.path(), &dump, chain);
    }
}

fn no_change_goes_unseen(dir: &Path, dump: &Path, chain: Chain) {
    let out = dir.join("caches.kv");
    encode(&EncodeOptions { dump: dump.to_owned(), chain, block_size: 4, out: out.clone() }).unwrap();
    let good = fs::read(&out).unwrap();
    let damaged = dir.join("damaged.kv");
    for at in 0..good.len() {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&damaged, bytes).unwrap();
        let error = Encoded::read(&damaged, None).map(|_| ()).expect_err(&format!("byte {at}")).to_string();
        assert!(error.contains("damaged.kv") && !error.contains('\n'), "{error}");
    }
    for length in (0..good.len()).step_by(7) {
        fs::write(&damaged, &good[..length]).unwrap();
        assert!(Encoded::read(&damaged, None).is_err(), "{length} bytes");
    }
    fs::write(&damaged, [&good[..], b"x"].concat()).unwrap();
    refuse(&["decode", text(&damaged), "-o", text(&dir.join("d"))], &["damaged.kv", "after its end"]);
}

#[test]
fn a_decoded_dump_sweeps_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(dir.path());
    let path = |name: &str| dir.path().join(name);
    // A folder that is not there yet is made.
    let (file, back) = (path("folder/caches.kv"), path("back"));
    let said =
        succeed(&["encode", text(&dump), "--method", "prefix+int8", "--block-size", "4", "-o", text(&file)]);
    assert!(said.contains("CR audited") && said.contains("padding 0 bits"), "{said}");
    succeed(&["decode", text(&file), "-o", text(&back)]);
    succeed(&["inspect", text(&back)]);
    succeed(&[
        "sweep",
        text(&back),
        "--method",
        "none",
        "--block-size",
        "4",
        "--resamples",
        "10",
        "-o",
        text(&path("out")),
    ]);
    refuse(&["decode", text(&file), "-o", text(&back)], &["back", "not empty"]);
    refuse(&["encode", text(&dump), "--method", "kivi:bits=4|2", "-o", text(&file)], &["2 chains"]);
    refuse(&["encode", text(&dump), "--method", "cff:tau=0.9", "-o", text(&file)], &["prefills anew"]);
    fs::write(path("x.kv"), "not one of ours").unwrap();
    refuse(&["decode", text(&path("x.kv")), "-o", text(&path("y"))], &["x.kv", "no encoded file"]);
}

/// A dump that another program rebuilt is read as it is and charged what it says.
#[test]
fn an_external_method_is_an_arm() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(dir.path());
    let path = |name: &str| dir.path().join(name);
    // Another program: here, our own encoder and decoder.
    let (file, back) = (path("caches.kv"), path("back"));
    succeed(&["encode", text(&dump), "--method", "int8", "--block-size", "4", "-o", text(&file)]);
    succeed(&["decode", text(&file), "-o", text(&back)]);
    let method = format!("int8,external:dir={}", text(&back));
    let sweep =
        ["sweep", text(&dump), "--method", &method, "--block-size", "4", "--resamples", "10", "--json"];
    let manifest = back.join("manifest.json");
    let mut value: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    // A decoded dump says what it was encoded by, and its requests' bits are the ledger's.
    assert_eq!(value["encoded"]["method"], "int8");
    let batch = Encoded::read(&file, None).unwrap().batch;
    let chain = Chain::parse("int8").unwrap().swap_remove(0);
    let layers = batch.caches[0].layers.len();
    let ledger = Ledger::of(&batch, &chain.coverage(layers));
    let dealt: u64 = value["requests"].as_array().unwrap().iter().map(|r| r["bits"].as_u64().unwrap()).sum();
    assert_eq!(dealt, ledger.total_bits());
    for request in value["requests"].as_array_mut().unwrap() {
        request.as_object_mut().unwrap().remove("bits");
    }
    fs::write(&manifest, value.to_string()).unwrap();
    refuse(&sweep, &["back", "bits"]);
    let config = Manifest::read(&dump).unwrap().model.config;
    for request in value["requests"].as_array_mut().unwrap() {
        let numbers = 2 * config.layers as u64 * (config.kv_heads * config.head_dim) as u64;
        let tokens = request["tokens"].as_u64().unwrap();
        request["bits"] = json!(tokens * (8 * numbers + 16 * numbers / config.head_dim as u64));
    }
    fs::write(&manifest, value.to_string()).unwrap();
    let rows: Vec<serde_json::Value> =
        succeed(&sweep).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let (own, other) = (&rows[2], &rows[3]);
    assert!(other["method"].as_str().unwrap().starts_with("external:dir=back-"), "{other}");
    let number = |row: &serde_json::Value, name: &str| row[name].as_f64().unwrap();
    assert!((number(own, "kl") - number(other, "kl")).abs() < 1e-4, "{own} {other}");
    // The last prompt token is charged, though a sweep's cache lacks it.
    let (cr, cr_other) = (number(own, "cr_audited"), number(other, "cr_audited"));
    assert!(cr_other < cr && cr_other > 0.9 * cr, "{cr} {cr_other}");
    refuse(
        &["sweep", text(&dump), "--method", &format!("prefix+external:dir={}", text(&back))],
        &["stands alone"],
    );
    refuse(&["sweep", text(&dump), "--method", "external"], &["dir"]);
    refuse(&["sweep", text(&dump), "--method", "external:dir=nowhere"], &["nowhere"]);
}

#[test]
fn a_codec_is_trained_the_same_twice_and_known_again() {
    let dir = tempfile::tempdir().unwrap();
    let dump = dump(dir.path());
    let path = |name: &str| dir.path().join(name);
    let train = |name: &str, threads: &str, more: &[&str]| {
        let out = path(name);
        let arguments = ["train", text(&dump), "-o", text(&out), "--rank", "4", "--threads", threads];
        succeed(&[&arguments[..], more].concat());
        out
    };
    let (one, two) = (train("codecs/a.safetensors", "1", &[]), train("b.safetensors", "2", &[]));
    let whole = |file: &Path| fs::read(file).unwrap();
    // The metadata hold the command, which differs; tensors do not.
    let tensors = |file: &Path| {
        let bytes = whole(file);
        bytes[8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize..].to_vec()
    };
    assert!(tensors(&one) == tensors(&two));
    let other = train("c.safetensors", "2", &["--step", "0.1", "--without", "klt,metric,prediction"]);
    for part in ["klt", "metric", "prediction"] {
        assert!(path(&format!("c-without-{part}.safetensors")).exists());
    }

    let file = path("caches.kv");
    let method = format!("joint:codec={}", text(&one));
    succeed(&["encode", text(&dump), "--method", &method, "-o", text(&file)]);
    let moved = path("moved.safetensors");
    fs::rename(&one, &moved).unwrap();
    refuse(&["decode", text(&file), "-o", text(&path("d"))], &["a.safetensors"]);
    let with = |codec: &Path| {
        ["decode", text(&file), "--codec", text(codec), "-o", text(&path("d"))].map(str::to_owned)
    };
    let refused = with(&other);
    refuse(&refused.each_ref().map(|a| &a[..]), &["caches.kv", "another codec"]);
    succeed(&with(&moved).each_ref().map(|a| &a[..]));

    fs::write(&moved, &whole(&two)[..1000]).unwrap();
    refuse(
        &["encode", text(&dump), "--method", &format!("joint:codec={}", text(&moved)), "-o", text(&file)],
        &["moved"],
    );
    refuse(&["train", text(&path("nowhere")), "-o", text(&moved)], &["nowhere"]);

    let csv = path("sensitivity.csv");
    succeed(&["sensitivity", text(&dump), "-o", text(&csv)]);
    let table = fs::read_to_string(&csv).unwrap();
    assert!(table.starts_with("layer,part,kl_per_unit,kl,units,kl_per_variance\n0,key,"), "{table}");
    assert_eq!(table.lines().count(), 3);

    // A search finds what a sweep of all would: the fewest bits within the KL.
    let shown =
        succeed(&["search", text(&dump), "--method", "prefix+kivi:residual=4", "--max-kl", "1e9", "--json"]);
    let tried: Vec<serde_json::Value> = shown.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let best: Vec<_> = tried.iter().filter(|t| t["best"] == true).collect();
    assert_eq!(best.len(), 1, "{shown}");
    assert!(best[0]["method"].as_str().unwrap().contains("bits=1"), "{shown}");
    let method = format!("prefix+joint:codec={}", text(&other));
    let shown = succeed(&["search", text(&dump), "--method", &method, "--max-kl", "1e-3"]);
    assert!(shown.contains("best"), "{shown}");
    for (method, words) in
        [("prefix", "turned"), ("kivi:bits=4", "bits"), ("kivi,int8", "one chain"), ("cff", "turned")]
    {
        let output = run(&["search", text(&dump), "--method", method, "--max-kl", "1"]);
        assert_eq!(output.status.code(), Some(2), "{method}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(words), "{method}");
    }
}
