//! Statistics and theory: against plain definitions, on degenerate caches, and through the binary on the real model.

mod common;

use common::{copy_folder, refuse, run, small_dump, succeed, text};
use kvfuse::codec::fusion::{Pairing, RopeMode};
use kvfuse::dump::{DataEntry, DumpDtype, Manifest, ModelEntry, RequestEntry, write_shard};
use kvfuse::model::{ModelConfig, RopeConfig};
use kvfuse::stats::{Class, Home, SimilarityOptions, StatRow, count_pairs, distinct_blocks, similarities};
use kvfuse::task::Request;
use kvfuse::theory::{Extent, LayerLaw, Model, layer_cr, percolation_requests, predict};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fs;
use std::path::Path;

type Cache = (Vec<f32>, Vec<f32>);

const WIDTH: usize = 4;

fn config() -> ModelConfig {
    ModelConfig {
        architecture: "llama".to_owned(),
        layers: 1,
        hidden: WIDTH,
        heads: 1,
        kv_heads: 1,
        head_dim: WIDTH,
        intermediate: WIDTH,
        vocab: 16,
        context: 4096,
        rms_epsilon: 1e-5,
        rope: RopeConfig::plain(10_000.0, WIDTH),
        sliding: None,
        query_scalar: None,
    }
}

/// A dump of one layer with these caches (one token more than the caches, as a prompt has). No model has made it, and the
/// statistics need none.
fn made_up_dump(folder: &Path, config: &ModelConfig, caches: &[Cache]) -> Manifest {
    let width = config.kv_heads * config.head_dim;
    let mut requests = Vec::new();
    for (i, (keys, values)) in caches.iter().enumerate() {
        let tokens = keys.len() / width + 1;
        let longer = |x: &[f32]| [x, &vec![0.5; width]].concat();
        let shard = format!("request-{i:05}.safetensors");
        let layers = [(longer(keys), longer(values))];
        let path = folder.join(&shard);
        let sha256 = write_shard(&path, &vec![1; tokens], &layers, config, DumpDtype::F32, "test").unwrap();
        let references = vec!["y".to_owned()];
        let request = Request { references, ..Request::raw(i.to_string(), "x".to_owned()) };
        requests.push(RequestEntry { shard, sha256, tokens, bits: None, request });
    }
    let manifest = Manifest {
        schema: 2,
        numerics: kvfuse::model::NUMERICS,
        kernels: Vec::new(),
        kvfuse_version: "test".to_owned(),
        command: vec!["test".to_owned()],
        model: ModelEntry { name: "none".to_owned(), sha256: "0".repeat(64), config: config.clone() },
        data: DataEntry {
            name: "made-up".to_owned(),
            sha256: "0".repeat(64),
            template: String::new(),
            shots: Vec::new(),
        },
        seed: 0,
        dtype: DumpDtype::F32,
        shared_prefix_tokens: 0,
        stop: None,
        answer_tokens: None,
        chat: false,
        encoded: None,
        requests,
    };
    manifest.write(folder).unwrap();
    manifest
}

fn options(size: usize, rope: RopeMode) -> SimilarityOptions {
    SimilarityOptions {
        block_sizes: vec![size],
        rope,
        sample: None,
        seed: 0,
        taus: vec![0.0, 0.5, 0.9],
        layers: None,
        lsh_recall: None,
        fuse: Vec::new(),
    }
}

fn value(rows: &[StatRow], part: &str, class: &str, statistic: &str, at: Option<f64>) -> Option<f64> {
    rows.iter().find(|r| r.is(part, class, statistic, at)).map(|r| r.value)
}

