//! How an answer is scored: the published metric of each task, in 0..=1.

use super::score::{lcs, lcs_words, token_f1};
use serde::{Deserialize, Serialize};

/// A task's metric.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Token F1 of SQuAD, the best over the references.
    #[default]
    F1,
    /// Token F1 of the answer's first line (LongBench's few-shot tasks).
    F1FirstLine,
    /// ROUGE-L F of summaries, as the `rouge` package counts it.
    RougeL,
    /// ROUGE-L of the first line.
    RougeLFirstLine,
    /// 1 over the number of classes the first line names, if the right one is among them.
    Classification,
    /// Share of the numbers in the answer that are the right paragraph's.
    Retrieval,
    /// Share of the numbers in the answer that are the right count.
    Count,
    /// Similarity of the first line of code: 2 LCS / total length, in hundredths.
    CodeSimilarity,
    /// Share of the references that the answer contains, without regard to case (RULER).
    ContainsAll,
    /// Whether the answer contains any reference (RULER's question answering).
    ContainsAny,
    /// Nothing is answered: the reference is text whose likelihood is measured.
    Likelihood,
}

impl Metric {
    /// As tables and figures call it.
    pub fn name(self) -> &'static str {
        match self {
            Metric::F1 | Metric::F1FirstLine => "F1",
            Metric::RougeL | Metric::RougeLFirstLine => "ROUGE-L",
            Metric::Classification => "classification",
            Metric::Retrieval => "retrieval",
            Metric::Count => "count",
            Metric::CodeSimilarity => "code similarity",
            Metric::ContainsAll | Metric::ContainsAny => "contains",
            Metric::Likelihood => "likelihood",
        }
    }

    /// The score of an answer, as it was decoded (code is not trimmed), against its best reference; `None` where there is
    /// nothing to score. `classes`: all there
    /// are, for [`Metric::Classification`].
    pub fn score(self, answer: &str, references: &[String], classes: &[String]) -> Option<f64> {
        if references.is_empty() || self == Metric::Likelihood {
            return None;
        }
        let best = |f: &dyn Fn(&str) -> f64| references.iter().map(|r| f(r)).fold(0.0, f64::max);
        let line = answer.trim_start_matches('\n').split('\n').next().unwrap_or_default();
        let contains = |reference: &str| answer.to_lowercase().contains(&reference.to_lowercase());
        Some(match self {
            Metric::F1 => token_f1(answer, references),
            Metric::F1FirstLine => token_f1(line, references),
            Metric::RougeL => best(&|r| rouge_l(answer, r)),
            Metric::RougeLFirstLine => best(&|r| rouge_l(line, r)),
            Metric::Classification => best(&|r| classification(line, r, classes)),
            Metric::Retrieval => best(&|r| share_of_numbers(answer, &number_after(r, "Paragraph "))),
            Metric::Count => best(&|r| share_of_numbers(answer, r.trim())),
            Metric::CodeSimilarity => best(&|r| code_similarity(answer, r)),
            Metric::ContainsAll => {
                references.iter().filter(|r| contains(r)).count() as f64 / references.len() as f64
            }
            Metric::ContainsAny => best(&|r| f64::from(contains(r))),
            Metric::Likelihood => return None,
        })
    }
}

/// Runs of digits in a text.
fn numbers(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty()).collect()
}

fn share_of_numbers(answer: &str, right: &str) -> f64 {
    let numbers = numbers(answer);
    let hits = numbers.iter().filter(|n| **n == right).count();
    if numbers.is_empty() { 0.0 } else { hits as f64 / numbers.len() as f64 }
}

/// The number that follows a word, else the first there is.
fn number_after(text: &str, word: &str) -> String {
    let rest = text.split_once(word).map_or(text, |(_, rest)| rest);
    numbers(rest).first().map(|n| (*n).to_owned()).unwrap_or_default()
}

/// LongBench's rule: a class that is part of the right one's name says nothing against it. Its script removes these from
/// the list it walks, and so passes over the class after each; we do as it does.
fn classification(line: &str, right: &str, classes: &[String]) -> f64 {
    let mut named: Vec<&String> = classes.iter().filter(|c| line.contains(c.as_str())).collect();
    let mut at = 0;
    while at < named.len() {
        if named[at] != right && right.contains(named[at].as_str()) {
            named.remove(at);
        }
        at += 1;
    }
    if named.iter().any(|c| *c == right) { 1.0 / named.len() as f64 } else { 0.0 }
}

/// The first line that is code (no fence, no comment) against the reference.
fn code_similarity(answer: &str, reference: &str) -> f64 {
    let code = |l: &&str| !["`", "#", "//"].iter().any(|mark| l.contains(mark));
    let line = answer.trim_start_matches('\n').split('\n').find(code).unwrap_or_default();
    let (a, b): (Vec<char>, Vec<char>) = (line.chars().collect(), reference.chars().collect());
    if a.is_empty() || b.is_empty() {
        return 0.0;
    }
    // In this order: ties are decided by how the package rounds on its way.
    let all = a.len() + b.len();
    let distance = (all - 2 * lcs(&a, &b)) as f64 / all as f64;
    ((1.0 - distance) * 100.0).round_ties_even() / 100.0
}

