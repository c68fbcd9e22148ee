//! Every way of fusing, through the binary on a made-up model, no download.

mod common;

use common::{REQUESTS, refuse, small_dump, small_model, succeed, text};
use kvfuse::block::{BlockShape, RequestCache, Storage};
use kvfuse::codec::{CacheBatch, Chain, Codec, Memo};
use kvfuse::model::{Rope, RopeConfig, Ropes};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows of a CSV file as maps from column to cell.
fn rows(path: &Path) -> Vec<BTreeMap<String, String>> {
    let table = kvfuse::tables::Table::read(path).unwrap();
    let columns: Vec<(String, Vec<String>)> =
        table.names().into_iter().map(|n| (n.clone(), table.strings(&n).unwrap())).collect();
    (0..table.height())
        .map(|i| columns.iter().map(|(n, cells)| (n.clone(), cells[i].clone())).collect())
        .collect()
}

fn number(row: &BTreeMap<String, String>, column: &str) -> f64 {
    row[column].parse().unwrap()
}

/// Short answers and few resamples: the rows are looked at, not believed.
const QUICK: [&str; 4] = ["--max-new-tokens", "4", "--resamples", "50"];

fn sweep(dump: &Path, out: &Path, arguments: &[&str]) -> Vec<BTreeMap<String, String>> {
    let mut all = vec!["sweep", text(dump), "-o", text(out)];
    all.extend(QUICK);
    all.extend(arguments);
    succeed(&all);
    rows(&out.join("sweep.csv"))
}

fn dump(out: &Path, arguments: &[&str]) -> PathBuf {
    let mut all = vec!["dump", "--model", text(small_model()), "--dtype", "f16", "-o", text(out)];
    all.extend(arguments);
    succeed(&all);
    out.to_owned()
}

#[test]
fn all_choices_in_one_sweep_the_same_bytes_on_one_thread_and_two() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let arguments = ["--method", "bff:pairing=tree|best|components|lsh,similarity=keys|mean,tau=0.85"];
    for (out, threads) in [(&one, "1"), (&two, "2")] {
        let rows = sweep(small_dump(), out, &[&arguments[..], &["--threads", threads]].concat());
        assert_eq!(rows.len(), 2 + 4 * 2);
        assert_eq!(rows[3]["bff.representative"], "mean");
        assert_eq!((&rows[4]["bff.pairing"][..], &rows[4]["bff.representative"][..]), ("best", "first"));
        for row in &rows {
            assert!(number(row, "cr_audited") <= number(row, "cr_paper"));
        }
    }
    for table in ["sweep.csv", "requests.csv"] {
        assert_eq!(fs::read(one.join(table)).unwrap(), fs::read(two.join(table)).unwrap(), "{table}");
    }
    succeed(&["plot", text(&one)]);
    let svg = fs::read_to_string(one.join("quality_vs_cr.svg")).unwrap();
    assert!(svg.contains("bff lsh mean"), "series are named by what differs");

    let requests = self::rows(&one.join("requests.csv"));
    assert_eq!(requests.iter().filter(|r| r["method"] == "none").count(), REQUESTS);

    let choices =
        "bff:pairing=best,rope=strip,group-layers=4,scale=least-squares|none,tau=0.9,spare-layers=0";
    let further = dir.path().join("further");
    let rows = sweep(small_dump(), &further, &["--method", choices]);
    assert_eq!(rows.len(), 4);
    assert_eq!((&rows[2]["bff.rope"][..], &rows[2]["bff.group-layers"][..]), ("strip", "4"));
    assert_eq!(number(&rows[3], "scale_bits"), 0.0);
    // A table for four layers: 8 of them for 30 layers.
    let share = number(&rows[2], "table_bits") / number(&rows[0], "table_bits");
    assert!((share - 8.0 / 30.0).abs() < 1e-6, "{share}");
}