/// Caches of few different numbers, so that duplicates, zero blocks and equal blocks are common.
fn caches() -> impl Strategy<Value = Vec<Cache>> {
    let numbers = |tokens: usize| prop::collection::vec(-1i8..=1, tokens * WIDTH);
    let request = (1usize..9).prop_flat_map(move |tokens| (numbers(tokens), numbers(tokens)));
    let cache = request.prop_map(|(k, v)| {
        let floats = |x: Vec<i8>| x.into_iter().map(f32::from).collect::<Vec<f32>>();
        (floats(k), floats(v))
    });
    prop::collection::vec(cache, 1..6)
}

proptest! {
    /// Counts of all pairs equal those of the definition: two loops over distinct blocks.
    #[test]
    fn pairs_are_counted_as_defined(caches in caches(), size in 1usize..3) {
        let places: Vec<Home> = caches.iter().enumerate().flat_map(|(r, (keys, _))| {
            let full = keys.len() / WIDTH / size;
            (0..full).map(move |p| Home { request: r as u32, position: p as u32 })
        }).collect();
        let read = |requests: &[u32]| Ok(requests.iter().map(|&r| caches[r as usize].clone()).collect());
        let blocks = distinct_blocks(&read, &places, size, WIDTH, None).unwrap();
        // No cosine of so few small whole numbers is as close as rounding to one of these.
        let taus = [-0.47, 0.13, 0.61, 0.93];
        let sums = count_pairs(&blocks, &taus, caches.len()).unwrap();
        let of = |home: &Home| {
            let length = size * WIDTH;
            let at = home.position as usize * length;
            let (keys, values) = &caches[home.request as usize];
            (&keys[at..at + length], &values[at..at + length])
        };
        prop_assert_eq!(blocks.homes.iter().map(Vec::len).sum::<usize>(), places.len());
        for homes in &blocks.homes {
            prop_assert!(homes.iter().all(|h| of(h) == of(&homes[0])));
        }
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        let cosine = |a: &[f32], b: &[f32]| {
            let norms = (dot(a, a) * dot(b, b)).sqrt();
            if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
        };
        let n = blocks.len();
        for class in Class::ALL {
            let is = |i: usize, j: usize| {
                let (a, b) = (&blocks.homes[i], &blocks.homes[j]);
                let shared = a.iter().any(|x| b.iter().any(|y| x.request == y.request));
                let level = a.iter().any(|x| b.iter().any(|y| x.position == y.position));
                match class {
                    Class::SameRequest => shared,
                    Class::SamePosition => !shared && level,
                    Class::Other => !shared && !level,
                    Class::All => true,
                }
            };
            let pairs: Vec<(usize, f64)> = (0..n)
                .flat_map(|i| (0..n).map(move |j| (i, j)))
                .filter(|&(i, j)| i != j && is(i, j))
                .map(|(i, j)| (i, cosine(of(&blocks.homes[i][0]).0, of(&blocks.homes[j][0]).0)))
                .collect();
            let got = &sums.keys[class as usize];
            prop_assert_eq!(got.pairs, pairs.len() as u64);
            prop_assert!((got.powers[0] - pairs.iter().map(|p| p.1).sum::<f64>()).abs() < 1e-3);
            for (tau, above) in taus.iter().zip(&got.above) {
                let mut rows = vec![0u64; n];
                pairs.iter().filter(|p| p.1 > *tau).for_each(|p| rows[p.0] += 1);
                prop_assert_eq!(above.pairs, rows.iter().sum::<u64>());
                prop_assert_eq!(above.squares, rows.iter().map(|k| k * k).sum::<u64>());
            }
        }
    }

    /// Any cache, however degenerate, has finite statistics or an error that says there is no full block; predictions from
    /// them are finite and leave between one block and all.
    #[test]
    fn degenerate_caches_have_defined_answers(caches in caches(), size in 1usize..4, strip in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let manifest = made_up_dump(dir.path(), &config(), &caches);
        let requests: Vec<usize> = (0..caches.len()).collect();
        let rope = if strip { RopeMode::Strip } else { RopeMode::Keep };
        let rows = match similarities(dir.path(), &manifest, &requests, &options(size, rope)) {
            Ok(rows) => rows,
            Err(e) => {
                prop_assert!(caches.iter().all(|c| c.0.len() / WIDTH < size), "{}", e);
                return Ok(());
            }
        };
        for row in &rows {
            prop_assert!(row.value.is_finite(), "{:?}", row);
            if let (Some(low), Some(high)) = (row.low, row.high) {
                prop_assert!(low <= row.value + 1e-5 && row.value <= high + 1e-5, "{:?}", row);
            }
            if ["exceedance", "rho1", "extremal_index", "gap_ks", "gaussian_ks"].contains(&&row.statistic[..]) {
                prop_assert!((0.0..=1.0).contains(&row.value), "{:?}", row);
            }
            if row.statistic == "neighbour_correlation" {
                prop_assert!(row.value.abs() <= 1.0 + 1e-5, "{:?}", row);
            }
        }
        for law in LayerLaw::of_rows(&rows, size) {
            for model in [Model::Uniform, Model::ByPosition] {
                for pairing in [Pairing::Tree, Pairing::Best, Pairing::Components] {
                    for extent in [Extent::MEASURED, Extent { factor: 100.0, own: 1.0 }, Extent { factor: 3.0, own: 2.5 }] {
                        let mut last = f64::INFINITY;
                        for tau in [0.9, 0.5, 0.25, 0.0] {
                            let Some(p) = predict(&law, model, pairing, tau, extent) else {
                                prop_assert!(law.requests < 2.0 && extent != Extent::MEASURED);
                                continue;
                            };
                            prop_assert!(p.blocks >= 1.0 - 1e-9 && p.blocks <= p.distinct * (1.0 + 1e-9), "{:?}", p);
                            prop_assert!(p.blocks_low <= p.blocks * 1.001 && p.blocks <= p.blocks_high * 1.001, "{:?}", p);
                            // By position the second step may find so few left that they no longer meet.
                            prop_assert!(model == Model::ByPosition || p.blocks <= last * 1.001, "{:?} after {}", p, last);
                            prop_assert!(p.cr.is_finite() && (0.0..=1.0).contains(&p.giant_share), "{:?}", p);
                            for error in [p.key_error, p.value_error].into_iter().flatten() {
                                prop_assert!((-1e-9..=100.0).contains(&error), "{:?}", p);
                            }
                            prop_assert!(layer_cr(&law, p.blocks).is_some_and(|cr| cr > 0.0));
                            last = p.blocks;
                        }
                    }
                    if let Some(requests) = percolation_requests(&law, model, pairing, 0.5, 1.0) {
                        let extent = Extent { factor: 4.0 * requests / law.requests, own: 1.0 };
                        prop_assert!(predict(&law, model, pairing, 0.5, extent).unwrap().giant_share > 0.0);
                    }
                }
            }
        }
    }
}

