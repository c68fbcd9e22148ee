//! A result table: a polars frame that knows the file it came from, so that whatever is wrong with it names that file.

use super::SWEEP_CSV;
use super::record::Row;
use super::write::{frame, is_parquet};
use crate::error::{Error, IoAt, Result};
use polars::prelude::*;
use serde::{Serialize, de::DeserializeOwned};
use std::fs;
use std::io::{Cursor, ErrorKind};
use std::path::{Path, PathBuf};

/// A table whose columns are asked for by name, and of which polars' expressions make others.
pub struct Table {
    path: PathBuf,
    frame: DataFrame,
}

impl Table {
    /// Reads a CSV or Parquet file, by its name; refuses one without rows.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = match fs::read(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let what = match path.ends_with(SWEEP_CSV) {
                    true => "a folder that `kvfuse sweep` wrote",
                    false => "one that is there",
                };
                return Err(Error::file(path, format!("no such table; name {what}")));
            }
            read => Cursor::new(read.at(path)?),
        };
        let read = match is_parquet(path) {
            true => ParquetReader::new(bytes).finish(),
            false => CsvReadOptions::default()
                .with_infer_schema_length(None)
                .into_reader_with_file_handle(bytes)
                .finish(),
        };
        let table = Table {
            frame: read.map_err(|e| Error::file(path, format!("not a result table: {}", reason(&e))))?,
            path: path.to_owned(),
        };
        match table.frame.height() {
            0 => Err(Error::file(path, "has no rows; run the command that wrote it again")),
            _ => Ok(table),
        }
    }

    /// What an expression makes of the table. Rows may be none.
    ///
    /// # Errors
    /// Columns that are not there.
    pub fn query(&self, query: impl FnOnce(LazyFrame) -> LazyFrame) -> Result<Table> {
        let frame = query(self.lazy()).collect().map_err(|e| self.broken(&e))?;
        Ok(Table { frame, path: self.path.clone() })
    }

    /// The table with the column `on_front`: whether no other row is better in one of two columns and worse in neither. Numbers of `most` should
    /// be large, those of `least` small.
    pub fn with_front(&self, most: &str, least: &str) -> Result<Table> {
        const ROW: &str = "row before sorting";
        let down = SortMultipleOptions::default().with_order_descending_multi([true, false]);
        // In this order nothing after a row beats it: it is on the front if none before has less of the one, nor as little and more of the other.
        let least_so_far = col(least).eq(col(least).cum_min(false));
        let most_of_equals = col(most).max().over([col(least)]).map_err(|e| self.broken(&e))?.eq(col(most));
        let on_front = least_so_far.and(most_of_equals).fill_null(true).alias("on_front");
        self.query(|rows| {
            let sorted = rows.with_row_index(ROW, None).sort([most, least], down).with_column(on_front);
            sorted.sort([ROW], SortMultipleOptions::default()).drop(cols([ROW]))
        })
    }

    /// The table as a lazy frame, for joins.
    pub fn lazy(&self) -> LazyFrame {
        self.frame.clone().lazy()
    }

    /// The table with one more column.
    pub fn with<T>(&self, name: &str, values: Vec<T>) -> Result<Table>
    where
        Series: NamedFrom<Vec<T>, [T]>,
    {
        let mut frame = self.frame.clone();
        let column = Column::new(name.into(), values);
        frame.with_column(column).map_err(|e| self.broken(&e))?;
        Ok(Table { frame, path: self.path.clone() })
    }

    /// Records as a table, for joins with this one.
    pub fn sibling<T: Serialize>(&self, rows: &[T]) -> Result<Table> {
        let frame = frame(rows).map_err(|e| self.broken(&e))?;
        Ok(Table { frame, path: self.path.clone() })
    }

    /// The table with the fields of a record for each row as further columns.
    pub fn beside<T: Serialize>(&self, rows: &[T]) -> Result<Table> {
        let further = self.sibling(rows)?.frame;
        let frame = self.frame.hstack(further.columns()).map_err(|e| self.broken(&e))?;
        Ok(Table { frame, path: self.path.clone() })
    }

    /// Tables of the rows that agree in a column, in the order in which its values first come, with these values.
    pub fn groups(&self, column: &str) -> Result<Vec<(String, Table)>> {
        let parts = self.frame.partition_by_stable([column], true).map_err(|_| self.unusable(column))?;
        let name = |frame: DataFrame| {
            let table = Table { frame, path: self.path.clone() };
            let name = table.strings(column)?.into_iter().next().unwrap_or_default();
            Ok((name, table))
        };
        parts.into_iter().map(name).collect()
    }

    /// The rows as records, a field a column of its name. A number that is not there is NaN, a text or list empty.
    ///
    /// # Errors
    /// Columns that are not there or hold something else; infinite numbers.
    pub fn rows<T: DeserializeOwned>(&self) -> Result<Vec<T>> {
        let record = |i: usize| T::deserialize(Row::of(self.frame.columns(), i));
        let rows: std::result::Result<_, _> = (0..self.height()).map(record).collect();
        rows.map_err(|e| if e.infinite { self.infinite(&e.column) } else { self.unusable(&e.column) })
    }

    /// Names of all columns, in the table's order.
    pub fn names(&self) -> Vec<String> {
        self.frame.get_column_names().into_iter().map(|n| n.to_string()).collect()
    }

    /// Number of rows.
    pub fn height(&self) -> usize {
        self.frame.height()
    }

    fn broken(&self, error: &PolarsError) -> Error {
        Error::file(&self.path, format!("is no such table of kvfuse: {}", reason(error)))
    }

    /// What is wrong with a table whose column cannot be read.
    pub fn unusable(&self, name: &str) -> Error {
        Error::file(&self.path, format!("has no usable column '{name}'; it is no such table of kvfuse"))
    }

    fn infinite(&self, name: &str) -> Error {
        let problem =
            format!("column '{name}' holds an infinite number; run the command that wrote it again");
        Error::file(&self.path, problem)
    }

    fn column(&self, name: &str, kind: &DataType) -> Result<Column> {
        self.frame.column(name).and_then(|c| c.cast(kind)).map_err(|_| self.unusable(name))
    }

    /// NaN where a cell is empty. No table of kvfuse holds an infinite number, and no axis can show one.
    pub fn floats(&self, name: &str) -> Result<Vec<f64>> {
        let column = self.column(name, &DataType::Float64)?;
        let numbers = column.f64().map_err(|_| self.unusable(name))?;
        if numbers.iter().flatten().any(f64::is_infinite) {
            return Err(self.infinite(name));
        }
        Ok(numbers.iter().map(|x| x.unwrap_or(f64::NAN)).collect())
    }

    pub fn strings(&self, name: &str) -> Result<Vec<String>> {
        let column = self.column(name, &DataType::String)?;
        let texts = column.str().map_err(|_| self.unusable(name))?;
        Ok(texts.iter().map(|x| x.unwrap_or_default().to_owned()).collect())
    }
}