#[test]
fn an_error_budget_holds_for_every_request() {
    let dir = tempfile::tempdir().unwrap();
    let rows = sweep(
        small_dump(),
        dir.path(),
        &["--method", "bff:max-error=0.05|1.5,pairing=best,representative=mean"],
    );
    let (strict, loose) = (&rows[2], &rows[3]);
    assert_eq!(
        (&strict["bff.max-error"][..], strict.get("bff.tau"), &strict["bff.similarity"][..]),
        ("0.05", None, "lower")
    );
    assert!(number(strict, "worst_block_error") <= 0.05 && number(loose, "worst_block_error") <= 1.5);
    assert!(number(strict, "cr_audited") <= number(loose, "cr_audited"));
    assert!(number(loose, "worst_block_error") > 0.05, "the looser budget is used");
}

#[test]
fn explain_says_what_was_fused_with_what() {
    let dir = tempfile::tempdir().unwrap();
    sweep(small_dump(), dir.path(), &["--method", "bff:pairing=tree|best,tau=0.8"]);
    let out = text(dir.path());
    refuse(&["explain", out, "--request", "1"], &["2 runs fit", "--only"]);
    refuse(&["explain", out, "--request", "1", "--method", "bff:tau=0.5"], &["no finished run that fits"]);
    refuse(
        &["explain", out, "--request", "9", "--method", "bff:tau=0.8,pairing=best"],
        &["--request 9", "0 to 4"],
    );
    refuse(&["explain", text(small_dump()), "--request", "1"], &["manifest.json", "sweep"]);
    refuse(&["explain", "nowhere", "--request", "1"], &["nowhere", "kvfuse sweep"]);
    let arguments = ["explain", out, "--request", "1", "--method", "bff:tau=0.8,pairing=best"];
    let said = succeed(&arguments);
    let manifest = kvfuse::dump::Manifest::read(small_dump()).unwrap();
    let request = &manifest.requests[1].request;
    assert!(said.contains(&request.question) && said.contains(&request.references[0]), "{said}");
    // The first block belongs to the shared example: the same in all touched layers, and nothing lost.
    let first = said.lines().find(|l| l.starts_with("0  ")).unwrap();
    assert!(first.contains("26") && first.ends_with("1.000        1.000        0.000"), "{first}");
    // As many fused blocks as the sweep counted.
    let fused = rows(&dir.path().join("requests.csv"))
        .into_iter()
        .find(|r| r["bff.pairing"] == "best" && r["id"] == request.id)
        .unwrap()["fused_blocks"]
        .clone();
    assert!(said.contains(&format!("\n{fused} of ")), "{fused}: {said}");
    let layer = succeed(&[&arguments[..], &["--layer", "12"]].concat());
    assert!(layer.contains("0:0 (1.00 1.00) 2:0 (1.00 1.00) 3:0 (1.00 1.00) and 1 more"), "{layer}");
    refuse(
        &["explain", out, "--request", "1", "--only", "bff.pairng=best"],
        &["--only bff.pairng", "no such column"],
    );
    // Runs of other settings in the same folder do not count.
    sweep(small_dump(), dir.path(), &["--method", "bff:pairing=best,tau=0.8", "--batch", "3"]);
    let other = succeed(&["explain", out, "--request", "1"]);
    assert!(other.contains(&request.id) && !other.contains("4:0"), "{other}");
    sweep(small_dump(), dir.path(), &["--method", "bff:pairing=best,tau=0.8", "--first-token", "prefill"]);
    let spared = succeed(&["explain", out, "--request", "1"]);
    let fused = rows(&dir.path().join("requests.csv")).into_iter().rfind(|r| r["id"] == request.id).unwrap();
    assert!(spared.contains(&format!("\n{} of ", fused["fused_blocks"])), "{spared}");
    refuse(&[&arguments[..], &["--layer", "30"]].concat(), &["--layer 30", "0 to 29"]);
}

