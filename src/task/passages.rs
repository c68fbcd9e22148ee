//! Plain text, for perplexity: windows one after the other, the end of each to be predicted from the rest.

use super::metric::Metric;
use super::{Draw, PromptSet, Request, lines};
use crate::error::{Error, Result};
use std::path::Path;

/// Tokens of a window where none are asked for.
pub const LENGTH: usize = 512;
/// Tokens at the end of a window whose likelihood is measured, where the draw says nothing.
pub const SCORED: usize = 64;
/// Longer words are cut too (scripts without spaces, encoded data).
const WORD: usize = 16;

/// The text's first windows of about `--length` tokens, cut between words.
pub fn windows(
    path: &Path,
    text: &str,
    draw: &Draw,
    (least, most): (usize, usize),
    tokens: &dyn Fn(&str) -> Result<usize>,
) -> Result<PromptSet> {
    let length = draw.length.unwrap_or(LENGTH);
    let scored = draw.continuation.unwrap_or(SCORED);
    if scored == 0 || length <= 2 * scored {
        let message = format!(
            "--length {length}: {scored} tokens are scored (--continuation), at least one and fewer than half of the window"
        );
        return Err(Error::argument(message));
    }
    let mut windows: Vec<Request> = Vec::new();
    let mut words: Vec<(&str, usize)> = Vec::new();
    let mut used = 0;
    for piece in words_with_space(text).flat_map(|word| pieces(word, tokens)) {
        let (piece, own) = piece?;
        if used + own > length {
            windows.push(window(path, &words, windows.len(), scored)?);
            words.clear();
            used = 0;
        }
        if windows.len() == most {
            break;
        }
        words.push((piece, own));
        used += own;
    }
    if windows.len() < least.max(1) {
        let problem = format!(
            "has text for {} windows of {length} tokens, fewer than --requests; ask for these or for a smaller --length",
            windows.len()
        );
        return Err(Error::file(path, problem));
    }
    Ok(lines::set(text, windows, "", None, Some(1)))
}

/// Words, each with the white space after it.
fn words_with_space(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let word = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let space = rest[word..].find(|c: char| !c.is_whitespace()).unwrap_or(rest.len() - word);
        let (first, later) = rest.split_at(word + space);
        rest = later;
        (!first.is_empty()).then_some(first)
    })
}

/// A word cut into pieces of at most [`WORD`] tokens, with their tokens, as they are asked for.
fn pieces<'a>(
    word: &'a str,
    tokens: &dyn Fn(&str) -> Result<usize>,
) -> impl Iterator<Item = Result<(&'a str, usize)>> {
    let mut left = vec![word];
    std::iter::from_fn(move || {
        while let Some(part) = left.pop() {
            // What is long enough in bytes is cut uncounted: tokenizers are slow on very long words. A space belongs to the word
            // behind it, as tokenizers have it.
            let counted = part.strip_suffix(' ').map_or(part.to_owned(), |word| format!(" {word}"));
            let own = match part.len() <= 64 * WORD {
                true => tokens(&counted).map(|n| n.max(1)),
                false => Ok(usize::MAX),
            };
            let middle = (part.len().div_ceil(2)..part.len()).find(|at| part.is_char_boundary(*at));
            match (own, middle) {
                (Ok(own), Some(middle)) if own > WORD => left.extend([&part[middle..], &part[..middle]]),
                (own, _) => return Some(own.map(|own| (part, own))),
            }
        }
        None
    })
}

/// A window's beginning as prompt, its end as reference. The white space between the two belongs to the reference.
fn window(path: &Path, words: &[(&str, usize)], n: usize, most: usize) -> Result<Request> {
    let mut scored = 0;
    let mut at = words.len();
    // One word at least, however long.
    while at > 1 && (scored == 0 || scored + words[at - 1].1 <= most) {
        at -= 1;
        scored += words[at].1;
    }
    let join = |part: &[(&str, usize)]| part.iter().map(|(word, _)| *word).collect::<String>();
    let (before, after) = (join(&words[..at]), join(&words[at..]));
    let prompt = before.trim_end();
    let reference = format!("{}{after}", &before[prompt.len()..]);
    if prompt.is_empty() || reference.trim().is_empty() {
        let problem =
            format!("window {} has white space for its prompt or for the end that is scored", n + 1);
        return Err(Error::file(path, problem));
    }
    Ok(Request {
        references: vec![reference],
        metric: Metric::Likelihood,
        ..Request::raw(format!("window-{}", n + 1), prompt.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_put_together_are_the_text() {
        let text: String =
            (0..1000).map(|i| format!("word{i}{}", if i % 9 == 0 { "\n\n" } else { " " })).collect();
        let draw = Draw { length: Some(200), ..Draw::plain("text:x", 3, 0, 0) };
        let one = |_: &str| Ok(1);
        let set = windows(Path::new("x"), &text, &draw, (3, 3), &one).unwrap();
        let joined: String =
            set.requests.iter().map(|r| format!("{}{}", r.prompt, r.references[0])).collect();
        assert!(text.starts_with(&joined));
        let scored: Vec<usize> =
            set.requests.iter().map(|r| r.references[0].split_whitespace().count()).collect();
        assert_eq!(scored, [SCORED; 3]);
        let refused = windows(Path::new("x"), &text, &draw, (9, 9), &one).unwrap_err();
        assert!(refused.to_string().contains("windows"), "{refused}");
    }

    /// A token a character: words longer than a window are cut, and no window is longer than asked for.
    #[test]
    fn text_without_spaces_is_cut() {
        let text = "\u{6587}\u{5b57}".repeat(400) + &" ".repeat(400) + &"x".repeat(800);
        let draw = Draw { length: Some(200), ..Draw::plain("text:x", 3, 0, 0) };
        let letters = |text: &str| Ok(text.chars().count());
        let set = windows(Path::new("x"), &text, &draw, (3, 3), &letters).unwrap();
        for request in &set.requests {
            let (prompt, scored) = (request.prompt.chars().count(), request.references[0].chars().count());
            assert!(
                prompt + scored <= 200 && (SCORED - WORD..=SCORED).contains(&scored),
                "{prompt} {scored}"
            );
        }
        let blank = windows(Path::new("x"), &text, &draw, (6, 6), &letters).unwrap_err();
        assert!(blank.to_string().contains("white space"), "{blank}");
    }
}
