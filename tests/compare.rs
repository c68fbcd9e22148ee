//! Methods against each other: Bjontegaard differences as the Python package has them, and the command. No download.

mod common;

use common::{refuse, small_dump, succeed, text};
use kvfuse::compare::{CompareOptions, Compared, Curve, Point, Series, Slopes, bd_quality, bd_rate, compare};
use serde_json::Value;
use std::fs;
use std::path::Path;

#[test]
fn differences_are_those_of_the_python_package() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bd.json");
    let golden: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let numbers =
        |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect() };
    let curve = |name: &Value| {
        let own = &golden["curves"][name.as_str().unwrap()];
        Curve::of(numbers(&own["rate"]).into_iter().zip(numbers(&own["quality"])).collect())
    };
    let mut seen = 0;
    for case in golden["cases"].as_array().unwrap() {
        let slopes = if case["method"] == "pchip" { Slopes::Pchip } else { Slopes::Akima };
        let (a, b) = (curve(&case["anchor"]), curve(&case["test"]));
        for (found, expected) in
            [(bd_rate(&a, &b, slopes), &case["rate"]), (bd_quality(&a, &b, slopes), &case["quality"])]
        {
            match expected.as_f64() {
                Some(expected) => {
                    let found = found.unwrap().value;
                    assert!((found - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{case}: {found}");
                    seen += 1;
                }
                None => assert_eq!(found, None, "{case}"),
            }
        }
    }
    assert!(seen > 100, "{seen}");
}

fn series(name: &str, points: &[(f64, f64)]) -> Series {
    let point = |&(cr, kl): &(f64, f64)| Point {
        method: name.to_owned(),
        cr,
        bits_per_element: 16.0 / cr,
        kl,
        score_diff: -kl,
        score_low: -2.0 * kl,
        on_front: true,
        kl_of_requests: vec![0.5 * kl, 1.5 * kl],
    };
    Series { name: name.to_owned(), points: points.iter().map(point).collect() }
}

fn compared(all: &[Series], max_kl: f64) -> Vec<Compared> {
    let options =
        CompareOptions { anchor: None, max_kl, margin: 0.05, slopes: Slopes::Pchip, resamples: 200, seed: 0 };
    compare(all, &options).unwrap()
}

#[test]
fn ratios_are_read_between_points() {
    let all = [
        series("plain", &[(2.0, 0.01), (8.0, 0.04), (16.0, 0.4)]),
        series("half", &[(4.0, 0.01), (16.0, 0.04), (32.0, 0.4)]),
        series("poor", &[(1.5, 0.3)]),
        series("fine", &[(1.1, 0.001)]),
    ];
    let rows = compared(&all, 0.02);
    // Half way in log KL: half way in log CR.
    assert!((rows[0].cr_at_kl.unwrap() - 4.0).abs() < 1e-4);
    // Requests of half and of one and a half times the KL: the interval reaches as far.
    let (low, high) = (rows[0].cr_at_kl_low.unwrap(), rows[0].cr_at_kl_high.unwrap());
    assert!(low < 3.0 && high > 7.0, "{low} {high}");
    assert!((rows[1].bd_rate_percent.unwrap() + 50.0).abs() < 1e-3, "{:?}", rows[1]);
    assert_eq!((rows[0].bd_rate_percent, rows[0].overlap), (Some(0.0), Some(1.0)));
    assert_eq!((rows[2].cr_at_kl, rows[2].cr_at_score), (None, None));
    assert_eq!((rows[3].cr_at_kl, rows[3].beyond_points), (Some(1.1), true));
    assert_eq!(rows[1].cr_at_score, Some(4.0));
}

#[test]
fn a_sweep_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    refuse(&["compare", out], &["sweep.csv"]);
    let sweep = ["sweep", text(small_dump()), "--max-new-tokens", "2", "--resamples", "20", "-o", out];
    succeed(&[&sweep[..], &["--method", "none"]].concat());
    refuse(&["compare", out], &["no method but the controls"]);
    succeed(&[&sweep[..], &["--method", "prefix+kivi:bits=8|4|2,prefix+rotated:bits=8|4|2"]].concat());
    let shown = succeed(&["compare", out, "--max-kl", "0.1"]);
    assert!(shown.contains("CR at KL 0.1") && shown.contains("bits against prefix+kivi"), "{shown}");
    assert!(fs::read_to_string(dir.path().join("compare.csv")).unwrap().lines().count() == 3);
    let rows: Vec<Value> = succeed(&["compare", out, "--anchor", "prefix+rotated", "--json"])
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(rows[1]["bd_rate_percent"], 0.0);
    refuse(&["compare", out, "--anchor", "prefix+kvi"], &["prefix+kvi", "prefix+kivi, prefix+rotated"]);
}

/// The cheapest setting that keeps to a KL, or to a score.
#[test]
fn a_setting_is_searched_for() {
    let dump = text(small_dump());
    let tried = |arguments: &[&str]| -> Vec<Value> {
        let said = succeed(&[&["search", dump, "--json"], arguments].concat());
        said.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
    };
    let number = |row: &Value, name: &str| row[name].as_f64().unwrap();
    let rows = tried(&["--method", "prefix+kivi", "--max-kl", "0.01"]);
    let best = rows.iter().find(|r| r["best"] == true).unwrap();
    let within = rows.iter().filter(|r| number(r, "kl") <= 0.01);
    assert!(within.map(|r| number(r, "cr_audited")).fold(0.0, f64::max) == number(best, "cr_audited"));
    assert!(rows.iter().any(|r| number(r, "kl") > 0.01), "something coarser was tried: {rows:?}");
    // Of evictions by attention too.
    let rows = tried(&["--method", "h2o", "--max-kl", "0.05", "--evaluations", "3"]);
    assert!(rows.iter().any(|r| r["best"] == true), "{rows:?}");
    // A random model's answers have no words in common with the references: no loss is possible.
    let rows = tried(&["--method", "prefix+rotated", "--min-f1-diff", "-0.1", "--evaluations", "3"]);
    assert!(rows.iter().all(|r| r["score_diff"].is_number()), "{rows:?}");
    refuse(&["search", dump, "--method", "prefix+kivi"], &["--max-kl"]);
    refuse(&["search", dump, "--method", "prefix+kivi", "--min-f1-diff", "2"], &["--min-f1-diff"]);
}

/// The claims of a report are about fusion; what other methods reach is on its first page.
#[test]
fn claims_of_fusion_are_judged_on_fusion() {
    let dir = tempfile::tempdir().unwrap();
    let out = text(dir.path());
    let method = "prefix+rotated:bits=8|6,prefix+random:share=0.1,prefix+bff:tau=0.99";
    let quick = ["--max-new-tokens", "2", "--resamples", "20", "-o", out];
    succeed(&[&["sweep", text(small_dump()), "--method", method], &quick[..]].concat());
    succeed(&["report", out]);
    let html = fs::read_to_string(dir.path().join("report.html")).unwrap();
    let headline = html.split("<tr>").find(|row| row.contains("4.38")).unwrap();
    assert!(headline.contains("none reaches it"), "{headline}");
    assert!(html.contains("What should I use?") && html.contains("<b>prefix+rotated</b>"), "the first page");
}