/// ROUGE-L F (Lin 2004) as the Python package `rouge` 1.0 counts it, which LongBench's scores are from: sentences end at
/// full stops, of every pair of sentences the words of a longest common subsequence are taken, and distinct words are
/// counted.
fn rouge_l(answer: &str, reference: &str) -> f64 {
    let (answer, reference) = (sentences(answer), sentences(reference));
    let distinct = |s: &[Vec<&str>]| s.iter().flatten().collect::<std::collections::HashSet<_>>().len();
    let mut union = std::collections::HashSet::new();
    for theirs in &reference {
        for ours in &answer {
            union.extend(lcs_words(theirs, ours));
        }
    }
    if union.is_empty() {
        return 0.0;
    }
    let recall = union.len() as f64 / distinct(&reference) as f64;
    let precision = union.len() as f64 / distinct(&answer) as f64;
    2.0 * precision * recall / (precision + recall)
}

/// A sentence of white space alone is one empty word, as in the package.
fn sentences(text: &str) -> Vec<Vec<&str>> {
    fn words(sentence: &str) -> Vec<&str> {
        if sentence.trim().is_empty() { vec![""] } else { sentence.split_whitespace().collect() }
    }
    text.split('.').filter(|s| !s.is_empty()).map(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(metric: Metric, answer: &str, references: &[&str], classes: &[&str]) -> f64 {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        metric.score(answer, &own(references), &own(classes)).unwrap()
    }

    #[test]
    fn metrics_of_known_answers() {
        use Metric::*;
        assert_eq!(score(F1FirstLine, "\nPort Vale\nPassage: x", &["port vale"], &[]), 1.0);
        assert_eq!(score(Retrieval, "Paragraph 7, or 12", &["Paragraph 7"], &[]), 0.5);
        assert_eq!(score(Retrieval, "none", &["Paragraph 7"], &[]), 0.0);
        assert_eq!(score(Count, "There are 12.", &["12"], &[]), 1.0);
        let classes = ["Date", "Date of birth", "City"];
        assert_eq!(score(Classification, "Date of birth\nCity", &["Date of birth"], &classes), 1.0);
        assert_eq!(score(Classification, "Date or City", &["Date"], &classes), 0.5);
        assert_eq!(score(Classification, "Country", &["Date"], &classes), 0.0);
        assert_eq!(score(Classification, "Date", &["Date"], &[]), 0.0);
        // Of two classes that are parts of the right one's name the script removes only the first.
        let parts = ["Date", "birth", "Date of birth"];
        assert_eq!(score(Classification, "Date of birth", &["Date of birth"], &parts), 0.5);
        assert_eq!(score(ContainsAll, "codes 12 and AB", &["12", "ab", "99"], &[]), 2.0 / 3.0);
        assert_eq!(score(ContainsAny, "it is AB", &["12", "ab"], &[]), 1.0);
        assert_eq!(Likelihood.score("x", &["y".to_owned()], &[]), None);
        assert_eq!(F1.score("x", &[], &[]), None);
    }

    /// Of `fuzzywuzzy.fuzz.ratio` and of `rouge.Rouge().get_scores` (packages thefuzz 0.22.1 and rouge 1.0.1).
    #[test]
    fn metrics_equal_the_published_scripts() {
        let code = |a: &str, b: &str| score(Metric::CodeSimilarity, a, &[b], &[]);
        assert_eq!(code("# a comment\nreturn x + 1\nz", "return x + 10"), 0.96);
        assert_eq!(code("for i in range(3):", "while True:"), 0.34);
        assert_eq!(code("\n        return x\n    def", "        return x"), 1.0);
        assert_eq!(code("return x", "        return x"), 0.67);
        assert_eq!(code("axxxxxxx", "ayyyyyyy"), 0.12);
        assert_eq!(code(&"a".repeat(23), &format!("{}{}", "a".repeat(23), "b".repeat(34))), 0.57);
        let rouge = |a: &str, b: &str| score(Metric::RougeL, a, &[b], &[]);
        let cases = [
            ("the cat sat on the mat", "a cat sat on a mat", ROUGE[0]),
            (
                "The board met. It chose a new head of the office.",
                "A new head was chosen. The board met in May.",
                ROUGE[1],
            ),
            ("nothing alike", "quite different words", ROUGE[2]),
            ("one two three four five. six seven", "six seven. one three five two", ROUGE[3]),
            ("One two. Three four.\n", "One two. Three five.\n", ROUGE[4]),
            ("Costs rose. . .", "The costs rose.", ROUGE[5]),
            (
                "Amanda baked cookies and brings some tomorrow. ",
                "Amanda baked cookies and brings some tomorrow.",
                ROUGE[6],
            ),
        ];
        for (answer, reference, expected) in cases {
            // The package adds 1e-8 to a denominator.
            assert!(
                (rouge(answer, reference) - expected).abs() < 1e-7,
                "{answer}: {}",
                rouge(answer, reference)
            );
        }
    }

    const ROUGE: [f64; 7] = [0.8, 0.476_190_47, 0.0, 0.769_230_77, 0.8, 0.333_333_33, 0.933_333_33];
}
