//! What users see, as it is: help, lists, summaries, errors, headers of tables. `cargo insta review` (or INSTA_UPDATE=always) takes a
//! change over. No download.

mod common;

use common::{run, small_dump, small_model, succeed, text};
use std::fs;
use std::path::Path;

/// A text without paths of this machine.
fn clean(shown: &str, folder: &Path) -> String {
    let places = [(folder, "[OUT]"), (small_dump(), "[DUMP]"), (small_model(), "[MODEL]")];
    places.iter().fold(shown.to_owned(), |shown, (path, name)| shown.replace(text(path), name))
}

#[test]
fn help_and_lists() {
    insta::assert_snapshot!("help", succeed(&["--help"]));
    for command in ["dump", "sweep", "compare", "check", "search", "train", "simulate", "encode"] {
        insta::assert_snapshot!(format!("help-{command}"), succeed(&[command, "--help"]));
    }
    insta::assert_snapshot!("methods", succeed(&["methods"]));
    for method in ["bff", "kivi", "snapkv", "joint"] {
        insta::assert_snapshot!(format!("methods-{method}"), succeed(&["methods", method]));
    }
}

#[test]
fn summaries_and_headers() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    let quick = ["--max-new-tokens", "2", "--resamples", "20", "-o", out];
    let method = "prefix+kivi:bits=4|2,snapkv:keep=0.5";
    succeed(&[&["sweep", text(small_dump()), "--method", method], &quick[..]].concat());
    succeed(&["compare", out, "--resamples", "20"]);
    let headers: Vec<String> = ["sweep.csv", "requests.csv", "layers.csv", "timings.csv", "compare.csv"]
        .iter()
        .map(|name| {
            let table = fs::read_to_string(dir.path().join(name)).unwrap();
            format!("{name}\n  {}", table.lines().next().unwrap().replace(',', "\n  "))
        })
        .collect();
    // Sizes of single layers differ in their last digits between processors.
    let inspected = succeed(&["inspect", text(small_dump())]);
    let inspected = inspected.split("\n\n").next().unwrap();
    insta::assert_snapshot!("inspect", clean(inspected, dir.path()));
    insta::assert_snapshot!("headers", headers.join("\n"));
}

#[test]
fn errors() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("nowhere");
    let dump = text(small_dump());
    let all: Vec<String> = [
        &["sweep", text(&missing)][..],
        &["sweep", dump, "--method", "bbf"],
        &["sweep", dump, "--method", "bff:tua=0.9"],
        &["sweep", dump, "--method", "bff:tau=1.9"],
        &["sweep", dump, "--method", "kivi+prefix"],
        &["sweep", dump, "--method", "snapkv+joint"],
        &["sweep", dump, "--method", "joint"],
        &["sweep", dump, "--block-size", "0"],
        &["compare", text(&missing)],
        &["search", dump, "--method", "prefix", "--max-kl", "0.02"],
        &["encode", dump, "--method", "cff", "-o", text(&missing)],
        &["simulate"],
        &["simulate", "--bound", dump, "--method", "int8", "-o", text(&dir.path().join("b"))],
        &["model", "info", "gpt-17"],
    ]
    .iter()
    .map(|arguments| {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        let error: Vec<&str> = stderr.lines().skip_while(|l| !l.starts_with("error: ")).collect();
        format!("$ kvfuse {}\n{}", arguments.join(" "), error.join("\n"))
    })
    .collect();
    insta::assert_snapshot!("errors", clean(&all.join("\n\n"), dir.path()));
}