#[test]
fn thresholds_are_calibrated_on_questions_that_the_sweep_leaves_out() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("t.toml");
    const HOW: &str = "bff:pairing=best,spare-layers=13";
    let arguments =
        ["calibrate", text(small_dump()), "--questions", "3", "--method", HOW, "--floor", "0.9", "-o"];
    let said = succeed(&[&arguments[..], &[text(&file), "--target-kl", "0.05"]].concat());
    assert!(said.contains("KL alone") && said.contains("3 questions, target kl 0.05"), "{said}");
    let kl: f64 = said.split("KL ").last().unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(kl <= 0.05, "{said}");
    let thresholds = kvfuse::codec::fusion::Thresholds::read(&file).unwrap();
    assert_eq!(thresholds.layers.iter().map(|l| l.layer).collect::<Vec<_>>(), [13, 14, 15, 16]);

    let out = dir.path().join("out");
    let rows = sweep(
        small_dump(),
        &out,
        &["--method", &format!("bff:pairing=best,tau=0.9,bff:thresholds={}", text(&file))],
    );
    assert_eq!(rows.len(), 4);
    assert!(rows[3]["bff.thresholds"].starts_with("t-") && rows[3]["bff.spare-layers"] == "13");
    let requests = self::rows(&out.join("requests.csv"));
    assert_eq!(requests.len(), 4 * 2);
    assert!(requests.iter().all(|r| !thresholds.questions.contains(&r["id"])));
    succeed(&["plot", text(&out)]);
    assert!(fs::read_to_string(out.join("quality_vs_cr.svg")).unwrap().contains("calibrated"));
    succeed(&["explain", text(&out), "--request", "0", "--run", &rows[3]["run"]]);

    // Every layer within its error, on the questions that were looked at.
    let said = succeed(&[&arguments[..], &[text(&file), "--target-error", "0.2"]].concat());
    assert!(said.contains("target error 0.2") && !said.contains("nats"), "{said}");

    // Foreign and damaged files.
    let refused = |text: &str, words: &[&str]| {
        fs::write(&file, text).unwrap();
        let method = format!("bff:thresholds={}", self::text(&file));
        refuse(&["sweep", self::text(small_dump()), "--method", &method], words);
    };
    let good = fs::read_to_string(&file).unwrap();
    refused("tau = 0.9", &["t.toml", "kvfuse calibrate"]);
    refused(&good.replace("schema = 2", "schema = 9"), &["t.toml", "schema 9"]);
    refused(&good.replacen("key = ", "key = 7", 1), &["t.toml", "layer 13"]);
    refused(&good.replace("block_size = 16", "block_size = 8"), &["--block-size 8"]);
    let other = good.lines().map(|l| if l.starts_with("model_sha256") { "model_sha256 = \"0\"" } else { l });
    refused(&other.collect::<Vec<_>>().join("\n"), &["another model"]);
    refuse(&["calibrate", text(small_dump())], &["--target-kl"]);
    refuse(&["calibrate", text(small_dump()), "--target-kl", "0"], &["--target-kl 0", "above 0"]);
    refuse(&["calibrate", text(small_dump()), "--target-kl", "1", "--floor", "2"], &["--floor 2"]);
    refuse(&["calibrate", text(small_dump()), "--target-kl", "1", "--questions", "5"], &["has 5 questions"]);
}

#[test]
fn tenants_keep_to_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let labelled = dump(&dir.path().join("dump"), &["--requests", "4", "--shots", "1", "--tenants", "2"]);
    let arguments = ["--method", "bff:within-tenant=false|true,tau=0.8"];
    let rows = sweep(&labelled, &dir.path().join("out"), &arguments);
    let crs: Vec<(bool, f64)> = rows
        .iter()
        .skip(1)
        .map(|r| (r["method"].contains("within-tenant"), number(r, "cr_audited")))
        .collect();
    assert_eq!(crs.iter().map(|(w, _)| *w).collect::<Vec<_>>(), [false, true, false, true]);
    // Two requests share a prefix instead of four: it must cost.
    assert!(crs[0].1 > crs[1].1 && crs[2].1 > crs[3].1, "{crs:?}");
    assert_eq!(rows[4]["cr_prefix"], rows[2]["cr_prefix"]);
    refuse(&["sweep", text(small_dump()), "--method", "bff:within-tenant"], &["--tenants"]);
}

