use clap::Parser;
use clap::error::ErrorKind;
use kvfuse::cli::{Cli, words_of};
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
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version are not errors to clap's callers either.
        Err(asked)
            if !asked.use_stderr() || asked.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            asked.exit()
        }
        Err(usage) => {
            return failed(&words_of(&usage));
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&format!("{error:#}")),
    }
}

/// One line, whatever it wraps.
fn failed(message: &str) -> ExitCode {
    eprintln!("error: {}", message.replace('\n', " "));
    ExitCode::from(2)
}
