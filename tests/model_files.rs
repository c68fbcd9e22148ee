//! Model files as people have them: metadata of other widths and keys, tokenizers and chat templates of other families. Right
//! numbers, or one error that names the file and what to do.

#[path = "common/reference.rs"]
mod reference;

use kvfuse::model::Model;
use reference::{Case, Fixture, Metadata, logits};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn close(a: &[f32], b: &[f32]) -> bool {
    a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4)
}

/// A llama GGUF whose metadata were changed: the model, or what refuses it.
fn gguf(dir: &Path, fixture: &Fixture, change: impl Fn(&mut Metadata)) -> Result<Model, String> {
    let case = fixture.case("llama", "smollm");
    let words = &fixture.tokenizers["smollm"].metadata;
    let mut metadata: Metadata =
        case.metadata.iter().chain(words).map(|(k, v)| (k.clone(), v.clone())).collect();
    change(&mut metadata);
    let path = dir.join("model.gguf");
    case.write_gguf_of(&metadata, &path);
    Model::open(&path).map_err(|e| e.to_string())
}

fn set(metadata: &mut Metadata, key: &str, kind: &str, value: Value) {
    metadata.insert(key.to_owned(), (kind.to_owned(), value));
}

/// A folder whose config.json was changed.
fn folder(dir: &Path, case: &Case, tokenizer: &Value, change: impl Fn(&mut Value)) -> PathBuf {
    let path = dir.join("folder");
    let _ = fs::remove_dir_all(&path);
    case.write_folder(tokenizer, &path);
    let mut config = case.config.clone();
    change(&mut config);
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    path
}

#[test]
fn metadata_may_have_any_width() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let prompt = &fixture.case("llama", "smollm").prompt;
    let plain = logits(&gguf(dir.path(), &fixture, |_| {}).unwrap(), prompt);
    let wide = gguf(dir.path(), &fixture, |m| {
        set(m, "llama.context_length", "u64", json!(512));
        set(m, "llama.attention.head_count", "i32", json!(4));
        set(m, "llama.block_count", "u16", json!(2));
        set(m, "llama.attention.layer_norm_rms_epsilon", "f64", json!(1e-5));
        set(m, "llama.rope.freq_base", "f64", json!(5000.0));
        set(m, "llama.attention.head_count_kv", "i32s", json!([2, 2]));
        let token_type = &m["tokenizer.ggml.token_type"].1;
        let as_u32: Vec<u64> = token_type.as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        set(m, "tokenizer.ggml.token_type", "i32s", json!(as_u32));
        set(m, "tokenizer.ggml.eos_token_id", "u64", json!(346));
    });
    assert_eq!(logits(&wide.unwrap(), prompt), plain);
}

#[test]
fn rope_scaling_of_every_spelling() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let case = fixture.case("llama", "smollm");
    let tokenizer = &fixture.tokenizers["smollm"].json;
    let plain = logits(&gguf(dir.path(), &fixture, |_| {}).unwrap(), &case.prompt);
    let linear = folder(dir.path(), case, tokenizer, |c| {
        c["rope_scaling"] = json!({"rope_type": "linear", "factor": 4.0});
    });
    let linear = logits(&Model::open(&linear).unwrap(), &case.prompt);
    assert!(!close(&linear, &plain));
    for (key, kind) in
        [("rope.scaling.factor", None), ("rope.scaling.factor", Some("linear")), ("rope.scale_linear", None)]
    {
        let model = gguf(dir.path(), &fixture, |m| {
            set(m, &format!("llama.{key}"), "f32", json!(4.0));
            if let Some(kind) = kind {
                set(m, "llama.rope.scaling.type", "str", json!(kind));
            }
        });
        assert!(close(&logits(&model.unwrap(), &case.prompt), &linear), "{key} {kind:?}");
    }
    let none = gguf(dir.path(), &fixture, |m| {
        set(m, "llama.rope.scaling.factor", "f32", json!(4.0));
        set(m, "llama.rope.scaling.type", "str", json!("none"));
    });
    assert!(close(&logits(&none.unwrap(), &case.prompt), &plain));
    // rope_theta of today's and of older files.
    for (parameters, outside) in [
        (json!({"rope_type": "default", "rope_theta": 5000.0}), None),
        (json!({"rope_theta": 5000.0}), Some(10_000.0)),
    ] {
        let path = folder(dir.path(), case, tokenizer, |c| {
            c["rope_parameters"] = parameters.clone();
            c["rope_theta"] = json!(outside);
        });
        assert!(close(&logits(&Model::open(&path).unwrap(), &case.prompt), &plain), "{parameters}");
    }
}