#[test]
fn shifted_requests_stand_exactly_so_many_tokens_later() {
    let dir = tempfile::tempdir().unwrap();
    let plain = kvfuse::dump::Manifest::read(small_dump()).unwrap();
    let shifted = dump(&dir.path().join("dump"), &["--requests", "3", "--shots", "1", "--shift", "32"]);
    let manifest = kvfuse::dump::Manifest::read(&shifted).unwrap();
    for (i, request) in manifest.requests.iter().enumerate() {
        let shift = if i == 1 { 32 } else { 0 };
        assert_eq!((request.tokens, request.request.shift_tokens), (plain.requests[i].tokens + shift, shift));
        assert!(request.request.prompt.ends_with(&plain.requests[i].request.prompt));
    }
    // The first layer's values see no other token: after BOS and filler they are those of the request unshifted.
    let values = |dump: &Path| {
        let config = &manifest.model.config;
        let shard = kvfuse::dump::Shard::open(&dump.join("request-00001.safetensors"), config).unwrap();
        shard.layer(0).unwrap().1
    };
    let (a, b) = (values(small_dump()), values(&shifted));
    // Equal but for the rounding of products of another shape.
    assert_eq!(a.len() + 32 * 12, b.len());
    let worst = a[12..].iter().zip(&b[33 * 12..]).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-3, "{worst}");

    let rows =
        sweep(&shifted, &dir.path().join("out"), &["--method", "bff:pairing=best,rope=keep|strip,tau=0.97"]);
    // The example stands at other positions in one of three requests: only without positions it is found again.
    assert!(number(&rows[3], "cr_audited") > number(&rows[2], "cr_audited"), "{rows:?}");
}

#[test]
fn chunks_fuse_while_a_long_prompt_is_prefilled() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["--data", "synth:niah", "--length", "900", "--needles", "2", "--requests", "2"];
    let niah = dump(&dir.path().join("dump"), &arguments);
    let manifest = kvfuse::dump::Manifest::read(&niah).unwrap();
    assert!(
        manifest.requests.iter().all(|r| (750..=901).contains(&r.tokens)),
        "{:?}",
        manifest.requests[0].tokens
    );
    let rows =
        sweep(&niah, &dir.path().join("out"), &["--method", "bff:tau=1|0.7,cff:chunk=64,fuse=2,tau=1|0.7"]);
    const CFF: &str = "cff:tau=1,chunk=64,fuse=2";
    let methods: Vec<&str> = rows.iter().map(|r| &r["method"][..]).collect();
    assert_eq!(methods, ["none", "prefix", "bff:tau=1", "bff:tau=0.7", CFF, "cff:tau=0.7,chunk=64,fuse=2"]);
    // Chunk by chunk without a fusion is the same prefill, up to the rounding of a cache in f16.
    assert!(number(&rows[4], "kl") < 1e-3 && number(&rows[4], "key_error") < 1e-5, "{:?}", rows[4]);
    assert_eq!(number(&rows[4], "cr_paper"), 1.0);
    assert!(number(&rows[5], "cr_audited") > 1.05 && number(&rows[5], "kl") > number(&rows[4], "kl"));
    assert_eq!((&rows[5]["cff.chunk"][..], &rows[5]["cff.fuse"][..]), ("64", "2"));
    let out = dir.path().join("out");
    let explain = ["explain", text(&out), "--request", "0", "--method", "cff:chunk=64,fuse=2,tau=0.7"];
    let said = succeed(&explain);
    let counted = self::rows(&out.join("requests.csv"));
    let fused = &counted.iter().find(|r| r["cff.tau"] == "0.7").unwrap()["fused_blocks"];
    assert!(fused != "0" && said.contains(&format!("\n{fused} of ")), "{fused}: {said}");
    succeed(&[&explain[..], &["--layer", "20"]].concat());

    refuse(&["sweep", text(&niah), "--method", "cff"], &["cff needs 2048", "chunk"]);
    refuse(&["sweep", text(&niah), "--method", "cff:chunk=100"], &["100", "block size 16"]);
    refuse(&["sweep", text(&niah), "--method", "cff:fuse=1"], &["fuse=1"]);
    refuse(
        &["sweep", text(&niah), "--method", "cff", "--first-token", "prefill"],
        &["--first-token", "during prefill"],
    );
}

