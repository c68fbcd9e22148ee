//! SQuAD v1.1 answer scores (Rajpurkar et al. 2016): token F1 and exact match, the best over the references.

use std::collections::HashMap;

/// Lower case, without ASCII punctuation and English articles, split at white space.
fn tokens(text: &str) -> Vec<String> {
    let plain: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    plain.split_whitespace().filter(|w| !["a", "an", "the"].contains(w)).map(str::to_owned).collect()
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
        return if answer == reference { 1.0 } else { 0.0 };
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
}
