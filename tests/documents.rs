//! Every command that README and docs show is run, with a made-up model and a few requests in place of many.

mod common;

use common::{Shape, copy_folder, scratch, small_model, succeed, text};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

/// Lines that are not run here, and why.
const ELSEWHERE: [(&str, &str); 7] = [
    ("kvfuse serve ", "never ends; tests/http.rs"),
    ("kvfuse merge ", "needs the shards of a job array; tests/shards.rs"),
    ("kvfuse compare results/theirs", "needs transformers; examples/python/tests"),
    ("kvfuse plot results/theirs", "needs transformers; examples/python/tests"),
    ("kvfuse simulate --bound", "needs queries of a trained codec's model; tests/joint.rs"),
    ("kvfuse project ", "needs a bench with more requests than its budget holds; tests/serve.rs"),
    ("kvfuse run experiments/", "names real models; tests/reproduce.rs"),
];

/// Commands of the indented blocks of a document, without comments; synopses (`DUMP`, `[--option]`) are none.
fn commands(document: &str) -> Vec<String> {
    let lines = document.lines().filter_map(|line| line.strip_prefix("    kvfuse "));
    let command = |line: &str| {
        let line = line.split("  #").next().unwrap_or(line).trim();
        format!("kvfuse {line}").replace("squad:FILE", "builtin:qa")
    };
    let synopsis = |c: &String| {
        c.split_whitespace().any(|word| {
            word.starts_with('[') || word.len() > 2 && word.chars().all(|c| c.is_ascii_uppercase())
        })
    };
    lines.map(command).filter(|c| !synopsis(c)).collect()
}

/// As few requests as a command can do with.
fn fewer(command: &str) -> String {
    let mut words: Vec<String> = command.split(' ').map(str::to_owned).collect();
    for i in 1..words.len() {
        if words[i - 1] == "--requests" && words[i].parse::<usize>().is_ok() {
            words[i] = "6".to_owned();
        }
    }
    let command = words.join(" ");
    match words[1].as_str() {
        "sweep" => format!("{command} --max-new-tokens 4"),
        "dump" => format!("{command} --model model"),
        "serve-bench" => format!("{command} --model model --requests 6 --output-len 4 --quality-requests 1"),
        _ => command,
    }
}

/// A place where the commands find what they name: a model, experiments, committed results, a dump of another program's.
fn workshop(place: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = place.join("model");
    fs::create_dir(&model).unwrap();
    Shape { layers: 6, hidden: 24, heads: 6, kv_heads: 2, wide: 32, vocab: 257, context: 8192 }.write(&model);
    symlink(root.join("experiments"), place.join("experiments")).unwrap();
    let quick = place.join("results/quick");
    fs::create_dir_all(&quick).unwrap();
    // A copy: what is run here writes beside it.
    let plane = "results/rd-few-shot/smollm2-135m";
    fs::create_dir_all(place.join(plane)).unwrap();
    fs::copy(root.join(plane).join("sweep.csv"), place.join(plane).join("sweep.csv")).unwrap();
    copy_folder(&root.join("results/quick/block-size/smollm2-135m"), &quick.join("smollm2-135m"));
    let theirs = place.join("dumps/theirs");
    succeed(&[
        "dump",
        "--model",
        text(small_model()),
        "--requests",
        "2",
        "--shots",
        "1",
        "-o",
        text(&theirs),
    ]);
}

#[test]
fn every_command_of_a_document_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let binary = assert_cmd::cargo::cargo_bin("kvfuse");
    let path = format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let mut documents: Vec<_> = fs::read_dir(root.join("docs"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .chain([root.join("README.md")])
        .collect();
    documents.sort();
    let (mut ran, mut failed) = (0, Vec::new());
    for document in &documents {
        let all = commands(&fs::read_to_string(document).unwrap());
        let ours: Vec<String> =
            all.into_iter().filter(|c| !ELSEWHERE.iter().any(|(start, _)| c.starts_with(start))).collect();
        if ours.is_empty() {
            continue;
        }
        // Each document by itself, from the top, as a reader would.
        let place = scratch();
        workshop(place.path());
        for command in ours {
            let started = std::time::Instant::now();
            let short = fewer(&command);
            let output = Command::new("sh")
                .args(["-c", &short])
                .current_dir(place.path())
                .env("PATH", &path)
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            if !output.status.success() {
                failed.push(format!("{}: {short}: {said}", document.display()));
            }
            println!("{:.1} s: {short}", started.elapsed().as_secs_f64());
            ran += 1;
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(ran > 35, "{ran} commands");
}
