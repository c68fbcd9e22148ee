//! Result tables as CSV files (polars).

use super::SWEEP_CSV;
use crate::error::{Error, IoAt, Result};
use crate::files;
use polars::prelude::*;
use serde::Serialize;
use serde_json::Value;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Writes rows as CSV, one column a field in declaration order; what a row does not have is an empty cell.
pub fn write_csv<T: Serialize>(path: &Path, rows: &[T]) -> Result<()> {
    let bad = |e: &dyn std::fmt::Display| Error::file(path, e.to_string());
    let maps: Vec<serde_json::Map<String, Value>> = rows
        .iter()
        .map(|row| match serde_json::to_value(row) {
            Ok(Value::Object(map)) => Ok(map),
            Ok(_) => Err(bad(&"a row is not a record")),
            Err(e) => Err(bad(&e)),
        })
        .collect::<Result<_>>()?;
    if maps.is_empty() {
        return Err(bad(&"there are no rows to write"));
    }
    let columns: Vec<Column> = names(&maps).iter().map(|name| column(name, &maps)).collect();
    let mut frame = DataFrame::new(maps.len(), columns).map_err(|e| bad(&e))?;
    let mut bytes = Vec::new();
    CsvWriter::new(&mut bytes).finish(&mut frame).map_err(|e| bad(&e))?;
    files::write_atomically(path, |out| out.write_all(&bytes))
}

/// All names, each after the one that it follows in its row.
fn names(rows: &[serde_json::Map<String, Value>]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for row in rows {
        let mut at = 0;
        for name in row.keys() {
            match all.iter().position(|n| n == name) {
                Some(known) => at = known + 1,
                None => {
                    all.insert(at, name.clone());
                    at += 1;
                }
            }
        }
    }
    all
}

fn column(name: &str, rows: &[serde_json::Map<String, Value>]) -> Column {
    let values = || rows.iter().map(|r| r.get(name).unwrap_or(&Value::Null));
    let name: PlSmallStr = name.into();
    if values().any(Value::is_string) {
        Column::new(name, values().map(Value::as_str).collect::<Vec<_>>())
    } else if values().any(Value::is_boolean) {
        Column::new(name, values().map(Value::as_bool).collect::<Vec<_>>())
    } else if values().all(|v| v.is_u64() || v.is_null()) && values().any(Value::is_u64) {
        Column::new(name, values().map(Value::as_u64).collect::<Vec<_>>())
    } else {
        Column::new(name, values().map(Value::as_f64).collect::<Vec<_>>())
    }
}

/// Reads a CSV file with a header.
pub fn read_csv(path: &Path) -> Result<DataFrame> {
    let bytes = match fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let what = match path.ends_with(SWEEP_CSV) {
                true => "a folder that `kvfuse sweep` wrote",
                false => "one that is there",
            };
            return Err(Error::file(path, format!("no such table; name {what}")));
        }
        read => read.at(path)?,
    };
    CsvReadOptions::default()
        .with_infer_schema_length(None)
        .into_reader_with_file_handle(std::io::Cursor::new(bytes))
        .finish()
        .map_err(|e| {
            Error::file(path, format!("not a result table: {}", e.to_string().lines().next().unwrap_or("")))
        })
}

/// A table whose columns are asked for by name.
pub struct Columns {
    path: PathBuf,
    frame: DataFrame,
}

impl Columns {
    /// Reads a CSV file; refuses one without rows.
    pub fn read(path: &Path) -> Result<Self> {
        let frame = read_csv(path)?;
        if frame.height() == 0 {
            return Err(Error::file(path, "has no rows; run the command that wrote it again"));
        }
        Ok(Columns { path: path.to_owned(), frame })
    }

    /// Names of all columns, in the table's order.
    pub fn names(&self) -> Vec<String> {
        self.frame.get_column_names().into_iter().map(|n| n.to_string()).collect()
    }

    pub fn rows(&self) -> usize {
        self.frame.height()
    }

    /// What is wrong with a table whose column cannot be read.
    pub fn unusable(&self, name: &str) -> Error {
        Error::file(&self.path, format!("has no usable column '{name}'; it is no such table of kvfuse"))
    }

    fn column(&self, name: &str, kind: &DataType) -> Result<Column> {
        self.frame.column(name).and_then(|c| c.cast(kind)).map_err(|_| self.unusable(name))
    }

    /// NaN where a cell is empty. No table of kvfuse holds an infinite number, and no axis can show one.
    pub fn floats(&self, name: &str) -> Result<Vec<f64>> {
        let column = self.column(name, &DataType::Float64)?;
        let numbers = column.f64().map_err(|_| self.unusable(name))?;
        if numbers.iter().flatten().any(f64::is_infinite) {
            let problem =
                format!("column '{name}' holds an infinite number; run the command that wrote it again");
            return Err(Error::file(&self.path, problem));
        }
        Ok(numbers.iter().map(|x| x.unwrap_or(f64::NAN)).collect())
    }

    pub fn strings(&self, name: &str) -> Result<Vec<String>> {
        let column = self.column(name, &DataType::String)?;
        let texts = column.str().map_err(|_| self.unusable(name))?;
        Ok(texts.iter().map(|x| x.unwrap_or_default().to_owned()).collect())
    }
}
