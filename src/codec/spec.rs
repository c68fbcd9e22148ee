//! The language of `--method`: `prefix+bff:tau=0.95:0.60:0.05,pairing=best|lsh+kivi:bits=4|2` as text, before it means anything.
//!
//! Chains are separated by commas, stages by `+`; options follow a colon. Alternatives (`|`) and ranges (`high:low:step`) make a
//! grid. A comma ends a chain unless what follows is an option (`name=...`) of the stage before it.

use crate::error::{Error, Result};

/// A stage of a chain as it was written: a method's name and its options.
#[derive(Debug, Clone, PartialEq)]
pub struct StageText {
    pub name: String,
    /// Byte at which the name begins.
    pub at: usize,
    pub options: Vec<OptionText>,
}

/// An option as it was written, with all its alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct OptionText {
    pub name: String,
    /// Byte at which the name begins.
    pub at: usize,
    pub values: Vec<String>,
}

/// Stages in the order in which they encode.
pub type ChainText = Vec<StageText>;

/// An error at a place of a method's text, which it shows with a caret under it.
pub fn bad(text: &str, at: usize, problem: impl std::fmt::Display) -> Error {
    Error::Method { problem: problem.to_string(), text: text.to_owned(), at }
}

/// All chains of a text, in its order.
pub fn parse(text: &str) -> Result<Vec<ChainText>> {
    let mut chains: Vec<ChainText> = Vec::new();
    let mut at = 0;
    for part in text.split(',') {
        // An option stands before whatever else a stage or a value may have.
        let is_option = part.find(['=', '+', ':', '|']).is_some_and(|i| part.as_bytes()[i] == b'=');
        let mut from = at;
        for (i, piece) in part.split('+').enumerate() {
            let last = chains.last_mut();
            match (i, last) {
                (0, Some(chain)) if is_option => {
                    let stage = chain.last_mut().filter(|s| !s.options.is_empty());
                    let problem = "an option follows its method and a colon, as bff:tau=0.9";
                    stage.ok_or_else(|| bad(text, from, problem))?.options.push(option(text, from, piece)?);
                }
                (0, _) if is_option => {
                    return Err(bad(text, from, "an option follows its method and a colon, as bff:tau=0.9"));
                }
                (0, _) => chains.push(vec![stage(text, from, piece)?]),
                (_, Some(chain)) => chain.push(stage(text, from, piece)?),
                (_, None) => return Err(bad(text, from, "a method's name is missing")),
            }
            from += piece.len() + 1;
        }
        at += part.len() + 1;
    }
    Ok(chains)
}

fn stage(text: &str, at: usize, piece: &str) -> Result<StageText> {
    let trimmed = piece.trim_start();
    let at = at + piece.len() - trimmed.len();
    let (name, rest) = match trimmed.split_once(':') {
        Some((name, rest)) => (name, Some(rest)),
        None => (trimmed, None),
    };
    let trimmed_name = name.trim();
    if trimmed_name.is_empty() {
        return Err(bad(text, at, "a method's name is missing"));
    }
    let options = match rest {
        Some(rest) => vec![option(text, at + name.len() + 1, rest)?],
        None => Vec::new(),
    };
    Ok(StageText { name: trimmed_name.to_owned(), at, options })
}

fn option(text: &str, at: usize, piece: &str) -> Result<OptionText> {
    let trimmed = piece.trim_start();
    let at = at + piece.len() - trimmed.len();
    // A name alone is a switch.
    let (name, values) = trimmed.split_once('=').unwrap_or((trimmed, "true"));
    let (name, values) = (name.trim(), values.trim());
    if name.is_empty() || values.is_empty() {
        return Err(bad(text, at, "an option is written name=value"));
    }
    let values_at = at + trimmed.find('=').map_or(0, |i| i + 1);
    let mut all = Vec::new();
    for value in values.split('|') {
        all.extend(range(value.trim()).map_err(|problem| bad(text, values_at, problem))?);
    }
    Ok(OptionText { name: name.to_owned(), at, values: all })
}

/// Names of the methods of a chain in normal form.
pub fn names(chain: &str) -> Vec<&str> {
    chain.split('+').map(|stage| stage.split(':').next().unwrap_or_default()).collect()
}

/// More values than anyone means by one range.
const MOST: usize = 1000;

