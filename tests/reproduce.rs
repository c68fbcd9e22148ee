//! Experiment files, reports and comparisons, through the binary.

mod common;

use common::{kvfuse, text};
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Output;

const PLAN: &str = r#"title = "A small one"
models = ["MODEL"]

[dump]
requests = 64

[stats]
tau = "0.9,0.8"

[sweep]
method = "bff:pairing=best,spare-layers=0,tau=0.9"
resamples = 50

[simulate]
draws = 1
synthetic = [4, 4]
world = "iid"

[quick.dump]
requests = 4
shots = 1
"#;

/// The experiment, on a made-up model.
fn plan() -> String {
    PLAN.replace("MODEL", text(common::small_model()))
}

fn in_folder(folder: &Path, arguments: &[&str]) -> Output {
    kvfuse().current_dir(folder).args(arguments).output().unwrap()
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn an_experiment_runs_to_its_figures_and_skips_what_is_done() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("small.toml"), plan()).unwrap();
    let run = |root: &str| {
        let output = in_folder(dir.path(), &["run", "small.toml", "--quick", "--root", root]);
        let (stdout, stderr) = said(&output);
        assert!(output.status.success(), "{stderr}");
        stdout
    };
    let first = run("results");
    let out = dir.path().join("results/quick/small/model-reproduce");
    let names = [
        "sweep.csv",
        "stats.csv",
        "monte_carlo.csv",
        "predictions.csv",
        "manifest.json",
        "quality_vs_cr.png",
        "layer_cr.svg",
        "similarity.png",
        "prediction.png",
    ];
    for name in names {
        assert!(out.join(name).exists(), "{name}");
    }
    // The commands it ran are those that a user would type, and that the manifests hold.
    let line = first.lines().find(|l| l.starts_with("$ kvfuse sweep")).unwrap();
    assert!(line.contains("--method=bff:pairing=best,spare-layers=0,tau=0.9"), "{line}");
    let manifest: Value =
        serde_json::from_str(&fs::read_to_string(out.join("manifest.json")).unwrap()).unwrap();
    let command: Vec<&str> =
        manifest["command"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    assert_eq!(format!("$ {}", command.join(" ")), line);

    let before: Vec<Vec<u8>> = ["sweep.csv", "stats.csv", "runs/steps.json"]
        .iter()
        .map(|n| fs::read(out.join(n)).unwrap())
        .collect();
    let made = fs::metadata(out.join("stats.csv")).unwrap().modified().unwrap();
    let second = run("results");
    assert_eq!(second.matches("(done)").count(), 2, "{second}");
    assert_eq!(fs::metadata(out.join("stats.csv")).unwrap().modified().unwrap(), made);
    let after: Vec<Vec<u8>> = ["sweep.csv", "stats.csv", "runs/steps.json"]
        .iter()
        .map(|n| fs::read(out.join(n)).unwrap())
        .collect();
    assert!(before == after);

    // A table that is gone or changed is made again.
    fs::remove_file(out.join("stats.csv")).unwrap();
    let carlo = fs::read_to_string(out.join("monte_carlo.csv")).unwrap();
    fs::write(out.join("monte_carlo.csv"), carlo.replacen("1.", "2.", 1)).unwrap();
    let third = run("results");
    assert_eq!(third.matches("(done)").count(), 0, "{third}");
    assert_eq!(fs::read(out.join("stats.csv")).unwrap(), before[1]);
    assert_eq!(fs::read_to_string(out.join("monte_carlo.csv")).unwrap(), carlo);

    // Made again elsewhere it is the same; changed it is not.
    run("again");
    let compare =
        |extra: &[&str]| in_folder(dir.path(), &[&["check", "results/quick", "again/quick"], extra].concat());
    let output = compare(&["--relative", "0", "--absolute", "0", "--outliers", "0"]);
    assert!(output.status.success(), "{:?}", said(&output));
    let csv = dir.path().join("again/quick/small/model-reproduce/sweep.csv");
    let changed = fs::read_to_string(&csv).unwrap().replace(",1.0,", ",1.5,");
    fs::write(&csv, changed).unwrap();
    let output = compare(&[]);
    let (stdout, stderr) = said(&output);
    assert_eq!(output.status.code(), Some(2));
    assert!(stdout.contains("DIFFERS") && stderr.contains("sweep.csv"), "{stdout}{stderr}");
    fs::remove_file(&csv).unwrap();
    assert_eq!(compare(&[]).status.code(), Some(2));

    report(dir.path(), &out);
}

