use clap::Parser;
use kvfuse::cli::Cli;
use std::process::ExitCode;

/// Keeps freed memory for the next matrix instead of giving it back to the kernel and paying for fresh, zeroed pages
/// again: a forward pass allocates megabytes at every step (docs/performance.md).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn keep_freed_memory() {
    // SAFETY: called before any other thread exists, with parameters glibc documents; it touches allocator settings
    // only.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn keep_freed_memory() {}

fn main() -> ExitCode {
    keep_freed_memory();
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // One line, whatever it wraps.
            eprintln!("error: {}", format!("{error:#}").replace('\n', " "));
            ExitCode::from(2)
        }
    }
}
