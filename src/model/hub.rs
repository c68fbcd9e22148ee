//! The model hub, through hf-hub: HF_HOME, HF_TOKEN and HF_ENDPOINT mean what they mean to it.

use super::builtin::Builtin;
use crate::error::{Error, IoAt, Result};
use crate::interrupt;
use crate::progress::{Progress, Unit};
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

/// How long the hub may stay silent, before its first answer or between two pieces, until it is given up.
const PATIENCE: Duration = Duration::from_secs(8);
/// Files of a model folder beside its weights; the first two must be there.
const SMALL_FILES: [&str; 5] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// `hf:ORG/NAME[@REVISION]` as a repository; `None` if a model is not spelt so.
pub fn repository(spec: &str) -> Option<Result<Repo>> {
    let rest = spec.strip_prefix("hf:")?;
    let (name, revision) = rest.split_once('@').unwrap_or((rest, "main"));
    let parts: Vec<&str> = name.split('/').collect();
    let clean = |p: &&str| !p.is_empty() && !p.starts_with('.');
    if parts.len() != 2 || !parts.iter().all(clean) || revision.is_empty() {
        return Some(Err(Error::argument(format!("{spec}: use hf:ORG/NAME or hf:ORG/NAME@REVISION"))));
    }
    Some(Ok(Repo::with_revision(name.to_owned(), RepoType::Model, revision.to_owned())))
}

/// The folder of a repository's model, downloaded unless the hub's cache has it whole.
pub fn folder(spec: &str, repo: &Repo) -> Result<PathBuf> {
    if let Some(folder) = cached(repo) {
        return Ok(folder);
    }
    let wanted = repo.clone();
    let outcome = watched(spec, None, move |builder, counter| {
        let api = builder.build()?.repo(wanted);
        let names: Vec<String> = api.info()?.siblings.into_iter().map(|s| s.rfilename).collect();
        let weights = |name: &str| {
            // Some repositories keep a second copy of the weights in another layout.
            name.ends_with(".safetensors") && !name.contains('/') && !name.starts_with("consolidated")
        };
        let ours = |name: &&String| SMALL_FILES.contains(&&name[..]) || weights(name);
        for name in names.iter().filter(ours) {
            api.download_with_progress(name, counter.clone())?;
        }
        Ok(())
    });
    outcome.map_err(|e| match e {
        Error::Fetch(problem) => Error::Fetch(format!(
            "{spec}: the model hub gave no such model ({problem}); check the name, HF_ENDPOINT and HF_TOKEN, or pass a folder"
        )),
        other => other,
    })?;
    let missing = "is no model folder on the hub: it needs config.json, tokenizer.json and *.safetensors";
    cached(repo).ok_or_else(|| Error::Fetch(format!("{spec}: {missing}")))
}

/// The snapshot of a repository in the hub's cache, if all its files are there.
fn cached(repo: &Repo) -> Option<PathBuf> {
    let cache = Cache::from_env().repo(repo.clone());
    let config = cache.get(SMALL_FILES[0])?;
    cache.get(SMALL_FILES[1])?;
    let index = cache.get("model.safetensors.index.json");
    let shards: BTreeSet<String> = match index {
        Some(index) => {
            let index: Value = serde_json::from_str(&fs::read_to_string(index).ok()?).ok()?;
            index
                .get("weight_map")?
                .as_object()?
                .values()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        }
        None => BTreeSet::from(["model.safetensors".to_owned()]),
    };
    shards.iter().all(|s| cache.get(s).is_some()).then(|| config.parent().map(Path::to_owned))?
}

/// One file of a built-in model into `staging`.
pub fn file(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let (repo, file) = model.hub;
    let cache = staging.join("hub");
    let path = watched(model.name, Some(model.bytes), move |builder, counter| {
        let api = builder.with_cache_dir(cache).build()?;
        api.model(repo.to_owned()).download_with_progress(file, counter)
    })?;
    // The hub's cache holds a link to the blob; the blob is what moves into place.
    fs::canonicalize(&path).at(&path)
}

/// Runs a download in a thread of its own: a hub that hangs must not hang us, and Ctrl-C must be heard. `bytes`: how many
/// will come, if that is known.
fn watched<T: Send + 'static>(
    name: &str,
    bytes: Option<u64>,
    job: impl FnOnce(ApiBuilder, Counter) -> std::result::Result<T, ApiError> + Send + 'static,
) -> Result<T> {
    let counter = Counter::default();
    let theirs = counter.clone();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut builder = ApiBuilder::from_env().with_progress(false).with_retries(0);
        if let Ok(token) = env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        // The receiver may have given up; then nobody wants the answer.
        let _ = sender.send(job(builder, theirs));
    });
    let mut progress = None;
    let (mut seen, mut since) = (0, Instant::now());
    let outcome = loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(outcome) => break outcome,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::Fetch("download failed".to_owned()));
            }
            Err(mpsc::RecvTimeoutError::Timeout) => interrupt::check()?,
        }
        let done = counter.done.load(Ordering::Relaxed);
        if done > seen {
            (seen, since) = (done, Instant::now());
            let total = bytes.unwrap_or_else(|| counter.expected.load(Ordering::Relaxed));
            let label = format!("fetching {name}");
            let progress = progress.get_or_insert_with(|| Progress::new(label, total, Unit::Bytes));
            progress.set_length(total);
            progress.set(done);
        } else if since.elapsed() > PATIENCE {
            return Err(Error::Fetch("no answer".to_owned()));
        }
    };
    if let Some(progress) = progress {
        progress.finish();
    }
    outcome.map_err(|e| Error::Fetch(e.to_string().lines().next().unwrap_or_default().to_owned()))
}

/// Counts the bytes that hf-hub reports, over all files of a download.
#[derive(Clone, Default)]
struct Counter {
    expected: Arc<AtomicU64>,
    done: Arc<AtomicU64>,
}

impl hf_hub::api::Progress for Counter {
    fn init(&mut self, size: usize, _filename: &str) {
        self.expected.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn update(&mut self, size: usize) {
        self.done.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_are_parsed_or_refused() {
        assert!(repository("smollm2-135m").is_none());
        let repo = repository("hf:org/name@v1").unwrap().unwrap();
        assert_eq!((repo.url(), repo.revision()), ("org/name".to_owned(), "v1"));
        assert_eq!(repository("hf:org/name").unwrap().unwrap().revision(), "main");
        for bad in ["hf:", "hf:name", "hf:org/", "hf:a/b/c", "hf:../x", "hf:org/name@"] {
            assert!(repository(bad).unwrap().is_err(), "{bad}");
        }
    }
}
