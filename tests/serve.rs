//! The serving engine: whatever the budget, the order and the company, answers are those of a request served alone.

mod common;

use common::{run, scratch, small_model, succeed, text};
use kvfuse::codec::Chain;
use kvfuse::model::Model;
use kvfuse::serve::{Arrival, Engine, Finish, Job, Limits, Policy, serve};
use kvfuse::task::Draw;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::HashMap;
use std::sync::OnceLock;

fn model() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| Model::open(small_model()).unwrap())
}

fn policy(text: &str, block_size: usize) -> Policy {
    let chain = Chain::parse_served(text).unwrap().swap_remove(0);
    Policy::of(&chain, model().decoder.block_shape(block_size)).unwrap()
}

/// Requests with common beginnings, of several tenants and lengths.
fn jobs(n: usize, seed: u64, tenants: usize) -> Vec<Job> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let shared: Vec<u32> = (0..40).map(|_| rng.random_range(0..256)).collect();
    let job = |i: usize| {
        let own = rng.random_range(1..50);
        let mut prompt = shared[..rng.random_range(0..40)].to_vec();
        prompt.extend((0..own).map(|_| rng.random_range(0..256u32)));
        Job {
            id: i as u64,
            tenant: format!("tenant-{}", i % tenants),
            prompt,
            max_tokens: rng.random_range(1..20),
            stop: Vec::new(),
            ignore_end: true,
            keep_logits: 0,
        }
    };
    (0..n).map(job).collect()
}

fn limits(budget_columns: usize, block_size: usize, step_tokens: usize, running: usize) -> Limits {
    let column = 4 * model().decoder.block_shape(block_size).block_width() * model().decoder.config().layers;
    Limits { block_size, budget_bytes: budget_columns * column, running, step_tokens }
}

fn at_once(jobs: &[Job]) -> Vec<Arrival> {
    jobs.iter().map(|job| Arrival { seconds: 0.0, after: None, job: job.clone() }).collect()
}

fn answers(jobs: &[Job], limits: Limits, chain: &str) -> (Vec<Vec<u32>>, kvfuse::serve::Counts) {
    let arrivals = at_once(jobs);
    let policy = policy(chain, limits.block_size);
    let outcome = serve(model(), limits, policy, &arrivals, usize::MAX).unwrap();
    (outcome.answers, outcome.counts)
}

/// Served alone, one after the other, the prompt in one piece.
fn alone(jobs: &[Job]) -> Vec<Vec<u32>> {
    jobs.iter()
        .map(|job| {
            let job = Job { id: 0, ..job.clone() };
            answers(&[job], limits(1000, 16, 10_000, 1), "none").0.swap_remove(0)
        })
        .collect()
}

#[test]
fn answers_do_not_depend_on_budget_company_chunks_blocks_or_threads() {
    let jobs = jobs(24, 5, 3);
    let expected = alone(&jobs);
    for (chain, budget, block, step, running) in [
        ("none", 1000, 16, 10_000, 64),
        ("prefix", 1000, 16, 10_000, 64),
        ("none", 14, 8, 7, 5),
        ("prefix", 14, 8, 7, 5),
        ("prefix", 28, 4, 33, 64),
        ("prefix", 9, 16, 64, 64),
        // Fusion of nothing.
        ("prefix+bff:tau=1", 20, 8, 64, 64),
    ] {
        let (got, counts) = answers(&jobs, limits(budget, block, step, running), chain);
        assert_eq!(got, expected, "{chain}, {budget} columns of {block}, steps of {step}: {counts:?}");
    }
    let one = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let (got, _) = one.install(|| answers(&jobs, limits(14, 8, 7, 5), "prefix"));
    assert_eq!(got, expected);
}

