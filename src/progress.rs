//! Progress of long work on stderr: a bar with rate and ETA on a terminal, a plain line now and then elsewhere.

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unit {
    Bytes,
    Items(&'static str),
}

pub struct Progress {
    label: String,
    unit: Unit,
    bar: ProgressBar,
    /// When the last plain line was printed; `None` on a terminal.
    last_line: Option<Mutex<Instant>>,
}

static SILENT: AtomicBool = AtomicBool::new(false);

/// Shows no progress from now on (`--quiet`).
pub fn silence() {
    SILENT.store(true, Ordering::Relaxed);
}

/// Says something beside the progress, unless that is silent.
pub fn note(text: &str) {
    if !SILENT.load(Ordering::Relaxed) {
        // A closed stderr is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// Time between plain lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Progress {
    pub fn new(label: impl Into<String>, total: u64, unit: Unit) -> Self {
        let label = label.into();
        let silent = SILENT.load(Ordering::Relaxed);
        let terminal = std::io::stderr().is_terminal() && !silent;
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let counts = match unit {
            Unit::Bytes => "{bytes}/{total_bytes} ({bytes_per_sec}, ETA {eta})".to_owned(),
            Unit::Items(name) => format!("{{pos}}/{{len}} {name} ({{per_sec}}, ETA {{eta}})"),
        };
        if let Ok(style) = ProgressStyle::with_template(&format!("{{msg}} {{bar:30}} {counts}")) {
            bar.set_style(style);
        }
        bar.set_message(label.clone());
        if terminal {
            bar.enable_steady_tick(Duration::from_millis(200));
        }
        let progress = Progress {
            label,
            unit,
            bar,
            last_line: (!terminal && !silent).then(|| Mutex::new(Instant::now())),
        };
        if progress.last_line.is_some() {
            progress.line();
        }
        progress
    }

    /// Sets how much there is in all, where it was not known at first.
    pub fn set_length(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Sets the count reached so far.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        let Some(last) = &self.last_line else { return };
        if let Ok(mut last) = last.lock()
            && last.elapsed() >= LINE_EVERY
        {
            *last = Instant::now();
            self.line();
        }
    }

    pub fn increment(&self) {
        self.set(self.bar.position() + 1);
    }

    /// Ends the bar with its count as it stands.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        if self.last_line.is_some() {
            self.line();
        }
    }

    fn line(&self) {
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let counts = match self.unit {
            Unit::Bytes => format!("{} of {}", HumanBytes(done), HumanBytes(total)),
            Unit::Items(name) => format!("{done} of {total} {name}"),
        };
        let seconds = self.bar.elapsed().as_secs_f64();
        // A closed stderr is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{}: {counts}, {seconds:.1} s", self.label);
    }
}
