//! Finished arms on disk: `runs/<id>.json` beside sweep.csv. A second run of the same command reads them back.

use super::arms::Arm;
use super::lot::Piece;
use super::positions::PositionScore;
use super::rows::{LayerScore, RequestScore, Row, Setting, Timings};
use crate::error::{IoAt, Result};
use crate::files;
use crate::model::NUMERICS;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// All that was measured of one arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    pub row: Row,
    /// What it was computed with ([`instructions`](crate::model::kernels::instructions)).
    #[serde(default)]
    pub kernels: String,
    pub layers: Vec<LayerScore>,
    pub positions: Vec<PositionScore>,
    pub requests: Vec<RequestScore>,
    pub timings: Timings,
}

/// The folder of finished arms of one sweep output.
pub struct Runs {
    folder: PathBuf,
}

impl Runs {
    pub fn open(out: &Path) -> Result<Self> {
        let folder = out.join("runs");
        fs::create_dir_all(&folder).at(&folder)?;
        Ok(Runs { folder })
    }

    /// The runs of a folder that is only read.
    pub fn at(out: &Path) -> Self {
        Runs { folder: out.join("runs") }
    }

    fn path(&self, run: &str) -> PathBuf {
        self.folder.join(format!("{run}.json"))
    }

    /// The record of a run, if it is there and readable; anything else is measured again.
    pub fn load(&self, run: &str) -> Option<RunRecord> {
        let text = fs::read_to_string(self.path(run)).ok()?;
        serde_json::from_str(&text).ok().filter(|r: &RunRecord| r.row.run == run)
    }

    fn piece_path(&self, run: &str, lot: usize) -> PathBuf {
        self.folder.join(format!("{run}.lot-{lot}.json"))
    }

    /// What a run has made of one of its lots, of so many requests, if it is there and readable.
    pub fn load_piece(&self, run: &str, lot: usize, requests: usize) -> Option<Piece> {
        let text = fs::read_to_string(self.piece_path(run, lot)).ok()?;
        let piece: Piece = serde_json::from_str(&text).ok()?;
        (piece.run == run && piece.requests.len() == requests).then_some(piece)
    }

    pub fn store_piece(&self, piece: &Piece, lot: usize) -> Result<()> {
        files::write_json(&self.piece_path(&piece.run, lot), piece)
    }

    /// Removes the pieces of a run of so many lots, whose record holds them all. One that stays is never looked at again.
    pub fn drop_pieces(&self, run: &str, lots: usize) {
        for lot in 0..lots {
            let _ = fs::remove_file(self.piece_path(run, lot));
        }
    }

    pub fn store(&self, record: &RunRecord) -> Result<()> {
        files::write_json(&self.path(&record.row.run), record)
    }
}

/// Raised whenever the same settings would give another row: what older code measured is then measured again.
const ROW_SCHEMA: u32 = 6;

/// Names a run by everything that its row depends on.
pub fn run_id(setting: &Setting, arm: &Arm) -> Result<String> {
    let key = serde_json::json!({
        "rows": ROW_SCHEMA,
        "numerics": NUMERICS,
        "setting": setting,
        "arm": arm.columns(),
    });
    Ok(files::sha256_bytes(key.to_string().as_bytes())[..12].to_owned())
}