#[test]
fn little_memory_means_preemptions_and_hits_are_counted() {
    let jobs = jobs(24, 5, 1);
    let (_, counts) = answers(&jobs, limits(16, 8, 64, 64), "prefix");
    assert!(counts.preemptions > 0 && counts.prefix_hits > 0, "{counts:?}");
    let (_, counts) = answers(&jobs, limits(1000, 8, 64, 64), "none");
    assert_eq!((counts.preemptions, counts.prefix_hits), (0, 0));
}

#[test]
fn a_prompt_beyond_the_budget_fails_and_the_others_are_served() {
    let mut jobs = jobs(3, 1, 1);
    jobs[1].prompt = vec![7; 400];
    let arrivals = at_once(&jobs);
    let outcome = serve(model(), limits(14, 8, 64, 8), policy("prefix", 8), &arrivals, 8).unwrap();
    let failed: Vec<bool> = outcome.served.iter().map(|s| s.failed).collect();
    assert_eq!(failed, [false, true, false]);
}

/// A request that fits by itself is served even if all that it finds is coded and takes room besides its pages.
#[test]
fn what_is_found_coded_keeps_no_request_waiting() {
    let job = |id: u64, from: u32, tokens: u32| Job {
        id,
        tenant: String::new(),
        prompt: (from..from + tokens).collect(),
        max_tokens: 1,
        stop: Vec::new(),
        ignore_end: true,
        keep_logits: 0,
    };
    let mut engine = Engine::new(model(), limits(10, 8, 100, 4), policy("prefix+cachegen", 8));
    // The second request takes the pages of the first, which stay coded; the third finds them.
    for job in [job(0, 0, 76), job(1, 100, 40), job(2, 0, 76)] {
        engine.submit(job);
        let ended = (0..100).flat_map(|_| engine.step().unwrap()).find_map(|event| event.finish);
        assert_eq!(ended, Some(Finish::Length));
    }
    assert!(engine.counts().encoded_columns > 0 && engine.counts().prefix_queries == 192);
}

/// Pages in 8 bits, cold ones coded again: what comes back is put into 8 bits once more, so that it takes what it took before.
#[test]
fn columns_that_come_back_are_kept_as_pages_are() {
    let alone = Chain::parse("prefix+int8+cachegen").err().unwrap().to_string();
    assert!(alone.contains("a server keeps pages in int8 and cold ones in cachegen"), "{alone}");
    let job = |id: u64, from: u32| Job {
        id,
        tenant: String::new(),
        prompt: (from..from + 73).collect(),
        max_tokens: 1,
        stop: Vec::new(),
        ignore_end: true,
        keep_logits: 0,
    };
    let mut engine = Engine::new(model(), limits(12, 8, 100, 4), policy("prefix+int8+cachegen:bin=2", 8));
    // All pages that are left are full ones.
    let mut bytes_a_page = |job: Job| {
        engine.submit(job);
        while !engine.step().unwrap().iter().any(|event| event.finish.is_some()) {}
        engine.check().unwrap();
        (engine.page_bytes() as f64 / engine.pages() as f64, engine.counts().decoded_tokens)
    };
    let (first, _) = bytes_a_page(job(0, 0));
    for id in 1..3 {
        bytes_a_page(job(id, 80 * id as u32));
    }
    let (last, decoded) = bytes_a_page(job(3, 0));
    assert!(decoded > 0 && last == first, "{decoded} {last} {first}");
}

