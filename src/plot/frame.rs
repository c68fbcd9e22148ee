//! Columns of any result table.

use crate::error::{Error, Result};
use crate::experiment::read_csv;
use polars::prelude::*;
use std::path::{Path, PathBuf};

/// A table whose columns are asked for by name.
pub struct Columns {
    path: PathBuf,
    frame: DataFrame,
}

impl Columns {
    pub fn read(path: &Path) -> Result<Self> {
        Self::of(path, read_csv(path)?)
    }

    /// Refuses a table without rows.
    pub fn of(path: &Path, frame: DataFrame) -> Result<Self> {
        if frame.height() == 0 {
            return Err(Error::file(path, "has no rows; run the command that wrote it again"));
        }
        Ok(Columns { path: path.to_owned(), frame })
    }

    fn missing(&self, name: &str) -> Error {
        Error::file(&self.path, format!("has no usable column '{name}'; plot reads what kvfuse writes"))
    }

    fn column(&self, name: &str, kind: &DataType) -> Result<Column> {
        self.frame.column(name).and_then(|c| c.cast(kind)).map_err(|_| self.missing(name))
    }

    /// NaN where a cell is empty.
    pub fn floats(&self, name: &str) -> Result<Vec<f64>> {
        let column = self.column(name, &DataType::Float64)?;
        let numbers = column.f64().map_err(|_| self.missing(name))?;
        Ok(numbers.iter().map(|x| x.unwrap_or(f64::NAN)).collect())
    }

    pub fn strings(&self, name: &str) -> Result<Vec<String>> {
        let column = self.column(name, &DataType::String)?;
        let texts = column.str().map_err(|_| self.missing(name))?;
        Ok(texts.iter().map(|x| x.unwrap_or_default().to_owned()).collect())
    }
}
