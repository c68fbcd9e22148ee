use clap::Parser;
use clap::error::ErrorKind;
use kvfuse::cli::{Cli, words_of};
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::ExitCode;

/// The system's allocator, but that memory that is not to be had ends the process with one line and status 2, as every
/// other error does, instead of a signal.
struct OrExit;

#[global_allocator]
static ALLOCATOR: OrExit = OrExit;

// SAFETY: every method hands its arguments to the system's allocator as they are; a null pointer is never returned.
unsafe impl GlobalAlloc for OrExit {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps to the contract of `GlobalAlloc::alloc`, which is the system's.
        or_exit(unsafe { System.alloc(layout) }, layout.size())
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        or_exit(unsafe { System.realloc(block, layout, size) }, size)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

fn or_exit(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() {
        no_memory(size);
    }
    block
}

/// Ends the process without allocating anything.
#[cold]
fn no_memory(bytes: usize) -> ! {
    use std::io::{Cursor, Write};
    let mut line = [0u8; 160];
    let mut text = Cursor::new(&mut line[..]);
    // The line is longer than any number makes this.
    let _ = writeln!(
        text,
        "error: out of memory ({} MiB more were needed); use a smaller model, fewer requests or a smaller --batch",
        bytes.div_ceil(1 << 20)
    );
    let written = text.position() as usize;
    let _ = std::io::stderr().write_all(&line[..written]);
    std::process::exit(2)
}

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
            let printed = asked.print().and_then(|()| std::io::Write::flush(&mut std::io::stdout()));
            return match printed {
                Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => failed(&format!("stdout: {e}")),
                _ => ExitCode::from(asked.exit_code() as u8),
            };
        }
        Err(usage) => {
            return failed(&words_of(&usage));
        }
    };
    match cli.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => match error.downcast_ref() {
            // Its caret stands under a place.
            Some(shown @ kvfuse::error::Error::Method { .. }) => {
                let around: Vec<String> = error.chain().map(ToString::to_string).collect();
                let before = &around[..around.len() - 1];
                eprintln!("error: {}{shown}", before.iter().map(|c| format!("{c}: ")).collect::<String>());
                ExitCode::from(2)
            }
            _ => failed(&format!("{error:#}")),
        },
    }
}

/// One line, whatever it wraps.
fn failed(message: &str) -> ExitCode {
    eprintln!("error: {}", message.replace('\n', " "));
    ExitCode::from(2)
}
