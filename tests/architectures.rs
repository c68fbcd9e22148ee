//! Tiny random Hugging Face folders of every architecture against a forward pass in f64 that is written out here.

mod common;

use half::{bf16, f16};
use kvfuse::block::{BlockPool, Storage};
use kvfuse::model::{ARCHITECTURES, Decoder, HfFolder, Segment, TensorSource, Weights};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::fs;
use std::path::Path;

const HIDDEN: usize = 24;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 8;
const WIDE: usize = 40;
const VOCAB: usize = 70;
const TOKENS: usize = 21;
const WINDOW: usize = 6;

/// What one architecture is, said independently of the library.
#[derive(Clone)]
struct Case {
    architecture: &'static str,
    /// Fields of config.json beside the sizes.
    extra: Value,
    layers: usize,
    dtype: Dtype,
    shards: usize,
    tied: bool,
    bias: bool,
    qk_norm: bool,
    fused: bool,
    sandwich: bool,
    /// Radians a token of pair `i` of a head, in layer `n`.
    frequency: fn(n: usize, i: usize) -> f64,
    slides: fn(n: usize) -> bool,
    query_scalar: f64,
}

fn plain(i: usize, base: f64) -> f64 {
    base.powf(-(2.0 * i as f64) / DIM as f64)
}