/// Requests come, are called off and end at random, under every kind of chain; references stay right, and all pages come back.
#[test]
fn engines_lose_no_page() {
    for (seed, chain) in [
        "none",
        "prefix",
        "prefix+bff:tau=0.2",
        "bff:tau=0.2",
        "prefix+kivi:residual=8",
        "prefix+cachegen",
        "prefix+int8",
        "prefix+int8+cachegen",
        "prefix+int8+cachegen:bin=2",
        "prefix+bff:tau=0.2+int8",
    ]
    .iter()
    .enumerate()
    {
        let mut rng = ChaCha8Rng::seed_from_u64(seed as u64);
        let mut engine = Engine::new(model(), limits(24, 8, 24, 6), policy(chain, 8));
        let mut open: HashMap<u64, usize> = HashMap::new();
        let mut coming = jobs(40, seed as u64, 2);
        let mut finished = 0;
        while !coming.is_empty() || !engine.is_idle() {
            if rng.random_bool(0.3)
                && let Some(job) = coming.pop()
            {
                open.insert(job.id, job.max_tokens);
                engine.submit(job);
            }
            if rng.random_bool(0.02)
                && let Some(&id) = open.keys().min()
            {
                engine.abort(id);
            }
            for event in engine.step().unwrap() {
                if let Some(finish) = event.finish {
                    assert!(open.remove(&event.id).is_some(), "a request ends once");
                    assert!(finish != Finish::TooLarge, "{chain}");
                    finished += 1;
                }
            }
            engine.check().unwrap_or_else(|e| panic!("{chain}: {e}"));
            assert!(engine.bytes() <= limits(24, 8, 24, 6).budget_bytes, "{chain}");
        }
        assert_eq!((finished, open.len()), (40, 0), "{chain}");
        engine.forget();
        assert_eq!((engine.pages(), engine.bytes()), (0, 0), "{chain}");
    }
}

#[test]
fn fewer_bits_take_less_of_the_pool() {
    // Prompts of many full blocks, so that what is coded outweighs the open ones.
    let long: Vec<Job> = (0..6)
        .map(|i| Job {
            prompt: (0..160).map(|t| (t * 31 + i * 7 + t * t) as u32 % 256).collect(),
            ..jobs(6, 2, 1)[i].clone()
        })
        .collect();
    let bytes = |chain: &str| {
        let mut engine = Engine::new(model(), limits(1000, 16, 10_000, 64), policy(chain, 16));
        long.iter().for_each(|job| engine.submit(job.clone()));
        engine.step().unwrap();
        engine.bytes()
    };
    let (plain, coded) = (bytes("none"), bytes("int8"));
    // int8: 8 bits and a scale of 16 for each head's 4 numbers here: 12 of 16 bits; the open blocks stay.
    assert!(coded < plain * 85 / 100, "{coded} of {plain}");
}