/// `0.95:0.60:0.05` as its values, falling, both ends included; anything without two colons as it is.
pub fn range(text: &str) -> std::result::Result<Vec<String>, String> {
    if text.is_empty() {
        return Err("a value is missing".to_owned());
    }
    let fields: Vec<&str> = text.split(':').collect();
    let numbers: Option<Vec<f64>> =
        fields.iter().map(|f| f.trim().parse().ok().filter(|x: &f64| x.is_finite())).collect();
    let [first, last, step] = match (numbers.as_deref(), fields.len()) {
        (_, 1) => return Ok(vec![text.to_owned()]),
        (Some(&[first, last, step]), _) => [first, last, step],
        _ => return Err(format!("'{text}' is no range; write high:low:step, as 0.95:0.60:0.05")),
    };
    if step <= 0.0 {
        return Err("the step must be above 0".to_owned());
    }
    if first < last {
        return Err("the range is reversed; write high:low:step, as 0.95:0.60:0.05".to_owned());
    }
    // A little more than the exact count: 0.35 / 0.05 is just below 7 in floating point.
    let steps = ((first - last) / step + 1e-9).floor();
    if steps >= MOST as f64 {
        return Err(format!("the range has more than {MOST} values"));
    }
    // Six decimals: 0.95 - 2 * 0.05 must be the number that prints as 0.85.
    let value = |i: usize| ((first - i as f64 * step) * 1e6).round() / 1e6;
    Ok((0..=steps as usize).map(|i| value(i).to_string()).collect())
}

/// Of some known names, the one that a misspelt one most likely means.
pub fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |a: &str, b: &str| {
        let b: Vec<char> = b.chars().collect();
        let mut row: Vec<usize> = (0..=b.len()).collect();
        for (i, x) in a.chars().enumerate() {
            let mut before = row[0];
            row[0] = i + 1;
            for (j, y) in b.iter().enumerate() {
                let swap = before + usize::from(x != *y);
                before = row[j + 1];
                row[j + 1] = swap.min(row[j] + 1).min(before + 1);
            }
        }
        row[b.len()]
    };
    let best = known.into_iter().map(|k| (distance(name, k), k)).min()?;
    (best.0 <= 2.max(name.len() / 3)).then_some(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        let stage = |s: &StageText| {
            let options: Vec<String> =
                s.options.iter().map(|o| format!("{}={}", o.name, o.values.join("|"))).collect();
            format!("{}({})", s.name, options.join(" "))
        };
        parse(text).unwrap().iter().map(|c| c.iter().map(stage).collect::<Vec<_>>().join("+")).collect()
    }

    #[test]
    fn chains_stages_options_and_ranges() {
        assert_eq!(shown("none,prefix"), ["none()", "prefix()"]);
        assert_eq!(
            shown("prefix, prefix+bff:tau=0.9:0.8:0.05,pairing=best|lsh+kivi:bits=4|2,kivi:bits=4"),
            ["prefix()", "prefix()+bff(tau=0.9|0.85|0.8 pairing=best|lsh)+kivi(bits=4|2)", "kivi(bits=4)"]
        );
        assert_eq!(shown("prefix:within-tenant,bff"), ["prefix(within-tenant=true)", "bff()"]);
        assert_eq!(shown("bff:tau=-0.5"), ["bff(tau=-0.5)"]);
    }

    #[test]
    fn errors_point_at_their_place() {
        let error = |text: &str| parse(text).unwrap_err().to_string();
        assert!(error("bff,tau=0.9").ends_with("\n  bff,tau=0.9\n      ^"), "{}", error("bff,tau=0.9"));
        for bad in [
            "",
            "a,,b",
            "a+",
            "+a",
            "a:",
            "a:tau=",
            "a:=1",
            "tau=0.9",
            "a:t=0.6:0.9:0.1",
            "a:t=0.9:0.6:0",
            "a:t=0.9:0.6",
            "a:t=1:-0.99:1e-9",
            "a:t=1||2",
        ] {
            assert!(error(bad).contains("\n  "), "{bad}");
        }
    }

    #[test]
    fn misspelt_names_are_recognised() {
        assert_eq!(nearest("prefx", ["none", "prefix", "bff"]), Some("prefix"));
        assert_eq!(nearest("quantum", ["none", "prefix", "bff"]), None);
    }
}
