//! Rows of a type as a table's file.

use crate::error::{Error, Result};
use crate::files;
use polars::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};
use std::path::Path;

/// Writes rows as a CSV file, or as Parquet where the file is called so: one column a field in declaration order; what a row does not have is an
/// empty cell.
pub fn write_table<T: Serialize>(path: &Path, rows: &[T]) -> Result<()> {
    if rows.is_empty() {
        return Err(Error::file(path, "there are no rows to write"));
    }
    let bad = |e: PolarsError| Error::file(path, e.to_string());
    let mut frame = frame(rows).map_err(bad)?;
    let mut bytes = Vec::new();
    match is_parquet(path) {
        true => ParquetWriter::new(&mut bytes).finish(&mut frame).map(|_| ()),
        false => CsvWriter::new(&mut bytes).finish(&mut frame),
    }
    .map_err(bad)?;
    files::write_atomically(path, |out| out.write_all(&bytes))
}

/// Whether a file is named as a Parquet file.
pub fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "parquet")
}

/// Rows as a data frame.
pub(super) fn frame<T: Serialize>(rows: &[T]) -> PolarsResult<DataFrame> {
    let record = |row: &T| match serde_json::to_value(row) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(polars_err!(ComputeError: "a row is not a record")),
        Err(e) => Err(polars_err!(ComputeError: "{e}")),
    };
    let maps: Vec<Map<String, Value>> = rows.iter().map(record).collect::<PolarsResult<_>>()?;
    let columns: Vec<Column> = names(&maps).iter().map(|name| column(name, &maps)).collect();
    DataFrame::new(maps.len(), columns)
}

/// All names, each after the one that it follows in its row.
fn names(rows: &[Map<String, Value>]) -> Vec<String> {
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

fn column(name: &str, rows: &[Map<String, Value>]) -> Column {
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
