//! The library's one error type. Every message names the thing at fault and what to do about it, in one line; only what is wrong
//! with a chain of methods takes three.

use std::path::{Path, PathBuf};

/// What can go wrong in kvfuse. The binary prints it as one line and exits with status 2.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused a file operation (missing, not writable, disk full ...).
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: std::io::Error },
    /// A file was read but is not what it should be. `problem` says what to do.
    #[error("{}: {problem}", path.display())]
    File { path: PathBuf, problem: String },
    /// An option or a combination of options makes no sense.
    #[error("{0}")]
    Argument(String),
    /// A chain of methods that means nothing; `text` is shown with a caret under its byte `at`.
    #[error("--method: {problem}\n  {text}\n  {:at$}^", "", at = text.get(..*at).map_or(0, |t| t.chars().count()))]
    Method { problem: String, text: String, at: usize },
    /// A model could not be fetched from any source.
    #[error("{0}")]
    Fetch(String),
    /// A figure could not be drawn.
    #[error("{}: cannot draw: {problem}", path.display())]
    Plot { path: PathBuf, problem: String },
    /// A number that should not be: NaN, infinity, or more than the cache can hold. The message names layer and request.
    #[error("{0}")]
    Number(String),
    /// Ctrl-C. Everything finished so far is on disk.
    #[error("interrupted; what was finished is kept, run the same command again to go on")]
    Interrupted,
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub fn argument(message: impl Into<String>) -> Self {
        Error::Argument(message.into())
    }

    pub fn file(path: impl AsRef<Path>, problem: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_owned(), problem: problem.into() }
    }
}

/// Adds the path to an `io::Error`: `fs::read(p).at(p)?`.
pub trait IoAt<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
}

impl<T> IoAt<T> for std::io::Result<T> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|cause| Error::Io { path: path.as_ref().to_owned(), cause })
    }
}