/// The first line of an error, without the plan that came to it and the columns that there are.
fn reason(error: &PolarsError) -> String {
    match error {
        PolarsError::Context { error, .. } => reason(error),
        PolarsError::ColumnNotFound(text) => text.split(';').next().unwrap_or_default().to_owned(),
        other => other.to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;

    fn table(csv: &str) -> Table {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.csv");
        fs::write(&path, csv).unwrap();
        Table::read(&path).unwrap()
    }

    #[derive(Debug, PartialEq, Deserialize)]
    struct Record {
        name: String,
        layers: usize,
        kl: f64,
        low: Option<f64>,
        held_out: bool,
    }

    #[test]
    fn rows_are_records() {
        let rows = "name,other,layers,kl,low,held_out\na,x,3,0.5,,true\n,y,4.0,,2,false\n7,z,5,1,1,true\n";
        let rows: Vec<Record> = table(rows).rows().unwrap();
        let record = |name: &str, layers, kl, low, held_out| Record {
            name: name.to_owned(),
            layers,
            kl,
            low,
            held_out,
        };
        assert_eq!(rows[0], record("a", 3, 0.5, None, true));
        assert!(rows[1].kl.is_nan() && rows[1].name.is_empty() && rows[1].low == Some(2.0));
        assert_eq!(rows[2], record("7", 5, 1.0, Some(1.0), true));
        let refused = |csv: &str| table(csv).rows::<Record>().unwrap_err().to_string();
        assert!(refused("name,layers,low,held_out\na,3,1,true\n").contains("no usable column 'kl'"));
        assert!(
            refused("name,layers,kl,low,held_out\na,3,1,1,maybe\n").contains("no usable column 'held_out'")
        );
        assert!(
            refused("name,layers,kl,low,held_out\na,-3,1,1,true\n").contains("no usable column 'layers'")
        );
        assert!(
            refused("name,layers,kl,low,held_out\na,3,inf,1,true\n")
                .contains("'kl' holds an infinite number")
        );
    }

    #[test]
    fn queries_name_the_column_that_is_missing() {
        let found = table("a,b\n1,2\n").query(|rows| rows.filter(col("c").gt(lit(0))));
        let said = found.err().unwrap().to_string();
        assert!(said.ends_with("is no such table of kvfuse: unable to find column \"c\""), "{said}");
    }

    proptest! {
        #[test]
        fn nothing_beats_what_is_on_the_front(points in prop::collection::vec((0u8..6, 0u8..6), 1..20)) {
            let lines: String = points.iter().map(|(most, least)| format!("{most}.5,{least}\n")).collect();
            let found = table(&format!("cr,kl\n{lines}")).with_front("cr", "kl").unwrap();
            let beats = |a: &(u8, u8), b: &(u8, u8)| a.0 >= b.0 && a.1 <= b.1 && a != b;
            let expected = points.iter().map(|p| (!points.iter().any(|other| beats(other, p))).to_string());
            prop_assert_eq!(found.strings("on_front").unwrap(), expected.collect::<Vec<_>>());
            prop_assert_eq!(found.floats("kl").unwrap(), points.iter().map(|p| f64::from(p.1)).collect::<Vec<_>>());
        }
    }
}
