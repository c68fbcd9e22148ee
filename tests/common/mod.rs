//! What the tests of the binary share.
#![allow(dead_code)]

use assert_cmd::Command;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;

/// The binary under test.
pub fn kvfuse() -> Command {
    Command::cargo_bin("kvfuse").unwrap()
}

/// Runs the binary; returns what it printed and its status.
pub fn run(arguments: &[&str]) -> Output {
    kvfuse().args(arguments).output().unwrap()
}

/// Runs the binary and expects success.
pub fn succeed(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs the binary and expects exit 2 with one line of error that contains `words`, no panic, no backtrace.
pub fn refuse(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    // Progress lines may come before it.
    let errors: Vec<&str> = stderr.lines().filter(|l| l.starts_with("error: ")).collect();
    assert_eq!(errors.len(), 1, "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().last(), Some(errors[0]), "{arguments:?}: {stderr}");
    for word in words {
        assert!(errors[0].contains(word), "{arguments:?}: {:?} lacks {word:?}", errors[0]);
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The default model's file, fetched on first use.
pub fn model_file() -> PathBuf {
    kvfuse::model::registry::resolve(kvfuse::model::registry::DEFAULT_MODEL).unwrap()
}

/// Requests of [`small_dump`].
pub const REQUESTS: usize = 5;

/// Arguments of the dump that [`small_dump`] holds, but for its folder.
pub const SMALL: [&str; 7] = ["dump", "--requests", "5", "--shots", "1", "--dtype", "f16"];

/// A dump that tests only read, made once per test binary. Its folder lives in cargo's own test folder.
pub fn small_dump() -> &'static Path {
    static DUMP: OnceLock<PathBuf> = OnceLock::new();
    DUMP.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(concat!("dump-", env!("CARGO_CRATE_NAME")));
        // The folder of an earlier run.
        let _ = fs::remove_dir_all(&folder);
        let mut arguments = SMALL.to_vec();
        arguments.extend(["-o", text(&folder)]);
        succeed(&arguments);
        folder
    })
}

/// Copies the files of a folder (not its subfolders).
pub fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        }
    }
}

/// Every shard of two dumps, byte for byte.
pub fn assert_same_dump(a: &Path, b: &Path) {
    for i in 0..REQUESTS {
        let name = format!("request-{i:05}.safetensors");
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name} differs");
    }
}
