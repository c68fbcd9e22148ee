//! Sizes of memory: as they are typed, and as the system counts this process's. Giving memory back.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A number of bytes: `4096`, `512MiB`, `1.5GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(pub usize);

const UNITS: [(&str, f64); 7] = [
    ("KiB", 1024.0),
    ("MiB", 1048576.0),
    ("GiB", 1073741824.0),
    ("kB", 1e3),
    ("MB", 1e6),
    ("GB", 1e9),
    ("", 1.0),
];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = UNITS.iter().find_map(|(unit, factor)| {
            let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
            Some(number * factor)
        });
        match known.filter(|n| *n >= 1.0 && n.is_finite()) {
            Some(n) => Ok(Bytes(n as usize)),
            None => Err("write 4096, 512MiB or 1.5GB".to_owned()),
        }
    }
}

impl TryFrom<String> for Bytes {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> String {
        bytes.0.to_string()
    }
}

impl fmt::Display for Bytes {
    /// In units that people read, rounded up to two digits behind the point: what is printed is enough.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (unit, size) = if self.0 >= 1 << 30 { ("GiB", 30) } else { ("MiB", 20) };
        let hundredths = (self.0 as f64 / f64::from(1u32 << size) * 100.0).ceil();
        write!(f, "{}{unit}", hundredths / 100.0)
    }
}

/// Memory of this process, if the system tells.
pub fn resident() -> Bytes {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    let kib = line.and_then(|l| l.trim().trim_end_matches(" kB").trim().parse::<usize>().ok());
    Bytes(kib.unwrap_or(0) * 1024)
}

/// Memory that the allocator keeps for later goes back to the system.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: takes no pointers; glibc documents it as safe to call at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The system takes the whole pages of a stretch of memory back; it stays its owner's, with other numbers in it.
///
/// # Safety
/// The stretch is the caller's alone, in memory that no file stands behind, and what it holds is not read before it is written again.
pub unsafe fn discard(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: takes no pointers.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(1 << 16);
        let before = start.align_offset(page);
        let whole = bytes.saturating_sub(before) / page * page;
        if whole > 0 {
            // SAFETY: whole pages within a stretch that is the caller's. Whether the system does it makes no difference to what is read.
            unsafe { libc::madvise(start.add(before).cast(), whole, libc::MADV_DONTNEED) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_can_be_typed_and_is_enough() {
        for bytes in [1, 4096, 3 << 20, 1_500_000_000, 3 << 30] {
            let again: Bytes = Bytes(bytes).to_string().parse().unwrap();
            assert!(again.0 >= bytes && again.0 - bytes <= bytes / 90 + (1 << 20), "{bytes} {again:?}");
        }
        assert_eq!("1.5GB".parse(), Ok(Bytes(1_500_000_000)));
        assert!("much".parse::<Bytes>().is_err());
    }

    /// Every second of many small vectors is dropped: what lies between the others is whole pages of the system's.
    #[test]
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    fn freed_memory_between_what_is_kept_goes_back() {
        let mut all: Vec<Option<Vec<u8>>> = (0..8192).map(|_| Some(vec![1u8; 16 << 10])).collect();
        all.iter_mut().step_by(2).for_each(|own| *own = None);
        let before = resident().0;
        give_back();
        let after = resident().0;
        assert!(after + (32 << 20) < before, "{before} {after}");
        assert!(all.iter().flatten().all(|own| own.iter().all(|x| *x == 1)));
    }
}