#[test]
fn what_a_gguf_lacks_or_has_too_much_is_named() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let refused = |words: &[&str], change: &dyn Fn(&mut Metadata)| {
        let error = gguf(dir.path(), &fixture, change).map(|_| ()).unwrap_err();
        for word in words.iter().chain(&["model.gguf"]) {
            assert!(error.contains(word), "{error:?} lacks {word:?}");
        }
        assert!(!error.contains('\n'), "{error}");
    };
    refused(&["tokenizer.ggml.pre", "convert"], &|m| _ = m.remove("tokenizer.ggml.pre"));
    refused(&["llama.context_length", "missing"], &|m| _ = m.remove("llama.context_length"));
    refused(&["layer_norm_rms_epsilon", "missing"], &|m| {
        _ = m.remove("llama.attention.layer_norm_rms_epsilon")
    });
    refused(&["split", "llama-gguf-split --merge"], &|m| set(m, "split.count", "u16", json!(2)));
    refused(&["yarn"], &|m| set(m, "llama.rope.scaling.type", "str", json!("yarn")));
    refused(&["llama.attention.scale"], &|m| set(m, "llama.attention.scale", "f32", json!(0.5)));
    refused(&["llama.expert_count"], &|m| set(m, "llama.expert_count", "u32", json!(8)));
    refused(&["head_count_kv", "differs between layers"], &|m| {
        set(m, "llama.attention.head_count_kv", "i32s", json!([2, 1]));
    });
    refused(&["attention.causal"], &|m| set(m, "llama.attention.causal", "bool", json!(false)));
    // A quantisation that is not read, by name: its number follows the shape in the tensor's header.
    gguf(dir.path(), &fixture, |_| {}).unwrap();
    let path = dir.path().join("model.gguf");
    let mut bytes = fs::read(&path).unwrap();
    let name = b"blk.0.attn_q.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap() + name.len();
    let kind = at + 4 + 2 * 8;
    bytes[kind..kind + 4].copy_from_slice(&23u32.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let error = Model::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("IQ4_XS") && error.contains("not supported"), "{error}");
}

#[test]
fn a_gguf_names_the_ends_of_answers() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let plain = gguf(dir.path(), &fixture, |_| {}).unwrap();
    assert!(plain.tokenizer.is_end(346) && !plain.tokenizer.is_end(40));
    let model = gguf(dir.path(), &fixture, |m| {
        set(m, "tokenizer.ggml.eot_token_id", "u32", json!(40));
        set(m, "tokenizer.ggml.eom_token_id", "i32", json!(41));
    });
    let model = model.unwrap();
    assert!([346, 40, 41].iter().all(|id| model.tokenizer.is_end(*id)));
    assert_eq!((model.tokenizer.end(false), model.tokenizer.end(true)), (Some(346), Some(40)));
}

/// What follows a prompt is what the whole text's tokens have beyond the prompt's; a space is never doubled.
#[test]
fn a_continuation_is_as_the_model_would_have_seen_it() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    for (name, tokenizer) in
        [("llama", "sentence-piece"), ("gemma3", "sentence-piece-no-prefix"), ("llama", "smollm")]
    {
        let case = fixture.case(name, tokenizer);
        let path = folder(dir.path(), case, &fixture.tokenizers[tokenizer].json, |_| {});
        let tokenizer = Model::open(&path).unwrap().tokenizer;
        for (before, text) in [
            ("When does it leave the harbour?\nAnswer:", " in the morning"),
            ("The captain said:", " \"We'll see\""),
            ("the boats ", "were there"),
            ("a\n", "b"),
        ] {
            let (prompt, rest) =
                (tokenizer.encode(before).unwrap(), tokenizer.continuation(before, text).unwrap());
            let whole = tokenizer.encode(&format!("{before}{text}")).unwrap();
            let both = [prompt.clone(), rest.clone()].concat();
            if whole.starts_with(&prompt) {
                assert_eq!(both, whole, "{before:?} {text:?}");
            }
            assert_eq!(
                tokenizer.decode(&both).unwrap(),
                tokenizer.decode(&whole).unwrap(),
                "{before:?} {text:?}"
            );
        }
    }
}

/// Ids of a chat: the template's special tokens once each, the user's text as it is and never as an instruction.
#[test]
fn chat_templates_see_the_text_and_the_configured_tokens() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let case = fixture.case("llama", "sentence-piece");
    let path = folder(dir.path(), case, &fixture.tokenizers["sentence-piece"].json, |_| {});
    let template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{{ eos_token }}\
                    {% if loop.last %}{% break %}{% endif %}{% endfor %}[assistant]";
    let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template});
    fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    let tokenizer = Model::open(&path).unwrap().tokenizer;
    assert_eq!(tokenizer.render("  the boats \n").unwrap(), "<s>[user]the boats</s>[assistant]");
    let ids = tokenizer.encode_chat("  the boats \n").unwrap();
    assert_eq!(ids.iter().filter(|id| **id == 1).count(), 1, "one BOS: {ids:?}");
    assert_eq!(ids.iter().filter(|id| **id == 2).count(), 1, "one EOS: {ids:?}");
    assert_eq!(ids[0], 1);
    let user = tokenizer.encode_chat("the </s> boats").unwrap();
    assert_eq!(user.iter().filter(|id| **id == 2).count(), 1, "the user's </s> is text: {user:?}");
    let answer = tokenizer.chat_continuation("the boats", "in the harbour").unwrap();
    assert_eq!(tokenizer.decode(&answer).unwrap().trim(), "in the harbour");
}

/// Tokens and flags of tokenizer_config.json count as in transformers 5.
#[test]
fn tokens_of_the_tokenizers_configuration_count() {
    let (dir, fixture) = (tempfile::tempdir().unwrap(), Fixture::read());
    let case = fixture.case("llama", "smollm");
    let path = folder(dir.path(), case, &fixture.tokenizers["smollm"].json, |c| {
        c["vocab_size"] = case.config["vocab_size"].clone()
    });
    let write = |id: &str, content: &str| {
        let token = json!({"content": content, "special": false, "lstrip": false, "rstrip": false, "normalized": false});
        let config = json!({"added_tokens_decoder": {id: token}});
        fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    };
    write("900", "<y>");
    let error = Model::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("<y>"), "{error}");
    fs::write(path.join("tokenizer_config.json"), r#"{"split_special_tokens": true}"#).unwrap();
    let error = Model::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("split_special_tokens"), "{error}");
}
