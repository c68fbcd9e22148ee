//! Sweeps that several processes share: each runs some of the arms into a folder of its own, and what they made is put together.

use super::run::{kernels, write_tables};
use super::runs::{RunRecord, Runs};
use crate::error::{Error, IoAt, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::tables::Format;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// One of so many processes, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub count: usize,
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

impl FromStr for Shard {
    type Err = String;

    /// `I/N`, or `N` with the index that a job array gives in `SLURM_ARRAY_TASK_ID` or `HQ_TASK_ID`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let number = |text: &str| text.parse::<usize>().ok();
        let parts = match text.split_once('/') {
            Some((index, count)) => number(index).zip(number(count)),
            None => number(text).map(|count| (task_of_array().unwrap_or(usize::MAX), count)),
        };
        match parts {
            Some((usize::MAX, _)) => {
                Err("outside of a job array write I/N; SLURM_ARRAY_TASK_ID and HQ_TASK_ID are not set"
                    .to_owned())
            }
            Some((index, count)) if index < count => Ok(Shard { index, count }),
            _ => Err("write I/N, I from 0 to N - 1".to_owned()),
        }
    }
}

/// The place of this process in its job array.
fn task_of_array() -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<usize>().ok();
    number("SLURM_ARRAY_TASK_ID").or_else(|| number("HQ_TASK_ID"))
}

/// Where shards of a sweep into `out` write.
const SHARDS: &str = "shards";
/// What a shard is to do.
const SHARD_JSON: &str = "shard.json";

/// What a shard of a sweep is to do.
#[derive(Serialize, Deserialize)]
struct Task {
    index: usize,
    count: usize,
    /// All runs of the sweep in the order of its tables.
    runs: Vec<String>,
    /// Those that are this shard's.
    own: Vec<String>,
}

impl Shard {
    /// Whether an arm of a grid is this shard's.
    pub fn has(&self, arm: usize) -> bool {
        arm % self.count == self.index
    }

    /// Its folder.
    pub fn folder(&self, out: &Path) -> PathBuf {
        out.join(SHARDS).join(format!("{}-of-{}", self.index, self.count))
    }

    /// Writes down what is to be done.
    pub(super) fn begin(&self, folder: &Path, runs: &[String], own: &[bool]) -> Result<()> {
        let own = runs.iter().zip(own).filter(|(_, own)| **own).map(|(id, _)| id.clone()).collect();
        let task = Task { index: self.index, count: self.count, runs: runs.to_vec(), own };
        files::write_json(&folder.join(SHARD_JSON), &task)
    }
}

/// Puts the shards of a sweep together: tables, runs and manifest as one process would have written them. `folders` are
/// outputs that hold `shards/`, or shards' own folders. Returns how many arms there are.
///
/// # Errors
/// Shards that are missing or not finished, by number; shards of different sweeps.
pub fn merge(folders: &[PathBuf], out: &Path) -> Result<usize> {
    let mut shards: BTreeMap<usize, (PathBuf, Task)> = BTreeMap::new();
    for folder in folders {
        for own in shard_folders(folder)? {
            let path = own.join(SHARD_JSON);
            let text = files::read_text(&path)?;
            let task: Task = serde_json::from_str(&text)
                .map_err(|e| Error::file(&path, format!("is no shard's ({e}); run the shard again")))?;
            shards.insert(task.index, (own, task));
        }
    }
    let Some((first, (_, task))) = shards.first_key_value() else {
        return Err(Error::file(&folders[0], "holds no shards; run some with --shard I/N first"));
    };
    let (count, ids) = (task.count, task.runs.clone());
    if let Some((other, (folder, _))) = shards.iter().find(|(_, (_, t))| t.count != count || t.runs != ids) {
        let problem = format!("is shard {other} of another sweep than shard {first}; merge one sweep's");
        return Err(Error::file(folder, problem));
    }
    let mut unfinished: Vec<String> =
        (0..count).filter(|i| !shards.contains_key(i)).map(|i| format!("{i}/{count} (not begun)")).collect();
    let mut records: BTreeMap<String, RunRecord> = BTreeMap::new();
    for (index, (folder, task)) in &shards {
        let runs = Runs::at(folder);
        let there: Vec<RunRecord> = task.own.iter().filter_map(|id| runs.load(id)).collect();
        if there.len() < task.own.len() {
            unfinished.push(format!("{index}/{count} ({} of {} arms)", there.len(), task.own.len()));
        }
        records.extend(there.into_iter().map(|r| (r.row.run.clone(), r)));
    }
    if !unfinished.is_empty() {
        let problem = format!("is not finished: run again with --shard {}", unfinished.join(", "));
        return Err(Error::file(out, problem));
    }
    let _lock = FolderLock::take(out)?;
    let into = Runs::open(out)?;
    let records: Vec<Option<RunRecord>> = ids.iter().map(|id| records.remove(id)).collect();
    records.iter().flatten().try_for_each(|record| into.store(record))?;
    let long_tables = match shards.values().next() {
        Some((folder, _)) => manifest(folder, out, &records)?,
        None => Format::default(),
    };
    write_tables(out, long_tables, &records)?;
    Ok(ids.len())
}

/// The folders of shards that a path means.
fn shard_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    if folder.join(SHARD_JSON).exists() {
        return Ok(vec![folder.to_owned()]);
    }
    let inside = folder.join(SHARDS);
    if !inside.is_dir() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(&inside).at(&inside)? {
        let path = entry.at(&inside)?.path();
        // A shard that died before it knew what to do has none.
        if path.join(SHARD_JSON).exists() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// The sweep's manifest, with the command that one process would have been given. Returns the format that it asks for long tables in.
fn manifest(shard: &Path, out: &Path, records: &[Option<RunRecord>]) -> Result<Format> {
    let path = shard.join("manifest.json");
    let text = files::read_text(&path)?;
    let mut manifest: Value = serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
    if let Some(Value::Array(words)) = manifest.get_mut("command") {
        let mut after_shard = false;
        words.retain(|word| {
            let word = word.as_str().unwrap_or_default();
            let drop = after_shard || word.starts_with("--shard=") || word == "--shard";
            after_shard = word == "--shard";
            !drop
        });
    }
    manifest["kernels"] = serde_json::json!(kernels(records));
    files::write_json(&out.join("manifest.json"), &manifest)?;
    Ok(serde_json::from_value(manifest["options"]["long_tables"].take()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_are_read_and_share_all_arms() {
        assert_eq!("2/5".parse(), Ok(Shard { index: 2, count: 5 }));
        for bad in ["5/5", "x", "1/", "/3", "-1/3", "1/0"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
        for arm in 0..20 {
            let owners = (0..3).filter(|&index| Shard { index, count: 3 }.has(arm)).count();
            assert_eq!(owners, 1);
        }
    }
}
