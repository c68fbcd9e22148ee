//! Ctrl-C as an ordinary error: long loops ask between two units of work, so files end whole and temporary ones go.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Catches Ctrl-C from now on. A second one ends the process at once.
pub fn install() {
    // Where no handler can be set, Ctrl-C keeps its default: the process ends, and files are atomic anyway.
    let _ = ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(2);
        }
    });
}

/// Whether Ctrl-C was pressed.
pub fn is_set() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// An error once Ctrl-C was pressed.
pub fn check() -> Result<()> {
    if is_set() { Err(Error::Interrupted) } else { Ok(()) }
}
