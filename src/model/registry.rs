//! Built-in model names: what they stand for, where their file is kept, and how it is fetched the first time.

pub use super::builtin::{BUILTINS, Builtin, DEFAULT_MODEL, builtin, models_folder};
use super::{fetch, hub};
use crate::error::{Error, IoAt, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The file or folder that `--model` means; a built-in name or `hf:ORG/NAME` is fetched if it is not on disk yet.
pub fn resolve(spec: &str) -> Result<PathBuf> {
    if let Some(repo) = hub::repository(spec) {
        return hub::folder(spec, &repo?);
    }
    let Some(model) = builtin(spec) else {
        let path = PathBuf::from(spec);
        if path.exists() {
            return Ok(path);
        }
        let names: Vec<&str> = BUILTINS.iter().map(|b| b.name).collect();
        let problem = format!(
            "no such file or folder, nor a built-in model (those are: {}), nor hf:ORG/NAME",
            names.join(", ")
        );
        return Err(Error::file(path, problem));
    };
    let path = model.cached_path()?;
    if !path.exists() {
        obtain(model, &path)?;
    }
    Ok(path)
}

/// Fetches a model under a lock, so that two commands started together download once.
fn obtain(model: &Builtin, path: &Path) -> Result<()> {
    let folder = models_folder()?;
    fs::create_dir_all(&folder).at(&folder)?;
    let lock_path = folder.join(".lock");
    let lock = File::create(&lock_path).at(&lock_path)?;
    lock.lock().at(&lock_path)?;
    if path.exists() {
        return Ok(());
    }
    // Whatever a killed fetch left behind is of no use to this one.
    let staging = folder.join(".fetching");
    if staging.exists() {
        fs::remove_dir_all(&staging).at(&staging)?;
    }
    fs::create_dir_all(&staging).at(&staging)?;
    let outcome = fetch::fetch(model, &staging).and_then(|file| fs::rename(&file, path).at(path));
    // An abandoned hub download may still be writing in there. What stays behind goes before the next fetch.
    let _ = fs::remove_dir_all(&staging);
    outcome
}
