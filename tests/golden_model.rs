//! The built-in models against reference numbers made outside this project (shared/golden/models.json, copied as a fixture).

use kvfuse::model::{Model, probe, registry};
use serde_json::Value;

fn floats(v: &Value) -> Vec<f64> {
    v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

#[test]
fn smollm2_agrees_with_the_reference() {
    agrees(registry::DEFAULT_MODEL);
}

#[test]
fn qwen2_agrees_with_the_reference() {
    agrees("qwen2.5-coder-0.5b");
}

#[test]
fn gemma3_agrees_with_the_reference() {
    agrees("gemma3-270m");
}

fn agrees(name: &str) {
    // Gemma's values reach 55.
    let sample_tolerance = if name.starts_with("gemma") { 1e-2 } else { 2e-3 };
    let golden: Value = serde_json::from_str(include_str!("fixtures/golden_models.json")).unwrap();
    let golden = &golden[name];
    let model = Model::load(name).unwrap();
    let config = model.decoder.config();
    assert_eq!(model.sha256, golden["sha256"].as_str().unwrap());
    for (name, expected) in golden["prompts"].as_object().unwrap() {
        let got = probe(&model, expected["text"].as_str().unwrap(), 16).unwrap();
        assert_eq!(got.ids, ids(&expected["ids"]), "{name}: token ids");
        let reference_ids = |i: usize| expected["top10"][i][0].as_u64().unwrap() as u32;
        let reference_logit = |i: usize| expected["top10"][i][1].as_f64().unwrap();
        for (i, candidate) in got.top10.iter().enumerate() {
            let reference = (0..10).find(|&j| reference_ids(j) == candidate.id).map(reference_logit);
            let reference = reference.unwrap_or_else(|| reference_logit(i));
            assert!((f64::from(candidate.logit) - reference).abs() < 2e-2, "{name}: logit {i}");
        }
        assert!((got.logsumexp - expected["logsumexp"].as_f64().unwrap()).abs() < 2e-2, "{name}: logsumexp");
        assert!((got.nll_prompt - expected["nll_prompt"].as_f64().unwrap()).abs() < 2e-3, "{name}: NLL");

        let layer = |n: usize, values: bool| -> Vec<f64> {
            let blocks = got.cache.layers[n].entries.iter();
            let read = |id| if values { got.pool.values(id) } else { got.pool.keys(id) };
            blocks.flat_map(|e| read(e.block).into_owned().into_iter().map(f64::from)).collect()
        };
        let (keys, values) = (floats(&expected["key_norm"]), floats(&expected["value_norm"]));
        for n in 0..config.layers {
            for (reference, is_values) in [(keys[n], false), (values[n], true)] {
                let norm = layer(n, is_values).iter().map(|x| x * x).sum::<f64>().sqrt();
                assert!(
                    (norm / reference - 1.0).abs() < 1e-3,
                    "{name}: norm of layer {n}, values {is_values}"
                );
            }
        }
        let token = expected["sample_token"].as_u64().unwrap() as usize;
        for (i, n) in [0, config.layers / 2, config.layers - 1].into_iter().enumerate() {
            for (reference, is_values) in
                [(&expected["key_sample"], false), (&expected["value_sample"], true)]
            {
                let row = &layer(n, is_values)[token * config.kv_heads * config.head_dim..][..8];
                for (got, reference) in row.iter().zip(floats(&reference[i])) {
                    assert!(
                        (got - reference).abs() < sample_tolerance,
                        "{name}: layer {n}: {got} {reference}"
                    );
                }
            }
        }
        // The reference's two best logits never lie closer than 2e-2 in these continuations.
        assert_eq!(got.greedy_ids, ids(&expected["greedy16"]), "{name}: greedy tokens");
        assert_eq!(got.greedy_text, expected["greedy_text"].as_str().unwrap(), "{name}: greedy text");
    }
}
