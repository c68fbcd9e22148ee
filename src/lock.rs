//! One writer per folder: a lock that the operating system drops with its process, and that says who holds it.

use crate::error::{Error, IoAt, Result};
use crate::files::PARTIAL;
use crate::interrupt;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whether to wait for folders that others hold.
static PATIENT: AtomicBool = AtomicBool::new(false);

/// Waits for folders that others hold from now on, instead of failing.
pub fn be_patient() {
    PATIENT.store(true, Ordering::Relaxed);
}

/// Time between two looks at a folder that another holds.
const PATIENCE: Duration = Duration::from_millis(200);

const LOCK: &str = ".kvfuse-lock";

/// Held while a command writes into a folder; dropping it lets others in. Within one process it nests: `kvfuse run` and
/// `kvfuse demo` call commands that lock the folder themselves.
#[derive(Debug)]
pub struct FolderLock {
    /// Canonical path of the folder.
    folder: PathBuf,
}

/// Locks of this process: folder -> the locked file and how often it is held.
static HELD: Mutex<Option<HashMap<PathBuf, (File, usize)>>> = Mutex::new(None);

fn held() -> MutexGuard<'static, Option<HashMap<PathBuf, (File, usize)>>> {
    // A panic elsewhere leaves the map as it was.
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FolderLock {
    /// Makes the folder if need be and locks it; what killed writers left unfinished in it is removed.
    ///
    /// # Errors
    /// If another process holds it: the message says which.
    pub fn take(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).at(folder)?;
        let folder = fs::canonicalize(folder).at(folder)?;
        let mut held = held();
        let held = held.get_or_insert_default();
        if let Some((_, count)) = held.get_mut(&folder) {
            *count += 1;
            return Ok(FolderLock { folder });
        }
        let file = lock(&folder)?;
        remove_unfinished(&folder)?;
        held.insert(folder.clone(), (file, 1));
        Ok(FolderLock { folder })
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        let mut held = held();
        let Some(held) = held.as_mut() else { return };
        let Some((_, count)) = held.get_mut(&self.folder) else { return };
        *count -= 1;
        if *count == 0 {
            // While it is still locked, so that nobody can lock a file that is about to vanish without noticing.
            let _ = fs::remove_file(self.folder.join(LOCK));
            held.remove(&self.folder);
        }
    }
}

fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    loop {
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).at(&path)?;
        match file.try_lock() {
            Ok(()) if is_current(&file, &path) => {
                file.set_len(0).at(&path)?;
                let words: Vec<String> = std::env::args().skip(1).take(2).collect();
                write!(file, "kvfuse {}, process {}", words.join(" "), std::process::id()).at(&path)?;
                return Ok(file);
            }
            // Its last holder removed it between our opening and locking it.
            Ok(()) => continue,
            Err(TryLockError::WouldBlock) if PATIENT.load(Ordering::Relaxed) => {
                interrupt::check()?;
                std::thread::sleep(PATIENCE);
            }
            Err(TryLockError::WouldBlock) => {
                let holder = fs::read_to_string(&path).ok().filter(|h| !h.is_empty());
                let holder = holder.unwrap_or_else(|| "another kvfuse".to_owned());
                let problem = format!(
                    "is being written by {holder}; wait until it has finished, or choose another output folder"
                );
                return Err(Error::file(folder, problem));
            }
            Err(TryLockError::Error(cause)) => return Err(Error::Io { path, cause }),
        }
    }
}

/// Whether the path still leads to this file.
#[cfg(unix)]
fn is_current(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    file.metadata().map(id).ok().is_some_and(|own| fs::metadata(path).map(id).ok() == Some(own))
}

#[cfg(not(unix))]
fn is_current(_file: &File, _path: &Path) -> bool {
    true
}

/// Files that only a killed writer can have left: whoever holds the lock is the only one.
fn remove_unfinished(folder: &Path) -> Result<()> {
    for folder in [folder.to_owned(), folder.join("runs")] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.at(&folder)?.path();
            if path.is_file() && path.extension().is_some_and(|e| e == PARTIAL) {
                fs::remove_file(&path).at(&path)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_nests_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a.csv.1-0.partial"), "x").unwrap();
        let outer = FolderLock::take(dir.path()).unwrap();
        assert!(!dir.path().join("a.csv.1-0.partial").exists());
        drop(FolderLock::take(dir.path()).unwrap());
        assert!(dir.path().join(LOCK).exists());
        drop(outer);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn another_holder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(LOCK);
        fs::write(&path, "kvfuse sweep dumps/qa, process 7").unwrap();
        let other = OpenOptions::new().write(true).open(&path).unwrap();
        other.try_lock().unwrap();
        let error = FolderLock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains("is being written by kvfuse sweep dumps/qa, process 7"), "{error}");
        drop(other);
        FolderLock::take(dir.path()).unwrap();
    }
}
