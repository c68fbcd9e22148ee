//! Names for the series of a table: the method and those choices in which its rows differ.

/// Columns that tell series apart, and how a cell of theirs reads.
const CHOICES: [(&str, &str, &str); 13] = [
    ("pairing", "", ""),
    ("representative", "", ""),
    ("similarity", "on ", ""),
    ("rope", "RoPE ", ""),
    ("positions", "", " position"),
    ("spare_layers", "sparing ", ""),
    ("group_layers", "", " layers a table"),
    ("scale", "scale ", ""),
    ("within_tenant", "within tenant: ", ""),
    ("chunk_tokens", "chunk ", ""),
    ("fuse_chunks", "", " chunks"),
    ("block_size", "block ", ""),
    ("thresholds", "", ""),
];

/// The columns that [`series_labels`] wants, in order.
pub fn label_columns() -> impl Iterator<Item = &'static str> {
    ["method", "max_error"].into_iter().chain(CHOICES.iter().map(|(name, ..)| *name))
}

/// A label for each row; `rows` hold the cells of [`label_columns`], empty where a column means nothing to a row. Rows of
/// a series have the same label: a threshold or an error budget is no part of it, but its kind is.
pub fn series_labels(rows: &[Vec<String>]) -> Vec<String> {
    let varies = |column: usize| {
        let mut cells = rows.iter().map(|r| &r[column]).filter(|c| !c.is_empty());
        let first = cells.next();
        cells.any(|c| Some(c) != first)
    };
    let varying: Vec<bool> = (0..CHOICES.len()).map(|i| varies(i + 2)).collect();
    let label = |row: &Vec<String>| {
        let mut words = vec![row[0].clone()];
        for ((&(name, before, after), cell), varies) in CHOICES.iter().zip(&row[2..]).zip(&varying) {
            let is_control = row[2].is_empty();
            if !cell.is_empty() && (*varies && !is_control || name == "thresholds") {
                words.push(format!("{before}{cell}{after}"));
            }
            if name == "within_tenant" && is_control && cell == "true" {
                words.push("within tenant".to_owned());
            }
        }
        if !row[1].is_empty() {
            words.push("max error".to_owned());
        }
        words.join(" ")
    };
    rows.iter().map(label).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_named() {
        let row = |method: &str, error: &str, pairing: &str, similarity: &str| {
            let mut row = vec![method.to_owned(), error.to_owned(), pairing.to_owned(), "first".to_owned()];
            row.push(similarity.to_owned());
            row.resize(label_columns().count(), String::new());
            row
        };
        let rows = [row("bff", "", "tree", "keys"), row("bff", "", "best", "keys"), row("bff", "0.1", "best", "lower")];
        assert_eq!(series_labels(&rows), ["bff tree on keys", "bff best on keys", "bff best on lower max error"]);
        assert_eq!(series_labels(&rows[..1]), ["bff"]);
    }
}
