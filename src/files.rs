//! Files that are either whole or absent: written beside their name, synced, then renamed.

use crate::error::{IoAt, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Where the bytes of `path` grow until they are complete. A leftover of a killed run is overwritten.
fn partial_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Writes `path` through `write`; the file appears under its name only when it is complete and synced.
pub fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>,
) -> Result<()> {
    let partial = partial_path(path);
    let outcome = (|| {
        let mut out = BufWriter::new(File::create(&partial)?);
        write(&mut out)?;
        out.into_inner().map_err(|e| e.into_error())?.sync_all()?;
        fs::rename(&partial, path)
    })();
    if outcome.is_err() {
        // Best effort: the error that brought us here is the one to report.
        let _ = fs::remove_file(&partial);
    }
    outcome.at(path)
}

/// [`write_atomically`] for a value as pretty JSON with a final newline.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    write_atomically(path, |out| {
        serde_json::to_writer_pretty(&mut *out, value)?;
        out.write_all(b"\n")
    })
}

/// Makes `folder` and proves that a file can be written there, before any long work begins.
pub fn writable_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).at(folder)?;
    let probe = folder.join(".kvfuse-write-test");
    File::create(&probe).at(folder)?;
    fs::remove_file(&probe).at(folder)
}

/// Maps a file into memory for reading.
pub fn map(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).at(path)?;
    if file.metadata().at(path)?.is_dir() {
        return Err(crate::error::Error::file(path, "is a folder, not a file"));
    }
    // SAFETY: the mapping is read-only. Should another process change the file meanwhile, we read changed numbers,
    // which every reader here validates; kvfuse itself replaces files by rename and never writes into one.
    unsafe { memmap2::Mmap::map(&file) }.at(path)
}

/// SHA-256 of a file in lower-case hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).at(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).at(path)?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}

/// SHA-256 of bytes in lower-case hexadecimal.
pub fn sha256_bytes(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_no_partial() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        write_atomically(&path, |out| out.write_all(b"old")).unwrap();
        let err = write_atomically(&path, |out| {
            out.write_all(b"new")?;
            Err(std::io::Error::other("disk full"))
        });
        assert!(err.unwrap_err().to_string().contains("a.txt: disk full"));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn sha256_of_a_known_string() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_bytes(b"abc"), expected);
    }
}
