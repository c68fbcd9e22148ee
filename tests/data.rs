//! Prompt files of others' benchmarks, through the binary.

mod common;

use common::{fixture, refuse, run, small_model, spec, succeed, text};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Dumps through the made-up model.
fn dumped(out: &Path, arguments: &[&str]) -> Value {
    common::dumped(out, &[&["--model", text(small_model())], arguments].concat())
}

#[test]
fn longbench_has_a_prompt_and_a_metric_a_task() {
    let dir = tempfile::tempdir().unwrap();
    let (dump, out) = (dir.path().join("dump"), dir.path().join("sweep"));
    let data = spec("longbench", &fixture("longbench.jsonl"));
    let manifest = dumped(&dump, &["--data", &data, "--limit", "9"]);
    let requests = manifest["requests"].as_array().unwrap();
    assert_eq!(requests.len(), 3);
    let field = |i: usize, name: &str| requests[i][name].clone();
    let prompt = |i: usize| field(i, "prompt").as_str().unwrap().to_owned();
    assert_eq!(field(0, "id"), "first-id");
    assert!(field(0, "metric").is_null(), "F1 goes without saying");
    assert!(prompt(0).contains("Passage 2:") && prompt(0).ends_with("reach the sea?\nAnswer:"));
    assert_eq!(field(0, "answer_tokens"), 32);
    assert_eq!((field(1, "metric"), field(2, "metric")), ("classification".into(), "code-similarity".into()));
    assert_eq!(field(1, "classes").as_array().unwrap().len(), 3);
    assert!(prompt(2).contains("{input} and {context} in braces"), "a context is not a template");
    assert_eq!(manifest["answer_tokens"], 64);

    succeed(&["sweep", text(&dump), "--method", "bff:tau=0.9", "--resamples", "50", "-o", text(&out)]);
    let csv = fs::read_to_string(out.join("sweep.csv")).unwrap();
    let mut lines = csv.lines().map(|l| l.split(',').collect::<Vec<_>>());
    let header = lines.next().unwrap();
    let at = |name: &str| header.iter().position(|h| *h == name).unwrap();
    let none = lines.next().unwrap();
    assert_eq!(none[at("metric")], "mixed");
    let score: f64 = none[at("score")].parse().unwrap();
    // By hand from the answers, each with its metric.
    let record =
        fs::read_dir(out.join("runs")).unwrap().map(|e| fs::read_to_string(e.unwrap().path()).unwrap());
    let none: Value = record
        .map(|r| serde_json::from_str::<Value>(&r).unwrap())
        .find(|r| r["row"]["method"] == "none")
        .unwrap();
    let scores: Vec<f64> =
        none["requests"].as_array().unwrap().iter().map(|r| r["score"].as_f64().unwrap()).collect();
    assert!((scores.iter().sum::<f64>() / 3.0 - score).abs() < 1e-5);
    let answer = none["requests"][1]["answer"].as_str().unwrap();
    let line = answer.trim_start_matches('\n').lines().next().unwrap_or_default();
    let named = ["Number", "Person", "Place"].iter().filter(|c| line.contains(**c)).count();
    let expected = if line.contains("Number") { 1.0 / named as f64 } else { 0.0 };
    assert_eq!(scores[1], expected, "{answer}");
}

