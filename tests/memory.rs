//! Sweeps within a bound of memory, lot by lot: it changes no number, and what does not fit is refused before anything runs. On a made-up
//! model, no download.

mod common;

use common::{made_up, plain_copy, refuse, small_dump, succeed, text};
use kvfuse::block::CodedPages;
use kvfuse::codec::quantize::Int8;
use kvfuse::codec::{Memo, Method};
use std::fs;
use std::path::Path;

/// Quantisers that are read in place and one that is not, and fusion with its tables.
const METHODS: &str = "prefix+kivi:residual=8,rotated:bits=4,prefix+cachegen,bff:tau=0.8,pairing=best";

fn sweep(out: &Path, more: &[&str]) {
    let fixed = ["sweep", text(small_dump()), "--method", METHODS, "--resamples", "50", "-o", text(out)];
    succeed(&[&fixed[..], more].concat());
}

fn tables(folder: &Path) -> Vec<Vec<u8>> {
    ["sweep.csv", "requests.csv", "layers.csv"].map(|t| fs::read(folder.join(t)).unwrap()).into()
}

#[test]
fn a_bound_changes_no_number_and_leaves_no_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let (free, bound) = (dir.path().join("free"), dir.path().join("bound"));
    sweep(&free, &["--batch", "3"]);
    sweep(&bound, &["--batch", "3", "--memory", "2GiB"]);
    assert!(tables(&free) == tables(&bound));
    for run in fs::read_dir(bound.join("runs")).unwrap() {
        let name = run.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains("lot"), "{name}: the record holds all of it");
    }
}

/// Arms that are done are not measured again; a piece of one that is not, which cannot be read, is made anew. (tests/reliability/kills.py
/// stops sweeps between lots.)
#[test]
fn a_sweep_goes_on_where_it_was_and_past_damaged_pieces() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    sweep(&whole, &["--batch", "3"]);
    let cut = dir.path().join("cut");
    // The first shard's arms are done; the manifest and the others are not there.
    sweep(&cut, &["--batch", "3", "--shard", "0/2"]);
    fs::rename(cut.join("shards/0-of-2/runs"), cut.join("runs")).unwrap();
    let runs: Vec<_> = fs::read_dir(cut.join("runs")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(runs.len() > 2);
    for run in fs::read_dir(whole.join("runs")).unwrap() {
        let path = cut.join("runs").join(run.unwrap().file_name());
        if !path.exists() {
            fs::write(path.with_extension("lot-0.json"), "{").unwrap();
        }
    }
    sweep(&cut, &["--batch", "3"]);
    assert!(tables(&whole) == tables(&cut));
}

#[test]
fn what_does_not_fit_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let all = ["sweep", text(small_dump()), "-o", text(&out), "--method", "prefix"];
    refuse(&[&all[..], &["--memory", "1MiB"]].concat(), &["--memory 1MiB", "need", "pass --memory"]);
    assert!(!out.join("sweep.csv").exists());
    refuse(&[&all[..], &["--memory", "lots"]].concat(), &["--memory", "512MiB"]);
}

#[test]
fn a_pool_that_packs_holds_bytes_alone_and_reads_the_same_numbers() {
    let encoded = |packs: bool| {
        let mut batch = plain_copy(&made_up(7, 4, 60, 16, &["a"]));
        if packs {
            batch.pool.hold_coded(CodedPages::Packed);
        }
        Int8 {}.codec().unwrap().encode(&mut batch, &Memo::default()).unwrap();
        batch
    };
    let (free, packed) = (encoded(false), encoded(true));
    assert!(3 * packed.pool.bytes() < free.pool.bytes(), "{} {}", packed.pool.bytes(), free.pool.bytes());
    for request in 0..4 {
        assert_eq!(free.read(request, 1, 0), packed.read(request, 1, 0));
    }
}
