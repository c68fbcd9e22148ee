//! Names for the series of a table: the method and those choices in which its rows differ.

/// Columns before those of [`CHOICES`]: the method and what kind of rule it follows.
const KINDS: usize = 3;

/// Columns that tell series apart, and how a cell of theirs reads.
const CHOICES: [(&str, &str, &str); 14] = [
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
    ("batch", "batch ", ""),
    ("first_token", "first token ", ""),
];

/// The columns that [`series_labels`] wants, in order.
pub fn label_columns() -> impl Iterator<Item = &'static str> {
    ["method", "max_error", "thresholds"].into_iter().chain(CHOICES.iter().map(|(name, ..)| *name))
}

/// A label for each row; `rows` hold the cells of [`label_columns`], empty where a column means nothing to a row. Rows of
/// a series have the same label: a threshold or an error budget is no part of it, but its kind is.
pub fn series_labels(rows: &[Vec<String>]) -> Vec<String> {
    // A budget and a calibration look at keys and values in any case.
    let known =
        |row: &[String], name: &str| name == "similarity" && !(row[1].is_empty() && row[2].is_empty());
    let varies = |column: usize| {
        let named = rows.iter().filter(|r| !known(r, CHOICES[column - KINDS].0));
        let mut cells = named.map(|r| &r[column]).filter(|c| !c.is_empty());
        let first = cells.next();
        cells.any(|c| Some(c) != first)
    };
    let varying: Vec<bool> = (0..CHOICES.len()).map(|i| varies(i + KINDS)).collect();
    let label = |row: &Vec<String>| {
        let (budget, calibrated) = (!row[1].is_empty(), !row[2].is_empty());
        let is_control = row[KINDS].is_empty();
        let mut words = vec![row[0].clone()];
        for ((&(name, before, after), cell), varies) in CHOICES.iter().zip(&row[KINDS..]).zip(&varying) {
            if is_control && name == "within_tenant" && cell == "true" {
                words.push("within tenant".to_owned());
            } else if !is_control && *varies && !known(row, name) {
                words.push(format!("{before}{cell}{after}"));
            }
        }
        if budget {
            words.push("max error".to_owned());
        }
        if calibrated {
            let predicted = row[2].contains("-model-");
            words.push(if predicted { "calibrated by model" } else { "calibrated" }.to_owned());
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
            let mut row: Vec<String> =
                [method, error, "", pairing, "first"].iter().map(|s| s.to_string()).collect();
            row.push(similarity.to_owned());
            row.resize(label_columns().count(), String::new());
            row
        };
        let rows = [
            row("bff", "", "tree", "keys"),
            row("bff", "", "best", "keys"),
            row("bff", "0.1", "best", "lower"),
        ];
        assert_eq!(series_labels(&rows), ["bff tree", "bff best", "bff best max error"]);
        assert_eq!(series_labels(&rows[..1]), ["bff"]);
        assert_eq!(series_labels(&[row("prefix", "", "", ""), rows[0].clone()]), ["prefix", "bff"]);
    }
}