/// A model that goes on and on is stopped by each request's own task.
#[test]
fn an_answer_is_as_long_as_its_task_allows() {
    let dir = tempfile::tempdir().unwrap();
    let line = |task: &str, limit: &str, context: &str, input: &str| {
        let line = serde_json::json!({"dataset": task, "_id": limit, "context": context, "input": input,
            "answers": ["Dorn"]});
        format!("{line}\n")
    };
    let file = dir.path().join("two.jsonl");
    let talk = "Ann: The mill grinds rye. Bob: How much? Ann: Four tons a day. Bob: That is a lot of rye, and who buys it?";
    let talk = line("samsum", "128", talk, "What is said of the mill?");
    let code = line("lcc", "64", "Ann: Dorn has the mill.", "Which town has the mill?");
    fs::write(&file, talk + &code).unwrap();
    let (dump, out) = (dir.path().join("dump"), dir.path().join("sweep"));
    dumped(&dump, &["--data", &spec("longbench", &file), "--limit", "2"]);
    succeed(&["sweep", text(&dump), "--method", "none", "--resamples", "50", "-o", text(&out)]);
    let run = || {
        let csv = fs::read_to_string(out.join("sweep.csv")).unwrap();
        csv.lines().nth(1).unwrap().split(',').next().unwrap().to_owned()
    };
    let record = fs::read_to_string(out.join("runs").join(format!("{}.json", run()))).unwrap();
    let record: Value = serde_json::from_str(&record).unwrap();
    for request in record["requests"].as_array().unwrap() {
        let tokens = request["answer_tokens"].as_array().unwrap().len();
        assert_eq!(request["id"], tokens.to_string(), "{}", request["answer"]);
    }
    // Asked for one limit for all, even the longest, it measures anew.
    let old = run();
    succeed(&[
        "sweep",
        text(&dump),
        "--method",
        "none",
        "--resamples",
        "50",
        "--max-new-tokens",
        "128",
        "-o",
        text(&out),
    ]);
    assert_ne!(run(), old);
}

#[test]
fn retrieved_passages_are_for_questions_about_passages() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("x");
    let dump = |arguments: &[&str], words: &[&str]| {
        refuse(
            &[
                &[
                    "dump",
                    "--model",
                    text(small_model()),
                    "--requests",
                    "2",
                    "--passages",
                    "2",
                    "-o",
                    text(&out),
                ],
                arguments,
            ]
            .concat(),
            words,
        );
    };
    dump(&["--data", "synth:niah"], &["--passages", "synth:niah"]);
    dump(&["--length", "900"], &["--passages", "--length"]);
    dump(&["--pool", "1"], &["--passages 2 of --pool 1"]);
}

#[test]
fn ruler_and_raw_prompts_load() {
    let dir = tempfile::tempdir().unwrap();
    let task = dir.path().join("niah_single_1");
    fs::create_dir(&task).unwrap();
    let file = task.join("validation.jsonl");
    fs::copy(fixture("ruler.jsonl"), &file).unwrap();
    let manifest = dumped(&dir.path().join("a"), &["--data", &spec("ruler", &file), "--requests", "2"]);
    let request = &manifest["requests"][0];
    assert_eq!((&request["id"], &request["metric"]), (&"7".into(), &"contains-all".into()));
    assert!(request["prompt"].as_str().unwrap().ends_with("of cedar? The special number of cedar is"));
    assert_eq!((&manifest["requests"][1]["id"], &manifest["answer_tokens"]), (&"8".into(), &128.into()));

    let data = spec("prompts", &fixture("prompts.jsonl"));
    let manifest = dumped(&dir.path().join("b"), &["--data", &data, "--limit", "1"]);
    assert_eq!(manifest["requests"].as_array().unwrap().len(), 1);
    assert_eq!(manifest["requests"][0]["references"][0], "Paris");
}