/// The report of the same folder: all in one file, nothing fetched.
fn report(dir: &Path, out: &Path) {
    let output = in_folder(dir, &["report", "results"]);
    assert!(output.status.success(), "{:?}", said(&output));
    let html = fs::read_to_string(dir.join("results/report.html")).unwrap();
    for word in [
        "quick&#x2f;small&#x2f;model-reproduce",
        "Claims and verdicts",
        "4.38",
        "independent",
        "data-svg=",
        "cr_audited",
        "kvfuse_version",
    ] {
        assert!(html.contains(word), "{word}");
    }
    // No file, style or script from elsewhere; names of SVG's own standard are no addresses.
    let addresses = html.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http://", "https://", "src=", "<link", "@import"] {
        assert!(!addresses.contains(outside), "{outside}");
    }
    // Figures are there, packed.
    let packed = html.split("data-svg=\"").nth(1).unwrap().split('"').next().unwrap();
    let bytes = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, packed).unwrap();
    let mut svg = String::new();
    flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut svg).unwrap();
    assert!(svg.starts_with("<svg"), "{}", &svg[..40]);
    let rows = fs::read_to_string(out.join("sweep.csv")).unwrap().lines().count() - 1;
    assert!(html.contains(&format!("({rows} rows)")), "{rows}");
    // The verdict on the headline is the table's.
    let most = csv_rows(&out.join("sweep.csv"))
        .into_iter()
        .filter(|r| r.0 == "bff")
        .map(|r| r.1)
        .fold(0.0, f64::max);
    assert!(most < 4.38, "so few requests do not reach it");
    let headline = html.split("<tr>").find(|row| row.contains("4.38")).unwrap();
    assert!(headline.contains("verdict fails") && headline.contains("none reaches it"), "{headline}");
    assert!(headline.contains("4 requests, two one-sided tests"), "{headline}");
    let nothing = tempfile::tempdir().unwrap();
    let output = in_folder(nothing.path(), &["report", "."]);
    assert_eq!((output.status.code(), said(&output).1.contains("no results")), (Some(2), true));
}

/// Method and audited ratio of each row.
fn csv_rows(path: &Path) -> Vec<(String, f64)> {
    let table = kvfuse::tables::Table::read(path).unwrap();
    let (method, cr) = (table.strings("method").unwrap(), table.floats("cr_audited").unwrap());
    method.into_iter().zip(cr).collect()
}

#[test]
fn a_fault_in_an_experiment_is_named_by_line() {
    let dir = tempfile::tempdir().unwrap();
    for (from, to, words) in [
        ("requests = 64", "reqests = 64", ["line 5", "reqests"]),
        ("tau = \"0.9,0.8\"", "tau = \"high\"", ["line 8", "high"]),
        ("pairing=best", "pairing=worst", ["line 11", "worst"]),
        ("tau=0.9", "tau=1.9", ["line 11", "1.9"]),
        ("requests = 64", "data = \"squad:{xquad}\"", ["line 5", "--define xquad"]),
        ("[simulate]", "[simulat]", ["line 14", "simulat"]),
        ("requests = 64", "requests = 64\ndata = \"sqad:x\"", ["line 6", "sqad"]),
        ("tau = \"0.9,0.8\"", "sample = 1", ["line 8", "--sample"]),
        ("draws = 1", "requests = \"9..2\"", ["line 15", "reversed"]),
        ("[stats]", "[calibrate]\ntarget_kl = -1\n\n[stats]", ["line 8", "above 0"]),
        ("[stats]\ntau = \"0.9,0.8\"", "", ["[simulate]", "[stats]"]),
    ] {
        let path = dir.path().join("x.toml");
        fs::write(&path, plan().replace(from, to)).unwrap();
        let output = in_folder(dir.path(), &["run", text(&path), "--quick"]);
        let (_, stderr) = said(&output);
        let error = stderr.lines().find(|l| l.starts_with("error: ")).unwrap_or_default();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        // Before anything is done, of this file or of the one before it.
        fs::write(dir.path().join("good.toml"), plan()).unwrap();
        let both = in_folder(dir.path(), &["run", "good.toml", text(&path), "--quick"]);
        assert_eq!((&said(&both).0[..], both.status.code()), ("", Some(2)), "{to}");
        assert!(!dir.path().join("dumps").exists() && !dir.path().join("results").exists());
        assert!(error.contains("x.toml") && words.iter().all(|w| error.contains(w)), "{to}: {error}");
    }
}

#[test]
fn rows_come_as_json_lines() {
    let dir = tempfile::tempdir().unwrap();
    let dump = common::small_dump();
    let out = dir.path().join("out");
    let sweep = in_folder(
        dir.path(),
        &[
            "sweep",
            text(dump),
            "--method",
            "bff:tau=0.9",
            "--resamples",
            "50",
            "--json",
            "--quiet",
            "-o",
            text(&out),
        ],
    );
    let (stdout, stderr) = said(&sweep);
    assert_eq!(stderr, "");
    let rows: Vec<Value> = stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(rows.len(), 3);
    assert_eq!((&rows[0]["method"], &rows[2]["bff.tau"]), (&"none".into(), &0.9.into()));
    let summary = in_folder(dir.path(), &["inspect", text(dump), "--json"]);
    let summary: Value = serde_json::from_str(&said(&summary).0).unwrap();
    assert_eq!(summary["requests"], common::REQUESTS);
}