#[test]
fn the_command_writes_its_tables_and_refuses_what_is_not_served() {
    let folder = scratch();
    let out = folder.path().join("out");
    let arguments = |method: &'static str| {
        vec![
            "serve-bench",
            "--model",
            text(small_model()),
            "--requests",
            "4",
            "--shots",
            "1",
            "--output-len",
            "4",
            "--ignore-eos",
            "--repeats",
            "2",
            "--quality-requests",
            "2",
            "--method",
            method,
            "--budget-requests",
            "3",
            "-o",
        ]
    };
    let mut good = arguments("none,prefix,prefix+kivi");
    good.push(text(&out));
    let table = succeed(&good);
    assert!(table.contains("prefix+kivi") && table.contains("tok/s"), "{table}");
    // Times are never the same twice: what is there was not measured again, and another arm is measured beside it.
    let rows = || std::fs::read_to_string(out.join("serve_requests.csv")).unwrap();
    let first = rows();
    succeed(&good);
    assert_eq!(rows(), first);
    for (name, rows) in [("serve.csv", 6), ("serve_summary.csv", 3)] {
        let csv = std::fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(csv.lines().count(), rows + 1, "{name}");
    }
    // Loads and budgets are settings of their own, drawn against each other.
    let mut loads = arguments("none,prefix");
    let at = loads.iter().position(|a| *a == "3").unwrap();
    loads[at] = "2,4";
    loads.extend([text(&out), "--request-rate", "50,100"]);
    let at = loads.iter().position(|a| *a == "--repeats").unwrap();
    loads[at + 1] = "1";
    succeed(&loads);
    let summary = kvfuse::tables::Table::read(&out.join("serve_summary.csv")).unwrap();
    let budgets = summary.floats("budget_bytes").unwrap();
    assert_eq!(budgets.len(), 8);
    assert!(budgets.iter().filter(|b| **b == budgets[0]).count() == 4, "{budgets:?}");
    assert!(
        summary.floats("peak_pool_bytes").unwrap().iter().zip(&budgets).all(|(peak, budget)| peak <= budget)
    );
    succeed(&["plot", text(&out)]);
    let projected = succeed(&["project", text(&out)]);
    assert!(projected.contains("not measured") && projected.contains("H100-SXM"), "{projected}");
    let checked = kvfuse::tables::Table::read(&out.join("roofline.csv")).unwrap();
    let (method, ratio) =
        (checked.strings("method").unwrap(), checked.floats("measured_over_predicted").unwrap());
    assert_eq!(method.len(), 8);
    let seconds = |column: &str| -> f64 {
        let all = checked.floats(column).unwrap();
        (0..8).filter(|&i| method[i] == "none").map(|i| all[i]).sum()
    };
    let own = seconds("forward_seconds") / seconds("predicted_seconds");
    assert!(
        (own - 1.0).abs() < 1e-3 && ratio.iter().all(|r| r.is_finite()),
        "calibrated on the first: {own}"
    );
    assert!(
        ["serving", "serving_load", "serving_budget"].iter().all(|f| out.join(format!("{f}.png")).exists())
    );
    for (method, word) in [
        ("h2o", "evictions"),
        ("prefix+bff:tau=0.9,rope=strip", "rope=strip"),
        ("kivi+prefix", "cannot follow"),
        ("prefix+kivi+int8", "kept by one codec"),
        ("prefix+cachegen+int8", "comes before what keeps cold ones"),
        ("prefix+kivi+cachegen+cachegen", "cannot follow"),
        ("cff:tau=0.9", "bff is served"),
    ] {
        let mut bad = arguments(method);
        bad.push(text(&out));
        let output = run(&bad);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{method}");
        assert!(stderr.contains(word), "{method}: {stderr}");
    }
}

/// What is moved is what an encoded file of the same requests, each by itself, would hold; links add what their rates say.
#[test]
fn moving_a_cache_takes_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("migration");
    let migrate =
        ["migrate", text(common::small_dump()), "--requests", "2", "--repeats", "1", "--link-gbits", "1,10"];
    let table = succeed(&[&migrate[..], &["--method", "none,kivi:bits=4", "-o", text(&out)]].concat());
    assert!(table.contains("10 Gbit/s") && table.contains("kivi"), "{table}");
    let rows = kvfuse::tables::Table::read(&out.join("migration.csv")).unwrap();
    let of = |name: &str| rows.floats(name).unwrap();
    let (bytes, link, total) = (of("bytes"), of("link_seconds"), of("total_seconds"));
    let (encode, decode, gbits) = (of("encode_seconds"), of("decode_seconds"), of("link_gbits"));
    assert_eq!(bytes.len(), 4);
    assert!(bytes[2] < bytes[0] && of("decode_seconds")[0] == 0.0);
    for i in 0..4 {
        assert!((link[i] - 8e-9 * bytes[i] / gbits[i]).abs() < 1e-5 * link[i]);
        assert!((total[i] - encode[i] - decode[i] - link[i]).abs() < 1e-4 * total[i]);
    }
    // 16 bits a number, and the tables.
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(common::small_dump().join("manifest.json")).unwrap()).unwrap();
    let config = &manifest["model"]["config"];
    let count = |name: &str| config[name].as_u64().unwrap() as f64;
    let numbers = 2.0 * of("tokens")[0] * count("layers") * count("kv_heads") * count("head_dim");
    assert!((bytes[0] / (2.0 * numbers) - 1.0).abs() < 0.05, "{} {numbers}", bytes[0]);
    succeed(&["plot", text(&out)]);
    assert!(out.join("migration.png").exists());
    common::refuse(&[&migrate[..], &["--method", "h2o", "-o", text(&out)]].concat(), &["h2o"]);
}