#[test]
fn passages_of_longbench_are_retrieved() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hotpotqa.jsonl");
    let line = |id: usize, answer: &str, context: &str| {
        serde_json::json!({"input": format!("Question {id}?"), "context": context, "answers": [answer], "dataset": "hotpotqa", "_id": id.to_string()})
            .to_string()
    };
    let lines = [
        line(1, "Port Vale", "Passage 1:\nMills\nThey grind oats.\n\nPassage 2:\nAun\nIt ends at port vale."),
        line(2, "oats", "Passage 1:\nMills\nThey grind oats.\n\nPassage 2:\nWells\nThey are deep."),
        line(3, "Mills", "Passage 1:\nMills\nThey grind oats."),
        line(4, "yes", "Passage 1:\nNothing of the kind."),
    ];
    fs::write(&file, lines.join("\n")).unwrap();
    let data = spec("longbench", &file);
    let arguments = ["--data", &data, "--passages", "2", "--shots", "0", "--limit", "9"];
    let manifest = dumped(&dir.path().join("a"), &arguments);
    let requests = manifest["requests"].as_array().unwrap();
    let ids: std::collections::BTreeSet<&str> = requests.iter().map(|r| r["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "2", "3"].into(), "no answer stands in the passages of the last");
    for request in requests {
        let prompt = request["prompt"].as_str().unwrap();
        assert!(
            prompt.contains("Passage: Mills They grind oats.") && prompt.contains("Passage: Aun It ends")
        );
        assert!(!prompt.contains("Wells"));
    }
    let mixed = spec("longbench", &fixture("longbench.jsonl"));
    let refused = ["dump", "--model", text(small_model()), "--data", &mixed, "--passages", "1", "-o", "out"];
    refuse(&refused, &["longbench.jsonl", "line 2", "trec", "musique"]);
}

#[test]
fn prompts_are_cut_in_the_middle_and_sorted() {
    let dir = tempfile::tempdir().unwrap();
    let data = spec("longbench", &fixture("longbench.jsonl"));
    let plain = dumped(&dir.path().join("a"), &["--data", &data, "--limit", "3"]);
    let tokens = |m: &Value| -> Vec<u64> {
        m["requests"].as_array().unwrap().iter().map(|r| r["tokens"].as_u64().unwrap()).collect()
    };
    let whole = tokens(&plain);
    assert!(whole[0] > 40 && whole[1] < whole[0]);
    let sorted = dumped(
        &dir.path().join("b"),
        &["--data", &data, "--limit", "3", "--max-tokens", "40", "--sort", "length"],
    );
    let mut expected: Vec<u64> = whole.iter().map(|&t| t.min(40)).collect();
    expected.sort_unstable();
    assert_eq!(tokens(&sorted), expected);
    let requests = sorted["requests"].as_array().unwrap();
    let first = requests.iter().find(|r| r["id"] == "first-id").unwrap();
    assert_eq!(first["cut_tokens"].as_u64().unwrap(), whole[0] - 40);
    let prompt = first["prompt"].as_str().unwrap();
    assert!(prompt.starts_with("Passages:") && prompt.ends_with("\nAnswer:"), "{prompt}");
}

#[test]
fn malformed_lines_are_named_by_number() {
    let dir = tempfile::tempdir().unwrap();
    let broken = |kind: &str, name: &str, from: &str, to: &str, words: &[&str]| {
        let good = fs::read_to_string(fixture(name)).unwrap();
        assert!(good.contains(from), "{name} has no {from}");
        let file = dir.path().join(name);
        fs::write(&file, good.replace(from, to)).unwrap();
        let out = dir.path().join("never");
        let data = spec(kind, &file);
        refuse(
            &["dump", "--model", text(small_model()), "--data", &data, "--limit", "9", "-o", text(&out)],
            &[&[name], words].concat(),
        );
    };
    let dataset = "\"dataset\": \"trec\"";
    broken(
        "longbench",
        "longbench.jsonl",
        dataset,
        "\"dataset\": \"dureader\"",
        &["line 2", "'dureader'", "trec"],
    );
    broken(
        "longbench",
        "longbench.jsonl",
        "\"answers\": [\"Number\"]",
        "\"answers\": []",
        &["line 2", "`answers`"],
    );
    broken("longbench", "longbench.jsonl", "\"_id\": \"third-id\"}", "\"_id\"", &["line 3", "column"]);
    broken("ruler", "ruler.jsonl", "\"outputs\": [\"17\", \"93\"]", "\"out\": 1", &["line 3", "`outputs`"]);
    broken("ruler", "ruler.jsonl", "{\"index\": 7", "\"index\": 7", &["line 1"]);
    broken("prompts", "prompts.jsonl", "\"The capital of Italy is\"", "\"\"", &["line 2", "empty"]);
    broken("prompts", "prompts.jsonl", "\"The capital of France is\"", "3", &["line 1", "string"]);

    let file = dir.path().join("empty.txt");
    fs::write(&file, "few words").unwrap();
    let data = spec("text", &file);
    refuse(
        &["dump", "--model", text(small_model()), "--data", &data, "-o", text(&dir.path().join("never"))],
        &["empty.txt", "0 windows"],
    );
    let data = spec("longbench", &fixture("longbench.jsonl"));
    refuse(
        &["dump", "--model", text(small_model()), "--data", &data, "-o", text(&dir.path().join("never"))],
        &["3 prompts", "--requests 64"],
    );
    let both =
        run(&["dump", "--model", text(small_model()), "--data", &data, "--limit", "2", "--requests", "2"]);
    assert_eq!(both.status.code(), Some(2));
}

/// Text is scored as far as `--continuation` says, and KL by place is that of the tokens there.
#[test]
fn long_continuations_have_kl_by_place() {
    let dir = tempfile::tempdir().unwrap();
    let (dump, out) = (dir.path().join("dump"), dir.path().join("sweep"));
    let long = ["--data", "builtin:text", "--length", "300", "--continuation", "120", "--requests", "3"];
    dumped(&dump, &long);
    let sweep =
        ["sweep", text(&dump), "--method", "prefix+kivi:bits=2", "--resamples", "50", "-o", text(&out)];
    succeed(&sweep);
    let table = kvfuse::tables::Table::read(&out.join("positions.csv")).unwrap();
    let of = |name: &str| table.floats(name).unwrap();
    let (method, first, last, kl, tokens) =
        (table.strings("method").unwrap(), of("first"), of("last"), of("kl"), of("tokens"));
    let coded: Vec<usize> = (0..method.len()).filter(|&i| method[i].contains("kivi")).collect();
    assert_eq!(first[coded[0]], 1.0);
    assert!(coded.windows(2).all(|w| first[w[1]] == last[w[0]] + 1.0));
    let records = fs::read_dir(out.join("runs")).unwrap().map(|e| e.unwrap().path());
    let record = records
        .map(|path| serde_json::from_str::<Value>(&fs::read_to_string(path).unwrap()).unwrap())
        .find(|r| r["row"]["method"].as_str().unwrap().contains("kivi"))
        .unwrap();
    let token_kl: Vec<Vec<f64>> = record["requests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| r["token_kl"].as_array().unwrap().iter().map(|k| k.as_f64().unwrap()).collect())
        .collect();
    // The words that fill it need not come out even.
    assert!(token_kl.iter().all(|k| (100..=120).contains(&k.len())), "{:?}", token_kl[0].len());
    for &i in &coded {
        let band = |k: &Vec<f64>| k[first[i] as usize - 1..k.len().min(last[i] as usize)].to_vec();
        let bands: Vec<Vec<f64>> = token_kl.iter().map(band).collect();
        let mean = |k: &Vec<f64>| k.iter().sum::<f64>() / k.len() as f64;
        assert_eq!(bands.iter().map(Vec::len).sum::<usize>() as f64, tokens[i]);
        let expected = bands.iter().map(mean).sum::<f64>() / bands.len() as f64;
        assert!((kl[i] - expected).abs() <= 1e-5 * expected, "{} {expected}", kl[i]);
    }
    succeed(&["plot", text(&out)]);
    assert!(out.join("kl_by_position.png").exists());
    refuse(
        &[&["dump", "--model", text(small_model()), "--data", "builtin:qa"], &long[4..6]].concat(),
        &["--continuation"],
    );
    refuse(
        &["dump", "--model", text(small_model()), "--data", "builtin:text", "--continuation", "300"],
        &["--length 512", "300"],
    );
}