#[test]
fn choices_beyond_reason() {
    let dir = tempfile::tempdir().unwrap();
    let dump = text(small_dump());
    refuse(&["sweep", dump, "--method", "bff:max-error=3"], &["max-error 3"]);
    refuse(&["sweep", dump, "--method", "bff:max-error=NaN"], &["max-error", "NaN"]);
    refuse(&["sweep", dump, "--method", "bff:group-layers=0"], &["group-layers", "0"]);
    refuse(&["sweep", dump, "--method", "bff:pairing=worst"], &["pairing", "worst"]);
    refuse(&["sweep", dump, "--method", "bff:thresholds=nowhere.toml"], &["nowhere.toml"]);
    let out = text(dir.path());
    let data = |spec: &str, arguments: &[&str], words: &[&str]| {
        refuse(
            &[
                &["dump", "--model", text(small_model()), "--data", spec, "--requests", "2", "-o", out],
                arguments,
            ]
            .concat(),
            words,
        );
    };
    data("synth:niah", &["--needles", "0"], &["--needles 0"]);
    data("synth:niah", &["--length", "20"], &["--length 20", "too short"]);
    data("builtin:longqa", &["--length", "100"], &["--length 100", "alone"]);
    data("builtin:longqa", &["--length", "100000"], &["--length 100000", "less than 8192"]);
    data("builtin:qa", &["--shift", "100000"], &["--shift 100000", "less than 8192"]);
    data("synth:hay", &[], &["synth:hay", "synth:niah"]);
}

/// Only blocks that stand where they stood can be explained.
#[test]
fn evictions_are_not_explained() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    sweep(small_dump(), dir.path(), &["--method", "prefix+streaming:keep=0.5"]);
    refuse(
        &["explain", out, "--request", "1", "--method", "prefix+streaming:keep=0.5"],
        &["prefix+streaming", "drops tokens"],
    );
}

#[test]
fn numbers_of_methods_beyond_reason() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    let dump = text(small_dump());
    refuse(
        &["simulate", "--bound", dump, "--method", "prefix", "--block-size", "0", "-o", out],
        &["--block-size"],
    );
    refuse(&["sweep", dump, "--method", "joint:spread=1e4"], &["spread", "from 0 to 4"]);
    refuse(&["sweep", dump, "--method", "joint:attention=-1"], &["attention", "from 0 to 4"]);
    refuse(&["sweep", dump, "--method", "random:share=1"], &["share", "below 1"]);
    // Found by fuzzing: marks that clap's messages have too.
    refuse(&["sweep", dump, "--method", "bff:tau=0>1 <2"], &["'0>1 <2'", "tau"]);
    refuse(&["sweep", dump, "--method", "cachegen:bin=0"], &["bin", "0.01"]);
    refuse(&["sweep", dump, "--method", "lowrank:rank=0"], &["rank", "above 0"]);
    refuse(&["sweep", dump, "--method", "kvquant:outliers=2"], &["outliers", "0.5"]);
    refuse(&["sweep", dump, "--method", "minicache:retain=2"], &["retain", "from 0 to 1"]);
}

/// Against E2M1 and E4M3 of another library (tests/reference/make_nvfp4.py).
#[test]
fn nvfp4_reads_back_what_ml_dtypes_says() {
    let fixture: serde_json::Value = serde_json::from_str(include_str!("fixtures/nvfp4.json")).unwrap();
    let size = |name: &str| fixture[name].as_u64().unwrap() as usize;
    let shape =
        BlockShape { block_size: size("tokens"), kv_heads: size("kv_heads"), head_dim: size("head_dim") };
    let ropes = Arc::new(Ropes::same(Rope::new(&RopeConfig::plain(100.0, shape.head_dim), 64)));
    let pages = fixture["pages"].as_array().unwrap();
    assert!(!pages.is_empty());
    for page in pages {
        let floats = |name: &str| -> Vec<f32> { serde_json::from_value(page[name].clone()).unwrap() };
        let mut batch = CacheBatch::empty(shape, Storage::F32, Arc::clone(&ropes));
        let mut cache = RequestCache::new(1);
        cache.layers[0].push(batch.pool.allocate(&floats("numbers"), &floats("numbers")));
        cache.tokens = shape.block_size;
        batch.push(cache, vec![0; shape.block_size], "");
        let chain = Chain::parse("nvfp4").unwrap().swap_remove(0);
        chain.encode(&mut batch, &Memo::default()).unwrap();
        let block = batch.caches[0].layers[0].entries[0].block;
        assert_eq!(*batch.pool.keys(block), floats("read"));
        assert_eq!(*batch.pool.values(block), floats("read"));
    }
}
