//! Files that are either whole or absent: written beside their name, synced, then renamed. Text files as people have them.

use crate::error::{Error, IoAt, Result};
use flate2::read::MultiGzDecoder;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// What the names of unfinished files end with.
pub const PARTIAL: &str = "partial";

/// Where the bytes of `path` grow until they are complete. No two writers share such a name; what a killed run left behind
/// is removed by [`crate::lock::FolderLock`].
fn partial_path(path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let mut name = path.file_name().unwrap_or_default().to_owned();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    name.push(format!(".{}-{count}.{PARTIAL}", std::process::id()));
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

/// [`read_text`] of a JSON file.
pub fn read_json(path: &Path) -> Result<serde_json::Value> {
    serde_json::from_str(&read_text(path)?).map_err(|e| Error::file(path, format!("not JSON: {e}")))
}

/// Makes `folder` and proves that a file can be written there, before any long work begins.
pub fn writable_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).at(folder)?;
    let probe = partial_path(&folder.join(".kvfuse-write-test"));
    File::create(&probe).at(folder)?;
    fs::remove_file(&probe).at(folder)
}

/// [`writable_folder`] of the folder that `file` is to be written into.
pub fn writable_beside(file: &Path) -> Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    writable_folder(folder.unwrap_or(Path::new(".")))
}

/// Longest text that is read, in bytes: a small archive can hold more than any machine has.
const LONGEST_TEXT: u64 = 4 << 30;

/// Reads a UTF-8 text file. Gzip is unpacked and a byte order mark dropped; other encodings and archives are refused by
/// name.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = fs::read(path).at(path)?;
    let archive = |kind: &str| Err(Error::file(path, format!("is a {kind} archive; unpack it first")));
    let bytes = match &bytes[..] {
        [0x1f, 0x8b, ..] => {
            let mut text = Vec::new();
            let unpacked = MultiGzDecoder::new(&bytes[..]).take(LONGEST_TEXT + 1).read_to_end(&mut text);
            unpacked
                .map_err(|e| Error::file(path, format!("damaged or cut short gzip ({e}); fetch it again")))?;
            if text.len() as u64 > LONGEST_TEXT {
                return Err(Error::file(path, "unpacks to more than 4 GiB; split it"));
            }
            text
        }
        [b'P', b'K', 3, 4, ..] => return archive("zip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => return archive("zstd"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => return archive("xz"),
        [b'B', b'Z', b'h', ..] => return archive("bzip2"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
            let problem = "is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)";
            return Err(Error::file(path, problem));
        }
        _ => bytes,
    };
    let text = String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::file(path, format!("is not UTF-8 text (byte {at}); save it as UTF-8"))
    })?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}

/// Maps a file into memory for reading.
pub fn map(path: &Path) -> Result<memmap2::Mmap> {
    let file = File::open(path).at(path)?;
    if file.metadata().at(path)?.is_dir() {
        return Err(Error::file(path, "is a folder, not a file"));
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
    fn texts_are_read_as_people_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.txt");
        let read = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            read_text(&path).map_err(|e| e.to_string())
        };
        assert_eq!(read("\u{feff}gr\u{fc}n".as_bytes()).unwrap(), "gr\u{fc}n");
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all("\u{feff}line\n".as_bytes()).unwrap();
        let packed = packed.finish().unwrap();
        assert_eq!(read(&packed).unwrap(), "line\n");
        assert!(read(&packed[..packed.len() - 9]).unwrap_err().contains("cut short gzip"));
        assert!(read(&[0xff, 0xfe, b'a', 0]).unwrap_err().contains("UTF-16"));
        assert!(read(b"ab\xe9").unwrap_err().contains("not UTF-8 text (byte 2)"));
        assert!(read(b"PK\x03\x04").unwrap_err().contains("zip archive"));
    }

    #[test]
    fn sha256_of_a_known_string() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_bytes(b"abc"), expected);
    }
}
