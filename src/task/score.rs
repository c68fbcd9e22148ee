//! SQuAD v1.1 answer scores (Rajpurkar et al. 2016): token F1 and exact match, the best over the references.

use regex::Regex;
use std::collections::HashMap;
use std::sync::LazyLock;

/// Runs of what is a word to Python's `re`: letters and numbers of any script, and the underscore, but no combining marks.
static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").ok());

/// Lower case, without ASCII punctuation; then articles between word boundaries become a space; split at white space. The
/// SQuAD v1.1 script's `normalize_answer`, with Python's notions of word and white space.
fn tokens(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let articles = |found: &regex::Captures| match &found[0] {
        "a" | "an" | "the" => " ".to_owned(),
        word => word.to_owned(),
    };
    let plain = match &*WORDS {
        Some(words) => words.replace_all(&plain, articles).into_owned(),
        None => plain,
    };
    // Python splits at the ASCII separators too.
    let space = |c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c);
    plain.split(space).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

/// Token F1 in 0..=1 of an answer against its best reference.
pub fn token_f1(answer: &str, references: &[String]) -> f64 {
    let answer = tokens(answer);
    references.iter().map(|r| f1(&answer, &tokens(r))).fold(0.0, f64::max)
}

/// 1 if the answer equals a reference after normalisation, else 0.
pub fn exact_match(answer: &str, references: &[String]) -> f64 {
    let answer = tokens(answer);
    if references.iter().any(|r| tokens(r) == answer) { 1.0 } else { 0.0 }
}

fn f1(answer: &[String], reference: &[String]) -> f64 {
    if answer.is_empty() || reference.is_empty() {
        // As the script: nothing in common.
        return 0.0;
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for word in reference {
        *left.entry(word).or_default() += 1;
    }
    let mut common = 0;
    for word in answer {
        if let Some(n) = left.get_mut(word.as_str()).filter(|n| **n > 0) {
            *n -= 1;
            common += 1;
        }
    }
    2.0 * f64::from(common) / (answer.len() + reference.len()) as f64
}

/// Lengths of longest common subsequences of all pairs of beginnings: `[a + 1, b + 1]`.
fn lcs_table<T: PartialEq>(a: &[T], b: &[T]) -> Vec<Vec<usize>> {
    let mut table = vec![vec![0; b.len() + 1]; a.len() + 1];
    for (i, x) in a.iter().enumerate() {
        for (j, y) in b.iter().enumerate() {
            let longest = table[i][j + 1].max(table[i + 1][j]);
            table[i + 1][j + 1] = if x == y { table[i][j] + 1 } else { longest };
        }
    }
    table
}

/// Length of a longest common subsequence.
pub fn lcs<T: PartialEq>(a: &[T], b: &[T]) -> usize {
    lcs_table(a, b)[a.len()][b.len()]
}

/// The members of a longest common subsequence; where several are, one that drops the end of `a` last.
pub fn lcs_words<'a>(a: &[&'a str], b: &[&str]) -> Vec<&'a str> {
    let table = lcs_table(a, b);
    let (mut i, mut j) = (a.len(), b.len());
    let mut words = Vec::new();
    while i > 0 && j > 0 {
        if a[i - 1] == b[j - 1] {
            words.push(a[i - 1]);
            (i, j) = (i - 1, j - 1);
        } else if table[i - 1][j] > table[i][j - 1] {
            i -= 1;
        } else {
            j -= 1;
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refs(r: &[&str]) -> Vec<String> {
        r.iter().map(|s| s.to_string()).collect()
    }

    #[test]
    fn scores_of_known_answers() {
        assert_eq!(token_f1("The Port Vale.", &refs(&["port vale"])), 1.0);
        assert_eq!(exact_match("The Port Vale.", &refs(&["x", "port vale"])), 1.0);
        assert_eq!(token_f1("Port of Vale", &refs(&["Port Vale"])), 0.8);
        assert_eq!(exact_match("Port of Vale", &refs(&["Port Vale"])), 0.0);
        assert_eq!(token_f1("cat cat", &refs(&["cat"])), 2.0 / 3.0);
        assert_eq!(token_f1("dog", &refs(&["cat"])), 0.0);
        assert_eq!(token_f1("", &refs(&["cat"])), 0.0);
    }

    /// tests/reference/squad.py made these with Python's notions of word, space and lower case.
    #[test]
    fn scores_are_pythons_on_any_text() {
        let rows = include_str!("../../tests/fixtures/squad.json");
        let rows: Vec<(String, Vec<String>, f64, f64)> = serde_json::from_str(rows).unwrap();
        for (answer, references, f1, exact) in rows {
            assert!((token_f1(&answer, &references) - f1).abs() < 1e-12, "{answer:?} {references:?} {f1}");
            assert_eq!(exact_match(&answer, &references), exact, "{answer:?} {references:?}");
        }
    }

    /// The metric's rules one after another, by regular expressions alone.
    fn plainly(text: &str) -> Vec<String> {
        let step = |pattern: &str, text: &str, to: &str| {
            Regex::new(pattern).unwrap().replace_all(text, to).into_owned()
        };
        let text = step(r"[!-/:-@\[-`{-~]", &text.to_lowercase(), "");
        // An article twice in a row shares the space between, which a match cannot.
        let edge = r"(?P<before>^|[^\p{L}\p{N}_])(?:a|an|the)(?P<after>$|[^\p{L}\p{N}_])";
        let text = step(edge, &step(edge, &text, "$before $after"), "$before $after");
        let text = step(r"[\s\x1c-\x1f]+", &text, " ");
        text.split(' ').filter(|w| !w.is_empty()).map(str::to_owned).collect()
    }

    proptest::proptest! {
        #[test]
        fn tokens_follow_the_rules(
            text in "((a|an|the|The|[a-z]{1,3}|\\PC)( |\t|\u{a0}|[.,'_-])?){0,8}"
        ) {
            proptest::prop_assert_eq!(tokens(&text), plainly(&text));
        }
    }
}
