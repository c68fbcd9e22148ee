//! A sweep that several processes share: put together, it is what one process writes, byte for byte.

mod common;

use common::{refuse, run, scratch, small_dump, succeed, text};
use kvfuse::tables::{Format, LAYERS, REQUESTS, Table};
use std::fs;
use std::path::Path;

const METHODS: &str = "prefix+bff:tau=0.9|0.5,int8,kivi:bits=4|2";

fn sweep<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["sweep", text(small_dump()), "--method", METHODS, "--resamples", "50", "-o", out];
    all.extend(more);
    all
}

fn same(a: &Path, b: &Path) {
    for table in ["sweep.csv", "requests.csv", "layers.csv"] {
        assert_eq!(fs::read(a.join(table)).unwrap(), fs::read(b.join(table)).unwrap(), "{table}");
    }
}

#[test]
fn shards_put_together_are_one_sweep() {
    let folder = scratch();
    let (whole, parts, apart) =
        (folder.path().join("whole"), folder.path().join("parts"), folder.path().join("apart"));
    succeed(&sweep(text(&whole), &[]));
    succeed(&sweep(text(&parts), &["--shard", "0/3"]));
    refuse(&["merge", text(&parts)], &["1/3 (not begun)", "2/3 (not begun)"]);
    succeed(&sweep(text(&parts), &["--shard", "2/3"]));
    // In a job array the index comes from outside; this one dies half-way.
    let array = |out: &Path| {
        common::kvfuse()
            .args(sweep(text(out), &["--shard", "3"]))
            .env("SLURM_ARRAY_TASK_ID", "1")
            .assert()
            .success()
    };
    array(&parts);
    let runs = parts.join("shards/1-of-3/runs");
    let some = fs::read_dir(&runs).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(some).unwrap();
    refuse(&["merge", text(&parts)], &["run again with --shard 1/3 ("]);
    array(&parts);
    assert!(succeed(&["merge", text(&parts)]).contains("7 arms"));
    same(&whole, &parts);
    // From folders of their own, into another.
    let own: Vec<_> = (0..3).map(|i| parts.join(format!("shards/{i}-of-3"))).collect();
    let mut arguments = vec!["merge"];
    arguments.extend(own.iter().map(|p| text(p)));
    arguments.extend(["-o", text(&apart)]);
    succeed(&arguments);
    same(&whole, &apart);
    // One process goes on from there without measuring anything.
    succeed(&sweep(text(&parts), &[]));
    same(&whole, &parts);
}

/// Long tables as Parquet: the same rows, read by the commands that read these tables; damage is an error that names the file.
#[test]
fn long_tables_can_be_parquet() {
    let folder = scratch();
    let (plain, packed) = (folder.path().join("plain"), folder.path().join("packed"));
    let parquet = ["--long-tables", "parquet"];
    succeed(&sweep(text(&plain), &[]));
    for shard in ["0/2", "1/2"] {
        succeed(&sweep(text(&packed), &[&parquet[..], &["--shard", shard]].concat()));
    }
    succeed(&["merge", text(&packed)]);
    for name in [REQUESTS, LAYERS] {
        let (csv, parquet) = (Format::Csv.file(&plain, name), Format::Parquet.file(&packed, name));
        assert!(!Format::Csv.file(&packed, name).exists());
        let (csv, parquet) = (Table::read(&csv).unwrap(), Table::read(&parquet).unwrap());
        assert_eq!(csv.names(), parquet.names());
        for column in csv.names() {
            assert_eq!(csv.strings(&column).unwrap(), parquet.strings(&column).unwrap(), "{name}, {column}");
        }
    }
    let compared = |out: &Path| {
        succeed(&["compare", text(out), "--resamples", "50"]);
        fs::read(out.join("compare.csv")).unwrap()
    };
    assert!(compared(&plain) == compared(&packed));
    // The other format takes the place of this one.
    let file = Format::Parquet.file(&packed, REQUESTS);
    let bytes = fs::read(&file).unwrap();
    succeed(&sweep(text(&packed), &[]));
    assert!(!file.exists());
    same(&plain, &packed);
    fs::remove_file(Format::Csv.file(&packed, REQUESTS)).unwrap();
    for damage in (0..bytes.len()).step_by(bytes.len() / 40) {
        fs::write(&file, &bytes[..damage]).unwrap();
        refuse(&["compare", text(&packed)], &["requests.parquet"]);
        // Not every bit is looked at.
        let mut flipped = bytes.clone();
        flipped[damage] ^= 0x55;
        fs::write(&file, flipped).unwrap();
        let run = run(&["compare", text(&packed), "--resamples", "50"]);
        assert!(matches!(run.status.code(), Some(0 | 2)), "byte {damage}");
    }
}

#[test]
fn shards_of_two_sweeps_do_not_mix() {
    let folder = scratch();
    let (a, b) = (folder.path().join("a"), folder.path().join("b"));
    succeed(&["sweep", text(small_dump()), "--method", "int8,fp8", "--shard", "0/2", "-o", text(&a)]);
    succeed(&["sweep", text(small_dump()), "--method", "int8,kivi", "--shard", "1/2", "-o", text(&b)]);
    refuse(&["merge", text(&a), text(&b)], &["another sweep"]);
    refuse(&["merge", text(folder.path())], &["holds no shards"]);
    refuse(&["sweep", text(small_dump()), "--shard", "2/2", "-o", text(&a)], &["I from 0 to N - 1"]);
}

#[test]
fn plans_are_lines_that_can_be_typed() {
    let lines = succeed(&["plan", "experiments/a b.toml", "--shards", "2", "--", "--quick"]);
    assert_eq!(
        lines,
        "kvfuse run 'experiments/a b.toml' --quick --shard=0/2\nkvfuse run 'experiments/a b.toml' --quick --shard=1/2\n"
    );
    let slurm = succeed(&["plan", "x.toml", "--shards", "4", "--format", "slurm"]);
    assert!(slurm.starts_with("#!/bin/sh\n") && slurm.contains("#SBATCH --array=0-3"), "{slurm}");
    assert!(slurm.ends_with("exec kvfuse run x.toml --shard=4\n"), "{slurm}");
    let json: serde_json::Value =
        serde_json::from_str(&succeed(&["plan", "x.toml", "--shards", "2", "--format", "json"])).unwrap();
    assert_eq!(json[1]["command"][3], "--shard=1/2");
    assert!(succeed(&["plan", "x.toml", "--shards", "2", "--format", "hyperqueue"]).contains("--array 0-1"));
    assert_eq!(run(&["plan", "x.toml", "--shards", "0"]).status.code(), Some(2));
}