/// Blocks of independent Gaussian numbers are the model's own world: exceedances come alone, the body is Gaussian with
/// deviation 1/sqrt(width), and every dimension is used.
#[test]
fn independent_blocks_look_independent() {
    let config = ModelConfig { head_dim: 64, hidden: 64, rope: RopeConfig::plain(1e4, 64), ..config() };
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    // Sums of twelve uniform numbers, less six.
    let mut normal = || (0..12).map(|_| rng.random_range(0.0f32..1.0)).sum::<f32>() - 6.0;
    let caches: Vec<Cache> = (0..24)
        .map(|_| {
            let keys: Vec<f32> = (0..30 * 64).map(|_| normal()).collect();
            (keys.clone(), keys)
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let manifest = made_up_dump(dir.path(), &config, &caches);
    let options = SimilarityOptions { taus: vec![0.25, 0.3], ..options(1, RopeMode::Keep) };
    let rows = similarities(dir.path(), &manifest, &(0..24).collect::<Vec<_>>(), &options).unwrap();
    let key =
        |class: &str, statistic: &str, at: Option<f64>| value(&rows, "key", class, statistic, at).unwrap();
    assert_eq!(value(&rows, "both", "all", "distinct", None), Some(720.0));
    for class in ["same_request", "same_position", "other", "all"] {
        assert!(key(class, "mean", None).abs() < 0.005, "{class}");
        assert!((key(class, "sd", None) - 0.125).abs() < 0.004, "{class}");
        assert!(key(class, "gaussian_ks", None) < 0.02, "{class}");
        assert!(key(class, "neighbour_correlation", None).abs() < 0.02, "{class}");
    }
    for tau in [0.25, 0.3] {
        let q = key("all", "exceedance", Some(tau));
        assert!((key("all", "dispersion", Some(tau)) - 1.0).abs() < 0.2);
        assert!((key("all", "rho1", Some(tau)) / q - 1.0).abs() < 0.1);
        assert!(key("all", "extremal_index", Some(tau)) > 0.9);
        assert!(key("all", "gap_ks", Some(tau)) < 0.05);
        let row = rows.iter().find(|r| {
            r.part == "key" && r.class == "all" && r.statistic == "exceedance" && r.at == Some(tau)
        });
        // The true share, of a cosine in 64 dimensions: (1 + cos) / 2 is a Beta(31.5, 31.5) variable.
        let exact = if tau == 0.25 { 0.023_15 } else { 0.008_03 };
        let (low, high) = row.map(|r| (r.low.unwrap(), r.high.unwrap())).unwrap();
        assert!(low - 0.001 <= exact && exact <= high + 0.001, "{tau}: [{low}, {high}]");
    }
    let dimension = key("all", "effective_dimension", None);
    // Of n blocks in d dimensions the participation ratio is n d / (n + d).
    assert!((dimension / (720.0 * 64.0 / 784.0) - 1.0).abs() < 0.03, "{dimension}");
}

/// One cluster at one position, everything else orthogonal: dispersion, rho1 and the position's own q in exact numbers.
#[test]
fn a_planted_cluster_is_found() {
    let config = ModelConfig { head_dim: 32, hidden: 32, rope: RopeConfig::plain(1e4, 32), ..config() };
    let caches: Vec<Cache> = (0..10)
        .map(|i| {
            let mut keys = vec![0.0; 2 * 32];
            keys[0] = 1.0;
            // Distinct, but hardly.
            keys[1] = 0.001 * (i + 1) as f32;
            keys[32 + 2 + i] = 1.0;
            (keys.clone(), keys)
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let manifest = made_up_dump(dir.path(), &config, &caches);
    let rows = similarities(dir.path(), &manifest, &(0..10).collect::<Vec<_>>(), &options(1, RopeMode::Keep))
        .unwrap();
    let key = |class: &str, statistic: &str| value(&rows, "key", class, statistic, Some(0.9));
    // 20 blocks, 190 pairs, 45 of them above; 10 blocks have 9 partners each, 10 have none.
    let near = |x: Option<f64>, y: f64| assert!((x.unwrap() / y - 1.0).abs() < 1e-4, "{x:?} {y}");
    near(key("all", "exceedance"), 45.0 / 190.0);
    near(key("all", "dispersion"), 20.0 * 4.5 * 4.5 / (45.0 / 190.0 * 380.0));
    near(key("all", "rho1"), 8.0 / 18.0);
    near(key("position_0", "exceedance"), 1.0);
    assert_eq!(key("position_1", "exceedance"), None, "its lowest threshold without a pair is lower");
    assert_eq!(value(&rows, "key", "position_1", "exceedance", Some(0.0)), Some(0.0));
    let law = &LayerLaw::of_rows(&rows, 1)[0];
    // The cluster becomes one block, the ten others stay; spread over all pairs, the same number of pairs says otherwise.
    let left = |model| predict(law, model, Pairing::Best, 0.9, Extent::MEASURED).unwrap().blocks;
    assert!((left(Model::ByPosition) - 11.0).abs() < 1e-6, "{}", left(Model::ByPosition));
    assert!(left(Model::Uniform) < 8.0, "{}", left(Model::Uniform));
}

#[test]
fn statistics_of_the_real_model_against_its_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (out, threads) in [("one", "1"), ("two", "2")] {
        let shown = succeed(&["stats", text(small_dump()), "-o", text(&path(out)), "--threads", threads]);
        assert!(shown.contains("blocks of 16 tokens"), "{shown}");
    }
    let csv = fs::read(path("one").join("stats.csv")).unwrap();
    assert!(csv == fs::read(path("two").join("stats.csv")).unwrap(), "depends on the number of threads");
    for figure in ["similarity", "exceedance", "dispersion"] {
        let svg = fs::read_to_string(path("one").join(format!("{figure}.svg"))).unwrap();
        assert!(svg.contains("<text"), "{figure}");
    }

    let sweep = path("sweep");
    let quick = ["--max-new-tokens", "1", "--resamples", "10"];
    let method = "bff:pairing=tree|best|components,representative=mean|first,spare-layers=0,tau=0.95|0.8";
    let arguments = ["--method", method];
    succeed(&[&["sweep", text(small_dump()), "-o", text(&sweep)], &arguments[..], &quick[..]].concat());
    let stats = path("one").join("stats.csv");
    let against = sweep.join("sweep.csv");
    let simulate = |out: &str, threads: &str| {
        succeed(&[
            "simulate",
            "--stats",
            text(&stats),
            "--against",
            text(&against),
            "--requests",
            "8..64",
            "--draws",
            "3",
            "--synthetic",
            "6,4",
            "--tau",
            "0.95,0.8",
            "-o",
            text(&path(out)),
            "--threads",
            threads,
        ])
    };
    let shown = simulate("model", "1");
    assert!(shown.contains("by position") && shown.contains("verdicts"), "{shown}");
    simulate("model-2", "2");
    for table in ["closed_forms", "monte_carlo", "predictions", "prediction_summary", "verdicts", "scale"]
        .map(|t| format!("{t}.csv"))
    {
        let bytes = fs::read(path("model").join(&table)).unwrap();
        assert!(bytes == fs::read(path("model-2").join(&table)).unwrap(), "{table} depends on the threads");
    }
    for figure in ["monte_carlo", "prediction", "scale"] {
        assert!(path("model").join(format!("{figure}.png")).exists(), "{figure}");
    }
    // A second run without a sweep leaves no predictions of the first behind.
    succeed(&[
        "simulate",
        "--stats",
        text(&stats),
        "--draws",
        "2",
        "--synthetic",
        "4,2",
        "-o",
        text(&path("model")),
    ]);
    assert!(!path("model").join("predictions.csv").exists());

    // What is not of these caches, or no table at all.
    refuse(&["simulate", "--stats", text(&against), "-o", text(&path("x"))], &["sweep.csv"]);
    refuse(&["simulate", "--stats", text(&path("none.csv")), "-o", text(&path("x"))], &["none.csv"]);
    refuse(
        &["simulate", "--stats", text(&stats), "--against", text(&stats), "-o", text(&path("x"))],
        &["layers.csv", "sweep again"],
    );
    refuse(
        &["simulate", "--stats", text(&stats), "--tau", "0.999", "-o", text(&path("x"))],
        &["stats.csv", "--tau"],
    );
    refuse(&["simulate", "--stats", text(&stats), "--layer", "99", "-o", text(&path("x"))], &["--layer 99"]);
    refuse(&["simulate", "--stats", text(&stats), "--requests", "64..8"], &["reversed"]);
    let lots = path("lots");
    succeed(&[&["sweep", text(small_dump()), "-o", text(&lots), "--batch", "2"], &quick[..]].concat());
    refuse(
        &[
            "simulate",
            "--stats",
            text(&stats),
            "--against",
            text(&lots.join("sweep.csv")),
            "-o",
            text(&path("x")),
        ],
        &["several batches", "--batch"],
    );
    let part = path("part");
    succeed(&["stats", text(small_dump()), "--sample", "20", "--tau", "0.5", "-o", text(&part)]);
    refuse(
        &[
            "simulate",
            "--stats",
            text(&part.join("stats.csv")),
            "--against",
            text(&against),
            "-o",
            text(&path("x")),
        ],
        &["different caches"],
    );
    refuse(
        &["simulate", "--stats", text(&part.join("stats.csv")), "--requests", "64", "-o", text(&path("x"))],
        &["sample", "--requests"],
    );
    // A table cut short in the middle of a line.
    let cut = path("cut.csv");
    fs::write(&cut, &csv[..csv.len() / 2]).unwrap();
    let output = run(&["simulate", "--stats", text(&cut), "-o", text(&path("x"))]);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn thresholds_from_the_model_run_in_a_sweep() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.toml");
    let shown = succeed(&[
        "calibrate",
        text(small_dump()),
        "--model-based",
        "--target-cr",
        "1.5",
        "--questions",
        "3",
        "-o",
        text(&file),
    ]);
    assert!(shown.contains("(predicted)"), "{shown}");
    assert!(fs::read_to_string(&file).unwrap().contains("model cr 1.5"));
    let out = dir.path().join("sweep");
    let quick = ["--max-new-tokens", "1", "--resamples", "10"];
    let method = format!("bff:thresholds={}", text(&file));
    succeed(&[&["sweep", text(small_dump()), "--method", &method, "-o", text(&out)], &quick[..]].concat());
    refuse(&["calibrate", text(small_dump()), "--target-cr", "2"], &["--model-based"]);
    refuse(
        &["calibrate", text(small_dump()), "--model-based", "--target-cr", "1e9", "--questions", "3"],
        &["--target-cr", "at most"],
    );
    refuse(
        &[
            "calibrate",
            text(small_dump()),
            "--model-based",
            "--target-cr",
            "2",
            "--method",
            "bff:pairing=lsh",
        ],
        &["model-based", "pairing"],
    );
}

#[test]
fn dumps_that_statistics_cannot_be_had_of() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    refuse(&["stats", text(&dir.path().join("none")), "-o", text(&out)], &["none", "kvfuse dump"]);
    refuse(&["stats", text(small_dump()), "--block-size", "4096", "-o", text(&out)], &["4096 tokens"]);
    refuse(&["stats", text(small_dump()), "--block-size", "0", "-o", text(&out)], &["--block-size 0"]);
    refuse(&["stats", text(small_dump()), "--tau", "2", "-o", text(&out)], &["--tau"]);
    let nan = dir.path().join("nan");
    copy_folder(small_dump(), &nan);
    let shard = nan.join("request-00001.safetensors");
    let mut bytes = fs::read(&shard).unwrap();
    // The end of the file is the last layer's values or the token ids; the middle is numbers in any case.
    let middle = bytes.len() / 2 / 2 * 2;
    bytes[middle..middle + 2].copy_from_slice(&[0x00, 0x7e]);
    bytes[middle + 1..middle + 3].copy_from_slice(&[0x7e, 0x7e]);
    fs::write(&shard, bytes).unwrap();
    refuse(&["stats", text(&nan), "-o", text(&out)], &["request-00001", "NaN"]);
    // One block in one request: nothing to compare, and a simulation says so.
    let single = dir.path().join("single");
    fs::create_dir(&single).unwrap();
    made_up_dump(&single, &config(), &[(vec![1.0; WIDTH * 2], vec![1.0; WIDTH * 2])]);
    succeed(&["stats", text(&single), "--block-size", "2", "-o", text(&out)]);
    refuse(
        &["simulate", "--stats", text(&out.join("stats.csv")), "-o", text(&out)],
        &["stats.csv", "two distinct blocks"],
    );
}
