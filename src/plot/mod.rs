use crate::error::Result;
use std::path::{Path, PathBuf};
pub fn plot_sweep(_out: &Path) -> Result<Vec<PathBuf>> {
    Ok(vec![])
}
