//! Token ids and log-probabilities against transformers and llama.cpp, for every architecture and both kinds of file.
//! `tests/reference/make.py` made the fixture; the files are written here from it, weights from a hash.

#[path = "common/reference.rs"]
mod reference;

use kvfuse::model::{ARCHITECTURES, Model, log_sum_exp};
use reference::{Fixture, logits};
use std::collections::BTreeSet;

/// Log-probabilities of the token after a prompt.
fn log_probabilities(model: &Model, prompt: &[u32]) -> Vec<f64> {
    let last = logits(model, prompt);
    let norm = log_sum_exp(&last);
    last.iter().map(|x| f64::from(*x) - norm).collect()
}

/// llama.cpp rounds activations to 16 bits in places: it differs from transformers by up to 6e-3 itself.
const TOLERANCES: [f64; 2] = [2e-4, 2e-2];

#[test]
fn transformers_and_llama_cpp_say_the_same() {
    let fixture = Fixture::read();
    assert!(fixture.texts.len() >= 100);
    let covered: BTreeSet<&str> = fixture.cases.iter().map(|c| c.name.as_str()).collect();
    assert!(ARCHITECTURES.iter().all(|a| covered.contains(a)), "{covered:?}");
    let dir = tempfile::tempdir().unwrap();
    for (n, case) in fixture.cases.iter().enumerate() {
        let tokens = &fixture.tokenizers[&case.tokenizer];
        let (folder, gguf) = (dir.path().join(format!("{n}")), dir.path().join(format!("{n}.gguf")));
        case.write_folder(&tokens.json, &folder);
        case.write_gguf(&tokens.metadata, &gguf);
        for (path, kind) in [(folder, "folder"), (gguf, "GGUF")] {
            let model = Model::open(&path).unwrap();
            let label = format!("{} with {}, {kind}", case.name, case.tokenizer);
            for (i, text) in fixture.texts.iter().enumerate() {
                let ids = model.tokenizer.encode_prompt(text).unwrap();
                assert_eq!(ids, case.transformers.ids[i], "{label}: {text:?}, transformers");
                // llama.cpp leaves out the NFC that Qwen's own tokenizer does.
                let composed = case.tokenizer == "qwen2" && case.llama_cpp.ids[i] != case.transformers.ids[i];
                if composed {
                    assert!(
                        ["cafe\u{301}", "\u{212b} \u{c5} A\u{30a}", "\u{1112}\u{1161}\u{11ab}"]
                            .contains(&text.as_str())
                    );
                } else {
                    assert_eq!(ids, case.llama_cpp.ids[i], "{label}: {text:?}, llama.cpp");
                }
            }
            let own = log_probabilities(&model, &case.prompt);
            for (said, tolerance) in [&case.transformers, &case.llama_cpp].into_iter().zip(TOLERANCES) {
                for &(token, expected) in &said.top {
                    let error = (own[token as usize] - expected).abs();
                    assert!(error < tolerance, "{label}: token {token}, {} {expected}", own[token as usize]);
                }
            }
        }
    }
}