fn cases() -> Vec<Case> {
    let llama = Case {
        architecture: "llama",
        extra: json!({"rope_theta": 1000.0}),
        layers: 2,
        dtype: Dtype::F32,
        shards: 1,
        tied: true,
        bias: false,
        qk_norm: false,
        fused: false,
        sandwich: false,
        frequency: |_, i| plain(i, 1000.0),
        slides: |_| false,
        query_scalar: DIM as f64,
    };
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    vec![
        llama.clone(),
        Case {
            extra: json!({"rope_theta": 1000.0, "rope_scaling": scaling}),
            // Wavelengths of 6, 35, 199 and 1117 tokens: turns in 64 tokens 10, 1.8, 0.3, 0.06.
            frequency: |_, i| {
                let f = plain(i, 1000.0);
                let turns = 64.0 * f / (2.0 * PI);
                match turns {
                    t if t > 4.0 => f,
                    t if t < 1.0 => f / 8.0,
                    t => {
                        let smooth = (t - 1.0) / 3.0;
                        (1.0 - smooth) * f / 8.0 + smooth * f
                    }
                }
            },
            dtype: Dtype::BF16,
            shards: 3,
            tied: false,
            ..llama.clone()
        },
        Case {
            extra: json!({"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}}),
            frequency: |_, i| plain(i, 1000.0) / 4.0,
            ..llama.clone()
        },
        Case {
            architecture: "mistral",
            extra: json!({"sliding_window": WINDOW}),
            frequency: |_, i| plain(i, 10_000.0),
            slides: |_| true,
            dtype: Dtype::F16,
            ..llama.clone()
        },
        Case {
            architecture: "qwen2",
            extra: json!({"rope_theta": 1000.0, "use_sliding_window": false, "sliding_window": 4}),
            bias: true,
            ..llama.clone()
        },
        Case {
            architecture: "qwen2",
            extra: json!({"rope_theta": 1000.0, "use_sliding_window": true, "sliding_window": WINDOW,
                "max_window_layers": 1}),
            bias: true,
            slides: |n| n >= 1,
            ..llama.clone()
        },
        Case { architecture: "qwen3", qk_norm: true, tied: false, dtype: Dtype::BF16, ..llama.clone() },
        Case {
            architecture: "phi3",
            extra: json!({"rope_theta": 1000.0, "sliding_window": WINDOW}),
            fused: true,
            slides: |_| true,
            tied: false,
            ..llama.clone()
        },
        Case {
            architecture: "gemma3",
            extra: json!({"rope_theta": 50_000.0, "rope_local_base_freq": 100.0, "sliding_window": WINDOW,
                "query_pre_attn_scalar": 12.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
            layers: 7,
            qk_norm: true,
            sandwich: true,
            frequency: |n, i| if n == 5 { plain(i, 50_000.0) / 2.0 } else { plain(i, 100.0) },
            slides: |n| n != 5,
            query_scalar: 12.0,
            ..llama.clone()
        },
        Case {
            architecture: "gemma3",
            extra: json!({"sliding_window": WINDOW, "query_pre_attn_scalar": DIM, "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 50_000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}},
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
            layers: 3,
            qk_norm: true,
            sandwich: true,
            frequency: |n, i| plain(i, if n == 1 { 50_000.0 } else { 100.0 }),
            slides: |n| n != 1,
            ..llama
        },
    ]
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

impl Case {
    fn tensors(&self, rng: &mut ChaCha8Rng) -> Tensors {
        let (q, kv) = (HEADS * DIM, KV_HEADS * DIM);
        let mut shapes = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
            ("model.norm.weight".to_owned(), vec![HIDDEN]),
        ];
        if !self.tied {
            shapes.push(("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]));
        }
        for n in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                shapes.push((format!("model.layers.{n}.{name}"), shape.to_vec()));
            };
            if self.fused {
                add("self_attn.qkv_proj.weight", &[q + 2 * kv, HIDDEN]);
                add("mlp.gate_up_proj.weight", &[2 * WIDE, HIDDEN]);
            } else {
                add("self_attn.q_proj.weight", &[q, HIDDEN]);
                add("self_attn.k_proj.weight", &[kv, HIDDEN]);
                add("self_attn.v_proj.weight", &[kv, HIDDEN]);
                add("mlp.gate_proj.weight", &[WIDE, HIDDEN]);
                add("mlp.up_proj.weight", &[WIDE, HIDDEN]);
            }
            add("self_attn.o_proj.weight", &[HIDDEN, q]);
            add("mlp.down_proj.weight", &[HIDDEN, WIDE]);
            add("input_layernorm.weight", &[HIDDEN]);
            add("post_attention_layernorm.weight", &[HIDDEN]);
            if self.bias {
                add("self_attn.q_proj.bias", &[q]);
                add("self_attn.k_proj.bias", &[kv]);
                add("self_attn.v_proj.bias", &[kv]);
            }
            if self.qk_norm {
                add("self_attn.q_norm.weight", &[DIM]);
                add("self_attn.k_norm.weight", &[DIM]);
            }
            if self.sandwich {
                add("pre_feedforward_layernorm.weight", &[HIDDEN]);
                add("post_feedforward_layernorm.weight", &[HIDDEN]);
            }
        }
        let rounded = |x: f32| match self.dtype {
            Dtype::F16 => f16::from_f32(x).to_f32(),
            Dtype::BF16 => bf16::from_f32(x).to_f32(),
            _ => x,
        };
        let mut draw = |(name, shape): (String, Vec<usize>)| {
            let n = shape.iter().product();
            let data = (0..n).map(|_| rounded(rng.random_range(-0.6f32..0.6))).collect();
            (name, (shape, data))
        };
        shapes.into_iter().map(&mut draw).collect()
    }

    /// Writes config.json and the shards.
    fn write(&self, folder: &Path, tensors: &Tensors) {
        let kind = if self.architecture == "gemma3" { "gemma3_text" } else { self.architecture };
        let mut config = json!({
            "model_type": kind, "hidden_size": HIDDEN, "num_hidden_layers": self.layers,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
            "intermediate_size": WIDE, "vocab_size": VOCAB, "max_position_embeddings": 128,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": self.tied,
        });
        config.as_object_mut().unwrap().extend(self.extra.as_object().unwrap().clone());
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
            .iter()
            .map(|(name, (shape, data))| {
                let bytes = data.iter().flat_map(|&x| match self.dtype {
                    Dtype::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
                    Dtype::BF16 => bf16::from_f32(x).to_le_bytes().to_vec(),
                    _ => x.to_le_bytes().to_vec(),
                });
                (name.clone(), shape.clone(), bytes.collect())
            })
            .collect();
        let mut index: BTreeMap<String, String> = BTreeMap::new();
        for shard in 0..self.shards {
            let part = bytes.iter().skip(shard).step_by(self.shards);
            let views = part.map(|(n, s, b)| (n, TensorView::new(self.dtype, s.clone(), b).unwrap()));
            let name = match self.shards {
                1 => "model.safetensors".to_owned(),
                n => format!("model-{:05}-of-{n:05}.safetensors", shard + 1),
            };
            let names = bytes.iter().skip(shard).step_by(self.shards).map(|(n, ..)| n.clone());
            index.extend(names.map(|n| (n, name.clone())));
            safetensors::serialize_to_file(views, None, &folder.join(name)).unwrap();
        }
        if self.shards > 1 {
            let index = json!({"metadata": {}, "weight_map": index});
            fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }

    /// Logits of every token, `[TOKENS][VOCAB]`, and keys of every layer after RoPE, `[layers][TOKENS][KV_HEADS * DIM]`.
    #[allow(clippy::needless_range_loop)]
    fn reference(&self, tensors: &Tensors, tokens: &[u32]) -> (Vec<Vec<f64>>, Vec<Vec<Vec<f64>>>) {
        let numbers = |name: &str| -> Vec<f64> { tensors[name].1.iter().map(|&x| f64::from(x)).collect() };
        let times = |weight: &[f64], x: &[f64]| -> Vec<f64> {
            weight.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum()).collect()
        };
        let gain_base = if self.architecture == "gemma3" { 1.0 } else { 0.0 };
        let norm = |x: &[f64], gain: &[f64]| -> Vec<f64> {
            let mean: f64 = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
            x.iter().zip(gain).map(|(x, g)| x / (mean + 1e-5).sqrt() * (g + gain_base)).collect()
        };
        let embedding = numbers("model.embed_tokens.weight");
        let factor = if self.architecture == "gemma3" { (HIDDEN as f64).sqrt() } else { 1.0 };
        let mut stream: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&t| embedding[t as usize * HIDDEN..][..HIDDEN].iter().map(|x| x * factor).collect())
            .collect();
        let mut all_keys = Vec::new();
        for n in 0..self.layers {
            let weight = |name: &str| numbers(&format!("model.layers.{n}.{name}"));
            let rotate = |head: &mut [f64], position: usize| {
                for i in 0..DIM / 2 {
                    let angle = position as f64 * (self.frequency)(n, i);
                    let (a, b) = (head[i], head[i + DIM / 2]);
                    head[i] = a * angle.cos() - b * angle.sin();
                    head[i + DIM / 2] = b * angle.cos() + a * angle.sin();
                }
            };
            let (mut queries, mut keys, mut values) = (Vec::new(), Vec::new(), Vec::new());
            for (position, x) in stream.iter().enumerate() {
                let x = norm(x, &weight("input_layernorm.weight"));
                let (mut q, mut k, mut v) = if self.fused {
                    let all = times(&weight("self_attn.qkv_proj.weight"), &x);
                    let (q, rest) = all.split_at(HEADS * DIM);
                    let (k, v) = rest.split_at(KV_HEADS * DIM);
                    (q.to_vec(), k.to_vec(), v.to_vec())
                } else {
                    let part = |p: &str| times(&weight(&format!("self_attn.{p}_proj.weight")), &x);
                    (part("q"), part("k"), part("v"))
                };
                if self.bias {
                    for (x, p) in [(&mut q, "q"), (&mut k, "k"), (&mut v, "v")] {
                        let bias = weight(&format!("self_attn.{p}_proj.bias"));
                        x.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
                    }
                }
                for (x, p) in [(&mut q, "q"), (&mut k, "k")] {
                    for head in x.chunks_mut(DIM) {
                        if self.qk_norm {
                            let normed = norm(head, &weight(&format!("self_attn.{p}_norm.weight")));
                            head.copy_from_slice(&normed);
                        }
                        rotate(head, position);
                    }
                }
                queries.push(q);
                keys.push(k);
                values.push(v);
            }
            for t in 0..stream.len() {
                let mut attended = vec![0.0; HEADS * DIM];
                for h in 0..HEADS {
                    let kv = h / (HEADS / KV_HEADS) * DIM;
                    let first = if (self.slides)(n) { (t + 1).saturating_sub(WINDOW) } else { 0 };
                    let weights: Vec<f64> = (first..=t)
                        .map(|s| {
                            let dot: f64 = (0..DIM).map(|i| queries[t][h * DIM + i] * keys[s][kv + i]).sum();
                            (dot / self.query_scalar.sqrt()).exp()
                        })
                        .collect();
                    let sum: f64 = weights.iter().sum();
                    for (w, s) in weights.iter().zip(first..) {
                        for i in 0..DIM {
                            attended[h * DIM + i] += w / sum * values[s][kv + i];
                        }
                    }
                }
                let mut out = times(&weight("self_attn.o_proj.weight"), &attended);
                let between = if self.sandwich {
                    out = norm(&out, &weight("post_attention_layernorm.weight"));
                    weight("pre_feedforward_layernorm.weight")
                } else {
                    weight("post_attention_layernorm.weight")
                };
                stream[t].iter_mut().zip(&out).for_each(|(x, o)| *x += o);
                let x = norm(&stream[t], &between);
                let (gate, up) = if self.fused {
                    let all = times(&weight("mlp.gate_up_proj.weight"), &x);
                    (all[..WIDE].to_vec(), all[WIDE..].to_vec())
                } else {
                    (times(&weight("mlp.gate_proj.weight"), &x), times(&weight("mlp.up_proj.weight"), &x))
                };
                let activated = gate.iter().zip(up).map(|(&g, u)| {
                    let gate = if self.architecture == "gemma3" {
                        0.5 * g * (1.0 + ((2.0 / PI).sqrt() * (g + 0.044715 * g.powi(3))).tanh())
                    } else {
                        g / (1.0 + (-g).exp())
                    };
                    gate * u
                });
                let mut out = times(&weight("mlp.down_proj.weight"), &activated.collect::<Vec<_>>());
                if self.sandwich {
                    out = norm(&out, &weight("post_feedforward_layernorm.weight"));
                }
                stream[t].iter_mut().zip(&out).for_each(|(x, o)| *x += o);
            }
            all_keys.push(keys);
        }
        let head = if self.tied { embedding } else { numbers("lm_head.weight") };
        let logits = stream.iter().map(|x| times(&head, &norm(x, &numbers("model.norm.weight")))).collect();
        (logits, all_keys)
    }
}

#[test]
fn every_architecture_equals_its_definition() {
    let cases = cases();
    for architecture in ARCHITECTURES {
        assert!(cases.iter().any(|c| c.architecture == architecture), "{architecture} is not tested");
    }
    for (i, case) in cases.iter().enumerate() {
        let label = format!("case {i}, {}", case.architecture);
        let mut rng = ChaCha8Rng::seed_from_u64(i as u64);
        let tensors = case.tensors(&mut rng);
        let dir = tempfile::tempdir().unwrap();
        case.write(dir.path(), &tensors);
        let folder = HfFolder::open(dir.path()).unwrap();
        assert_eq!(folder.is_tied(), case.tied);
        let weights = Weights::load(folder.config(), &folder).unwrap();
        let decoder = Decoder::new(folder.config().clone(), weights);
        let tokens: Vec<u32> = (0..TOKENS).map(|_| rng.random_range(0..VOCAB as u32)).collect();

        // Some tokens at once, the rest one by one: both ways through attention.
        let mut pool = BlockPool::new(decoder.block_shape(4), Storage::F32);
        let mut cache = decoder.new_cache();
        let mut hidden = Vec::new();
        let (together, single) = tokens.split_at(13);
        for part in [together].into_iter().chain(single.chunks(1)) {
            let segment = Segment { cache: &mut cache, tokens: part };
            hidden.extend(decoder.forward(&mut pool, &mut [segment], None).unwrap());
        }
        let logits = decoder.logits(&hidden);
        let (expected, keys) = case.reference(&tensors, &tokens);
        for (t, (got, expected)) in logits.chunks(VOCAB).zip(&expected).enumerate() {
            for (got, expected) in got.iter().zip(expected) {
                let error = (f64::from(*got) - expected).abs();
                assert!(error < 2e-4 * (1.0 + expected.abs()), "{label}, token {t}: {got} {expected}");
            }
        }
        for (n, keys) in keys.iter().enumerate() {
            let blocks = cache.layers[n].entries.iter();
            let got: Vec<f32> = blocks.flat_map(|e| pool.keys(e.block).to_vec()).collect();
            for (got, expected) in got.iter().zip(keys.iter().flatten()) {
                let error = (f64::from(*got) - expected).abs();
                assert!(error < 1e-4 * (1.0 + expected.abs()), "{label}, layer {n}: {got} {expected}");
            }
        }
    }
}

/// Peak resident memory of this process in KiB, from the kernel.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Writes a gibibyte; run alone by `just memory`.
#[test]
#[ignore = "writes 1 GiB and measures the whole process: run by `just memory`"]
fn a_gibibyte_of_bf16_peaks_near_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let (hidden, wide, vocab, layers) = (1536, 6144, 64_000, 12);
    let config = json!({
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": 12,
        "num_key_value_heads": 4, "intermediate_size": wide, "vocab_size": vocab, "max_position_embeddings": 2048,
        "tie_word_embeddings": true,
    });
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut bytes = 0;
    let mut index: BTreeMap<String, String> = BTreeMap::new();
    let mut write = |name: &str, shapes: Vec<(String, Vec<usize>)>| {
        let data: Vec<(String, Vec<usize>, Vec<u8>)> = shapes
            .into_iter()
            .map(|(name, shape)| {
                let n: usize = shape.iter().product();
                let pattern = (0..n).flat_map(|i| bf16::from_f32((i % 31) as f32 / 512.0).to_le_bytes());
                (name, shape, pattern.collect())
            })
            .collect();
        index.extend(data.iter().map(|(n, ..)| (n.clone(), name.to_owned())));
        let views = data.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::BF16, s.clone(), b).unwrap()));
        let path = dir.path().join(name);
        safetensors::serialize_to_file(views, None, &path).unwrap();
        bytes += fs::metadata(path).unwrap().len();
    };
    write(
        "a.safetensors",
        vec![
            ("model.embed_tokens.weight".to_owned(), vec![vocab, hidden]),
            ("model.norm.weight".to_owned(), vec![hidden]),
        ],
    );
    for n in 0..layers {
        let tensor =
            |name: &str, shape: &[usize]| (format!("model.layers.{n}.{name}.weight"), shape.to_vec());
        write(
            &format!("layer-{n:02}.safetensors"),
            vec![
                tensor("self_attn.q_proj", &[hidden, hidden]),
                tensor("self_attn.k_proj", &[512, hidden]),
                tensor("self_attn.v_proj", &[512, hidden]),
                tensor("self_attn.o_proj", &[hidden, hidden]),
                tensor("mlp.gate_proj", &[wide, hidden]),
                tensor("mlp.up_proj", &[wide, hidden]),
                tensor("mlp.down_proj", &[hidden, wide]),
                tensor("input_layernorm", &[hidden]),
                tensor("post_attention_layernorm", &[hidden]),
            ],
        );
    }
    let index = json!({"metadata": {}, "weight_map": index});
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    let before = peak_kib() * 1024;
    let folder = HfFolder::open(dir.path()).unwrap();
    let weights = Weights::load(folder.config(), &folder).unwrap();
    let peak = peak_kib() * 1024;
    let ratio = peak as f64 / bytes as f64;
    println!("files {bytes} bytes, peak {peak} bytes ({before} before loading): {ratio:.3} of the files");
    assert!(ratio <= 1.3, "loading peaks at {ratio} of the file size");
    assert_eq!(weights.layers.len(), layers);
}