/// A trace says when requests come, how long they are and what they share; text is ours.
#[test]
fn a_trace_is_replayed() {
    let dir = tempfile::tempdir().unwrap();
    let (out, trace) = (dir.path().join("out"), dir.path().join("trace.jsonl"));
    let line = |at: usize, input: usize, ids: &str| {
        format!(
            "{{\"timestamp\": {at}, \"input_length\": {input}, \"output_length\": 40, \"hash_ids\": [{ids}]}}\n"
        )
    };
    let lines = [line(0, 1100, "1, 2, 3"), line(2000, 1100, "1, 2, 4"), line(3000, 500, "9")];
    std::fs::write(&trace, lines.concat()).unwrap();
    let spec = format!("mooncake:{}", trace.display());
    let serve = [
        "serve-bench",
        "--model",
        text(small_model()),
        "--trace",
        &spec,
        "--trace-scale",
        "0.1",
        "--trace-speed",
        "20",
        "--requests",
        "3",
        "--repeats",
        "1",
        "--quality-requests",
        "1",
        "--block-size",
        "8",
        "--method",
        "none,prefix",
        "-o",
        text(&out),
    ];
    succeed(&serve);
    let rows = kvfuse::tables::Table::read(&out.join("serve_requests.csv")).unwrap();
    let of = |name: &str| rows.floats(name).unwrap();
    assert_eq!(of("input_tokens")[..3], [110.0, 110.0, 50.0]);
    assert_eq!(of("output_tokens")[..3], [4.0; 3]);
    assert_eq!(of("arrival_seconds")[1..3], [0.1, 0.15]);
    let runs = kvfuse::tables::Table::read(&out.join("serve.csv")).unwrap();
    let hits = runs.floats("prefix_hit_tokens").unwrap();
    // Two blocks of 51 tokens are shared: twelve whole ones of 8.
    assert_eq!(hits, [0.0, 96.0]);
    let refused = |extra: &[&str], words: &[&str]| common::refuse(&[&serve[..], extra].concat(), words);
    refused(&["--passages", "2"], &["--passages", "--trace"]);
    let bad = [&serve[..3], &["--trace", "sharegpt:x", "-o", text(&out)]].concat();
    common::refuse(&bad, &["sharegpt:x", "mooncake:FILE"]);
}

/// A turn of a conversation comes when the turn before has ended, and finds its prompt in the prefix cache.
#[test]
fn turns_follow_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let serve = "--turns 3 --requests 9 --shots 0 --repeats 1 --output-len 6 --ignore-eos --block-size 8 --quality-requests 2";
    let model =
        ["serve-bench", "--model", text(small_model()), "--method", "prefix", "--budget-requests", "20"];
    let arguments: Vec<&str> = model.into_iter().chain(serve.split(' ')).chain(["-o", text(&out)]).collect();
    succeed(&arguments);
    let rows = kvfuse::tables::Table::read(&out.join("serve_requests.csv")).unwrap();
    let of = |name: &str| rows.floats(name).unwrap();
    let (arrivals, ends, inputs) = (of("arrival_seconds"), of("end_seconds"), of("input_tokens"));
    // Three conversations: first turns, second ones, third ones.
    let draw = Draw { turns: Some(3), ..Draw::plain("builtin:qa", 9, 0, 0) };
    let before = kvfuse::task::load(&draw, &|_| Ok(1)).unwrap().followed();
    for i in 3..9 {
        let last = before[i].unwrap();
        assert!(arrivals[i] >= ends[last] && arrivals[i] < ends[last] + 1.0, "{i}");
        assert!(inputs[i] > inputs[last]);
    }
    let runs = kvfuse::tables::Table::read(&out.join("serve.csv")).unwrap();
    let hits = runs.floats("prefix_hit_tokens").unwrap()[0];
    let before: f64 = inputs[..6].iter().map(|tokens| (tokens - 8.0).max(0.0)).sum();
    assert!(hits >= before, "{hits} {before}");
}
